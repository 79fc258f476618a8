"""Who gives way to online work: as few as will do, the youngest, and nobody in vain."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core import limits
from proxy.core.lease import Lease
from proxy.core.opening import is_open
from proxy.core.picture import Picture
from proxy.core.policy import Decision, Request
from proxy.core.preempting import Clearing, who_gives_way
from tests.core.builders import chain, pool, replica

_RUNWAY_TOKENS = int(limits.RUNWAY_S * limits.PREFILL_TOKENS_PER_S_DEFAULT)


class _World:
    """Replicas, and leases on them: those of offline work may be ended."""

    def __init__(self, names: str = "a", max_inputs: int = 0) -> None:
        self.pool = pool([replica(name, max_inputs=max_inputs) for name in names])
        self.picture = Picture()
        self.picture.know(self.pool.replicas.values())
        self.offline: list[Lease] = []
        self.ids = 0

    def busy(self, name: str, tokens: int, *, offline: bool = True, at_s: float = 0.0) -> Lease:
        self.ids += 1
        slot = self.picture.slots[name]
        lease = Lease(slot, name, prefill_tokens=tokens, prompt_tokens=tokens, lease_id=self.ids)
        self.picture.loads.acquire(lease, at_s)
        if offline:
            self.offline.append(lease)
        return lease

    def leaving(self, tokens: int = 10, now_s: float = 0.0, names: str = "") -> list[int]:
        slots = [self.picture.slots[name] for name in names or self.pool.replicas]
        request = self.request(tokens)
        found = who_gives_way(request, slots, self.offline, self.picture, now_s)
        return [lease.lease_id for lease in found]

    def request(self, tokens: int = 10) -> Request:
        return Request(chain(99, tokens * limits.BYTES_PER_TOKEN), has_session=False)


def test_the_youngest_leaves_a_full_replica() -> None:
    world = _World(max_inputs=3)
    for _ in range(3):
        world.busy("a", 10)
    assert world.leaving() == [3]


def test_online_and_semi_online_work_stays() -> None:
    world = _World(max_inputs=2)
    world.busy("a", 10)
    world.busy("a", 10, offline=False)
    assert world.leaving() == [1]
    world.offline.clear()
    assert world.leaving() == []


def test_as_many_leave_a_line_as_make_it_short() -> None:
    world = _World()
    for _ in range(4):
        world.busy("a", _RUNWAY_TOKENS // 2)
    assert world.leaving() == [4, 3]


def test_nobody_leaves_in_vain() -> None:
    world = _World()
    world.busy("a", 5 * _RUNWAY_TOKENS, offline=False)
    world.busy("a", _RUNWAY_TOKENS)
    assert world.leaving() == []


def test_of_two_replicas_that_where_fewest_leave() -> None:
    world = _World("ab")
    for _ in range(4):
        world.busy("a", _RUNWAY_TOKENS // 2)
    world.busy("b", 2 * _RUNWAY_TOKENS)
    assert world.leaving() == [5]
    assert world.leaving(names="a") == [4, 3]


def test_of_equals_the_youngest() -> None:
    world = _World("ab", max_inputs=1)
    world.busy("b", 10, at_s=1.0)
    world.busy("a", 10, at_s=2.0)
    assert world.leaving(now_s=2.0) == [2]


def test_one_that_is_past_its_prefill_frees_its_place_and_no_work() -> None:
    world = _World(max_inputs=2)
    lease = world.busy("a", 10)
    world.busy("a", 3 * _RUNWAY_TOKENS, offline=False)
    world.picture.prefill_ended(lease, 0.0)
    assert world.leaving() == []  # the line stays as long
    world = _World(max_inputs=2)
    for _ in range(2):
        world.picture.prefill_ended(world.busy("a", 10), 0.0)
    assert world.leaving() == [2]


@pytest.mark.parametrize("slots", [2, 8])
def test_a_place_among_those_that_run_is_freed(slots: int) -> None:
    world = _World()
    loads = world.picture.loads
    loads.limit(0, 1000, running_max=slots)
    loads.request_s[0] = 10.0
    for _ in range(slots):
        world.picture.prefill_ended(world.busy("a", 10), 0.0)
    assert loads.extra_s[0] > limits.RUNWAY_S
    assert world.leaving() == [slots]


def test_no_more_leave_than_one_request_may_have_ended() -> None:
    world = _World()
    for _ in range(limits.PREEMPTED_TOGETHER_MAX + 2):
        world.busy("a", _RUNWAY_TOKENS)
    assert world.leaving() == []


@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.integers(1, 2 * _RUNWAY_TOKENS), st.booleans()),
        max_size=12,
    ),
    st.integers(0, 4),
    st.integers(1, 5_000),
)
def test_where_somebody_leaves_the_replica_is_open_after(
    busy: list[tuple[str, int, bool]], max_inputs: int, tokens: int
) -> None:
    world = _World("ab", max_inputs)
    for name, prefill_tokens, offline in busy:
        world.busy(name, prefill_tokens, offline=offline)
    leaving = world.leaving(tokens)
    by_id = {lease.lease_id: lease for lease in world.offline}
    request = world.request(tokens)

    def opened() -> bool:
        return any(
            is_open(Decision(r, world.picture.slots[name], "new"), request, world.picture, 0.0)
            for name, r in world.pool.replicas.items()
            if not leaving or name == by_id[leaving[0]].replica_name
        )

    for lease_id in leaving:
        assert not opened()  # it was needed
        world.picture.release(by_id[lease_id], 0.0, served=False)
    if leaving:
        assert opened()


def test_a_replica_is_kept_clear_for_a_moment_that_each_who_asks_begins_anew() -> None:
    clearing = Clearing()
    assert clearing.bits(0.0) == 0
    clearing.keep(3, 1.0)
    clearing.keep(0, 1.0 + limits.GIVE_WAY_S / 2)
    assert clearing.bits(1.0 + limits.GIVE_WAY_S) == 0b1001
    assert clearing.bits(clearing.end_s) == 0
    clearing.keep(1, clearing.end_s)
    assert clearing.bits(clearing.end_s - limits.GIVE_WAY_S / 2) == 0b10
