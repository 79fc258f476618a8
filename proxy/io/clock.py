"""The only source of time, randomness and fresh names in the data plane."""

from __future__ import annotations

import os
import random
import time
from typing import Final

_LOW: Final = tuple([b"%02x" % low for low in range(256)])


class Clock:
    """Real time; tests put a fake in its place."""

    def __init__(self) -> None:
        self._random = random.Random(os.urandom(16))  # noqa: S311 - spreads load, keeps no secret
        self._name = b"req-%b-" % os.urandom(6).hex().encode()
        self._count = -1
        self._ids = b""  # what the present 256 names have in common
        self._monotonic = time.monotonic  # looked up once: a request asks a dozen times

    def now_s(self) -> float:
        """Monotonic seconds: for durations and deadlines."""
        return self._monotonic()

    def unix_s(self) -> float:
        """Seconds since 1970: for logs."""
        return time.time()

    def draw(self) -> float:
        """A number in [0, 1)."""
        return self._random.random()

    def request_id(self) -> bytes:
        """A name that is unique over workers and restarts: random prefix, then a count."""
        self._count += 1
        low = self._count & 0xFF
        if not low:
            self._ids = b"%b%06x" % (self._name, self._count >> 8)
        return self._ids + _LOW[low]
