"""What each tenant was given by all workers of a proxy, in memory that they share.

The kernel deals connections to workers by their addresses and not by whose they are, so one worker
may have nearly all requests of a tenant. Each alone would then be fair among those that it happens
to have; together they are fair only if each knows what the others gave whom, and who waits there.

A row is one tenant's account in one class. In it each worker has cells that it alone writes: what
it charged, how many wait, and when one came last. What is read of others may be some microseconds
old, which is nothing against the requests by which shares are measured. Only who makes a row, or
raises a sum, holds a lock meanwhile. The row of a tenant is one of a few that follow from his name;
where all are others', that has been idle longest, and long enough, becomes his.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

import xxhash

from proxy.core import claim_limits
from proxy.core.classes import NAMES

ROWS: Final = 1024
_WAYS: Final = 16  # rows among which one name is looked for
NAME_BYTES: Final = 8
_CELL_BYTES: Final = 8
_KINDS: Final = 3  # charged, waiting, seen


def share_table_bytes(workers: int) -> int:
    """Return the size of the memory that so many workers share."""
    return ROWS * (NAME_BYTES + _row_cells(workers) * _CELL_BYTES)


def _row_cells(workers: int) -> int:
    return _KINDS * workers + 1  # the last is what workers charged that are gone


def name_of(work_class: int, tenant: str) -> int:
    """Return the name of a row: the same in every worker, never 0, and telling its class."""
    digest = xxhash.xxh3_64_intdigest(tenant.encode())
    return (digest & ~3 or 4) | work_class


class Seen(NamedTuple):
    """One row as it is now."""

    name: int
    charged: float  # by all
    own: float
    waiting_elsewhere: int
    seen_s: float  # by all

    @property
    def work_class(self) -> int:
        return min(self.name & 3, len(NAMES) - 1)


class ShareCells:
    """One worker's part of it, and its view of all."""

    def __init__(
        self,
        names: memoryview[int],
        cells: memoryview[float],
        place: int,
        workers: int,
        lock: Callable[[], None],
        unlock: Callable[[], None],
    ) -> None:
        """`names` are 64-bit numbers, `cells` doubles; `place` is this worker's."""
        self._names = names
        self._cells = cells
        self._place = place
        self._workers = workers
        self._width = _row_cells(workers)
        self._lock = lock
        self._unlock = unlock

    def row(self, name: int, now_s: float) -> int:
        """Return the row of this name; it is made where there is none. Below 0: no room."""
        found = self._find(name)
        if found >= 0:
            return found
        self._lock()
        try:
            found = self._find(name)
            if found < 0:
                found = self._make(name, now_s)
        finally:
            self._unlock()
        return found

    def _find(self, name: int) -> int:
        start = name % ROWS
        for step in range(_WAYS):
            row = (start + step) % ROWS
            if self._names[row] == name:
                return row
        return -1

    def _make(self, name: int, now_s: float) -> int:
        start = name % ROWS
        best, best_s = -1, now_s - claim_limits.SHARE_IDLE_S
        for step in range(_WAYS):
            row = (start + step) % ROWS
            if not self._names[row]:
                best = row
                break
            seen = self.seen(row)
            if not (seen.waiting_elsewhere or self._own_waiting(row)) and seen.seen_s < best_s:
                best, best_s = row, seen.seen_s
        if best >= 0:
            at = best * self._width
            for cell in range(at, at + self._width):
                self._cells[cell] = 0.0
            self._cells[at + 2 * self._workers + self._place] = now_s
            self._names[best] = name
        return best

    def _own_waiting(self, row: int) -> float:
        return float(self._cells[row * self._width + self._workers + self._place])

    def write(self, row: int, name: int, charged: float, waiting: int, seen_s: float) -> bool:
        """Tell what this worker knows of one. False: the row is another's by now."""
        if self._names[row] != name:
            return False
        at = row * self._width + self._place
        self._cells[at] = charged
        self._cells[at + self._workers] = float(waiting)
        self._cells[at + 2 * self._workers] = seen_s
        return True

    def lift(self, row: int, name: int, counter: float) -> float:
        """Raise the sum to this, unless another worker has; return what is this worker's of it."""
        self._lock()
        try:
            seen = self.seen(row)
            if seen.name != name or seen.charged >= counter:
                return seen.own
            own = seen.own + counter - seen.charged
            self._cells[row * self._width + self._place] = own
            return own
        finally:
            self._unlock()

    def seen(self, row: int) -> Seen:
        at, workers, place = row * self._width, self._workers, self._place
        # Not `tolist`, which is declared to give integers: a translation holds it to that.
        cells = list(self._cells[at : at + self._width])
        own = cells[place]
        waiting = sum(cells[workers : 2 * workers]) - cells[workers + place]
        return Seen(
            self._names[row],
            sum(cells[:workers]) + cells[3 * workers],
            own,
            int(waiting),
            max(cells[2 * workers : 3 * workers]),
        )

    def all_seen(self) -> list[Seen]:
        """Return the rows that are anybody's."""
        names = self._names.tolist()
        return [self.seen(row) for row in range(ROWS) if names[row]]


def bury(names: memoryview[int], cells: memoryview[float], place: int, workers: int) -> None:
    """A worker is gone: nobody waits there any more, and what it charged stays charged."""
    width = _row_cells(workers)
    for row in range(len(names)):
        at = row * width + place
        cells[row * width + width - 1] += cells[at]
        cells[at] = cells[at + workers] = 0.0
