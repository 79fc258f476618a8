"""The memory that the workers of one proxy have in common.

In its first part they count requests (`core.headcount`), in its second tenants' tokens
(`core.share_cells`); in another piece they keep the numbers of hops that have been used
(`core.nonces`), and in one more they and the supervisor say what they decide (`core.note_ring`).
The supervisor makes it, and each worker inherits its descriptor. It has no name anywhere, and is
gone with the last who has it open.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Sequence

from proxy.core.headcount import CELL_BYTES, Headcount, table_bytes
from proxy.core.nonces import Nonces, memory_bytes
from proxy.core.note_ring import RingReader, RingWriter, rings_bytes
from proxy.core.share_cells import NAME_BYTES, ROWS, ShareCells, bury, share_table_bytes


class SharedCells:
    """The supervisor's hold on it."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.fd = os.memfd_create("doherty-headcount", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, _all_bytes(workers))
        self._memory = mmap.mmap(self.fd, _all_bytes(workers))

    def clear(self, place: int) -> None:
        """Whoever filled this place is dead: so are the requests that it had."""
        step = self.workers * CELL_BYTES
        for at in range(place * CELL_BYTES, table_bytes(self.workers), step):
            self._memory[at : at + CELL_BYTES] = bytes(CELL_BYTES)
        names, cells = _shares_in(self._memory, self.workers)
        bury(names, cells, place, self.workers)
        names.release()
        cells.release()

    def close(self) -> None:
        """Harmless when repeated."""
        if not self._memory.closed:
            self._memory.close()
            os.close(self.fd)


class SharedNonces:
    """The supervisor's hold on the numbers that workers have used: they outlive who used them."""

    def __init__(self, workers: int) -> None:
        self.fd = os.memfd_create("doherty-nonces", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, memory_bytes(workers))  # pages are there once they are written

    def close(self) -> None:
        """Harmless when repeated."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class SharedNotes:
    """The supervisor's hold on what is told, and its ends of the rings: the last one is its own."""

    def __init__(self, workers: int) -> None:
        self.fd = os.memfd_create("doherty-notes", os.MFD_CLOEXEC)
        size = rings_bytes(workers + 1)
        os.ftruncate(self.fd, size)  # pages are there once they are written
        self._memory = mmap.mmap(self.fd, size)
        whole = memoryview(self._memory)
        self.writer = RingWriter(whole, workers)
        self.readers = [RingReader(whole, place, (0, 0), ours=True) for place in range(workers)]
        whole.release()

    def ends(self) -> list[tuple[int, int]]:
        """Return up to where each ring is written."""
        return [ring.end for ring in (*self.readers, self.writer)]

    def close(self) -> None:
        """Harmless when repeated."""
        if not self._memory.closed:
            for ring in (self.writer, *self.readers):
                ring.release()
            self.readers.clear()
            self._memory.close()
            os.close(self.fd)


def rings_at(
    fd: int, place: int, ends: Sequence[tuple[int, int]]
) -> tuple[RingWriter, list[RingReader]]:
    """Return a worker's end of its own ring, and its ends of the others: what follows `ends`."""
    whole = memoryview(mmap.mmap(fd, rings_bytes(len(ends))))
    others = [
        RingReader(whole, ring, end, ours=ring < len(ends) - 1)
        for ring, end in enumerate(ends)
        if ring != place
    ]
    return RingWriter(whole, place), others


def nonces_at(fd: int, place: int, workers: int) -> Nonces:
    """Return a worker's part in the memory behind this descriptor."""
    return Nonces(memoryview(mmap.mmap(fd, memory_bytes(workers))).cast("Q"), place, workers)


def headcount_at(fd: int, place: int, workers: int) -> Headcount:
    """Return a worker's part in the memory behind this descriptor."""
    cells = memoryview(mmap.mmap(fd, table_bytes(workers))).cast("i")

    def lock(at: int) -> bool:
        # One lock for each row: the kernel gives it to one process, and takes it from a dead one.
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, at - place)
        except OSError:
            return False
        return True

    def unlock(at: int) -> None:
        fcntl.lockf(fd, fcntl.LOCK_UN, 1, at - place)

    return Headcount(cells, place, workers, lock, unlock)


def shares_at(fd: int, place: int, workers: int) -> ShareCells:
    """Return a worker's part in the second part of that memory."""
    names, cells = _shares_in(mmap.mmap(fd, _all_bytes(workers)), workers)
    end = _all_bytes(workers)

    def lock() -> None:
        fcntl.lockf(fd, fcntl.LOCK_EX, 1, end)  # for microseconds, and never by a dead process

    def unlock() -> None:
        fcntl.lockf(fd, fcntl.LOCK_UN, 1, end)

    return ShareCells(names, cells, place, workers, lock, unlock)


def _all_bytes(workers: int) -> int:
    return table_bytes(workers) + share_table_bytes(workers)


def _shares_in(memory: mmap.mmap, workers: int) -> tuple[memoryview[int], memoryview[float]]:
    start = table_bytes(workers)
    whole = memoryview(memory)
    names = whole[start : start + ROWS * NAME_BYTES].cast("Q")
    return names, whole[start + ROWS * NAME_BYTES :].cast("d")
