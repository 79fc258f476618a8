"""Shares of tenants in tokens, as one worker and as several count them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from proxy.core import claim_limits
from proxy.core.classes import OFFLINE, ONLINE
from proxy.core.fairness import Account, Shares
from proxy.core.share_cells import ROWS, ShareCells, bury, name_of, share_table_bytes

_Q = claim_limits.SHARE_QUANTUM_TOKENS


def _served(shares: Shares, account: Account, tokens: float) -> None:
    shares.over(account, shares.dispatched(account, 0), tokens)


def _next(shares: Shares, accounts: list[Account]) -> Account:
    """Return who goes: the least over the share, of equals the first."""
    shares.refresh(0.0)
    return min(accounts, key=shares.level)


@given(
    st.lists(st.sampled_from([0.5, 1.0, 2.0, 3.0]), min_size=2, max_size=5),
    st.lists(st.integers(50, 30_000), min_size=40, max_size=60),
)
def test_whoever_waits_all_the_time_gets_his_share_within_a_quantum_and_a_request(
    weights: list[float], sizes: list[int]
) -> None:
    shares = Shares()
    accounts = [
        shares.account(ONLINE, f"t{place}", weight, 0.0) for place, weight in enumerate(weights)
    ]
    for account in accounts:
        shares.begins_to_wait(account)
    most = max(sizes) / min(weights) + _Q
    for size in sizes:
        _served(shares, _next(shares, accounts), size)
        counters = sorted(account.counter for account in accounts)
        assert counters[-1] - counters[0] <= most


def test_one_who_idled_has_no_credit_for_it_but_a_quantum() -> None:
    shares = Shares()
    busy = shares.account(ONLINE, "busy", 1.0, 0.0)
    idle = shares.account(ONLINE, "idle", 1.0, 0.0)
    shares.begins_to_wait(busy)
    for _ in range(100):
        _served(shares, busy, 10_000)
    shares.begins_to_wait(idle)
    assert _next(shares, [busy, idle]) is idle
    assert busy.counter - idle.counter == _Q
    shares.waits_no_more(idle)
    _served(shares, idle, 3 * _Q)  # more than that credit: it stays owed when it comes again
    shares.begins_to_wait(idle)
    assert _next(shares, [busy, idle]) is busy


def test_what_was_taken_while_nobody_waited_costs_nothing() -> None:
    shares = Shares()
    heavy = shares.account(ONLINE, "heavy", 1.0, 0.0)
    light = shares.account(ONLINE, "light", 1.0, 0.0)
    _served(shares, heavy, 1_000_000)
    for account in (light, heavy):
        shares.begins_to_wait(account)
    shares.refresh(0.0)
    assert shares.level(heavy) <= 1
    assert shares.level(light) == 0


def test_what_was_charged_too_much_comes_back() -> None:
    shares = Shares()
    account = shares.account(ONLINE, "a", 2.0, 0.0)
    other = shares.account(ONLINE, "b", 2.0, 0.0)
    for each in (account, other):
        shares.begins_to_wait(each)
    before = account.counter
    charged = shares.dispatched(account, 5_000)
    assert account.counter == before + charged / 2.0
    shares.over(account, charged, 0.0)
    assert account.counter == before
    assert account.open == 0


def test_answers_teach_what_the_next_one_needs() -> None:
    shares = Shares()
    account = shares.account(ONLINE, "a", 1.0, 0.0)
    for _ in range(100):
        shares.learn(account, 2_000)
    assert 1_990 < shares.dispatched(account, 0) <= 2_000


def test_one_who_comes_now_and_then_puts_a_flood_over_its_share_for_a_while() -> None:
    shares = Shares()
    flood = shares.account(ONLINE, "flood", 1.0, 0.0)
    shares.begins_to_wait(flood)
    shares.refresh(0.0)
    _served(shares, flood, 50_000)
    shares.refresh(0.0)
    assert shares.level(flood) == 0  # alone it cannot take too much
    shares.account(ONLINE, "guest", 1.0, 1.0)
    shares.refresh(1.0)
    assert shares.level(flood) >= 1
    shares.account(ONLINE, "flood", 1.0, 8.0)
    shares.refresh(1.1 + claim_limits.SHARE_RECENT_S)
    assert shares.level(flood) == 0


def test_classes_have_counters_of_their_own() -> None:
    shares = Shares()
    both = [shares.account(work_class, "a", 1.0, 0.0) for work_class in (ONLINE, OFFLINE)]
    assert both[0] is not both[1]
    other = shares.account(ONLINE, "b", 1.0, 0.0)
    for account in (both[0], other):
        shares.begins_to_wait(account)
    _served(shares, both[1], 1_000_000)
    assert _next(shares, [both[0], other]) is both[0]


def test_the_table_of_accounts_is_bounded_and_nobody_who_has_something_is_forgotten() -> None:
    shares = Shares()
    waits, runs = (shares.account(ONLINE, name, 1.0, 0.0) for name in ("waits", "runs"))
    shares.begins_to_wait(waits)
    charged = shares.dispatched(runs, 10)
    for number in range(2 * claim_limits.ACCOUNTS_MAX):
        shares.account(ONLINE, f"t{number}", 1.0, float(number))
    assert len(shares) <= claim_limits.ACCOUNTS_MAX
    assert shares.account(ONLINE, "waits", 1.0, 1e6) is waits
    assert shares.account(ONLINE, "runs", 1.0, 1e6) is runs
    shares.over(runs, charged, 10.0)


class _Workers:
    """Several workers on one memory."""

    def __init__(self, count: int) -> None:
        memory = memoryview(bytearray(share_table_bytes(count)))
        self.names = memory[: ROWS * 8].cast("Q")
        self.cells = memory[ROWS * 8 :].cast("d")
        self.count = count
        self.locked = 0
        self.all = [self.start(place) for place in range(count)]

    def start(self, place: int) -> Shares:
        shares = Shares()
        shares.cells = ShareCells(
            self.names, self.cells, place, self.count, self._lock, self._unlock
        )
        return shares

    def _lock(self) -> None:
        assert not self.locked
        self.locked += 1

    def _unlock(self) -> None:
        self.locked -= 1


def test_workers_that_have_different_tenants_keep_the_shares_together() -> None:
    workers = _Workers(2)
    one, other = workers.all
    here = one.account(ONLINE, "a", 1.0, 0.0)
    there = [other.account(ONLINE, name, weight, 0.0) for name, weight in (("a", 1.0), ("b", 3.0))]
    for shares, account in ((one, here), (other, there[0]), (other, there[1])):
        shares.begins_to_wait(account)
    _served(one, here, 60_000)
    other.refresh(1.0)
    assert there[0].counter == there[1].counter + 60_000
    assert other.level(there[0]) > 10
    one.refresh(1.0)
    assert one.level(here) > 10  # by one who waits at the other worker alone
    _served(other, there[1], 180_000)
    one.refresh(2.0)
    assert one.level(here) == 0


def test_one_who_waits_at_another_worker_is_not_lifted_for_a_second_time() -> None:
    workers = _Workers(2)
    one, other = workers.all
    flood = one.account(ONLINE, "flood", 1.0, 0.0)
    one.begins_to_wait(flood)
    _served(one, flood, 100_000)
    one.refresh(0.0)
    guests = [shares.account(ONLINE, "guest", 1.0, 1.0) for shares in workers.all]
    one.refresh(1.0)
    one.begins_to_wait(guests[0])
    other.refresh(1.0)
    other.begins_to_wait(guests[1])
    for shares in workers.all:
        shares.refresh(2.0)
    assert guests[0].counter == guests[1].counter == flood.counter - _Q


def test_what_a_dead_worker_charged_stays_charged_and_nobody_waits_there() -> None:
    workers = _Workers(2)
    account = workers.all[0].account(ONLINE, "a", 1.0, 0.0)
    workers.all[0].begins_to_wait(account)
    _served(workers.all[0], account, 7_000)
    bury(workers.names, workers.cells, 0, 2)
    anew = workers.start(0).account(ONLINE, "a", 1.0, 0.0)
    assert (anew.charged, anew.elsewhere, anew.waiting_elsewhere) == (0.0, 7_000.0, 0)


def test_cells_that_were_idle_for_long_become_anothers_and_the_old_owner_sees_it() -> None:
    workers = _Workers(1)
    (shares,) = workers.all
    old = shares.account(ONLINE, "old", 1.0, 0.0)
    _served(shares, old, 5_000)
    rivals = [
        name
        for name in (f"t{number}" for number in range(40_000))
        if 0 <= name_of(ONLINE, name) % ROWS - name_of(ONLINE, "old") % ROWS < 1
    ][:17]
    taken = [shares.account(ONLINE, name, 1.0, 2.0 * claim_limits.SHARE_IDLE_S) for name in rivals]
    rows = [account.row for account in taken if account.row >= 0]
    assert len(set(rows)) == len(rows) == 16
    assert old.row in rows
    _served(shares, old, 5_000)
    assert old.row == -1
    assert shares.cells is not None
    assert all(not shares.cells.seen(row).charged for row in rows)


def test_names_tell_their_class_and_no_two_tenants_have_the_same() -> None:
    names = [
        name_of(work_class, f"tenant {number}")
        for number in range(2_000)
        for work_class in (0, 1, 2)
    ]
    assert len(set(names)) == len(names)
    assert all(0 < name < 2**64 for name in names)
    assert [name & 3 for name in names[:3]] == [0, 1, 2]


def test_a_burst_of_one_below_his_share_goes_at_once_and_is_paid_back() -> None:
    shares = Shares()
    shares.know_speed(50_000.0)
    flood = shares.account(ONLINE, "flood", 1.0, 0.0)
    guest = shares.account(ONLINE, "guest", 2.0, 0.0)
    shares.begins_to_wait(flood)
    for _ in range(100):
        _served(shares, flood, 10_000)
    shares.begins_to_wait(guest)
    given = 0
    while _next(shares, [flood, guest]) is guest:
        _served(shares, guest, 4_000)
        given += 4_000
    in_hand = 50_000.0 * claim_limits.SHARE_CREDIT_S
    assert in_hand - 3 * _Q <= given <= in_hand + 3 * _Q
    served = {"flood": 0, "guest": 0}
    for _ in range(300):
        account = _next(shares, [flood, guest])
        _served(shares, account, 4_000)
        served[account.tenant] += 4_000
    assert abs(served["guest"] / served["flood"] - 2.0) < 0.1
