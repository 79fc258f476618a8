"""The only source of time in the control plane, so that a test can hold it in its hand."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Protocol


class Timer(Protocol):
    """Something that will happen, unless it is cancelled."""

    def cancel(self) -> None: ...


class Clock(Protocol):
    """Time that passes."""

    def now_s(self) -> float:
        """Return seconds on a clock that never goes back; only differences mean something."""

    def unix_s(self) -> float:
        """Return Unix time, for readers outside."""

    def call_later(self, delay_s: float, call: Callable[[], None]) -> Timer: ...


class SystemClock:
    """The machine's clocks and the running loop's timers."""

    def now_s(self) -> float:
        return time.monotonic()

    def unix_s(self) -> float:
        return time.time()

    def call_later(self, delay_s: float, call: Callable[[], None]) -> Timer:
        return asyncio.get_running_loop().call_later(delay_s, call)


class Alarm:
    """A wait that ends by time or by `ring`, whichever is first; for one waiter."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._event = asyncio.Event()

    def ring(self) -> None:
        self._event.set()

    async def wait(self, delay_s: float | None) -> None:
        """Return after `delay_s`, or as soon as it rings; a ring before the wait counts."""
        timer = None if delay_s is None else self._clock.call_later(delay_s, self._event.set)
        try:
            await self._event.wait()
        finally:
            self._event.clear()
            if timer is not None:
                timer.cancel()


class Deadline:
    """One moment at which `call` is due; a new one takes the place of the last."""

    def __init__(self, clock: Clock, call: Callable[[], None]) -> None:
        self._clock = clock
        self._call = call
        self._timer: Timer | None = None

    def set(self, at_s: float | None) -> None:
        """Be due at `at_s`; None: never."""
        if self._timer is not None:
            self._timer.cancel()
        delay_s = None if at_s is None else max(0.0, at_s - self._clock.now_s())
        self._timer = None if delay_s is None else self._clock.call_later(delay_s, self._call)
