"""What is told as gone and what is under way, in whatever order both are heard of."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core import limits
from proxy.core.kv_underway import Underway
from proxy.core.prefix import PrefixChain


def chain(*hashes: int) -> PrefixChain:
    return PrefixChain(0, hashes, [100 * (at + 1) for at in range(len(hashes))], 1000)


def test_what_a_request_is_made_of_is_not_told_while_it_runs() -> None:
    underway = Underway()
    assert not underway.dispatched(1, chain(11, 12), 1.0, 1.0)
    assert not underway.dispatched(2, chain(11, 13), 1.0, 1.0)
    assert underway.evicted([11, 12, 14], 1.1) == [14]
    underway.released(1, 1.2)
    assert underway.evicted([12, 11, 13], 1.2) == [12]
    underway.released(2, 1.3)
    underway.released(2, 1.3)
    assert underway.evicted([11, 13], 1.3) == [11, 13]
    assert len(underway) == 0


@pytest.mark.parametrize("clearing", [True, False])
def test_one_heard_of_too_late_is_told_as_held(*, clearing: bool) -> None:
    underway = Underway()
    gone_s = 10.0
    if clearing:
        assert underway.cleared(gone_s) == []
    else:
        assert underway.evicted([11], gone_s) == [11]
    assert underway.dispatched(1, chain(11, 12), gone_s, gone_s + 0.01)
    assert underway.dispatched(2, chain(12), gone_s, gone_s + 0.01) == clearing
    assert not underway.dispatched(3, chain(11), gone_s + 0.1, gone_s + 0.1)


def test_after_a_clearing_those_under_way_are_held() -> None:
    underway = Underway()
    chains = [chain(11), chain(12), chain(13)]
    for key, one in enumerate(chains):
        underway.dispatched(key, one, 1.0, 1.0)
    underway.released(0, 1.4)
    underway.released(1, 1.9)  # whose events may have come before this one
    assert underway.cleared(2.0) == chains[1:]


def test_its_tables_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "KV_OPEN_MAX", 3)
    monkeypatch.setattr(limits, "KV_TOLD_MAX", 2)
    underway = Underway()
    for key in range(5):
        underway.dispatched(key, chain(key), 1.0, 1.0)
    assert len(underway) == 3
    assert underway.evicted([0, 1, 2, 7, 8, 9], 1.0) == [0, 1, 7, 8, 9]
    assert not underway.dispatched(9, chain(7), 1.0, 1.0)
    assert underway.dispatched(9, chain(8), 1.0, 1.0)


class Play:
    """A worker and the engine's follower, with what each hears of the other some time later."""

    def __init__(self, back_s: float) -> None:
        self.underway = Underway()
        self.believed: set[int] = set()
        self.running: dict[int, PrefixChain] = {}
        self.now_s = 1.0
        self._back_s = back_s
        self._last_s = 0.0
        self._order = itertools.count()
        self._due: list[tuple[float, int, Callable[[float], object]]] = []

    def _later(self, at_s: float, act: Callable[[float], object]) -> None:
        heapq.heappush(self._due, (at_s, next(self._order), act))

    def _tell(self, act: Callable[[], object], now_s: float) -> None:
        self._later(now_s + self._back_s, lambda _: act())

    def until(self, now_s: float) -> None:
        while self._due and self._due[0][0] <= now_s:
            at_s, _, act = heapq.heappop(self._due)
            act(at_s)
        self.now_s = now_s

    def _arrival_s(self, way_s: float) -> float:
        self._last_s = max(self._last_s, self.now_s + way_s)  # one worker's notes come in order
        return self._last_s

    def dispatch(self, key: int, way_s: float) -> None:
        if key in self.running:
            return
        sent, sent_s = chain(key, key + 1), self.now_s
        self.running[key] = sent
        self.believed.update(sent.hashes)

        def arrive(now_s: float) -> None:
            if self.underway.dispatched(key, sent, sent_s, now_s):
                self._tell(lambda: self.believed.update(sent.hashes), now_s)

        self._later(self._arrival_s(way_s), arrive)

    def release(self, key: int, way_s: float) -> None:
        if self.running.pop(key, None) is not None:
            self._later(self._arrival_s(way_s), lambda now_s: self.underway.released(key, now_s))

    def evict(self, key: int, _: float) -> None:
        told = self.underway.evicted([key], self.now_s)
        self._tell(lambda: self.believed.difference_update(told), self.now_s)

    def clear(self, *_: object) -> None:
        self._tell(self.believed.clear, self.now_s)
        for held in self.underway.cleared(self.now_s):
            self._tell(lambda held=held: self.believed.update(held.hashes), self.now_s)  # type: ignore[misc]

    def under_way(self) -> set[int]:
        return {name for sent in self.running.values() for name in sent.hashes}


_ACTS = (Play.dispatch, Play.dispatch, Play.release, Play.evict, Play.clear)
_STEPS = st.lists(
    st.tuples(
        st.sampled_from(_ACTS),
        st.integers(0, 7),
        st.floats(0.0, 0.02),  # since the one before
        st.floats(0.0, limits.KV_EARLY_S / 2),  # a note's way to the follower
    ),
    max_size=40,
)


@given(_STEPS, st.floats(0.0, limits.KV_EARLY_S / 2))
def test_a_worker_believes_in_all_that_is_under_way(
    steps: list[tuple[Callable[[Play, int, float], None], int, float, float]], back_s: float
) -> None:
    """And, of what is told as gone when nothing is on its way, in nothing else."""
    play = Play(back_s)
    for act, key, pause_s, way_s in steps:
        play.until(play.now_s + pause_s)
        act(play, key, way_s)
    play.until(play.now_s + 1.0)
    assert play.under_way() <= play.believed
    for name in range(9):
        play.evict(name, 0.0)
    play.until(play.now_s + 1.0)
    assert play.believed == play.under_way()
