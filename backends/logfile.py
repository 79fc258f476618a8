"""Files that other processes write to, kept bounded by us.

An engine writes to its log for weeks and knows nothing of rotation. It has the file open for
appending, so the file can be cut to nothing under it and its next line lands at the new end: the
last part is copied aside first, and at most the lines of that instant are lost.
"""

from __future__ import annotations

import os
from pathlib import Path

LOG_BYTES_MAX = 32 * 1024 * 1024
KEPT_BYTES_MAX = 4 * 1024 * 1024
APPEND = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
MODE = 0o640  # engines print prompts when told to log requests


def open_log(path: Path) -> int:
    """Return a descriptor that appends to `path`; its folder is made, an overlong file is cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    bound(path)
    return os.open(path, APPEND, MODE)


def bound(path: Path, bytes_max: int = LOG_BYTES_MAX, kept_bytes: int = KEPT_BYTES_MAX) -> bool:
    """Cut `path` to nothing when it is too long, its last part kept in `PATH.1`."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return False
    if size <= bytes_max:
        return False
    with path.open("rb") as source:
        source.seek(max(0, size - kept_bytes))
        tail = source.read(kept_bytes)
    kept = path.with_name(path.name + ".1")
    with open(os.open(kept, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, MODE), "wb") as target:
        target.write(tail)
    os.truncate(path, 0)
    return True


def length(path: Path) -> int:
    """Return how long a log is now; 0 when there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def last_lines(path: Path, count: int, bytes_max: int = 16_384) -> list[str]:
    """Return the end of a log, for an error message; nothing when there is none."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - bytes_max))
            text = file.read(bytes_max).decode("utf-8", "backslashreplace")
    except OSError:
        return []
    return text.splitlines()[-count:]
