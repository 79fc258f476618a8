"""How many requests each limited replica has from all workers of a proxy together, exactly.

What workers tell each other is some milliseconds old, so two of them may both see the last place of
a replica. Here they reserve it: each has a cell of its own for each replica, in memory that all
share, writes its request there first and then reads the cells of all. Whoever finds that it is one
too many takes it back. Of two that write and then read, at least one sees the other, as long as no
processor reads before it has written; so near the limit the reading is done under a lock, which
the kernel orders and ends with the process. Farther away, by as many as there are other workers,
each of them may have one request on its way that is not seen yet, and the limit still holds; no
worker can have two, because a processor writes within nanoseconds and a request takes microseconds.

Nobody waits for the lock: whoever does not get it takes the replica for full, and asks again soon.
A cell has one writer, and who fills a place that another has left begins with empty cells. What
other proxies have there comes by notes alone (`core.hearsay`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Final

from proxy.contract import FleetSnapshot
from proxy.core.lease import Lease
from proxy.core.replica import Replica, names_of

COLUMNS_MAX: Final = 4096  # replicas with a limit; others are not counted here
CELL_BYTES: Final = 4
_KINDS: Final = 2  # requests, and prompt tokens in line


def table_bytes(workers: int) -> int:
    """Return the size of the memory that so many workers share."""
    return COLUMNS_MAX * _KINDS * workers * CELL_BYTES


class Columns:
    """Which column is whose. One keeps it while it is there, in all lives of its engine."""

    def __init__(self) -> None:
        self._of: dict[str, int] = {}

    def assign(self, snapshot: FleetSnapshot) -> dict[str, int]:
        """Return the columns of all that have a limit, as far as there are any.

        Workers that have not heard yet count for one that is gone what is another's now: so that
        takes less for a moment, and never more.
        """
        measured = {pool.pool for pool in snapshot.pools if pool.max_tokens}
        wanted: dict[str, None] = {}
        for record in snapshot.replicas:
            if record.max_inputs or record.pool in measured:
                wanted.update(dict.fromkeys(names_of(record)))
        kept = {name: column for name, column in self._of.items() if name in wanted}
        taken = set(kept.values())
        free = (column for column in range(COLUMNS_MAX) if column not in taken)
        for name in wanted:
            if name not in kept and (column := next(free, None)) is not None:
                kept[name] = column
        self._of = kept
        return dict(kept)


class Headcount:
    """One worker's part of the counts, and its view of all."""

    def __init__(
        self,
        cells: memoryview,
        place: int,
        workers: int,
        lock: Callable[[int], bool],
        unlock: Callable[[int], None],
    ) -> None:
        """`cells` are 32-bit numbers, `place` is this worker's. `lock(column)` may fail."""
        self._cells = cells
        self._place = place
        self._workers = workers
        self._lock = lock
        self._unlock = unlock
        self._limits: dict[str, tuple[int, int, int]] = {}  # its cell, and how much it may have
        self._reserved: tuple[str, int, int] | None = None  # by nobody's lease yet

    def know(
        self, columns: Mapping[str, int], replicas: Iterable[Replica], leases: Collection[Lease]
    ) -> None:
        """These are the replicas now; count anew what we have there."""
        self._reserved = None
        self._limits = {}
        for replica in replicas:
            column = columns.get(replica.name, -1)
            if column >= 0:
                own = column * _KINDS * self._workers + self._place
                self._limits[replica.name] = (own, replica.max_inputs, replica.max_tokens)
        counts: dict[int, int] = {}
        for lease in leases:
            if lease.cell >= 0:
                own = (
                    self._limits[lease.replica_name][0]
                    if lease.replica_name in self._limits
                    else -1
                )
                lease.cell = own
                if own >= 0:
                    counts[own] = counts.get(own, 0) + 1
                    queued = own + self._workers
                    counts[queued] = counts.get(queued, 0) + lease.queued_tokens
        # Each cell goes from what it was to what it is, so that nobody sees less in between.
        for cell in range(self._place, len(self._cells), self._workers):
            if self._cells[cell] != counts.get(cell, 0):
                self._cells[cell] = counts.get(cell, 0)

    def take(self, name: str, tokens: int, lower_max: int = 0) -> bool:
        """Reserve a place for a request with so much to compute; `hold` it in the same turn.

        `lower_max`: for one that may only come while there are fewer than this; 0: as many as may.
        """
        self._give_up()
        limits = self._limits.get(name)
        if limits is None:
            return True
        own, most, tokens_most = limits
        most = lower_max or most
        if not tokens_most:
            tokens = 0
        self._add(own, 1, tokens)
        if not tokens_most and self._sum(own) + self._workers - 1 <= most:
            self._reserved = (name, own, tokens)
            return True
        fits = False
        if self._lock(own):
            try:
                fits = not most or self._sum(own) <= most
                if fits and tokens_most:
                    queued_tokens = self._sum(own + self._workers)
                    fits = queued_tokens <= tokens_most or queued_tokens == tokens
            finally:
                self._unlock(own)
        if fits:
            self._reserved = (name, own, tokens)
        else:
            self._add(own, -1, -tokens)
        return fits

    def hold(self, lease: Lease) -> None:
        """What was reserved is this lease's; one that nothing was reserved for is not counted."""
        if self._reserved is not None and self._reserved[0] == lease.replica_name:
            _, lease.cell, lease.queued_tokens = self._reserved
            self._reserved = None

    def left_line(self, lease: Lease) -> None:
        """Its prompt is computed, or will not be."""
        tokens, lease.queued_tokens = lease.queued_tokens, 0
        if lease.cell >= 0:
            self._add(lease.cell, 0, -tokens)

    def give_back(self, lease: Lease) -> None:
        """It has ended."""
        if lease.cell >= 0:
            self._add(lease.cell, -1, -lease.queued_tokens)
            lease.cell, lease.queued_tokens = -1, 0

    def _give_up(self) -> None:
        """Nobody came for what was reserved last: something failed."""
        if self._reserved is not None:
            _, own, tokens = self._reserved
            self._add(own, -1, -tokens)
            self._reserved = None

    def _add(self, own: int, requests: int, tokens: int) -> None:
        self._cells[own] += requests
        if tokens:
            self._cells[own + self._workers] += tokens

    def _sum(self, own: int) -> int:
        """Return what all workers have in the row of cells in which this one's is."""
        start = own - self._place
        return sum(self._cells[start : start + self._workers].tolist())
