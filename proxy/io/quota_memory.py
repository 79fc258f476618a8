"""The memory in which the workers of one proxy count what tenants use (`core.quota`).

The supervisor makes it, knows whose row is whose, and has a column of its own in it; each worker
inherits its descriptor. It is there with one worker as well: the counts outlive that one.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable

from proxy.core import quota
from proxy.core.quota import Row, Rows


class QuotaMemory:
    """The supervisor's hold on it."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.fd = os.memfd_create("doherty-quotas", os.MFD_CLOEXEC)
        size = quota.memory_bytes(workers)
        os.ftruncate(self.fd, size)  # no page of it takes memory before it is written
        self._memory = mmap.mmap(self.fd, size)
        self._cells = memoryview(self._memory).cast("q")
        self._rows = Rows()

    def assign(self, names: Iterable[str]) -> dict[str, int]:
        """Return the rows of the tenants that have limits now."""
        rows, cleared = self._rows.assign(names)
        for row in cleared:
            for start, end in quota.cells_of(row, self.workers):
                self._cells[start:end] = memoryview(bytes(8 * (end - start))).cast("q")
        return rows

    def rows(self) -> dict[str, Row]:
        """Return all rows that were ever given, by tenant, to write the supervisor's column."""
        return {name: self._row(row) for name, row in self._rows.used.items()}

    def _row(self, row: int) -> Row:
        return Row(self._cells, self.workers, row, self.workers)

    def forget_flight(self, place: int) -> None:
        """Whoever filled this place is dead: so are the requests that it had."""
        for row in self._rows.used.values():
            self._row(row).forget_flight(place)

    def close(self) -> None:
        """Harmless when repeated."""
        if not self._memory.closed:
            self._cells.release()
            self._memory.close()
            os.close(self.fd)


def quota_cells_at(fd: int, workers: int) -> memoryview:
    """Return the cells behind this descriptor."""
    return memoryview(mmap.mmap(fd, quota.memory_bytes(workers))).cast("q")


def quota_cells_alone() -> memoryview:
    """Return the cells of a process that counts by itself."""
    return memoryview(mmap.mmap(-1, quota.memory_bytes(1))).cast("q")
