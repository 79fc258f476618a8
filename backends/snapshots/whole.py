"""Whether an image is what it was when it was made: every byte of it, at the speed of memory.

Files are hashed by xxh3-128 in pieces, so that several threads (the hash lets go of the
interpreter) share one large file of pages: 5 GB/s a core from the page cache, where SHA-256 makes
0.8 GB/s on the same one.
It finds what disks, copies and full file systems do to a file. It is no signature: who can write
into the folder, which is the owner's alone, can write a manifest as well.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import xxhash

MANIFEST = "manifest.json"
PIECE_BYTES = 64 * 1024 * 1024
BIG_BYTES = 8 * 1024 * 1024  # what is smaller is read before CRIU is started at all
_READ_BYTES = 1024 * 1024
_THREADS_MAX = 16


def use(image: Path) -> int:
    """Keep the image from being pruned; return the descriptor whose closing ends that."""
    lock = os.open(image / MANIFEST, os.O_RDONLY | os.O_CLOEXEC)
    fcntl.flock(lock, fcntl.LOCK_SH)
    return lock


def hash_files(paths: Iterable[Path]) -> dict[str, list[str]]:
    """Return the hashes of the pieces of each file. Raises `OSError`."""
    pieces = [(path, start) for path in paths for start in _starts(path.stat().st_size)]
    digests = _hash(pieces)
    found: dict[str, list[str]] = {}
    for (path, _), digest in zip(pieces, digests, strict=True):
        if isinstance(digest, OSError):
            raise digest
        found.setdefault(path.name, []).append(digest)
    return found


def first_problem(image: Path, *, big: bool | None = None) -> str:
    """Return what is wrong with the image, "" when nothing is; `big`: of those files only."""
    try:
        files: list[dict[str, Any]] = json.loads((image / MANIFEST).read_bytes())["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    files = [file for file in files if big is None or big == (file["bytes"] >= BIG_BYTES)]
    for file in files:
        problem = odd_size(image / file["name"], file["bytes"])
        if problem:
            return problem
    pieces = [(image / file["name"], start) for file in files for start in _starts(file["bytes"])]
    wanted = [digest for file in files for digest in file["hashes"]]
    for (path, start), digest, known in zip(pieces, _hash(pieces), wanted, strict=True):
        if isinstance(digest, OSError):
            return f"{path.name}: {digest}"
        if digest != known:
            size = PIECE_BYTES // 2**20
            return f"{path.name} is not what was written, in the {size} MiB from byte {start} on"
    return ""


def judge(image: Path, verdict: Path) -> None:
    """Read all pages, and tell the one who waits at `verdict`; a problem is left beside it."""
    problem = first_problem(image, big=True)
    if problem:
        verdict.with_suffix(".problem").write_text(problem)
    with contextlib.suppress(OSError):
        verdict.write_text("damaged\n" if problem else "whole\n")


def odd_size(path: Path, size: int) -> str:
    """Return what is wrong with the size of a file, "" when it is as it was."""
    try:
        found = path.stat().st_size
    except OSError as error:
        return f"{path.name}: {error.strerror}"
    return "" if found == size else f"{path.name} has {found} bytes and was written with {size}"


def _starts(size: int) -> range:
    return range(0, max(size, 1), PIECE_BYTES)


def _hash(pieces: Sequence[tuple[Path, int]]) -> list[str | OSError]:
    """Hash the pieces in as many threads as there are processors to spare."""
    digests: list[str | OSError] = [""] * len(pieces)
    numbers = iter(range(len(pieces)))

    def work() -> None:
        buffer = memoryview(bytearray(_READ_BYTES))
        for number in numbers:  # one iterator: each takes the next
            try:
                digests[number] = _digest(*pieces[number], buffer)
            except OSError as error:
                digests[number] = error

    count = min(len(pieces), _THREADS_MAX, len(os.sched_getaffinity(0)))
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return digests


def _digest(path: Path, start: int, buffer: memoryview) -> str:
    digest = xxhash.xxh3_128()
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        position, end = start, start + PIECE_BYTES
        while position < end:
            count = os.preadv(fd, [buffer[: min(_READ_BYTES, end - position)]], position)
            if count == 0:
                break
            digest.update(buffer[:count])
            position += count
    finally:
        os.close(fd)
    return digest.hexdigest()
