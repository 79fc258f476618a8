"""Reads what memory this process may use: the machine's, and every control group's above it."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from proxy.core.memory import group_room_bytes, machine_room_bytes

# Folder of the memory groups, their limit and their usage, for version 1 and version 2.
_VERSIONS = {
    "memory": ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    "": ("sys/fs/cgroup", "memory.max", "memory.current"),
}


def rooms_bytes(root: Path = Path("/")) -> list[int | None]:
    """Return how much the machine and each group still allow; None where one sets no limit."""
    rooms = [machine_room_bytes(_text(root / "proc/meminfo"))]
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            if controller in _VERSIONS:
                rooms += _groups(root, path, *_VERSIONS[controller])
    return rooms


def _groups(root: Path, path: str, folder: str, limit: str, usage: str) -> list[int | None]:
    """Look at a group and those above it. Within a container the path may name what is outside."""
    own = PurePosixPath(path.lstrip("/"))
    return [
        group_room_bytes(
            *(_text(root / folder / group / name) for name in (limit, usage, "memory.stat"))
        )
        for group in (own, *own.parents)
    ]


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
