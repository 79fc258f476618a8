"""Reads weights and compile caches into the page cache, so that an engine finds them in memory.

An engine spends its first tens of seconds on imports and reads nothing of its model meanwhile. A
start waits for nothing here: the reading goes on beside it, in one thread, one model at a time, and
ends early rather than push other pages out (`MEMORY_SHARE`). What is cached already is left alone,
so that a restart costs a look (mincore) and no traffic.

mincore answers for files that we own or may write, and calls every page of others cached (Linux
since 5.2, `can_do_mincore` in mm/mincore.c): those are read without asking, which costs a copy
where they are cached. Pages are read, not merely announced: a file system may ignore an
announcement (posix_fadvise), which is made as well so that the next window is on its way.
"""

from __future__ import annotations

import asyncio
import ctypes
import mmap
import os
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from backends.host_memory import available_bytes
from backends.log import Log
from backends.readahead import (
    FRESH_SHARE_MIN,
    VARIABLE,
    Lists,
    Record,
    fetch,
    name_at,
    record_start,
)
from backends.snapshots.tree import environment_of
from backends.tasks import cancel_all, spawn

MEMORY_SHARE = 0.5  # of what is available; the engine needs host memory of its own
WINDOW_BYTES = 64 * 1024 * 1024
_BUFFER_BYTES = 4 * 1024 * 1024
_libc = ctypes.CDLL(None, use_errno=True)


class Warmed(msgspec.Struct, frozen=True):
    """What came of it."""

    read_bytes: int = 0
    cached_bytes: int = 0  # were in memory before
    left_bytes: int = 0  # stayed on the disk: memory is short, or it was ended
    took_s: float = 0.0


class Warmer:
    """One thread that reads what starts are about to need."""

    def __init__(self, log: Log, *, enabled: bool = True, lists: Lists | None = None) -> None:
        """`lists`: what starts of each release have read."""
        self._log = log
        self._enabled = enabled
        self._lists = lists if enabled else None
        self._stop = threading.Event()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="page-cache")
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def warm(self, what: str, find: Callable[[], Iterable[Path]]) -> None:
        """Read the files that `find` returns, unless `what` is being read already."""
        if not self._enabled or what in self._tasks:
            return
        self._own(what, self._warm(what, find))

    def ahead(self, name: str, environ: dict[str, str]) -> None:
        """Fetch what a start of this name reads; have one that is not known recorded."""
        if self._lists is None:
            return
        record = self._lists.find(name)
        if record is None:
            with suppress(OSError):
                environ[VARIABLE] = self._lists.told_at(name)
        elif f"ahead {name}" not in self._tasks:
            self._own(f"ahead {name}", self._fetch(self._lists, record))

    def answered(self, pid: int) -> None:
        """Have a start recorded that has just come to its end, if it is to be."""
        prefix = environment_of(pid).get(VARIABLE, "")
        name = name_at(prefix)
        if self._lists is None or not name or f"record {name}" in self._tasks:
            return
        if self._lists.find(name) is None:
            self._own(f"record {name}", self._record(self._lists, name, prefix, pid))

    async def idle(self) -> None:
        """Wait until nothing is read."""
        await asyncio.gather(*self._tasks.values())

    async def close(self) -> None:
        self._stop.set()
        await cancel_all(list(self._tasks.values()))
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _own(self, what: str, work: Coroutine[Any, Any, None]) -> None:
        task = spawn(work, f"warm {what}", self._log)
        self._tasks[what] = task
        task.add_done_callback(lambda _: self._tasks.pop(what, None))

    async def _fetch(self, lists: Lists, record: Record) -> None:
        """Fetch, in the one thread, so that the weights come after; forget a list that is stale."""
        if record.bytes_in_all > available_bytes() * MEMORY_SHARE:
            return
        loop = asyncio.get_running_loop()
        done = await loop.run_in_executor(self._executor, fetch, record.reads, self._stop)
        if done.stale > len(record.reads) * FRESH_SHARE_MIN:
            lists.forget(record.name)
        self._log.tell(
            "read_ahead",
            what=record.name,
            files=done.files,
            read_bytes=done.read_bytes,
            stale=done.stale,
            took_s=round(done.took_s, 3),
        )

    async def _record(self, lists: Lists, name: str, prefix: str, pid: int) -> None:
        record = await asyncio.to_thread(record_start, name, prefix, pid)
        if record is None:
            return
        try:
            lists.keep(record)
        except OSError as error:
            self._log.caution("reads_not_kept", what=name, error=str(error))
        else:
            size = record.bytes_in_all
            self._log.tell("reads_recorded", what=name, files=len(record.reads), read_bytes=size)

    async def _warm(self, what: str, find: Callable[[], Iterable[Path]]) -> None:
        loop = asyncio.get_running_loop()
        warmed = await loop.run_in_executor(self._executor, self._read, find)
        if warmed.read_bytes or warmed.left_bytes:
            self._log.tell(
                "page_cache_warmed",
                what=what,
                read_bytes=warmed.read_bytes,
                cached_bytes=warmed.cached_bytes,
                left_bytes=warmed.left_bytes,
                took_s=round(warmed.took_s, 3),
            )

    def _read(self, find: Callable[[], Iterable[Path]]) -> Warmed:
        return warm_files(find(), int(available_bytes() * MEMORY_SHARE), self._stop)


def warm_files(files: Iterable[Path], budget_bytes: int, stop: threading.Event) -> Warmed:
    """Read `files` in their order, at most `budget_bytes` that are not in memory yet."""
    started_s = time.monotonic()
    read = cached = left = 0
    for path in files:
        with suppress(OSError):  # gone, or not for us: the engine will say so itself
            size = path.stat().st_size
            if stop.is_set() or read >= budget_bytes:
                left += size
                continue
            for window_bytes, was_cached in _windows(path, size, stop, budget_bytes - read):
                read += 0 if was_cached else window_bytes
                cached += window_bytes if was_cached else 0
                size -= window_bytes
            left += size
    return Warmed(read, cached, left, time.monotonic() - started_s)


def _windows(
    path: Path, size: int, stop: threading.Event, budget_bytes: int
) -> Iterator[tuple[int, bool]]:
    """Read one file window by window; yield the bytes of each and whether they were cached."""
    buffer = memoryview(bytearray(_BUFFER_BYTES))
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        asks = may_ask(path)
        for start in range(0, size, WINDOW_BYTES):
            if stop.is_set() or budget_bytes <= 0:
                return
            length = min(WINDOW_BYTES, size - start)
            if asks and resident_bytes(fd, start, length) >= length:
                yield length, True
                continue
            os.posix_fadvise(fd, start, 2 * WINDOW_BYTES, os.POSIX_FADV_WILLNEED)
            at = start
            while at < start + length:
                count = os.preadv(fd, [buffer[: start + length - at]], at)
                if not count:
                    return  # it has become shorter
                at += count
            budget_bytes -= length
            yield length, False
    finally:
        os.close(fd)


def resident_bytes(fd: int, start: int, length: int) -> int:
    """Return how much of a part of a file, from a page's beginning on, is in memory.

    Raises `OSError`.
    """
    pages = -(-length // mmap.PAGESIZE)
    answer = ctypes.create_string_buffer(pages)
    with mmap.mmap(fd, length, access=mmap.ACCESS_COPY, offset=start) as mapped:
        first = (ctypes.c_char * length).from_buffer(mapped)
        try:
            failed = _libc.mincore(
                ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(length), answer
            )
        finally:
            del first  # or the map cannot be closed
    if failed:
        raise OSError(ctypes.get_errno(), "mincore")
    resident = answer.raw.count(b"\x01")
    return length if resident == pages else resident * mmap.PAGESIZE


def may_ask(path: Path) -> bool:
    """Say whether mincore tells the truth of this file."""
    user = os.geteuid()
    return user in {0, path.stat().st_uid} or os.access(path, os.W_OK)
