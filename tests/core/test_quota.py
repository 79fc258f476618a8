"""Counts in shared cells: a sliding minute, a day, and rows that stay whose they are."""

from __future__ import annotations

import mmap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core import quota
from proxy.core.quota import Account, Row, Rows


def memory(workers: int) -> memoryview:
    return memoryview(mmap.mmap(-1, quota.memory_bytes(workers))).cast("q")


@given(st.lists(st.tuples(st.integers(0, 2), st.floats(0.0, 20.0), st.integers(1, 9)), max_size=40))
def test_a_minute_holds_what_was_used_in_it_and_nothing_older_than_a_tenth_of_a_second_more(
    uses: list[tuple[int, float, int]],
) -> None:
    cells = memory(3)
    accounts = [Account(cells, 3, 7, place) for place in range(3)]
    now_s, past = 1000.0, []
    for place, pause_s, amount in uses:
        now_s += pause_s
        for account in accounts:
            account.advance(quota.bucket_at(now_s))
        accounts[place].use(quota.bucket_at(now_s), quota.TOKENS, amount)
        past.append((now_s, amount))
        counted = accounts[0].sum(quota.TOKENS)
        assert counted >= sum(n for at_s, n in past if now_s - at_s < 60.0)
        assert counted <= sum(n for at_s, n in past if now_s - at_s <= 60.1001)
    now_s += 60.5
    left = [account.advance(quota.bucket_at(now_s)) for account in accounts]
    assert not any(left)
    for account in accounts:
        assert account.whole_s(quota.TOKENS, account.sum(quota.TOKENS), now_s) == 0.0
    assert accounts[1].frees_s(quota.TOKENS, 1, now_s) == 60.0  # nothing is in any ring


def test_when_enough_of_all_is_forgotten() -> None:
    one, other = (Account(memory_ := memory(2), 2, 0, 0), Account(memory_, 2, 0, 1))
    for account, at_s, amount in ((one, 100.0, 5), (other, 110.0, 7), (one, 120.1, 1)):
        for each in (one, other):
            each.advance(quota.bucket_at(at_s))
        account.use(quota.bucket_at(at_s), quota.TOKENS, amount)
    for account in (one, other):
        assert account.frees_s(quota.TOKENS, 5, 121.0) == pytest.approx(39.1)
        assert account.frees_s(quota.TOKENS, 6, 121.0) == pytest.approx(49.1)
        assert account.frees_s(quota.TOKENS, 13, 121.0) == pytest.approx(59.2)
        assert account.frees_s(quota.TOKENS, 14, 121.0) == 60.0
        assert account.whole_s(quota.TOKENS, account.sum(quota.TOKENS), 121.0) == pytest.approx(
            59.2
        )
        assert account.whole_s(quota.REQUESTS, account.sum(quota.REQUESTS), 121.0) == 0.0
    # What it says comes true, and not before.
    due = quota.bucket_at(121.0 + 39.1)
    one.advance(due - 1)
    assert one.sum(quota.TOKENS) == 13
    one.advance(due)
    assert one.sum(quota.TOKENS) == 8


def test_what_is_given_back_after_a_minute_is_nobodys() -> None:
    account = Account(memory(1), 1, 0, 0)
    account.advance(400)
    account.use(400, quota.TOKENS, 9)
    account.give_back(400, quota.TOKENS, 4)
    assert account.sum(quota.TOKENS) == 5
    account.advance(400 + quota.BUCKETS)
    account.use(400 + quota.BUCKETS, quota.TOKENS, 2)  # in the same place of the ring
    account.give_back(400, quota.TOKENS, 5)
    assert account.sum(quota.TOKENS) == 2


def test_a_worker_that_died_leaves_its_minute_to_the_next_and_nothing_in_flight() -> None:
    cells = memory(2)
    before = Account(cells, 2, 3, 1)
    before.advance(400)
    before.use(400, quota.TOKENS, 50)
    before.add(quota.TOKENS, 11)  # it died between two writings
    before.add(quota.CONCURRENT, 2)
    before.add_to_day(20_000, 30, 40)
    Row(cells, 2, 3, 2).forget_flight(1)
    after, other = Account(cells, 2, 3, 1), Account(cells, 2, 3, 0)
    after.advance(500)
    assert other.sum(quota.TOKENS) == 50
    assert other.sum(quota.CONCURRENT) == 0
    assert other.of_day(quota.DAY_TOKENS, 20_000) == 30
    after.advance(400 + quota.BUCKETS)
    assert other.sum(quota.TOKENS) == 0


def test_a_day_ends_for_all_at_once() -> None:
    cells = memory(2)
    one, other, rest = (Row(cells, 2, 1, place) for place in range(3))
    one.add_to_day(20_000, 5, 7)
    other.add_to_day(20_000, 6, 8)
    rest.add_to_day(20_000, 100, 0)
    assert one.of_day(quota.DAY_TOKENS, 20_000) == 111
    assert one.of_day(quota.DAY_TOKENS, 20_000, workers_only=True) == 11
    assert one.of_day(quota.DAY_COST, 20_000) == 15
    other.add_to_day(20_001, 1, 2)
    assert one.of_day(quota.DAY_TOKENS, 20_001) == 1
    assert one.of_day(quota.DAY_COST, 20_001) == 2


def test_tenants_keep_their_rows() -> None:
    rows = Rows()
    first, cleared = rows.assign(["a", "b"])
    assert (first, cleared) == ({"a": 0, "b": 1}, [])
    assert rows.assign(["0", "b"]) == ({"0": 2, "b": 1}, [])
    assert rows.assign(["0", "a", "b"])[0] == {"0": 2, "a": 0, "b": 1}


def test_only_a_row_that_nobody_has_is_given_away_and_it_is_cleared() -> None:
    rows = Rows()
    names = [str(number) for number in range(quota.ROWS_MAX)]
    rows.assign(names)
    assert "x" not in rows.assign([*names, "x"])[0]
    given, cleared = rows.assign([*names[:5], *names[6:], "x"])
    assert given["x"] == 5
    assert cleared == [5]
    assert len(set(given.values())) == quota.ROWS_MAX
