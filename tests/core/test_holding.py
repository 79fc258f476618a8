"""Late binding: who waits goes when a replica is about to run out of work, and nobody starves."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core import claim_limits, limits
from proxy.core.classes import OFFLINE, ONLINE, SEMI_ONLINE, YIELD_S
from proxy.core.fleet import Pool
from proxy.core.held import Held
from proxy.core.holding import Holding
from proxy.core.lease import Lease
from proxy.core.opening import Opening, is_open
from proxy.core.picture import Picture
from proxy.core.policy import POLICIES, Decision, Request, prefix
from tests.core.builders import chain, pool, replica

_RATE = limits.PREFILL_TOKENS_PER_S_DEFAULT
_OCTETS = limits.BYTES_PER_TOKEN


class _World:
    """Replicas, who waits for them, and who has gone where."""

    def __init__(self, names: str) -> None:
        self.pool: Pool | None = pool([replica(name) for name in names])
        self.picture = Picture()
        self.picture.know(self.pool.replicas.values())
        self.holding = Holding()
        self.sent: list[tuple[int, str]] = []
        self.leases: list[Lease] = []

    def hold(self, key: int, tokens: int, now_s: float, queue: int = 0) -> Held:
        request = Request(chain(key, tokens * _OCTETS), has_session=False, stream=True)
        held = Held(request, lambda: self.pool, lambda _: None, now_s)
        held.queue = queue
        self.holding.add(held, self.picture)
        return held

    def release(self, now_s: float, *, at_once: bool = False, braked: int = 0) -> None:
        picture = self.picture
        while found := self.holding.take(prefix, picture, now_s, at_once=at_once, braked=braked):
            held, decision = found
            self.sent.append((held.request.chain.home_key, decision.replica.name))
            self.leases.append(
                self.picture.acquire(
                    decision.replica,
                    held.request.chain,
                    cached_octets=decision.cached_octets,
                    now_s=now_s,
                )
            )

    def busy(self, name: str, tokens: int, now_s: float = 0.0) -> Lease:
        lease = Lease(self.picture.slots[name], name, prefill_tokens=tokens, prompt_tokens=tokens)
        self.picture.loads.acquire(lease, now_s)
        return lease


def test_a_replica_is_open_until_it_has_enough_to_do() -> None:
    world = _World("a")
    assert world.pool is not None
    decision = Decision(world.pool.replicas["a"], 0, "new")
    short = Request(chain(1, 4), has_session=False)
    assert is_open(decision, short, world.picture, 0.0)
    world.busy("a", int(2 * limits.RUNWAY_S * _RATE))
    assert not is_open(decision, short, world.picture, 0.0)
    assert is_open(decision, short, world.picture, limits.RUNWAY_S * 1.01)


def test_the_shortest_goes_first_and_the_others_when_their_time_has_come() -> None:
    world = _World("a")
    lease = world.busy("a", 30_000)
    for key, tokens in ((1, 60_000), (2, 12_000), (3, 20_000)):
        world.hold(key, tokens, 0.0)
    world.release(0.0)
    assert world.sent == []
    world.picture.prefill_ended(lease, 1.0)
    world.release(1.0)
    assert world.sent == [(2, "a")]
    assert len(world.holding) == 2
    world.picture.prefill_ended(world.leases[0], 1.2)
    world.release(1.2)
    assert world.sent == [(2, "a"), (3, "a")]


def test_who_has_waited_long_goes_before_a_shorter_newcomer() -> None:
    world = _World("a")
    lease = world.busy("a", 30_000)
    world.hold(1, 60_000, 0.0)  # two seconds of prefill
    world.hold(2, 600, 3.0)
    world.picture.prefill_ended(lease, 3.0)
    world.release(3.0)
    assert world.sent == [(1, "a")]


def test_what_waits_goes_to_a_replica_that_comes_up() -> None:
    world = _World("a")
    world.busy("a", 300_000)
    world.hold(1, 6_000, 0.0)
    world.release(0.0)
    assert world.sent == []
    world.pool = pool([replica("a"), replica("b")])
    world.picture.know(world.pool.replicas.values())
    world.release(0.1)
    assert world.sent == [(1, "b")]


def test_one_that_waits_for_its_prefix_lets_others_pass() -> None:
    world = _World("ab")
    warm = chain(7, 60_000 * _OCTETS)
    world.picture.index.note(world.picture.slots["a"], warm)
    world.busy("a", 30_000)
    world.picture.loads.dispatched_tokens[world.picture.slots["b"]] = 10**9
    world.hold(7, 60_000, 0.0)
    world.hold(8, 6_000, 0.0)
    world.release(0.0)
    assert world.sent == [(8, "b")]
    assert world.picture.loads.prefilling.queued_tokens(world.picture.slots["a"]) == 30_000


def test_those_who_wait_for_one_replica_hold_up_nobody_who_wants_another() -> None:
    world = _World("ab")
    world.picture.index.note(world.picture.slots["a"], chain(7, 60_000 * _OCTETS))
    world.busy("a", 30_000)
    lease = world.busy("b", 30_000)
    for _ in range(2 * limits.HELD_TRIED_MAX):
        world.hold(7, 60_000, 0.0)
    world.release(0.0)
    world.hold(8, 6_000, 0.0)
    world.release(0.0)
    assert world.holding.awaits(world.picture.slots["b"])
    world.picture.prefill_ended(lease, 0.5)
    world.release(0.5)
    assert world.sent == [(8, "b")]
    assert not world.holding.awaits(world.picture.slots["b"])


def test_a_long_line_gives_to_an_idle_replica_whoever_gains_by_it() -> None:
    """Not the first in the line, whose turn is near, but one far behind it."""
    world = _World("ab")
    slot = world.picture.slots["a"]
    world.picture.index.note(slot, chain(7, 60_000 * _OCTETS))
    world.busy("a", 30_000)
    lease = world.busy("b", 600_000)
    for _ in range(limits.HELD_TRIED_MAX):
        world.hold(7, 60_000, 0.0)
    for key in range(100, 120):
        world.hold(key, 20_000, 0.0)
    while world.holding.unseen:
        world.release(0.0)
    world.picture.prefill_ended(lease, 0.5)
    for _ in range(4):
        world.release(0.5)
    assert [(key >= 100, name) for key, name in world.sent] == [(True, "b")]


def test_who_waits_for_a_replica_that_goes_is_looked_at_anew() -> None:
    world = _World("ab")
    world.picture.index.note(world.picture.slots["a"], chain(7, 60_000 * _OCTETS))
    world.busy("a", 30_000)
    world.picture.loads.dispatched_tokens[world.picture.slots["b"]] = 10**9
    world.hold(7, 60_000, 0.0)
    world.release(0.0)
    assert world.sent == []
    world.pool = pool([replica("b")])
    world.picture.know(world.pool.replicas.values())
    world.release(0.0)
    assert world.sent == [(7, "b")]


def test_whom_nobody_may_take_waits_for_whoever_has_room_first() -> None:
    world = _World("ab")
    world.pool = pool([replica("a", max_inputs=1), replica("b", max_inputs=1)])
    world.picture.know(world.pool.replicas.values())
    leases = [world.busy(name, 1) for name in "ab"]
    world.hold(1, 6_000, 0.0)
    world.release(0.0)
    assert all(world.holding.awaits(slot) for slot in world.picture.slots.values())
    world.picture.release(leases[1], 1.0)
    world.release(1.0)
    assert world.sent == [(1, "b")]


def test_at_once_all_go_for_whom_there_is_room() -> None:
    world = _World("a")
    world.pool = pool([replica("a", max_inputs=3)])
    world.picture.know(world.pool.replicas.values())
    world.busy("a", 300_000)
    for key in (1, 2, 3):
        world.hold(key, 6_000, 0.0)
    world.release(0.0)
    assert world.sent == []
    world.release(0.0, at_once=True)
    assert [name for _, name in world.sent] == ["a", "a"]
    assert len(world.holding) == 1


def test_one_that_is_dropped_is_not_sent_and_leaves_nothing() -> None:
    world = _World("a")
    lease = world.busy("a", 30_000)
    waiting = [world.hold(key, 3000, 0.0) for key in range(1, 1000)]
    for held in waiting[1:]:
        world.holding.drop(held)
        world.holding.drop(held)
    assert len(world.holding) == 1
    assert sum(line.count for line in world.holding._lines.values()) == 1
    world.picture.prefill_ended(lease, 1.0)
    world.release(1.0)
    assert world.sent == [(1, "a")]
    assert len(world.holding) == 0


def test_a_pool_that_is_gone_sends_nobody() -> None:
    world = _World("a")
    world.pool = None
    world.hold(1, 3000, 0.0)
    world.release(0.0)
    assert world.sent == []
    assert len(world.holding) == 1


@given(
    st.lists(st.tuples(st.integers(1, 60_000), st.floats(0, 0.3)), min_size=1, max_size=60),
    st.integers(1, 4),
)
def test_all_go_in_the_end_and_none_waits_for_more_than_what_came_before_and_its_equals(
    requests: list[tuple[int, float]], replicas: int
) -> None:
    world = _World("abcd"[:replicas])
    now_s = 0.0
    arrived: dict[int, float] = {}
    gone: dict[int, float] = {}
    for key, (tokens, pause_s) in enumerate(requests, 1):
        now_s += pause_s
        arrived[key] = now_s
        world.hold(key, tokens, now_s)
    while len(gone) < len(requests):
        world.release(now_s)
        for key, _ in world.sent[len(gone) :]:
            gone[key] = now_s
        heads = [world.picture.loads.prefilling.line[slot][0] for slot in range(replicas)
                 if world.picture.loads.prefilling.line[slot]]  # fmt: skip
        assert heads or len(gone) == len(requests), "somebody waits, and nobody works"
        if heads:
            head = min(heads, key=lambda lease: world.picture.loads.head_end_s[lease.slot])
            now_s = max(now_s, world.picture.loads.head_end_s[head.slot])
            world.picture.prefill_ended(head, now_s)
    # Ageing: a request yields only to work that arrived within its own prefill after it.
    for key, (tokens, _) in enumerate(requests, 1):
        latest_s = arrived[key] + limits.AGEING_WEIGHT * tokens / _RATE
        before = sum(
            size for other, (size, _) in enumerate(requests, 1) if arrived[other] <= latest_s
        )
        assert gone[key] <= max(latest_s, arrived[len(requests)]) + before / _RATE + 1.0


# --- when to look again ---------------------------------------------------------------------------

_LINES = st.lists(
    st.lists(st.tuples(st.integers(1, 20_000), st.booleans()), max_size=4), min_size=1, max_size=3
)


def _some_are_open(world: _World, now_s: float) -> bool:
    """The same asked of each replica, about a request that needs next to nothing."""
    assert world.pool is not None
    for slot in range(len(world.picture.slots)):
        world.picture.loads.prefilling.settle(slot, now_s)
    small = Request(chain(1, 1), has_session=False)
    decisions = [Decision(r, world.picture.slots[r.name], "") for r in world.pool.available]
    return any(is_open(decision, small, world.picture, now_s) for decision in decisions)


@given(_LINES, st.floats(0, 3), st.floats(0.001, 0.999))
def test_nothing_opens_by_time_alone_before_it_is_looked_at_again(
    lines: list[list[tuple[int, bool]]], now_s: float, share: float
) -> None:
    world = _World("abc"[: len(lines)])
    assert world.pool is not None
    for name, line in zip("abc", lines, strict=False):
        for tokens, streamed in line:
            lease = Lease(
                world.picture.slots[name], name,
                prefill_tokens=tokens, prompt_tokens=tokens, streamed=streamed,
            )  # fmt: skip
            world.picture.loads.acquire(lease, 0.0)
    for _ in range(20):
        opening = Opening(world.pool, world.picture, now_s)
        assert opening.now is _some_are_open(world, now_s)
        assert opening.next_s > now_s
        if opening.now:
            return
        if opening.next_s == float("inf"):
            assert not _some_are_open(world, now_s + 1000.0)
            return
        between_s = now_s + share * (opening.next_s - now_s)
        assert not _some_are_open(world, between_s - 1e-9)
        now_s = opening.next_s + 1e-9
    raise AssertionError("it looks again and again, and nothing opens")


def test_a_replica_with_as_much_as_it_may_have_is_not_open() -> None:
    world = _World("a")
    world.pool = pool([replica("a", max_inputs=1)])
    world.picture.know(world.pool.replicas.values())
    assert Opening(world.pool, world.picture, 0.0).now
    world.busy("a", 1)
    opening = Opening(world.pool, world.picture, 1.0)
    assert (opening.now, opening.next_s) == (False, float("inf"))


# --- classes, and those for whom there is nothing -------------------------------------------------


def _classed(world: _World, key: int, work_class: int, now_s: float, tokens: int = 600) -> Held:
    held = world.hold(key, tokens, now_s)
    world.holding.drop(held)
    request = Request(chain(key, tokens * _OCTETS), has_session=False, work_class=work_class)
    again = Held(request, lambda: world.pool, lambda _: None, now_s)
    world.holding.add(again, world.picture)
    return again


def _drain(world: _World, lease: Lease, now_s: float, count: int) -> list[int]:
    """Let one go after another; return in which order."""
    world.picture.prefill_ended(lease, now_s)
    for _ in range(count):
        world.release(now_s)
        for each in world.leases:
            world.picture.prefill_ended(each, now_s)
    return [key for key, _ in world.sent]


def test_online_work_goes_first_and_then_the_order_is_as_ever() -> None:
    world = _World("a")
    lease = world.busy("a", 30_000)
    for key, work_class in ((1, OFFLINE), (2, SEMI_ONLINE), (3, ONLINE), (4, OFFLINE), (5, ONLINE)):
        _classed(world, key, work_class, 0.1 * key)
    assert _drain(world, lease, 1.0, 5) == [3, 5, 2, 1, 4]


@given(st.sampled_from([SEMI_ONLINE, OFFLINE]), st.booleans())
def test_nobody_yields_for_longer_than_its_class_does(work_class: int, late: bool) -> None:
    world = _World("a")
    lease = world.busy("a", 30_000)
    patient = YIELD_S[work_class]
    _classed(world, 1, work_class, 0.0)
    _classed(world, 2, ONLINE, patient + 1.0 if late else patient - 1.0)
    assert _drain(world, lease, patient + 2.0, 2) == ([1, 2] if late else [2, 1])


def test_a_newcomer_does_not_take_the_room_of_those_for_whom_all_were_full() -> None:
    world = _World("")
    world.pool = pool([replica("a", max_inputs=1)])
    world.picture.know(world.pool.replicas.values())
    lease = world.busy("a", 600)
    world.hold(1, 600, 0.0)
    world.release(0.0)
    world.picture.release(lease, 1.0)
    _classed(world, 2, OFFLINE, 1.0)  # comes before anybody has looked
    world.release(1.0)
    assert world.sent == [(1, "a")]


def test_those_who_wait_for_nothing_hold_up_nobody_and_go_as_they_came() -> None:
    world = _World("a")
    served, world.pool = world.pool, None
    for key, tokens in ((1, 9_000), (2, 600), (3, 60)):
        world.hold(key, tokens, 0.1 * key, queue=1)
    world.release(1.0)
    other = Held(
        Request(chain(9, 600 * _OCTETS), has_session=False), lambda: served, lambda _: None, 1.0
    )
    other.queue = 2
    world.holding.add(other, world.picture)
    world.release(1.0)
    assert world.sent == [(9, "a")]  # of another model
    assert not world.holding.awaits(0)
    world.pool = served
    world.holding.renew(1, empty=False)
    assert world.holding.awaits(0)  # a newcomer has to wait behind them
    world.picture.prefill_ended(world.leases[0], 1.1)
    for _ in range(3):
        world.release(1.2)
        for lease in world.leases:
            world.picture.prefill_ended(lease, 1.2)
    assert [key for key, _ in world.sent] == [9, 1, 2, 3]


# --- tokens in a line -----------------------------------------------------------------------------


def _limited(tokens_max: int) -> _World:
    world = _World("")
    world.pool = pool([dataclasses.replace(replica("a"), max_tokens=tokens_max)])
    world.picture.know(world.pool.replicas.values())
    return world


def test_a_line_never_has_more_tokens_than_it_may_but_for_one_that_is_larger_itself() -> None:
    world = _limited(1_000)
    for key, tokens in ((1, 600), (2, 300), (3, 200), (4, 5_000)):
        world.hold(key, tokens, 0.0)
    world.release(0.0)
    assert [key for key, _ in world.sent] == [3, 2]
    for lease in list(world.leases):
        world.picture.prefill_ended(lease, 0.0)
    world.release(0.0)
    assert [key for key, _ in world.sent] == [3, 2, 1]
    world.picture.prefill_ended(world.leases[-1], 0.0)
    world.release(0.0)
    assert [key for key, _ in world.sent] == [3, 2, 1, 4]


@given(st.lists(st.integers(1, 3_000), min_size=1, max_size=30), st.integers(1, 4_000))
def test_whatever_waits_the_limit_holds_and_all_go(sizes: list[int], tokens_max: int) -> None:
    world = _limited(tokens_max)
    for key, tokens in enumerate(sizes):
        world.hold(key, tokens, 0.0)
    for _ in sizes:
        world.release(0.0)
        loads = world.picture.loads
        assert loads.prefilling.queued_tokens(0) <= tokens_max or len(loads.prefilling.line[0]) == 1
        for lease in world.leases:
            world.picture.prefill_ended(lease, 0.0)
    assert len(world.sent) == len(sizes)


@pytest.mark.parametrize("name", ["prefix", "session", "least_load", "round_robin"])
def test_every_policy_passes_over_a_line_that_is_full(name: str) -> None:
    replicas = [dataclasses.replace(replica(each), max_tokens=1_000) for each in "ab"]
    world = _World("")
    world.pool = pool(replicas)
    world.picture.know(world.pool.replicas.values())
    world.busy("a", 900)
    request = Request(chain(1, 200 * _OCTETS), has_session=True)
    for _ in range(3):
        decision = POLICIES[name](request, world.pool, world.picture, 0.0)
        assert decision is not None
        assert decision.replica.name == "b"
    world.busy("b", 900)
    assert POLICIES[name](request, world.pool, world.picture, 0.0) is None


def _sent_online(world: _World, tokens: int, now_s: float) -> Lease:
    lease = world.busy("a", tokens, now_s)
    world.picture.prefill_ended(lease, now_s)
    return lease


def test_offline_work_beside_online_work_waits_until_a_replica_has_next_to_nothing_to_do() -> None:
    world = _World("a")
    world.busy("a", int(0.2 * _RATE))  # a replica with less than its runway to do
    _classed(world, 1, OFFLINE, 0.0)
    world.release(0.0)
    assert world.sent == []
    _classed(world, 2, ONLINE, 0.0)
    world.release(0.0)
    assert world.sent == [(2, "a")]


def test_of_what_online_work_leaves_offline_work_gets_a_part() -> None:
    world = _World("a")
    _sent_online(world, 600, 0.0)  # and is still being answered
    world.hold(1, 600, 0.0).request.work_class = OFFLINE
    world.release(0.0)
    lease = world.picture.loads.prefilling.line[0][0]
    lease.weight = limits.FLEX_WEIGHT
    spare = world.picture.loads.spare
    spare.dispatched(0, 0.1, 0.0, urgent=False)
    world.picture.prefill_ended(lease, 0.01)
    _classed(world, 2, OFFLINE, 0.01)
    world.release(0.01)
    assert [key for key, _ in world.sent] == [1]
    assert world.pool is not None
    opening = Opening(world.pool, world.picture, 0.01, offline=True)
    assert 0.01 < opening.next_s < claim_limits.BESIDE_S
    world.release(opening.next_s + 1e-6)
    assert [key for key, _ in world.sent] == [1, 2]


def test_online_work_changes_its_replica_whatever_offline_work_waits_for_that() -> None:
    world = _World("ab")
    first, second = world.busy("a", 60_000), world.busy("b", 90_000)
    for key in range(10, 20):
        _classed(world, key, OFFLINE, 0.0, tokens=60_000)
    world.release(0.0)
    _classed(world, 1, ONLINE, 0.0)
    world.release(0.0)
    assert world.sent == []
    world.picture.prefill_ended(second, 1.0)
    world.release(1.0, braked=0b11)
    assert world.sent == [(1, "b")]
    assert first.pending
