"""Small damage to octets, of the kinds by which readers come to differ.

Each kind is a function of the octets, three places, a splinter and a second vector, so that both
hypothesis and a seeded generator can drive it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Final

Places = tuple[int, int, int]
Mutation = Callable[[bytes, Places, bytes, bytes], bytes]

# What means something to one reader or another.
SPLINTERS: Final = (
    b"\r", b"\n", b"\r\n", b"\n\r", b"\r\r\n", b"\r\n\r\n", b"\n\n", b"\x00", b" ", b"\t", b"\x0b",
    b"\x0c", b"\x7f", b"\x80", b"\x85", b"\xa0", b"\xff", b":", b";", b",", b"=", b'"', b"\\", b"/",
    b"?", b"#", b"@", b"%", b"+", b"-", b"_", b".", b"0", b"1", b"5", b"9", b"a", b"F", b"x", b"0x",
    b"00000000000000005", b"X: y\r\n", b"Host: a\r\n", b"Content-Length: 3\r\n",
    b"Content-Length: 0\r\n", b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: identity\r\n",
    b"Connection: close\r\n", b"Connection: keep-alive\r\n", b"Expect: 100-continue\r\n",
    b"chunked", b"HTTP/1.0", b"HTTP/1.1", b"GET / HTTP/1.1\r\n", b"http://a", b"0\r\n\r\n",
    b"5\r\nhello\r\n", b"1;a=b\r\nx\r\n", b"0\r\nX: y\r\n\r\n",
)  # fmt: skip


def _span(octets: bytes, places: Places) -> tuple[int, int]:
    """Return a place in the octets and one not far behind it."""
    at = places[0] % (len(octets) + 1)
    return at, min(len(octets), at + places[1] % 12)


def _insert(octets: bytes, places: Places, splinter: bytes, _: bytes) -> bytes:
    at, _end = _span(octets, places)
    return octets[:at] + splinter + octets[at:]


def _replace(octets: bytes, places: Places, splinter: bytes, _: bytes) -> bytes:
    at, _end = _span(octets, places)
    return octets[:at] + splinter + octets[at + len(splinter) :]


def _delete(octets: bytes, places: Places, _splinter: bytes, _: bytes) -> bytes:
    at, end = _span(octets, places)
    return octets[:at] + octets[end:]


def _double(octets: bytes, places: Places, _splinter: bytes, _: bytes) -> bytes:
    at, end = _span(octets, places)
    return octets[:end] + octets[at:]


def _flip_case(octets: bytes, places: Places, _splinter: bytes, _: bytes) -> bytes:
    at, end = _span(octets, places)
    return octets[:at] + octets[at:end].swapcase() + octets[end:]


def _double_line(octets: bytes, places: Places, _splinter: bytes, _: bytes) -> bytes:
    lines = octets.split(b"\r\n")
    at = places[0] % len(lines)
    lines.insert(places[1] % (len(lines) + 1), lines[at])
    return b"\r\n".join(lines)


def _splice(octets: bytes, places: Places, _splinter: bytes, other: bytes) -> bytes:
    return octets[: places[0] % (len(octets) + 1)] + other[places[1] % (len(other) + 1) :]


def _append(octets: bytes, _places: Places, _splinter: bytes, other: bytes) -> bytes:
    return octets + other


def _cut(octets: bytes, places: Places, _splinter: bytes, _: bytes) -> bytes:
    return octets[: places[0] % (len(octets) + 1)]


MUTATIONS: Final[tuple[Mutation, ...]] = (
    _insert,
    _replace,
    _delete,
    _double,
    _flip_case,
    _double_line,
    _splice,
    _append,
    _cut,
)


def mutated(chance: random.Random, seeds: Sequence[bytes]) -> bytes:
    """Return one seed with some damage, mostly a little: more would all be refused at once."""
    octets = chance.choice(seeds)
    for _ in range(chance.choice((0, 1, 1, 1, 2, 2, 3, 5))):
        places = (chance.randrange(1 << 16), chance.randrange(1 << 16), chance.randrange(1 << 16))
        splinter = chance.choice(SPLINTERS)
        if not chance.randrange(4):
            splinter = chance.randbytes(chance.randrange(1, 4))
        octets = chance.choice(MUTATIONS)(octets, places, splinter, chance.choice(seeds))
    return octets
