"""The only source of time, randomness and fresh names in the data plane."""

from __future__ import annotations

import os
import random
import time


class Clock:
    """Real time; tests put a fake in its place."""

    def __init__(self) -> None:
        self._random = random.Random(os.urandom(16))  # noqa: S311 - spreads load, keeps no secret
        self._prefix = os.urandom(6).hex().encode()
        self._count = 0

    def now_s(self) -> float:
        """Monotonic seconds: for durations and deadlines."""
        return time.monotonic()

    def unix_s(self) -> float:
        """Seconds since 1970: for logs."""
        return time.time()

    def draw(self) -> float:
        """A number in [0, 1)."""
        return self._random.random()

    def request_id(self) -> bytes:
        """A name that is unique over workers and restarts: random prefix, then a count."""
        self._count += 1
        return b"req-%b-%08x" % (self._prefix, self._count)
