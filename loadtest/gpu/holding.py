"""What a replica holds while it rests: memory of cards, and of the host."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection
from pathlib import Path

import msgspec

from loadtest.gpu import machine

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Held(msgspec.Struct, frozen=True):
    """At one moment."""

    gpu_mib: int | None  # over the cards that were looked at; None: there are none
    host_mib: int  # resident, over the processes; what they share counts for each
    processes: int


def held_by(pid: int, cards: Collection[int] = ()) -> Held:
    """Return what the tree of processes under `pid` holds, and what is held of `cards`."""
    tree = tree_of(pid)
    return Held(machine.used_mib(cards), sum(map(_resident_bytes, tree)) >> 20, len(tree))


def tree_of(root: int) -> list[int]:
    """Return the processes under `root` and itself; those in a cell are seen from here, too."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdecimal() and (parent := _parent(int(name))) is not None:
            children.setdefault(parent, []).append(int(name))
    tree = [root] if _parent(root) is not None else []
    for pid in tree:  # it grows while it is walked
        tree += children.get(pid, ())
    return tree


def folder_mib(folder: Path) -> int:
    """Return what the files below a folder take on the disk."""
    blocks = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                blocks += os.stat(Path(place, name)).st_blocks
    return blocks * 512 >> 20  # of stat(2), whatever the file system's are


def _parent(pid: int) -> int | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    fields = text[text.rfind(b")") + 2 :].split()
    return None if fields[0] in (b"Z", b"X") else int(fields[1])


def _resident_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_bytes().split()[1]) * _PAGE_BYTES
    except (OSError, IndexError):
        return 0
