"""Which GPU code inside a shared library one card can run, and what may be blanked.

A CUDA extension carries machine code for many chips in the section `.nv_fatbin`: containers, each
of entries that hold one chip's code (ELF) or PTX. The driver takes, of the container that it
wants, the entry that fits the card. So of each container the entries for the card are kept, where
there are none the PTX that the driver can translate, and the payload of the rest is blanked.
Offsets, sizes and headers stay, so that the library loads as before; zeros cost nothing to carry.

A container whose kept code defines a kernel that matches `drop` is blanked as a whole. Asking for
such a kernel then fails with "no kernel image is available", it never computes anything else.

The layout is that of the files: nothing official describes it. What cannot be read is kept.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

_CONTAINER_MAGIC = 0xBA55ED50
_CONTAINER = struct.Struct("<IHHQ")  # magic, version, size of the header, size of the entries
_ENTRY = struct.Struct(
    "<HHIQIIHHI"
)  # kind, version, header, size, compressed, -, minor, major, arch
_ENTRY_TAIL = struct.Struct("<QQQ")  # flags, -, decompressed size; from octet 40 of the entry on
_ENTRY_BYTES_MIN = 64
_PTX, _ELF = 1, 2
_ELF_MAGIC = b"\x7fELF"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_SECTIONS = (b".nv_fatbin", b"__nv_relfatbin")

Buffer = bytes | bytearray | memoryview
Decompress = Callable[[bytes, int], bytes]


class FatbinError(Exception):
    """The file is no 64-bit little-endian ELF library."""


class Entry(NamedTuple):
    """One chip's code: its payload lies at `start` and has `size_bytes`."""

    kind: int
    arch: int
    start: int
    size_bytes: int
    stored_bytes: int  # of the payload without its padding
    unpacked_bytes: int


class Slimming(NamedTuple):
    """What may be blanked, and what that comes to."""

    blanks: tuple[tuple[int, int], ...]  # start and size
    containers: int
    dropped: int  # containers that `drop` took
    kept_bytes: int
    blanked_bytes: int


def slim(
    library: Buffer, arch: int, drop: re.Pattern[bytes] | None, decompress: Decompress | None
) -> Slimming:
    """Return what of `library` a card of compute capability `arch` (90: 9.0) never loads."""
    blanks: list[tuple[int, int]] = []
    containers = dropped = kept_bytes = 0
    for start, size_bytes in _gpu_sections(library):
        for entries in _containers(library, start, size_bytes):
            containers += 1
            kept = usable(entries, arch)
            if drop is not None and any(_defines(library, e, drop, decompress) for e in kept):
                dropped += 1
                kept = ()
            kept_bytes += sum(entry.size_bytes for entry in kept)
            blanks += [(e.start, e.size_bytes) for e in entries if e not in kept]
    blanked_bytes = sum(size for _, size in blanks)
    return Slimming(tuple(blanks), containers, dropped, kept_bytes, blanked_bytes)


def usable(entries: tuple[Entry, ...], arch: int) -> tuple[Entry, ...]:
    """Return the entries that the driver may take for a card of `arch`.

    Machine code runs on its own major version at the same or a higher minor one, and the nearest is
    taken; PTX is translated for any newer card (CUDA C++ Programming Guide, binary and PTX
    compatibility).
    """
    machine = [e for e in entries if e.kind == _ELF and arch // 10 * 10 <= e.arch <= arch]
    if machine:
        nearest = max(entry.arch for entry in machine)
        return tuple(entry for entry in machine if entry.arch == nearest)
    return tuple(e for e in entries if e.kind == _PTX and e.arch <= arch)


def _gpu_sections(library: Buffer) -> Iterator[tuple[int, int]]:
    if len(library) < 64 or bytes(library[:6]) != _ELF_MAGIC + b"\x02\x01":
        raise FatbinError("not a 64-bit little-endian ELF file")
    (table,) = struct.unpack_from("<Q", library, 0x28)
    entry_bytes, count, names_index = struct.unpack_from("<HHH", library, 0x3A)
    headers = []
    for index in range(count):
        name, _, _, _, start, size = struct.unpack_from(
            "<IIQQQQ", library, table + index * entry_bytes
        )
        headers.append((name, start, size))
    if not headers:
        return
    _, names_start, names_bytes = headers[names_index]
    names = bytes(library[names_start : names_start + names_bytes])
    for name, start, size in headers:
        if names[name : names.index(b"\0", name)] in _SECTIONS:
            yield start, size


def _containers(library: Buffer, start: int, size_bytes: int) -> Iterator[tuple[Entry, ...]]:
    at, end = start, start + size_bytes
    while at + _CONTAINER.size <= end:
        magic, _, header_bytes, entries_bytes = _CONTAINER.unpack_from(library, at)
        if magic != _CONTAINER_MAGIC:
            at += 8  # padding between containers
            continue
        first = at + header_bytes
        yield tuple(_entries(library, first, min(first + entries_bytes, end)))
        at = -(-(first + entries_bytes) // 8) * 8


def _entries(library: Buffer, at: int, end: int) -> Iterator[Entry]:
    while at + _ENTRY_BYTES_MIN <= end:
        kind, _, header_bytes, size, stored, _, _, _, arch = _ENTRY.unpack_from(library, at)
        _, _, unpacked = _ENTRY_TAIL.unpack_from(library, at + 40)
        if header_bytes == 0 or at + header_bytes + size > end:
            return
        yield Entry(kind, arch, at + header_bytes, size, stored or size, unpacked)
        at += header_bytes + size


def _defines(
    library: Buffer, entry: Entry, wanted: re.Pattern[bytes], decompress: Decompress | None
) -> bool:
    """Say whether machine code names a kernel that matches; what cannot be read names none."""
    if entry.kind != _ELF:
        return False
    code = bytes(library[entry.start : entry.start + entry.stored_bytes])
    if code.startswith(_ZSTD_MAGIC) and decompress is not None:
        code = decompress(code, entry.unpacked_bytes)
    return code.startswith(_ELF_MAGIC) and wanted.search(code) is not None
