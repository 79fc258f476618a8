"""The order of those who wait: class, share, deadline, size."""

from __future__ import annotations

from proxy.core import claim_limits, limits
from proxy.core.classes import OFFLINE, ONLINE, SEMI_ONLINE, YIELD_S
from proxy.core.fairness import Account, Shares
from proxy.core.fleet import Pool
from proxy.core.held import Held, band, begin_by_s, is_vain, rank_s
from proxy.core.holding import Holding
from proxy.core.lease import Lease
from proxy.core.lines import Line, Order
from proxy.core.picture import Picture
from proxy.core.policy import Decision, Request, prefix
from tests.core.builders import chain, pool, replica

_RATE = limits.PREFILL_TOKENS_PER_S_DEFAULT


def made(
    key: int = 1,
    since_s: float = 0.0,
    *,
    deadline_s: float = 0.0,
    work_class: int = ONLINE,
    tokens: int = 10,
) -> Held:
    request = Request(chain(key, tokens * limits.BYTES_PER_TOKEN), has_session=False)
    request.work_class = work_class
    request.deadline_s = deadline_s
    return Held(request, lambda: None, lambda _: None, since_s)


def test_the_earliest_deadline_is_first_and_none_said_is_a_deadline_too() -> None:
    soon, later, none = made(deadline_s=0.5), made(deadline_s=4.0), made()
    assert sorted((later, none, soon), key=rank_s) == [soon, none, later]
    assert rank_s(made(deadline_s=claim_limits.OBJECTIVE_S)) == rank_s(none)


def test_no_deadline_makes_a_request_one_of_another_class() -> None:
    far, near = made(deadline_s=3600.0), made(deadline_s=0.01, work_class=SEMI_ONLINE)
    assert rank_s(far) < rank_s(near)


def test_a_clients_patience_is_no_wish_to_wait() -> None:
    patient = made(deadline_s=60.0)
    patient.request.listens_until_s = 60.0
    assert rank_s(patient) == rank_s(made())
    assert not is_vain(patient, 59.0)
    assert is_vain(patient, 60.1)


def test_who_is_late_yields_as_semi_online_work_does_and_not_for_ever() -> None:
    late = made(deadline_s=0.5)
    late.late = True
    assert band(late, 1.0) == SEMI_ONLINE
    assert rank_s(late) > rank_s(made(since_s=1.0, deadline_s=3.0))
    assert band(late, YIELD_S[SEMI_ONLINE] + 0.1) == ONLINE
    assert begin_by_s(late) == 0.0


def test_in_a_line_the_class_decides_then_the_share_then_the_rank() -> None:
    shares, line = Shares(), Line()
    accounts = {
        (work_class, name): shares.account(work_class, name, 1.0, 0.0)
        for work_class in (ONLINE, OFFLINE)
        for name in "ab"
    }
    entries = {}
    for number, (work_class, name) in enumerate(accounts):
        one = entries[work_class, name] = made(number, work_class=work_class)
        one.account, one.order, one.rank_s = accounts[work_class, name], number, float(number)
        shares.begins_to_wait(accounts[work_class, name])
        line.enter(one)
    greedy = accounts[ONLINE, "a"]
    shares.over(greedy, shares.dispatched(greedy, 0), 5 * claim_limits.SHARE_QUANTUM_TOKENS)
    shares.refresh(1.0)
    order = Order(shares, 1.0)
    expected = [entries[key] for key in ((ONLINE, "b"), (ONLINE, "a"), (OFFLINE, "a"))]
    for one in entries.values():
        one.tokens = 10
    assert line.part(order, 0, 3) == (0, expected)
    assert line.part(order, 2, 4) == (20, [expected[2], entries[OFFLINE, "b"]])
    assert line.firsts(order, 2) == expected[:2]
    gone = []
    while line.count:
        first = line.first(order)
        gone.append(first)
        line.leave(first)
    assert gone[:3] == expected


class _World:
    """One replica, and those who wait for it."""

    def __init__(self) -> None:
        self.pool: Pool = pool([replica("a")])
        self.picture = Picture()
        self.picture.know(self.pool.replicas.values())
        self.holding = Holding()

    def busy(self, tokens: int) -> Lease:
        lease = Lease(0, "a", prefill_tokens=tokens, prompt_tokens=tokens)
        self.picture.loads.acquire(lease, 0.0)
        return lease

    def hold(self, one: Held, account: Account | None = None) -> Held:
        one.pool_of = lambda: self.pool
        one.account = account
        self.holding.add(one, self.picture)
        return one

    def take(self, now_s: float) -> tuple[Held, Decision] | None:
        return self.holding.take(prefix, self.picture, now_s)


def test_one_whose_time_is_over_lets_another_go_and_goes_when_nobody_else_waits() -> None:
    world = _World()
    lease = world.busy(30_000)
    late = world.hold(made(1, deadline_s=0.5, tokens=3_000))
    fresh = world.hold(made(2, since_s=0.9, deadline_s=5.0, tokens=3_000))
    assert world.take(0.1) is None
    assert world.holding.overdue(0.3) == []
    assert world.holding.overdue(0.6) == [late]
    assert world.holding.overdue(0.7) == []  # once
    world.picture.prefill_ended(lease, 1.0)
    first = world.take(1.0)
    assert first is not None
    assert first[0] is fresh
    last = world.take(1.0)
    assert last is not None
    assert last[0] is late


def test_one_that_would_be_late_where_it_could_go_is_late_before_its_moment() -> None:
    world = _World()
    world.busy(int(0.2 * _RATE))
    tight = world.hold(made(1, deadline_s=0.25, tokens=int(0.1 * _RATE)))
    found = world.take(0.0)
    assert tight.late
    assert found is not None  # nobody else wants the place
    assert found[0] is tight


def test_deadlines_of_those_who_have_gone_are_forgotten() -> None:
    world = _World()
    world.busy(300_000)
    for number in range(200):
        world.holding.drop(world.hold(made(number, deadline_s=1e6)))
    assert len(world.holding._due) < 50


def test_a_flood_does_not_hold_up_one_who_is_within_his_share() -> None:
    world = _World()
    shares = world.holding.shares
    shares.on = True
    flood, guest = (shares.account(ONLINE, name, 1.0, 0.0) for name in ("flood", "guest"))
    lease = world.busy(30_000)
    for number in range(20):
        world.hold(made(number, tokens=6_000), flood)
    shares.over(flood, shares.dispatched(flood, 0), 20_000)
    other = world.hold(made(99, since_s=0.9, tokens=60_000), guest)
    world.picture.prefill_ended(lease, 1.0)
    found = world.take(1.0)
    assert found is not None
    assert found[0] is other


def test_one_who_is_ahead_of_another_finds_a_replica_open_later() -> None:
    world = _World()
    shares = world.holding.shares
    shares.on = True
    flood = shares.account(ONLINE, "flood", 1.0, 0.0)
    world.busy(int(0.2 * _RATE))
    shares.over(flood, shares.dispatched(flood, 0), 20_000)
    one = world.hold(made(1, tokens=600), flood)
    shares.account(ONLINE, "guest", 1.0, 0.0)
    assert world.take(0.0) is None
    assert world.holding.runway_s_min == claim_limits.RUNWAY_OVER_S
    found = world.take(0.18)
    assert found is not None
    assert found[0] is one
