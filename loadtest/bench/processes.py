"""Processes as the kernel accounts for them: processor time, memory, and the cores they may use.

Processor time comes from the scheduler's own clock of a process, in nanoseconds and with all of its
threads, ended ones included; the ticks of /proc/PID/stat would add 10 ms of doubt to each end.
"""

from __future__ import annotations

import contextlib
import os
import resource
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from loadtest.run import RunError

_SCHEDULER_CLOCK = 2  # CPUCLOCK_SCHED of the kernel's per-process clocks


class Cores(msgspec.Struct, frozen=True, kw_only=True):
    """Who runs where."""

    proxy: frozenset[int]
    engine: frozenset[int]
    load: frozenset[int]


def share_cores(available: Iterable[int], proxy_cores: int = 1) -> Cores:
    """Give the proxy the last `proxy_cores` cores and the rest to the others, one each if it can.

    A proxy that is given all there are shares them with the load: the run says so.
    """
    cores = sorted(available)
    proxy = cores[-proxy_cores:]
    others = cores[: -len(proxy)] or cores
    return Cores(
        proxy=frozenset(proxy),
        engine=frozenset(others[:1]),
        load=frozenset(others[1:2] or others[:1]),
    )


@contextlib.contextmanager
def on_cores(cores: frozenset[int]) -> Iterator[None]:
    """Have what is started meanwhile run on `cores` from its first instruction."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def descriptors_max() -> int:
    """Return how many descriptors a process may have at most."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[1]


def raise_descriptors() -> None:
    """Let this process, and what it starts, have as many descriptors as it may."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors_max(), descriptors_max()))


def family(pid: int) -> list[int]:
    """Return `pid` and the processes below it, parents first."""
    found = [pid]
    for task in sorted(Path(f"/proc/{pid}/task").glob("*/children")):
        try:
            children = task.read_text().split()
        except OSError:  # the thread ended
            continue
        for child in children:
            found += family(int(child))
    return found


def processor_ns(pid: int) -> int:
    """Return the processor time, user and system, that `pid` has used. Raises `RunError`."""
    clock = ~pid << 3 | _SCHEDULER_CLOCK
    try:
        return time.clock_gettime_ns(clock)
    except OSError as error:
        raise RunError(f"process {pid} ended during a run") from error


def processor_of(pids: Iterable[int]) -> dict[int, int]:
    return {pid: processor_ns(pid) for pid in pids}


def spent_ns(before: dict[int, int], after: dict[int, int]) -> int:
    """Return what was used between two readings; a process that is new used all it has.

    Raises `RunError` if one ended between them: what it had used is not known.
    """
    gone = before.keys() - after.keys()
    if gone:
        raise RunError(f"process {min(gone)} ended during a run")
    return sum(used - before.get(pid, 0) for pid, used in after.items())


def resident_bytes(pid: int) -> int:
    """Return the resident memory of `pid`, pages that it shares with others included."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def proportional_bytes(pid: int) -> int:
    """Return the memory of `pid`, a page that it shares counted in parts."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise RunError(f"the kernel does not say what process {pid} weighs")


def name(pid: int) -> str:
    """Return what `pid` is called, empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def cores_here() -> frozenset[int]:
    """Return the cores that this process may use."""
    return frozenset(os.sched_getaffinity(0))


def core_count() -> int:
    return len(cores_here())


def cores_allow(proxy_cores: int) -> bool:
    """Say whether so many cores are left to a proxy beside one each for engine and load."""
    return core_count() >= proxy_cores + 2
