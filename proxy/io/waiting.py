"""The requests of one worker that wait for a replica, and when they are looked at again.

Who goes next, and where, is `core.holding`'s to say. Here is what brings it to be asked: a request
that ends or gets its first octet, another fleet (`work_done`), what others tell (`heard`), and one
timer for the moment at which the first replica should be open. Many of these in one turn of the
loop are answered by one look; and a look gives away only so many requests before it lets the loop
go on. What other workers see as well is not acted upon by all in one moment, lest each gives its
first to the same replica.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from math import ceil
from typing import Final

from proxy.core import limits
from proxy.core.fleet import Pool
from proxy.core.holding import Held, Holding, Opening
from proxy.core.picture import Picture
from proxy.core.policy import Decision, Policy, Request
from proxy.errors import RETRY_AFTER_S_MAX
from proxy.io.clock import Clock

_log = logging.getLogger("doherty.waiting")

_NEVER: Final = float("inf")


class Waiter(Held):
    """One that waits, and with whom."""

    __slots__ = ("key",)

    def __init__(
        self,
        key: str,
        request: Request,
        pool_of: Callable[[], Pool | None],
        on_decision: Callable[[Decision], None],
        since_s: float,
    ) -> None:
        super().__init__(request, pool_of, on_decision, since_s)
        self.key = key


class Waiting:
    """All who wait. Models that the same replicas serve (adapters and their base) share these."""

    def __init__(
        self,
        clock: Clock,
        picture: Picture,
        choose: Policy,
        pool_of: Callable[[str], Pool | None],
        on_fault: Callable[[], None],
    ) -> None:
        """`pool_of(key)` returns the pool that those under this key wait for, as it is now."""
        self.count = 0
        self._clock = clock
        self._picture = picture
        self._choose = choose
        self._pool_of = pool_of
        self._on_fault = on_fault
        self.at_once = False  # nobody is held back any more: go as soon as there is room
        self._holding = Holding()
        self._waiters: dict[str, int] = {}  # for each pool, by its key
        self._look_due = False
        self._timer: asyncio.TimerHandle | None = None
        self._drain = _Drain()

    def awaits(self, slot: int) -> bool:
        """Whether somebody waits for this replica, so that a newcomer has to wait, too."""
        return self.count > 0 and self._holding.awaits(slot)

    def add(self, key: str, request: Request, on_decision: Callable[[Decision], None]) -> Waiter:
        """Have it wait. `on_decision` is called once, in a later turn, unless it is dropped."""
        now_s = self._clock.now_s()
        waiter = Waiter(key, request, lambda: self._pool_of(key), on_decision, now_s)
        if not self.count:
            self._drain.begin(now_s)
        self._holding.add(waiter, self._picture)
        self._waiters[key] = self._waiters.get(key, 0) + 1
        self.count += 1
        self.work_done()
        return waiter

    def drop(self, waiter: Waiter) -> None:
        """It waits no longer. Harmless when repeated, and when its decision has come."""
        if not waiter.gone:
            self._holding.drop(waiter)
            self._left(waiter.key)

    def retry_after_s(self) -> int:
        """Return when as many will have left as wait now, at the pace of the last seconds."""
        pace = self._drain.per_s(self._clock.now_s())
        if pace * RETRY_AFTER_S_MAX <= self.count:
            return RETRY_AFTER_S_MAX
        return max(1, ceil(self.count / pace))

    def work_done(self) -> None:
        """Something has changed by which a replica may have become open."""
        if self.count and not self._look_due:
            self._look_due = True
            asyncio.get_running_loop().call_soon(self._look)

    def heard(self) -> None:
        """Others have told what they did: look again soon, each of us at another moment."""
        if self.count and not self._look_due:
            delay_s = self._spread_s()
            due_s = asyncio.get_running_loop().time() + delay_s
            if self._timer is None or self._timer.when() > due_s:
                self._wake_in(delay_s)

    def _look(self) -> None:
        """Give away what can go now."""
        self._look_due = False
        now_s = self._clock.now_s()
        left = limits.HELD_TAKEN_MAX
        some_open, next_s = self._openings(now_s)
        while left and (some_open or (self.at_once and self.count)) and self._take(now_s):
            left -= 1
            now_s = self._clock.now_s()
            some_open, next_s = self._openings(now_s)
        if not left or (some_open and self._holding.unseen):
            self.work_done()
        self._wake_at(next_s if self.count else _NEVER)

    def _openings(self, now_s: float) -> tuple[bool, float]:
        """Return whether any replica that is waited for is open, and else when one should be."""
        some_open, next_s = False, _NEVER
        seen: set[int] = set()
        for key in self._waiters:
            pool = self._pool_of(key)
            bits = self._picture.seats(pool).bits if pool is not None else 0
            if pool is None or bits in seen:
                continue
            seen.add(bits)
            opening = Opening(pool, self._picture, now_s)
            some_open = some_open or opening.now
            next_s = min(next_s, opening.next_s)
        return some_open, next_s

    def _take(self, now_s: float) -> bool:
        found = self._holding.take(self._choose, self._picture, now_s, at_once=self.at_once)
        if found is None:
            return False
        held, decision = found
        assert isinstance(held, Waiter)
        self._drain.left(now_s)
        self._left(held.key)
        try:
            held.on_decision(decision)
        except Exception:  # noqa: BLE001 - of one request: the others are to go on
            self._on_fault()
            _log.exception("a request that had waited")
        return True

    def _left(self, key: str) -> None:
        self.count -= 1
        self._waiters[key] -= 1
        if not self._waiters[key]:
            del self._waiters[key]
        if not self.count:
            self._wake_at(_NEVER)

    def _wake_at(self, moment_s: float) -> None:
        if moment_s < _NEVER:
            # A little late: at the very moment, rounding may still say that it has not come.
            delay_s = max(0.0, moment_s - self._clock.now_s()) + limits.HELD_TIMER_S_MIN
            self._wake_in(delay_s + self._spread_s())
        elif self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wake_in(self, delay_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._woken)

    def _spread_s(self) -> float:
        return self._clock.draw() * limits.HELD_SPREAD_S

    def _woken(self) -> None:
        self._timer = None
        self.work_done()


class _Drain:
    """How many leave in a second while any wait; what was long ago counts little."""

    __slots__ = ("_at_s", "_count", "_seconds")

    def __init__(self) -> None:
        self._at_s = 0.0
        self._count = 0.0
        self._seconds = 0.0

    def begin(self, now_s: float) -> None:
        """From now on somebody waits: the time before does not count."""
        self._at_s = now_s

    def left(self, now_s: float) -> None:
        self._pass_time(now_s)
        self._count += 1.0

    def per_s(self, now_s: float) -> float:
        self._pass_time(now_s)
        return self._count / self._seconds if self._seconds > 0.0 else 0.0

    def _pass_time(self, now_s: float) -> None:
        passed_s = now_s - self._at_s
        keep = 0.5 ** (passed_s / limits.DRAIN_HALF_LIFE_S)
        self._count *= keep
        self._seconds = self._seconds * keep + passed_s
        self._at_s = now_s
