"""The processes of a replica as /proc tells of them: a tree under the one that was started."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import msgspec

_PROC = Path("/proc")


class Member(msgspec.Struct, frozen=True):
    """One live process of a tree."""

    pid: int
    parent: int
    state: str  # a letter, as proc(5) has them

    @property
    def stopped(self) -> bool:
        return self.state in ("T", "t")


def members(root: int) -> tuple[Member, ...]:
    """Return the live processes of the tree under `root`, parents before children."""
    by_parent: dict[int, list[Member]] = {}
    for name in os.listdir(_PROC):
        found = _member(int(name)) if name.isdecimal() else None
        if found is not None:
            by_parent.setdefault(found.parent, []).append(found)
    first = _member(root)
    tree = [] if first is None else [first]
    for member in tree:  # it grows while it is walked
        tree += by_parent.get(member.pid, ())
    return tuple(tree)


def children(pid: int) -> list[int]:
    """Return the live processes whose parent this one is."""
    return [member.pid for member in members(pid) if member.parent == pid]


def alive(pid: int) -> bool:
    """Say whether a process runs; one that is dead and not collected does not."""
    return _member(pid) is not None


def _member(pid: int) -> Member | None:
    """Return a process that lives; None for one that is dead or gone."""
    try:
        text = (_PROC / str(pid) / "stat").read_bytes()
    except OSError:
        return None
    fields = text[text.rfind(b")") + 2 :].split()  # the name before it may hold anything
    state = fields[0].decode()
    return None if state in ("Z", "X") else Member(pid, int(fields[1]), state)


def resident_bytes(pids: Iterable[int]) -> int:
    """Return the host memory that processes hold; what they share counts for each."""
    total = 0
    for pid in pids:
        with suppress(OSError, ValueError, IndexError):
            pages = int((_PROC / str(pid) / "statm").read_bytes().split()[1])
            total += pages * os.sysconf("SC_PAGE_SIZE")
    return total


def open_devices(pid: int, part: str) -> int:
    """Return how many files are open whose name has `part` in it."""
    count = 0
    folder = _PROC / str(pid) / "fd"
    with suppress(OSError):
        for name in os.listdir(folder):
            with suppress(OSError):
                count += part in os.readlink(folder / name)
    return count


def catches(pid: int, number: int) -> bool:
    """Say whether a process has a handler of its own for a signal."""
    with suppress(OSError, StopIteration, ValueError):
        status = (_PROC / str(pid) / "status").read_text(errors="replace")
        mask = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
        return bool(int(mask.split()[1], 16) >> (number - 1) & 1)
    return False


def environment_of(pid: int) -> dict[str, str]:
    """Return the environment that a process began with; empty when it is gone, or not for us."""
    try:
        pairs = (_PROC / str(pid) / "environ").read_bytes().split(b"\0")
    except OSError:
        return {}
    texts = (pair.decode("utf-8", "surrogateescape").partition("=") for pair in pairs)
    return {name: value for name, equals, value in texts if equals}
