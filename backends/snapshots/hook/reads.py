"""Tells which files this process has read so far: its modules in the order of import, and of what
it has mapped, the parts that it has touched.

The kernel says which pages of a mapping are there for this process (/proc/self/pagemap, proc(5)),
so that of a library of a gigabyte only what was needed is told. One line of JSON a file:
[path, [[start, length], ...]], and no parts for a file that was read whole.
"""

from __future__ import annotations

import json
import os
import struct
import sys
from collections.abc import Iterator

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_PRESENT = 1 << 63
_GAP_BYTES = 128 * 1024  # parts nearer than that are one: a disk reads that much at once anyhow
_MAPPING_BYTES_MIN = 64 * 1024
# What is gone, and weights: those are read by themselves, and in another order.
_OTHERS = (" (deleted)", ".safetensors", ".gguf", ".bin", ".pt")


def tell(prefix: str) -> None:
    """Write them to PREFIX.PID; whole or not at all."""
    path = f"{prefix}.{os.getpid()}"
    with open(path + ".new", "w", encoding="utf-8") as file:
        file.writelines(json.dumps([name, []]) + "\n" for name in _modules())
        file.writelines(json.dumps([name, parts]) + "\n" for name, parts in _mapped().items())
    os.replace(path + ".new", path)


def _modules() -> Iterator[str]:
    for module in list(sys.modules.values()):  # in the order in which they began to be imported
        source = getattr(module, "__file__", None)
        compiled = getattr(module, "__cached__", None)
        for name in (compiled, source):
            if isinstance(name, str) and os.path.isfile(name):
                if not name.endswith(".so"):
                    yield os.path.abspath(name)
                break


def _mapped() -> dict[str, list[tuple[int, int]]]:
    found: dict[str, list[tuple[int, int]]] = {}
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps, \
            open("/proc/self/pagemap", "rb", buffering=0) as pages:  # fmt: skip
        for line in maps:
            fields = line.split(maxsplit=5)
            if len(fields) < 6 or not fields[5].startswith("/") or fields[4] == "0":
                continue
            name = fields[5].rstrip("\n")
            first, last = (int(address, 16) for address in fields[0].split("-"))
            if name.endswith(_OTHERS) or last - first < _MAPPING_BYTES_MIN:
                continue
            parts = _touched(pages.fileno(), first, last, int(fields[2], 16))
            if parts:
                found[name] = _joined(found.get(name, []) + parts)
    return found


def _touched(pagemap: int, first: int, last: int, offset: int) -> list[tuple[int, int]]:
    """Return the parts of the file of which this mapping has pages."""
    count = (last - first) // _PAGE_BYTES
    try:
        data = os.pread(pagemap, 8 * count, first // _PAGE_BYTES * 8)
    except OSError:
        return []
    parts: list[tuple[int, int]] = []
    for number, (entry,) in enumerate(struct.iter_unpack("<Q", data[: len(data) // 8 * 8])):
        if entry & _PRESENT:
            at = offset + number * _PAGE_BYTES
            if parts and at - sum(parts[-1]) < _GAP_BYTES:
                parts[-1] = (parts[-1][0], at + _PAGE_BYTES - parts[-1][0])
            else:
                parts.append((at, _PAGE_BYTES))
    return parts


def _joined(parts: list[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for start, length in sorted(parts):
        if joined and start - sum(joined[-1]) < _GAP_BYTES:
            end = max(sum(joined[-1]), start + length)
            joined[-1] = (joined[-1][0], end - joined[-1][0])
        else:
            joined.append((start, length))
    return joined
