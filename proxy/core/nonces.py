"""The numbers that have been used, so that what was signed once is taken once: by all workers.

A number counts for as long as the clocks of two regions may differ and signatures hold, by the
signed time and not by ours. So time is cut into spans as long as that, a number belongs to that of
its signature, and a place in the memory is free again when it is of a span that is over. Each
worker writes only its own part, first, and then reads those of the others: of two that are shown
one number in the same moment at least one sees the other, and neither needs a lock.

The memory is bounded. A number for which there is no room is refused, never forgotten: who signed
it has other places to go to.
"""

from __future__ import annotations

from typing import Final

from proxy.core import claim_limits

SPANS: Final = 3  # of which two may be in use, since a signature may be of the future, too
ENTRIES: Final = 16  # in one place of the memory; the first says of which span the others are
CELL_BYTES: Final = 8
PART_CELLS: Final = SPANS * claim_limits.NONCE_BUCKETS_MAX * ENTRIES


def memory_bytes(workers: int) -> int:
    """Return the octets that the memory of so many workers takes, at most."""
    return workers * PART_CELLS * CELL_BYTES


class Nonces:
    """One worker's view of all numbers that have been used."""

    def __init__(self, cells: memoryview, place: int, workers: int) -> None:
        """`cells` are unsigned numbers of 64 bits, at first all 0."""
        self._cells = cells
        self._place = place
        self._workers = workers

    def use(self, nonce: bytes, unix_s: float) -> bool:
        """Return whether this number, signed at that time, has not been used yet, and use it."""
        mark = int.from_bytes(nonce[:CELL_BYTES], "little") | 1  # 0 is no number
        span = int(unix_s // (2 * claim_limits.HOP_SKEW_S)) + 1
        bucket = int.from_bytes(nonce[CELL_BYTES:], "little") % claim_limits.NONCE_BUCKETS_MAX
        at = ((span % SPANS) * claim_limits.NONCE_BUCKETS_MAX + bucket) * ENTRIES
        return self._write(self._place * PART_CELLS + at, span, mark) and not any(
            self._holds(place * PART_CELLS + at, span, mark)
            for place in range(self._workers)
            if place != self._place
        )

    def _write(self, at: int, span: int, mark: int) -> bool:
        cells = self._cells
        if cells[at] != span:
            for each in range(at + 1, at + ENTRIES):
                cells[each] = 0
            cells[at] = span
        for each in range(at + 1, at + ENTRIES):
            if cells[each] == mark:
                return False
            if not cells[each]:
                cells[each] = mark
                return True
        return False

    def _holds(self, at: int, span: int, mark: int) -> bool:
        part = self._cells[at : at + ENTRIES].tolist()
        return part[0] == span and mark in part[1:]
