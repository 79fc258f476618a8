"""A start that is slow as a real engine's is: by imports and by work, whose result fills memory.

What an engine does before its first answer (imports, compilation, graphs captured) is worth keeping
in an image because it takes long and is the same every time. So is this: a chain of hashes, each of
the one before, so that nothing can be left out or done at once. 1,024 MiB take some 40 s of one
processor. Every answer depends on an entry, so a copy whose memory is not whole answers otherwise.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable

import xxhash

_ENTRY_BYTES = 32
_MIB = 1024 * 1024
# Of the standard library, so that they are there; a real import reads and runs files.
_MODULES = ("sqlite3", "xml.dom.minidom", "unittest.mock", "xmlrpc.client", "pydoc", "decimal")


class Tables:
    """The chain, in one piece of memory."""

    def __init__(self, entries: bytearray) -> None:
        self._entries = entries

    def value(self, prompt: bytes) -> int:
        """Return the entry that an answer to `prompt` depends on."""
        count = len(self._entries) // _ENTRY_BYTES
        start = xxhash.xxh3_64_intdigest(prompt) % count * _ENTRY_BYTES
        return int.from_bytes(self._entries[start : start + 8], "little")


def build_tables(mib: int, seed: int, stopped: Callable[[], bool]) -> Tables | None:
    """Import, and fill `mib` of memory; None when `stopped` says so in between."""
    for name in _MODULES:
        importlib.import_module(name)
    entries = bytearray(mib * _MIB)
    digest = str(seed).encode()
    sha256 = hashlib.sha256
    for start in range(0, len(entries), _MIB):
        if stopped():
            return None
        for position in range(start, start + _MIB, _ENTRY_BYTES):
            digest = sha256(sha256(digest).digest()).digest()
            entries[position : position + _ENTRY_BYTES] = digest
    return Tables(entries)
