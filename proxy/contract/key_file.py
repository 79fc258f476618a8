"""The file of API keys as it is read: strictly, and only if nobody else may read or change it.

What is in it opens no door by itself, but says whose keys there are, and its salt is what tenants'
credentials towards the offline service are made of. So a file that other users of the machine can
read, or that its group can write, is refused, as ssh refuses such a private key. Unknown fields are
errors: a misspelt `expires_at` would be a key that never ends.

A reading that fails takes nothing back: whoever watches a file goes on with what it said last. One
that is not there at the start says that there are no keys yet, and nobody is let in; one that goes
away later says nothing.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections import Counter

import msgspec

from proxy.contract.keys import KEYS_BYTES_MAX, KEYS_MAX, KeyRecord, KeySet, decode_keys

WATCH_INTERVAL_S = (
    0.2  # between two looks at a file, so that a revocation is everywhere in a second
)
SALT_BYTES = 24
_MODES_REFUSED = 0o027  # the group may read: so secrets are mounted for a service's own group


class KeyFileError(Exception):
    """The file cannot be used; the text says why and what to do."""

    passing = False  # it may be readable in a moment, though nothing about it changes


class _Record(KeyRecord, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """A key as it may stand in the file."""


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    version: int = 0
    salt: str = ""
    keys: tuple[_Record, ...] = ()


def read_key_file(path: str) -> KeySet:
    """Return what is in the file at `path`. Raises `KeyFileError`."""
    return parse_key_file(_content(path), path)


def parse_key_file(content: bytes, source: str) -> KeySet:
    """Return what a file says; `source` names it in errors. Raises `KeyFileError`."""
    try:
        msgspec.json.decode(content, type=_File)
        keys = decode_keys(content)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise KeyFileError(f"{source}: no file of keys: {error}") from error
    if len(keys.keys) > KEYS_MAX:
        raise KeyFileError(
            f"{source}: {len(keys.keys)} keys, and {KEYS_MAX} are the most; remove those that are "
            "over with `doherty keys prune`"
        )
    for name in ("key_id", "digest"):
        (value, count), *_ = Counter(getattr(key, name) for key in keys.keys).most_common(1) or [
            ("", 0)
        ]
        if count > 1:
            shown = f"'{value}'" if name == "key_id" else f"beginning with {value[:8]}"
            raise KeyFileError(f"{source}: the {name} {shown} is there {count} times")
    return keys


def _content(path: str) -> bytes:
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise KeyFileError(f"{path}: it is no file")
            if found.st_mode & _MODES_REFUSED:
                raise KeyFileError(
                    f"{path}: others may use it (mode {stat.S_IMODE(found.st_mode):04o}); "
                    f"take that from them: chmod 600 {path}"
                )
            content = file.read(KEYS_BYTES_MAX + 1)
    except OSError as error:
        failure = KeyFileError(f"{path}: cannot be read: {error.strerror or error}")
        failure.passing = True  # such as for want of descriptors, or of a server of files
        raise failure from error
    if len(content) > KEYS_BYTES_MAX:
        raise KeyFileError(f"{path}: larger than {KEYS_BYTES_MAX} bytes")
    return content


def _open_at_once(path: str, flags: int) -> int:
    """A pipe is refused, not waited for: whoever watches a file has more to do (open(2))."""
    return os.open(path, flags | os.O_NONBLOCK)


def no_keys_yet() -> KeySet:
    """Return a set without keys, and with a salt of its own."""
    return KeySet(salt=secrets.token_urlsafe(SALT_BYTES))


class KeyFile:
    """A file that is looked at again and again."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.missing = False  # it was not there at the first look, and has not come since
        self._seen: tuple[int, ...] | None = None
        self._told = ""  # why it could not be read at the last look, if that may pass

    def look(self) -> KeySet | None:
        """Return what it says if that may have changed since the last look.

        Raises `KeyFileError`, once for each change, where it cannot be used.
        """
        stamp = self._stamp()
        if stamp == self._seen and not self._told:
            return None
        told = self._told if stamp == self._seen else ""
        first, self._seen, self._told = self._seen is None, stamp, ""
        self.missing = not stamp and (first or self.missing)
        try:
            return no_keys_yet() if self.missing else read_key_file(self.path)
        except KeyFileError as error:
            # What was missed, such as that a key is revoked, is not to wait for the next change.
            self._told = str(error) if error.passing else ""
            if told and told == self._told:
                return None
            raise

    def _stamp(self) -> tuple[int, ...]:
        """Return what differs when it was changed or replaced; nothing when there is none."""
        try:
            found = os.stat(self.path)
        except OSError:
            return ()
        times = (found.st_mtime_ns, found.st_ctime_ns)  # the latter for its mode
        return (*times, found.st_size, found.st_ino)
