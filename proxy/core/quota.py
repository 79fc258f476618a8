"""What tenants have used, counted by all workers of a proxy together, in memory that they share.

For each tenant there is a row, and in it a cell for each worker and kind of count. A cell has one
writer, so nothing is locked: whoever admits a request writes it into his own cell first and then
reads the cells of all, and takes it back when they are too many together. Of two who write and then
read, at least one sees the other, because a processor writes within nanoseconds and between the
writing and the reading stand some hundred instructions. So a limit is never exceeded; right below
it two who come in the same microseconds may both take back, and the next one gets it.

A minute is a *sliding* one: what was used is kept by tenths of a second, in a ring of each
worker's own, and forgotten a minute after the end of its tenth. So no sixty seconds, whenever
they begin, hold more than a minute's limit, and under saturation they hold 600/601 of it. A ring
lies in the shared memory, too: it outlives its worker, whose successor goes on with it, and all can
reckon when enough of everybody's will be forgotten.

A day goes from midnight to midnight, UTC. Each cell says of which day it is, so the first use of a
new day needs nobody's consent. What other proxies have used, and what this one had before it was
started, is in a last cell of each row, which the supervisor writes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from itertools import accumulate
from struct import Struct
from typing import Final

BUCKETS_PER_S: Final = 10
WINDOW_S: Final = 60
# One more than a minute has: the one that has begun is not over.
BUCKETS: Final = WINDOW_S * BUCKETS_PER_S + 1
DAY_S: Final = 86_400

ROWS_MAX: Final = 4096  # tenants with a limit; a configuration with more is refused
CELL_BYTES: Final = 8
# What a row has of each process.
REQUESTS: Final = 0  # begun within the minute
TOKENS: Final = 1  # of these: what was used, or is reserved
CONCURRENT: Final = 2
HELD_TOKENS: Final = 3  # reserved, by those that run
HELD_COST: Final = 4  # in billionths of the currency
DAY: Final = 5  # of which the next two are, by number since 1970
DAY_TOKENS: Final = 6
DAY_COST: Final = 7
SWEPT: Final = 8  # the bucket up to which the ring is in order
KINDS: Final = 9


def memory_bytes(workers: int) -> int:
    """Return the size of what so many workers share; only what is touched takes memory."""
    return ROWS_MAX * CELL_BYTES * (KINDS * (workers + 1) + 2 * BUCKETS * workers)


def cells_of(row: int, workers: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return where the counts and the rings of a row begin and end."""
    counts, rings = KINDS * (workers + 1), 2 * BUCKETS * workers
    first = ROWS_MAX * counts + row * rings
    return (row * counts, (row + 1) * counts), (first, first + rings)


def bucket_at(now_s: float) -> int:
    return int(now_s * BUCKETS_PER_S)


def day_at(unix_s: float) -> int:
    return int(unix_s // DAY_S)


class Rows:
    """Which row is whose. A tenant keeps its row for good, so that nobody gets another's counts.

    One that is no longer configured may come back, and what runs of it is still to be settled; its
    row is given away only when no other is left, to one that begins with empty cells.
    """

    def __init__(self) -> None:
        self._of: dict[str, int] = {}

    def assign(self, names: Iterable[str]) -> tuple[dict[str, int], list[int]]:
        """Return the rows of those who are limited now, and the rows that must be cleared."""
        wanted = dict.fromkeys(names)
        free = [name for name in self._of if name not in wanted]
        cleared = []
        for name in wanted:
            if name in self._of:
                continue
            if len(self._of) < ROWS_MAX:
                self._of[name] = len(self._of)
            elif free:
                self._of[name] = row = self._of.pop(free.pop(0))
                cleared.append(row)
        return {name: self._of[name] for name in wanted if name in self._of}, cleared

    @property
    def used(self) -> dict[str, int]:
        """All that were ever given, by tenant."""
        return self._of


class Row:
    """One tenant's counts, as the process that writes the column `place` sees them."""

    __slots__ = ("_at", "_cells", "_columns", "_place", "_unpack")

    def __init__(self, cells: memoryview, workers: int, row: int, place: int) -> None:
        """`cells` are 64-bit numbers. The supervisor's place is the one after the workers'."""
        self._cells = cells
        self._columns = workers + 1
        self._at = cells_of(row, workers)[0][0]
        self._place = place
        self._unpack = Struct(f"{self._columns}q").unpack_from  # all cells of one kind

    def sum(self, kind: int) -> int:
        """Return what all have."""
        start = self._at + kind * self._columns
        return sum(self._unpack(self._cells, start * CELL_BYTES))

    def sum_of_workers(self, kind: int) -> int:
        """Return what the workers of this proxy have."""
        start = self._at + kind * self._columns
        return sum(self._cells[start : start + self._columns - 1].tolist())

    def own(self, kind: int) -> int:
        return int(self._cells[self._at + kind * self._columns + self._place])

    def put(self, kind: int, value: int) -> None:
        self._cells[self._at + kind * self._columns + self._place] = value

    def add(self, kind: int, amount: int) -> None:
        if amount:
            self._cells[self._at + kind * self._columns + self._place] += amount

    def of_day(self, kind: int, today: int, *, workers_only: bool = False) -> int:
        """Return what was used today, as far as it is settled; `kind` is one of the day's."""
        days = self._at + DAY * self._columns
        cells = self._at + kind * self._columns
        total = 0
        for place in range(self._columns - workers_only):
            if self._cells[days + place] == today:
                total += self._cells[cells + place]
        return total

    def add_to_day(self, today: int, tokens: int, cost: int) -> None:
        """Count what is settled. A cell of another day begins anew."""
        if self.own(DAY) != today:
            self.put(DAY, 0)  # nobody reads a half of it
            self.put(DAY_TOKENS, 0)
            self.put(DAY_COST, 0)
            self.put(DAY, today)
        self.add(DAY_TOKENS, tokens)
        self.add(DAY_COST, cost)

    def octets(self) -> bytes:
        """Return all cells of it, to see whether anything has changed."""
        return bytes(self._cells[self._at : self._at + KINDS * self._columns])

    def forget_flight(self, place: int) -> None:
        """Whoever wrote this column is dead, and so are the requests that he had running."""
        for kind in (CONCURRENT, HELD_TOKENS, HELD_COST):
            self._cells[self._at + kind * self._columns + place] = 0


class Account(Row):
    """A row as a worker has it, with its part of the minute."""

    __slots__ = ("_merged", "_merged_at", "_ring", "_rings", "_swept", "_workers")

    def __init__(self, cells: memoryview, workers: int, row: int, place: int) -> None:
        super().__init__(cells, workers, row, place)
        self._workers = workers
        self._rings = cells_of(row, workers)[1][0]
        self._ring = self._ring_of(place)
        self._swept = self.own(SWEPT)
        self._merged: list[list[int]] = [[], []]  # of requests and tokens, oldest first, summed up
        self._merged_at = -1  # the bucket in which that was
        # Whoever had this place before may have died between two writings.
        for kind in (REQUESTS, TOKENS):
            start = self._ring + kind * BUCKETS
            self.put(kind, sum(cells[start : start + BUCKETS].tolist()))

    def _ring_of(self, place: int) -> int:
        return self._rings + place * 2 * BUCKETS

    def advance(self, bucket: int) -> bool:
        """Forget what is older than a minute; return whether anything is left."""
        left = self.own(REQUESTS) or self.own(TOKENS)
        if bucket > self._swept:
            if left:  # else all of the ring is 0
                first = max(self._swept + 1, bucket - BUCKETS + 1)
                for number in range(first, bucket + 1):
                    self._forget(number % BUCKETS)
                left = self.own(REQUESTS) or self.own(TOKENS)
            self._swept = bucket
            self.put(SWEPT, bucket)
        return bool(left)

    def _forget(self, slot: int) -> None:
        cells, ring = self._cells, self._ring
        for kind in (REQUESTS, TOKENS):
            used = cells[ring + kind * BUCKETS + slot]
            if used:
                cells[ring + kind * BUCKETS + slot] = 0
                self.add(kind, -used)

    def use(self, bucket: int, kind: int, amount: int) -> None:
        """Count something in the bucket, which is that of now."""
        if amount:
            self._cells[self._ring + kind * BUCKETS + bucket % BUCKETS] += amount
            self.add(kind, amount)

    def give_back(self, bucket: int, kind: int, amount: int) -> None:
        """Count less in a bucket; what is forgotten already is nobody's any more."""
        if amount and self._swept - bucket < BUCKETS:
            self._cells[self._ring + kind * BUCKETS + bucket % BUCKETS] -= amount
            self.add(kind, -amount)

    # --- when there will be room -------------------------------------------------------------

    def frees_s(self, kind: int, amount: int, now_s: float) -> float:
        """Return in how many seconds so much will be forgotten, if nothing comes meanwhile.

        Of what other proxies have nobody here knows the age: it may take the whole minute.
        """
        bucket = bucket_at(now_s)
        if self._merged_at != bucket:
            self._merge(bucket)
        place = bisect_left(self._merged[kind], amount)
        if place >= BUCKETS:
            return float(WINDOW_S)
        oldest = bucket - BUCKETS + 1
        return (oldest + place + BUCKETS) / BUCKETS_PER_S - now_s

    def whole_s(self, kind: int, used: int, now_s: float) -> float:
        """Return in how many seconds all of what is `used` will be forgotten."""
        if used <= 0:
            return 0.0
        bucket = bucket_at(now_s)
        if self._swept == bucket and self._cells[self._ring + kind * BUCKETS + bucket % BUCKETS]:
            return float(WINDOW_S)  # some of it is of now: no ring need be read
        return self.frees_s(kind, used, now_s)

    def _merge(self, bucket: int) -> None:
        """Sum up all rings, the oldest first. Others may not have forgotten yet what is over."""
        self._merged_at = bucket
        for kind in (REQUESTS, TOKENS):
            total = [0] * BUCKETS
            for place in range(self._workers):
                start = self._ring_of(place) + kind * BUCKETS
                ring = self._cells[start : start + BUCKETS].tolist()
                total = [one + other for one, other in zip(total, ring, strict=True)]
            first = (bucket + 1) % BUCKETS
            self._merged[kind] = list(accumulate(total[first:] + total[:first]))
