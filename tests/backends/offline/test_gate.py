"""The gate of spare capacity: nobody is to notice, and nothing goes in where others need it all."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.offline import gate as gates
from backends.offline.gate import Gate, ReplicaSeen, Seen, Verdict, inputs_max, is_burst
from backends.offline.steps import StepTimes, tells
from proxy.contract import LoadSample

LOOK_S = 0.5


class World:
    """One model on replicas whose steps take `step_s(batch)`; it counts what a manager would."""

    def __init__(self, replicas: int = 1, **limits: int) -> None:
        self.gate = Gate(64)
        self.now_s = 1000.0
        self.count = replicas
        self.limits = limits
        self.lines = 0
        self.others = 0
        self.arrivals = 0
        self.tokens = 0.0
        self.fields: dict[str, Any] = {}
        self.load: dict[str, Any] = {}

    def step_s(self, batch: float) -> float:
        return 0.005 if batch <= 16 else 0.005 * batch / 16

    def look(self, **fields: Any) -> Verdict:
        self.now_s += LOOK_S
        batch = (self.lines + self.others) / self.count
        if batch:
            self.tokens += batch * LOOK_S / self.step_s(batch)
        load = LoadSample(
            running=math.ceil(batch),
            generation_tokens_total=int(self.tokens),
            **{"at_s": self.now_s, **self.load},
        )
        seen = Seen(
            at_s=self.now_s,
            replicas=tuple(
                ReplicaSeen(replica_id=f"r{n}", load=load, **self.limits) for n in range(self.count)
            ),
            others_in_flight=self.others,
            others_arrivals_total=self.arrivals,
            lines=self.lines,
            **{**self.fields, **fields},
        )
        return self.gate.decide(seen)

    def run(self, looks: int) -> Verdict:
        """Fill whatever is allowed, look after look."""
        verdict = Verdict(lines=0, keep=0)
        for _ in range(looks):
            verdict = self.look()
            self.lines = max(verdict.lines, min(self.lines, verdict.keep))
        return verdict


def test_where_nobody_else_is_lines_grow_to_what_a_replica_may_have_within_seconds() -> None:
    world = World(replicas=2)
    assert world.look().lines == 2, "a slow start"
    assert world.run(10).lines == 128
    assert world.look().prompt_tokens_per_s == math.inf


def test_where_nobody_else_came_for_a_while_it_opens_at_once_without_new_readings() -> None:
    world = World(replicas=2)
    world.arrivals = 1
    world.run(1)
    world.lines = 0  # no work yet
    verdict = Verdict(lines=0, keep=0)
    for _ in range(int(gates.ALONE_S / LOOK_S)):
        assert verdict.lines <= 2, "somebody was there a moment ago"
        verdict = world.look()
    assert verdict.lines == 2 * gates.ALONE_LINES
    world.load = {"at_s": world.now_s}
    for expected in (32, 64, 128):
        world.lines = verdict.lines
        verdict = world.look()
        assert verdict.lines == expected
    world.arrivals += 1  # somebody comes, and it is as careful as ever
    world.look(preempted=1)
    world.lines = 32
    assert world.run(6).lines == 32, "and without new readings it does not grow"


def test_alone_with_full_caches_it_stays_below_what_filled_them() -> None:
    world = World(replicas=1)
    world.run(int(gates.ALONE_S / LOOK_S) + 4)
    assert world.lines == 64
    world.load = {"kv_used_ratio": 0.95}
    assert world.look().lines == 32
    world.load, world.lines = {}, 32
    assert world.look().lines <= 33
    assert world.look().lines <= 34


def test_beside_others_steps_stay_nearly_as_short_as_theirs_alone() -> None:
    world = World()
    world.others = 4
    for _ in range(4):
        world.look()
    verdict = world.run(60)
    assert verdict.reason == "slower steps"
    assert world.step_s(world.lines + 4) <= 0.005 * 2, "one class beyond what is fast was tried"
    assert 8 <= world.lines <= 27
    assert verdict.prompt_tokens_at_once == pytest.approx(80.0, rel=0.1), "two steps at 8000 a s"
    assert verdict.prompt_tokens_per_s == pytest.approx(8000.0 * 2 * gates.SLOW_SHARE_MOST)


@pytest.mark.parametrize(
    ("limits", "others", "most"),
    [
        ({"target_inputs": 8}, 0, 8),
        ({"target_inputs": 8}, 5, 3),
        ({"target_inputs": 8}, 9, 0),
        ({"target_inputs": 8, "max_inputs": 80}, 0, 8),
        ({"max_inputs": 10}, 0, 8),
        ({"max_inputs": 10}, 6, 2),
    ],
)
def test_no_pool_grows_or_is_full_because_of_lines(
    limits: dict[str, int], others: int, most: int
) -> None:
    world = World(**limits)
    world.others = others
    assert world.run(20).lines == most


def test_an_engine_that_says_how_many_it_computes_gets_no_more() -> None:
    load = LoadSample(at_s=0.0, running_max=6)
    assert inputs_max(ReplicaSeen(replica_id="r", load=load)) == 6
    assert inputs_max(ReplicaSeen(replica_id="r")) == math.inf


def test_a_burst_empties_it_at_once_and_it_starts_slowly_afterwards() -> None:
    world = World()
    for _ in range(60):
        world.arrivals += 1
        world.run(1)
    assert world.lines == 64
    world.arrivals += 20
    verdict = world.look()
    assert (verdict.lines, verdict.keep, verdict.reason) == (0, 0, "burst")
    world.lines = 0
    assert world.run(int(gates.BURST_HOLD_S / LOOK_S)).lines == 0
    later = [world.run(1).lines for _ in range(12)]
    first = next(lines for lines in later if lines)
    assert first <= 2
    assert later[-1] > 8


def test_chance_is_no_burst_and_nothing_is_judged_before_it_is_known_what_is_usual() -> None:
    steady = deque((float(s), 3 * s) for s in range(40))
    assert not is_burst(steady)
    assert not is_burst([*steady, (40.0, 3 * 40 + 4)])
    assert is_burst([*steady, (40.0, 3 * 40 + 20)])
    assert not is_burst([(0.0, 0), (1.0, 500)])


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"panicking": True}, "burst"),
        ({"replicas": ()}, "nothing awake"),
    ],
)
def test_what_empties_it(fields: dict[str, Any], reason: str) -> None:
    world = World()
    world.run(10)
    seen = Seen(at_s=world.now_s + LOOK_S, lines=64, **fields)
    if "replicas" not in fields:
        seen = msgspec.structs.replace(seen, replicas=(ReplicaSeen(replica_id="r0"),))
    assert world.gate.decide(seen) == Verdict(lines=0, keep=0, reason=reason)


def test_those_who_wait_press_it_once_and_empty_it_the_second_time() -> None:
    world = World()
    world.others = 2
    world.run(20)
    before = world.lines
    first = world.look(others_queued=1)
    assert first.reason == "others wait"
    assert 0 < first.lines <= before / 2
    assert first.keep == before
    second = world.look(others_queued=1)
    assert (second.lines, second.keep) == (0, 0)


def test_a_preempted_line_halves_it_and_nothing_goes_in_for_a_while() -> None:
    world = World()
    world.others = 1
    world.run(20)
    before = world.lines
    verdict = world.look(preempted=1)
    assert (verdict.lines, verdict.keep, verdict.reason) == (0, before, "preempted")
    world.lines = 0
    world.run(3)
    assert 0 < world.lines <= before / 2 + 2


def test_a_line_that_found_no_room_shows_how_many_have_it() -> None:
    world = World()
    world.run(5)
    assert world.look().lines > 20
    world.lines = 20
    assert world.look(turned_back=3).lines == 20


def test_a_full_cache_takes_out_half_beside_others_and_near_it_nothing_grows() -> None:
    world = World()
    world.others = 1
    world.load = {"kv_used_ratio": 0.82}
    world.run(4)
    assert world.lines == 1, "near the bound of 0.9"
    world.load = {"kv_used_ratio": 0.1}
    world.run(10)
    before = world.lines
    world.load = {"kv_used_ratio": 0.98}
    assert world.look().keep == before // 2
    world.load = {"kv_used_ratio": 0.5}
    assert world.look(kv_target=0.5).reason == "kv cache", "or the pool would grow"


def test_without_news_nothing_new_goes_in_and_what_is_there_stays() -> None:
    world = World()
    world.run(10)
    verdict = world.look(news_age_s=gates.NEWS_AGE_S_MAX + 1)
    assert (verdict.lines, verdict.keep, verdict.reason) == (0, 64, "no news")


def test_step_times_are_read_from_counters_and_only_where_these_tell() -> None:
    def load(at_s: float, running: int, tokens: int) -> LoadSample:
        return LoadSample(at_s=at_s, running=running, generation_tokens_total=tokens)

    assert tells(load(0, 8, 0), load(1, 8, 1600))
    assert not tells(load(0, 8, 0), load(0.1, 8, 160)), "too short"
    assert not tells(load(0, 8, 0), load(1, 40, 1600)), "who knows how many there were"
    assert not tells(load(0, 8, 900), load(1, 8, 0)), "it has been restarted"
    assert not tells(load(0, 0, 0), load(1, 0, 5))
    times, tokens, now_s = StepTimes(), 0, 0.0
    assert times.batch_max(4, 0.1) == 15, "nothing is known: twice as many are tried"
    for size, step_s in ((4, 0.005), (8, 0.0052), (16, 0.008)):
        now_s += 20.0  # no reading tells of that
        for _ in range(9):
            times.note("r", load(now_s, size, tokens))
            now_s, tokens = now_s + 1.0, tokens + round(size / step_s)
    assert times.step_s(4) == pytest.approx(0.005, rel=0.01)
    assert times.batch_max(4, 0.1) == 15
    assert times.batch_max(4, 0.01) == 7
    assert times.batch_max(7, 0.01) == 8, "one more, whatever was measured"
    times.note("r", load(now_s + 700.0, 4, tokens))
    assert times.step_s(4) == 0.0, "it is too long ago"


_SEEN = st.builds(
    dict,
    others_in_flight=st.integers(0, 200),
    others_queued=st.integers(0, 3),
    others_arrivals_total=st.integers(0, 10_000),
    panicking=st.booleans(),
    kv_target=st.floats(0.1, 1.0),
    turned_back=st.integers(0, 9),
    preempted=st.integers(0, 3),
    news_age_s=st.floats(0, 9),
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(_SEEN, st.integers(0, 3), st.floats(0, 1), st.integers(0, 300)), max_size=25)
)
def test_whatever_is_seen(history: list[tuple[dict[str, Any], int, float, int]]) -> None:
    gate, lines, now_s = Gate(64), 0, 0.0
    for fields, count, kv_used, running in history:
        now_s += LOOK_S
        load = LoadSample(at_s=now_s, kv_used_ratio=kv_used, running=running)
        replicas = tuple(
            ReplicaSeen(replica_id=str(n), load=load, target_inputs=40) for n in range(count)
        )
        seen = Seen(at_s=now_s, replicas=replicas, lines=lines, **fields)
        verdict = gate.decide(seen)
        assert 0 <= verdict.keep <= lines
        assert verdict.lines <= max(0, 40 * count - fields["others_in_flight"])
        if not count or fields["panicking"]:
            assert verdict.keep == verdict.lines == 0
        if fields["news_age_s"] > gates.NEWS_AGE_S_MAX:
            assert verdict.lines == 0
        assert verdict.prompt_tokens_per_s > 0
        lines = max(verdict.lines, verdict.keep)
