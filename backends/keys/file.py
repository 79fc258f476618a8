"""The file of keys as it is written: one writer at a time, and never seen half.

Who changes it holds a lock on its folder from reading to writing. The new content is on the disk
before it takes the place of the old one by a rename (rename(2)), and so is the folder's word of it:
after a crash there is the one or the other. Owner and group stay those of the file that was there,
so that what root revokes is still read by the service that runs as somebody else.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from proxy.contract.key_file import KeyFileError, no_keys_yet, parse_key_file, read_key_file
from proxy.contract.keys import KeySet

_MODE, _MODE_KEPT = 0o600, 0o640


def load(path: str) -> KeySet:
    """Return what the file has; a set without keys where there is none yet.

    Raises `KeyFileError`.
    """
    if not os.path.exists(path):
        return no_keys_yet()
    return read_key_file(path)


def change(path: str, make: Callable[[KeySet], KeySet]) -> KeySet:
    """Have `make` turn what is there into what is to be there, and keep that.

    Raises `KeyFileError`, and what `make` raises; then no file is changed.
    """
    path = os.path.realpath(path)  # what a link points to is replaced, not the link
    try:
        with contextlib.suppress(FileExistsError):  # keys may be made before anything has run there
            os.mkdir(os.path.dirname(path), 0o755)
        with _locked(os.path.dirname(path)) as folder:
            before = load(path)
            after = msgspec.structs.replace(make(before), version=before.version + 1)
            content = msgspec.json.format(msgspec.json.encode(after)) + b"\n"
            parse_key_file(content, path)  # no reader would refuse what is written here
            replace_file(path, content)
            os.fsync(folder)
    except OSError as error:
        raise KeyFileError(f"{path}: cannot be written: {error.strerror or error}") from error
    return after


@contextlib.contextmanager
def _locked(folder: str) -> Iterator[int]:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield fd
    finally:
        os.close(fd)  # and with it the lock


def replace_file(path: str, content: bytes) -> None:
    """Have a file for nobody else's eyes say `content`, all of it or as before."""
    new = Path(f"{path}.{secrets.token_hex(4)}.new")
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _MODE)
    try:
        with open(fd, "wb") as file:
            with contextlib.suppress(FileNotFoundError):
                old = os.stat(path)
                with contextlib.suppress(PermissionError):  # it is ours now, which is no less safe
                    os.fchown(fd, old.st_uid, old.st_gid)
                    os.fchmod(fd, old.st_mode & _MODE_KEPT)
            file.write(content)
            file.flush()
            os.fsync(fd)
        os.replace(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
