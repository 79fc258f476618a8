"""The memory that the workers of one proxy have in common.

In one part they count together what each replica has (`core.headcount`), in another they keep the
numbers of hops that have been used (`core.nonces`). The supervisor makes it, and each worker
inherits its descriptor. It has no name anywhere, and is gone with the last who has it open.
"""

from __future__ import annotations

import fcntl
import mmap
import os

from proxy.core.headcount import CELL_BYTES, Headcount, table_bytes
from proxy.core.nonces import Nonces, memory_bytes


class SharedCells:
    """The supervisor's hold on it."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.fd = os.memfd_create("doherty-headcount", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, table_bytes(workers))
        self._memory = mmap.mmap(self.fd, table_bytes(workers))

    def clear(self, place: int) -> None:
        """Whoever filled this place is dead: so are the requests that it had."""
        step = self.workers * CELL_BYTES
        for at in range(place * CELL_BYTES, len(self._memory), step):
            self._memory[at : at + CELL_BYTES] = bytes(CELL_BYTES)

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
