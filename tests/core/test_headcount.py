"""Counting together: whoever is one too many takes it back, whatever the others do meanwhile."""

from __future__ import annotations

import msgspec
import pytest

from proxy.contract import FleetSnapshot, PoolRecord, ReplicaRecord
from proxy.core.headcount import COLUMNS_MAX, Columns, Headcount, table_bytes
from proxy.core.lease import Lease
from proxy.core.replica import Replica, replicas_of


class Table:
    """The memory of all, and its locks."""

    def __init__(self, workers: int) -> None:
        self.cells = memoryview(bytearray(table_bytes(workers))).cast("i")
        self.locked: set[int] = set()
        self.locks = 0
        self.workers = [self._worker(place, workers) for place in range(workers)]

    def _worker(self, place: int, workers: int) -> Headcount:
        def lock(at: int) -> bool:
            self.locks += 1
            if at - place in self.locked:
                return False
            self.locked.add(at - place)
            return True

        return Headcount(
            self.cells, place, workers, lock, lambda at: self.locked.discard(at - place)
        )

    def know(self, *replicas: Replica, columns: dict[str, int] | None = None) -> None:
        columns = columns or {replica.name: at for at, replica in enumerate(replicas)}
        for worker in self.workers:
            worker.know(columns, replicas, ())

    def total(self) -> int:
        return sum(self.cells.tolist())


def replica(name: str, max_inputs: int = 0, max_tokens: int = 0) -> Replica:
    record = ReplicaRecord(replica_id=name, url="http://127.0.0.1:1", max_inputs=max_inputs)
    return replicas_of(record, max_tokens)[0]


def lease_of(worker: Headcount, name: str, tokens: int = 1) -> Lease | None:
    """Reserve and hold."""
    if not worker.take(name, tokens):
        return None
    lease = Lease(0, name, prefill_tokens=tokens, prompt_tokens=tokens)
    worker.hold(lease)
    return lease


def test_all_workers_together_have_no_more_than_one_may() -> None:
    table = Table(3)
    table.know(replica("a", 4), replica("b", 1))
    held = [lease_of(table.workers[turn % 3], "a") for turn in range(9)]
    assert [lease is not None for lease in held] == [True] * 4 + [False] * 5
    assert lease_of(table.workers[2], "b") is not None
    assert lease_of(table.workers[0], "b") is None
    first = held[0]
    assert first is not None
    table.workers[0].give_back(first)
    assert lease_of(table.workers[1], "a") is not None
    assert table.total() == 5


def test_the_lock_is_only_asked_for_near_the_limit() -> None:
    table = Table(4)
    table.know(replica("a", 100))
    for _ in range(97):
        assert lease_of(table.workers[1], "a") is not None
    assert table.locks == 0
    for _ in range(3):
        assert lease_of(table.workers[2], "a") is not None
    assert table.locks == 3
    assert lease_of(table.workers[3], "a") is None


def test_whoever_does_not_get_the_lock_leaves_no_trace() -> None:
    table = Table(2)
    table.know(replica("a", 1))
    table.locked.add(0)
    assert lease_of(table.workers[0], "a") is None
    assert table.total() == 0
    table.locked.clear()
    assert lease_of(table.workers[0], "a") is not None


def test_two_that_reserve_the_last_place_in_one_moment_never_both_have_it() -> None:
    """The other writes its cell just before this one reads: the worst that can happen."""
    table = Table(2)
    table.know(replica("a", 1))
    one, other = table.workers
    other._lock = lambda at: False  # so it gives up, in whichever order
    assert other.take("a", 1) is False
    table.cells[1] = 1  # it has written, and not read yet
    assert one.take("a", 1) is False
    table.cells[1] = 0
    assert one.take("a", 1) is True


def test_tokens_in_line_are_counted_until_they_have_left_it() -> None:
    table = Table(2)
    table.know(replica("a", max_tokens=100))
    one, other = table.workers
    large = lease_of(one, "a", 500)  # alone it may be larger than the limit
    assert large is not None
    assert lease_of(other, "a", 1) is None
    one.left_line(large)
    assert lease_of(other, "a", 60) is not None
    assert lease_of(one, "a", 41) is None
    assert lease_of(one, "a", 40) is not None
    one.give_back(large)
    assert table.total() == 2 + 100


def test_what_was_reserved_for_nobody_is_given_back() -> None:
    table = Table(2)
    table.know(replica("a", 2, 50), replica("b", 2))
    one = table.workers[0]
    assert one.take("a", 30)  # and then something fails
    assert lease_of(one, "b") is not None
    assert table.total() == 1


def test_what_nothing_was_reserved_for_is_not_counted() -> None:
    table = Table(2)
    table.know(replica("a", 1))
    lookup = Lease(0, "a", prefill_tokens=1, prompt_tokens=1)
    table.workers[0].hold(lookup)
    table.workers[0].give_back(lookup)
    unlimited = lease_of(table.workers[0], "nobody's")
    assert unlimited is not None
    assert unlimited.cell < 0
    assert table.total() == 0


def test_another_fleet_counts_anew_and_what_is_gone_is_not_counted() -> None:
    table = Table(2)
    table.know(replica("a", 3, 99), replica("b", 3))
    one = table.workers[0]
    leases = [lease_of(one, "a", 7), lease_of(one, "a", 8), lease_of(one, "b")]
    held = [lease for lease in leases if lease is not None]
    moved = replica("a", 2, 99)
    for worker, theirs in zip(table.workers, (held, []), strict=True):
        worker.know({"a": 5}, [moved], theirs)
    assert table.total() == 2 + 15
    assert lease_of(table.workers[1], "a") is None
    for lease in held:
        one.give_back(lease)
    assert table.total() == 0


def test_columns_stay_and_are_used_again() -> None:
    columns = Columns()
    records = [
        ReplicaRecord(replica_id=name, url="http://h", pool="m", max_inputs=most)
        for name, most in (("a", 1), ("free", 0), ("b", 1))
    ]

    def fleet(*replicas: ReplicaRecord, tokens: int = 0) -> FleetSnapshot:
        pool = PoolRecord(model="m", pool="m", max_tokens=tokens)
        return FleetSnapshot(epoch="e", version=1, replicas=replicas, pools=(pool,))

    assert columns.assign(fleet(*records)) == {"a": 0, "b": 1}
    assert columns.assign(fleet(*records[1:])) == {"b": 1}
    assert columns.assign(fleet(*records[1:], tokens=9)) == {"b": 1, "free": 0}
    ranks = msgspec.structs.replace(records[0], dp_size=2)
    assert columns.assign(fleet(ranks, records[2])) == {"b": 1, "a/0": 0, "a/1": 2}


@pytest.mark.parametrize("extra", [0, 5])
def test_there_are_only_so_many_columns(extra: int) -> None:
    snapshot = FleetSnapshot(
        epoch="e",
        version=1,
        replicas=tuple(
            ReplicaRecord(replica_id=str(n), url="http://h", max_inputs=1)
            for n in range(COLUMNS_MAX + extra)
        ),
    )
    found = Columns().assign(snapshot)
    assert sorted(found.values()) == list(range(COLUMNS_MAX))
