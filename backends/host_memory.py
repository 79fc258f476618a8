"""How much memory this machine has, and how much of it can be had without swapping.

A container is told of the whole machine's memory, and has its limit beside it: the smaller counts.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def available_bytes(meminfo: Path = _MEMINFO, limit: Path = _CGROUP_LIMIT) -> int:
    """Return the memory that can be had without swapping; 0 when nobody says."""
    return _read("MemAvailable:", meminfo, limit)


def total_bytes(meminfo: Path = _MEMINFO, limit: Path = _CGROUP_LIMIT) -> int:
    """Return all memory that there is for us; 0 when nobody says."""
    return _read("MemTotal:", meminfo, limit)


def _read(field: str, meminfo: Path, limit: Path) -> int:
    with suppress(OSError, ValueError, IndexError):
        for line in meminfo.read_text().splitlines():
            if line.startswith(field):
                return min(int(line.split()[1]) * 1024, _limit_bytes(limit))
    return 0


def _limit_bytes(limit: Path) -> int:
    try:
        return int(limit.read_text())
    except (OSError, ValueError):  # there is none, or it says "max"
        return sys.maxsize
