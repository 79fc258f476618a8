"""What works on this machine, asked once, and again after a while where it did not work.

A yes is kept: what goes wrong later is found by whoever uses it, who does without for a time.
A no may be of the moment only (a driver that was being loaded, a CRIU that was not installed yet),
so it is asked again, by a thread of its own: to find out takes seconds, and who asks serves others.
Until it has answered, the old answer holds.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

AGAIN_S = 60.0

T = TypeVar("T")


class Asking(Generic[T]):
    """One question and its newest answer. `ask` ends by itself: it has limits of its own."""

    def __init__(
        self,
        ask: Callable[[], T],
        works: Callable[[T], bool],
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.known: T | None = None  # None: it has not been asked yet
        self._ask = ask
        self._works = works
        self._now_s = now_s
        self._again_at_s = 0.0
        self._thread: threading.Thread | None = None

    def answer(self) -> T:
        """Return the newest answer; the first one is waited for."""
        if self.known is None:
            self._learn()
        elif not self._works(self.known) and self._now_s() >= self._again_at_s:
            self._learn_beside()
        assert self.known is not None
        return self.known

    def settle(self) -> None:
        """Wait for the answer that is under way, if one is."""
        if self._thread is not None:
            self._thread.join()

    def _learn(self) -> None:
        self.known = self._ask()
        self._again_at_s = self._now_s() + AGAIN_S

    def _learn_beside(self) -> None:
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._learn, name="works-here", daemon=True)
            self._thread.start()
