"""A process that writes notes as fast as it can, until it is killed: `FD NUMBER_OF_RINGS ORIGIN`.

Each note says what it has to be, so that a reader can tell one that it alone has made up.
"""

from __future__ import annotations

import mmap
import random
import sys

from xxhash import xxh3_128_digest

from proxy.core.note_ring import RingWriter, rings_bytes

_SIZES = (0, 5, 17, 40, 40, 40, 130, 130, 450, 4000)
_LARGE_BYTES = 200_000


def batch_of(origin: int, number: int) -> bytes:
    """Return the note of this number."""
    draw = random.Random(origin * 1_000_003 + number)
    size = _LARGE_BYTES if number % 500 == 499 else draw.choice(_SIZES)
    once = xxh3_128_digest(b"%d %d" % (origin, number))
    return (once * (size // len(once) + 1))[:size]


def main(fd: int, rings: int, origin: int) -> None:
    writer = RingWriter(memoryview(mmap.mmap(fd, rings_bytes(rings))), 0)
    number = 0
    while True:
        writer.write(origin, float(number), batch_of(origin, number))
        number += 1


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
