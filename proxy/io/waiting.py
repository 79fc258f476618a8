"""The requests of one worker that wait for a replica, and when they are looked at again.

Who goes next, and where, is `core.holding`'s to say. Here is what brings it to be asked: a request
that ends or gets its first octet, another fleet (`work_done`), and one timer: for the moment at
which the first replica should be open, or what others have said is read again. Many of these in one
turn of the loop are answered by one look; and a look gives away only so many requests before it
lets the loop go on. What other workers see as well is not acted upon by all in one moment, lest
each gives its first to the same replica.

Each model has a queue, in which one knows since when nothing of it is awake: then its requests are
held for a replica that demand brings up, and by other rules (`end_of_hold`). Who may wait at all,
and who has to leave for another, `core.room` says.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import Final

from proxy.core import claim_limits, limits
from proxy.core.charging import account_of
from proxy.core.classes import NAMES, OFFLINE, ONLINE, PATIENCE
from proxy.core.fairness import Shares
from proxy.core.fleet import Pool
from proxy.core.held import class_of, is_vain
from proxy.core.holding import Holding
from proxy.core.opening import Opening
from proxy.core.picture import Picture
from proxy.core.policy import Decision, Policy, Request
from proxy.core.preempting import Clearing
from proxy.core.prospects import Prospect
from proxy.core.room import Room, retry_after_s, start_retry_s
from proxy.errors import NotAwakeError, ProxyError, QueueFullError, QueueTimeoutError
from proxy.io.clock import Clock
from proxy.io.lateness import Lateness
from proxy.io.queues import Queue, Waiter
from proxy.io.telemetry import Sample

_log = logging.getLogger("doherty.waiting")

_NEVER: Final = float("inf")


class Waiting:
    """All who wait. Models that the same replicas serve (adapters and their base) share these."""

    def __init__(
        self,
        clock: Clock,
        picture: Picture,
        choose: Policy,
        pool_of: Callable[[str, frozenset[str] | None], Pool | None],
        prospect_of: Callable[[str], Prospect],
        on_fault: Callable[[], None],
    ) -> None:
        """`pool_of(key, regions)` returns what those under a key wait for there; see `Choice`."""
        self.room = Room()
        self.queues: dict[str, Queue] = {}  # by key; also of those for whom nobody waits any more
        self.catch_up: Callable[[], None] = nothing  # reads what others have decided
        self.hears = False  # there may be some
        self._news = False  # something was read since the last look
        self.on_hold: Callable[[], None] = nothing  # somebody waits for what has nothing awake
        self.refused = [0 for _ in NAMES]  # for want of room, by class
        self._clock = clock
        self._picture = picture
        self._choose = choose
        self._pool_of = pool_of
        self._prospect_of = prospect_of
        self._on_fault = on_fault
        self.sharers = 1  # workers that hold requests for the same replicas
        self._quota = 0  # requests that may leave until that moment
        self._quota_end_s = 0.0
        self.at_once = False  # nobody is held back any more: go as soon as there is room
        self.shares = Shares()
        self._holding = Holding(self.shares)
        self.lateness = Lateness()
        self._numbers = 0
        self._look_due = False
        self._timer: asyncio.Handle | None = None
        self._due_s = _NEVER  # when a replica should be open, if nothing happens before
        self.clearing = Clearing()  # for online work that waits at other workers

    @property
    def count(self) -> int:
        return self.room.count

    def awaits(self, slot: int) -> bool:
        """Whether somebody waits for this replica, so that a newcomer has to wait, too."""
        return self.room.count > 0 and self._holding.awaits(slot)

    def runway_s(self, request: Request, now_s: float) -> float:
        """Return how little a replica must have to do for this newcomer to go there at once."""
        if not (self.shares.on and self.room.count):
            return limits.RUNWAY_S  # nobody is in anybody's way
        account = account_of(self.shares, request, now_s)
        self.shares.refresh(now_s)
        return self.shares.runway_s(account)

    def braked(self) -> int:
        """Return the replicas, as bits of their slots, for which online work waits.

        No offline work goes there meanwhile, even to one that is open: what waits for another may
        be better there in a moment, and what has begun cannot be called back from a batch.
        """
        bits = self.clearing.bits(self._clock.now_s())
        for queue in self.queues.values():
            if queue.online and queue.bits > 0:
                bits |= queue.bits
        return bits

    def add(
        self,
        key: str,
        request: Request,
        held_bytes: int,
        on_decision: Callable[[Decision], None],
        on_refusal: Callable[[ProxyError], None],
        since_s: float = -1.0,
    ) -> Waiter:
        """Have it wait. `on_decision` is called once, in a later turn, unless it is dropped.

        `on_refusal` is called, and it waits no longer, when its place is needed for another. Raises
        `QueueFullError` where there is no place for it. `since_s` is when it came, if before now.
        """
        now_s = self._clock.now_s()
        came_s = since_s if since_s >= 0.0 else now_s
        pool_of = partial(self._pool_of, key, request.regions)
        waiter = Waiter(key, request, pool_of, on_decision, on_refusal, came_s)
        waiter.held_bytes = held_bytes
        if self.shares.on:
            waiter.account = account_of(self.shares, request, now_s)
        queue = self.queue(key)
        leaving = None if self._crowded(queue) else self.room.enter(waiter)
        if leaving is None:
            raise self._refusal(waiter, queue)
        if not queue.waiters:
            queue.pace.begin(now_s)
        waiter.queue = queue.number
        self._holding.add(waiter, self._picture)
        queue.waiters[waiter] = None
        queue.online += class_of(waiter) == ONLINE
        queue.tokens += waiter.needed_tokens
        if queue.empty_since_s >= 0.0 and len(queue.waiters) == 1:
            self.on_hold()
        for other in leaving:
            assert isinstance(other, Waiter)
            self._send_away(other, self._refusal)
        self.work_done()
        return waiter

    def _send_away(self, other: Waiter, refusal_of: Callable[[Waiter, Queue], ProxyError]) -> None:
        if other.gone:  # sent away already, for one that came while others were
            return
        refusal = refusal_of(other, self.queues[other.key])
        self.drop(other)
        try:
            other.on_refusal(refusal)
        except Exception:  # noqa: BLE001 - of one request: its place is another's already
            self._on_fault()
            _log.exception("a request whose place another needs")

    def queue(self, key: str) -> Queue:
        """Return the queue of a key, of which there are as many as the fleet has models."""
        queue = self.queues.get(key)
        if queue is None:
            self._numbers += 1
            queue = self.queues[key] = Queue(self._numbers)
            self._see(key, queue)
        return queue

    def _crowded(self, queue: Queue) -> bool:
        """Whether those for whom nothing is awake have all the room that they may have."""
        if queue.empty_since_s < 0.0:
            return False
        held = sum([len(q.waiters) for q in self.queues.values() if q.empty_since_s >= 0.0])
        return held >= self.room.count_max * limits.STARTING_SHARE

    def _refusal(self, waiter: Waiter, queue: Queue) -> QueueFullError:
        work_class = class_of(waiter)
        self.refused[work_class] += 1
        queue.refused_total += 1
        return QueueFullError(
            f"{self.room.count} requests wait for a replica already, "
            f"{self.room.count_of(work_class)} of them {NAMES[work_class]} ones (--queue-size)",
            wait_s=self._retry_after_s(waiter, queue),
        )

    def drop(self, waiter: Waiter) -> None:
        """It waits no longer. Harmless when repeated, and when its decision has come."""
        if not waiter.gone:
            self._left(waiter)
            self._holding.drop(waiter)
            self.work_done()  # it may have been the last that offline work waited for

    def _retry_after_s(self, waiter: Waiter, queue: Queue) -> int:
        """Of its tenant's own part of the queue, where tenants are told apart."""
        pool, account = self._pool_of(waiter.key, None), waiter.account
        awake = len(pool.available) if pool is not None else 0
        count, pace_per_s = len(queue.waiters), queue.pace.per_s(self._clock.now_s())
        if account is not None:
            count, pace_per_s = account.waiting, pace_per_s * self.shares.part_of(account)
        return retry_after_s(count, pace_per_s, awake, self._prospect_of(waiter.key))

    # --- the fleet, and time -----------------------------------------------------------------

    def fleet_changed(self, known: Callable[[str], bool]) -> None:
        """Replicas have come or gone; forget the queues of models that are not `known` any more."""
        for key, queue in list(self.queues.items()):
            if queue.waiters or known(key):
                self._see(key, queue)
            else:
                del self.queues[key]
        self.work_done()

    def _see(self, key: str, queue: Queue) -> None:
        """Note what there is for those in a queue now."""
        now_s = self._clock.now_s()
        pool, prospect = self._pool_of(key, None), self._prospect_of(key)
        bits = self._picture.seats(pool).bits if pool is not None else 0
        if bits != queue.bits:
            if queue.waiters and self.sharers > 1:
                self._divide(bits & ~max(0, queue.bits), now_s)
            queue.bits = bits
            self._holding.renew(queue.number, empty=not bits)
        if bits:
            if queue.empty_since_s >= 0.0:
                queue.open_since_s = now_s
            queue.empty_since_s = queue.let_be_since_s = -1.0
            queue.start_seen = False
            return
        if queue.empty_since_s < 0.0:
            queue.empty_since_s = now_s
            if queue.waiters:
                self.on_hold()
        if prospect.coming:
            queue.start_seen = True
            queue.let_be_since_s = -1.0
        elif queue.start_seen and queue.let_be_since_s < 0.0:
            queue.let_be_since_s = now_s

    def end_of_wait(
        self, waiter: Waiter, now_s: float, *, queue_timeout_s: float, hold_timeout_s: float
    ) -> ProxyError | None:
        """Return why one should wait no longer, if so.

        Its time in the queue begins when there is a replica to wait for, so that nobody is sent
        away by a replica that comes up at last; with the time before, it stays bounded.
        """
        queue = self.queues[waiter.key]
        if queue.empty_since_s >= 0.0 and self._prospect_of(waiter.key).wakes:
            return self._end_of_hold(waiter, queue, now_s, hold_timeout_s)
        patience_s = queue_timeout_s * PATIENCE[class_of(waiter)]
        waited_s = now_s - waiter.since_s
        queued_s = now_s - max(waiter.since_s, queue.open_since_s)
        if queued_s <= patience_s and waited_s <= patience_s + hold_timeout_s:
            return None
        return QueueTimeoutError(
            f"no replica was free for {waited_s:.0f} s (--queue-timeout-secs)",
            wait_s=self._retry_after_s(waiter, queue),
        )

    def _end_of_hold(
        self, waiter: Waiter, queue: Queue, now_s: float, hold_timeout_s: float
    ) -> ProxyError | None:
        """Return why one should wait no longer for a replica that is to come up, if so."""
        waited_s = now_s - max(waiter.since_s, queue.empty_since_s)
        let_be_s = now_s - max(waiter.since_s, queue.let_be_since_s)
        if queue.let_be_since_s >= 0.0 and let_be_s > limits.START_FAILED_S:
            reason = "a replica was being started for this model, and the start has failed"
        elif waited_s > hold_timeout_s:
            reason = f"nothing of this model came up within {waited_s:.0f} s (--hold-timeout-secs)"
        else:
            return None
        return NotAwakeError(reason, wait_s=start_retry_s(self._prospect_of(waiter.key)))

    # --- looking -----------------------------------------------------------------------------

    def work_done(self) -> None:
        """Something has changed by which a replica may have become open."""
        if self.room.count and not self._look_due:
            self._look_due = True
            asyncio.get_running_loop().call_soon(self._look)

    def heard(self) -> None:
        """Others have decided something. Each of us looks at another moment of those to come."""
        self._news = True

    def _look(self) -> None:
        """Give away what can go now."""
        self._look_due = False
        self.catch_up()
        self._news = False
        now_s = self._clock.now_s()
        self._end_late(now_s)
        share = left = self._share(now_s)
        some_open, next_s = self._openings(now_s)
        while left and (some_open or (self.at_once and self.room.count)) and self._take(now_s):
            left -= 1
            now_s = self._clock.now_s()
            some_open, next_s = self._openings(now_s)
        self._quota -= share - left
        crowded = self._picture.loads.crowded
        if crowded:  # others took what seemed to be open; what they did will be heard soon
            next_s = min(next_s, now_s)
            crowded.clear()
            some_open = False
        if share and (not left or (some_open and self._holding.unseen)):
            self.work_done()
        if not share:
            next_s = self._quota_end_s
        if self.clearing.bits(now_s):
            next_s = min(next_s, self.clearing.end_s)
        next_s = min(next_s, self._holding.next_due_s)
        self._wake_at(next_s if self.room.count else _NEVER)

    def _end_late(self, now_s: float) -> None:
        """Who cannot meet his deadline any more goes behind those who can, or is told so."""
        for held in self._holding.overdue(now_s):
            if self.lateness.shed or is_vain(held, now_s):
                assert isinstance(held, Waiter)
                self._send_away(held, self.lateness.refusal)

    def _divide(self, opened: int, now_s: float) -> None:
        """Every worker sees these replicas come up at once: take a part of what they may have.

        The rest is anybody's a moment later, when each has heard what the others took.
        """
        loads = self._picture.loads
        most = [
            loads.inflight_max[slot] for slot in range(opened.bit_length()) if opened >> slot & 1
        ]
        if most and all(most):
            before = self._quota if now_s < self._quota_end_s else 0
            self._quota = before + sum(most) // self.sharers
            self._quota_end_s = now_s + limits.OPENED_SHARED_S * (1.0 + self._clock.draw())

    def _share(self, now_s: float) -> int:
        """Return how many may leave in this look."""
        if self._quota_end_s <= now_s:
            self._quota = 0
            return limits.HELD_TAKEN_MAX
        return min(limits.HELD_TAKEN_MAX, self._quota)

    def _openings(self, now_s: float) -> tuple[bool, float]:
        """Return whether any replica that is waited for is open, and else when one should be."""
        some_open, next_s = False, _NEVER
        offline = self.room.count_of(OFFLINE) > 0
        runway_s = self._holding.runway_s_min
        if offline:
            runway_s = min(runway_s, claim_limits.RUNWAY_OVER_S)
        seen: set[int] = set()
        for key, queue in self.queues.items():
            pool = self._pool_of(key, None) if queue.waiters else None
            bits = self._picture.seats(pool).all_bits if pool is not None else 0
            if pool is None or bits in seen:
                continue
            seen.add(bits)
            opening = Opening(pool, self._picture, now_s, runway_s, offline=offline)
            some_open = some_open or opening.now
            next_s = min(next_s, opening.next_s)
        return some_open, next_s

    def _take(self, now_s: float) -> bool:
        found = self._holding.take(
            self._choose, self._picture, now_s, at_once=self.at_once, braked=self.braked()
        )
        if found is None:
            return False
        held, decision = found
        assert isinstance(held, Waiter)
        self.queues[held.key].pace.left(now_s)
        self._left(held)
        try:
            held.on_decision(decision)
        except Exception:  # noqa: BLE001 - of one request: the others are to go on
            self._on_fault()
            _log.exception("a request that had waited")
        return True

    def _left(self, waiter: Waiter) -> None:
        queue = self.queues[waiter.key]
        del queue.waiters[waiter]
        queue.online -= class_of(waiter) == ONLINE
        queue.tokens -= waiter.needed_tokens
        self.room.leave(waiter)
        if not self.room.count:
            self._wake_at(_NEVER)

    def _wake_at(self, moment_s: float) -> None:
        self._due_s = moment_s
        now_s = self._clock.now_s()
        if self.hears and self.room.count:
            moment_s = min(moment_s, now_s + limits.HELD_READ_S)
        if moment_s < _NEVER:
            # A little late: at the very moment, rounding may still say that it has not come.
            delay_s = max(0.0, moment_s - now_s) + limits.HELD_TIMER_S_MIN
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
        """The moment has come, or one at which others may have said something."""
        self._timer = None
        self.catch_up()
        if self._news or self._clock.now_s() >= self._due_s:
            self.work_done()
        else:
            self._wake_at(self._due_s)

    # --- what is reported --------------------------------------------------------------------

    def counters(self) -> list[Sample]:
        refused = [
            Sample("queue_refused_total", (("class", name),), self.refused[number])
            for number, name in enumerate(NAMES)
        ]
        return [*refused, *self.lateness.counters()]

    def gauges(self, now_s: float) -> list[Sample]:
        out = []
        for number, name in enumerate(NAMES):
            by = (("class", name),)
            out += [
                Sample("queue_depth", by, self.room.count_of(number)),
                Sample("queue_depth_max", by, self.room.count_max_of(number)),
                Sample("queue_bytes", by, self.room.bytes_of(number)),
                Sample("queue_oldest_seconds", by, self.room.oldest_s(number, now_s)),
            ]
        held = sum([len(q.waiters) for q in self.queues.values() if q.empty_since_s >= 0.0])
        return [*out, Sample("queue_held_for_start", (), held)]


def nothing() -> None:
    """Nobody wants to know."""
