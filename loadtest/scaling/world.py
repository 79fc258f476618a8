"""Pools of replicas in virtual time: requests come, wait, are served; replicas start and go.

A request goes to the replica with the fewest in flight, at most `max_inputs` each; beyond that it
waits in front of the pool, first come first served, and binds to whichever is free first, also one
that has just come up. It is refused where the queue is full and lost where it waited too long. A
replica that is taken away gets no more, ends what it has, and is paid until then; one on its way up
is paid from its order.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from loadtest.scaling.replicas import Job, Replica, Speeds

QUEUED_MAX = 4096
QUEUED_S_MAX = 150.0
AFTER_S = 60.0  # that everybody pays on, after the last arrival


class Seen:
    """What a law may look at: a pool at one moment, and what it has counted."""

    __slots__ = (
        "arrivals_total",
        "at_s",
        "coming_in_s",
        "in_flight",
        "in_flight_tokens",
        "kv_used_ratio",
        "queued",
        "queued_tokens",
        "ready",
        "refused_total",
        "start_s",
    )

    def __init__(self, at_s: float, pool: Pool) -> None:
        self.at_s = at_s
        self.in_flight = sum(one.in_flight for one in pool.ready)
        self.in_flight += sum(one.in_flight for one in pool.leaving)
        self.in_flight_tokens = sum(one.waiting_tokens for one in pool.ready)
        self.queued = len(pool.queue)
        self.queued_tokens = pool.queued_tokens
        self.ready = len(pool.ready)
        self.coming_in_s = tuple(ready_s - at_s for ready_s in pool.coming)
        self.start_s = pool.start_s
        ratios = sum(one.kv_used_ratio for one in pool.ready)
        self.kv_used_ratio = ratios / len(pool.ready) if pool.ready else 0.0
        self.arrivals_total = pool.arrivals_total
        self.refused_total = pool.refused_total


class Law(Protocol):
    """Says how many replicas there should be, every `tick_s`."""

    tick_s: float

    def desired(self, seen: Seen) -> int: ...


class Pool:
    """The replicas of one model, what waits for them, and what they have cost."""

    def __init__(self, world: World, *, start_s: float, max_inputs: int, speeds: Speeds) -> None:
        self.world = world
        self.start_s = start_s
        self.max_inputs = max_inputs
        self.speeds = speeds
        self.queue: deque[Job] = deque()
        self.queued_tokens = 0
        self.ready: list[Replica] = []
        self.leaving: list[Replica] = []
        self.coming: list[float] = []  # when each will serve, the first first
        self.arrivals_total = 0
        self.refused_total = 0
        self.lost_total = 0
        self.paid_s = 0.0
        self.peak = 0
        self.turns = 0  # times that the direction changed
        self._direction = 0
        self._paid_until_s = 0.0
        self._names = 0

    @property
    def size(self) -> int:
        return len(self.ready) + len(self.coming)

    def pay(self, now_s: float) -> None:
        """Count replica-seconds up to now; called before the number changes."""
        count = len(self.ready) + len(self.coming) + len(self.leaving)
        self.paid_s += count * (now_s - self._paid_until_s)
        self._paid_until_s = now_s

    # --- requests ---------------------------------------------------------------------------------

    def arrive(self, job: Job, now_s: float) -> None:
        self.arrivals_total += 1
        if len(self.queue) >= QUEUED_MAX:
            self.refused_total += 1
            return
        self.queue.append(job)
        self.queued_tokens += job.prompt_tokens
        self.serve(now_s)

    def serve(self, now_s: float) -> None:
        """Give what waits to who has room."""
        while self.queue:
            if now_s - self.queue[0].at_s > QUEUED_S_MAX:
                self.queued_tokens -= self.queue.popleft().prompt_tokens
                self.lost_total += 1
                continue
            free = min(self.ready, key=lambda one: (one.in_flight, one.name), default=None)
            if free is None or free.in_flight >= self.max_inputs:
                return
            job = self.queue.popleft()
            self.queued_tokens -= job.prompt_tokens
            free.take(job, now_s)
            self.world.watch(self, free)

    def turn(self, replica: Replica, now_s: float) -> None:
        """Something ends on a replica."""
        ended = replica.turn(now_s)
        self.world.watch(self, replica)
        if ended is None:
            return
        self.ended(ended, now_s)
        if replica in self.leaving:
            if not replica.in_flight:
                self.pay(now_s)
                self.leaving.remove(replica)
        else:
            self.serve(now_s)

    def ended(self, job: Job, now_s: float) -> None:
        """A request has been served."""

    # --- replicas ---------------------------------------------------------------------------------

    def resize(self, count: int, now_s: float) -> None:
        """Have `count` replicas, those on their way included."""
        if count == self.size:
            return
        self.pay(now_s)
        direction = 1 if count > self.size else -1
        self.turns += direction == -self._direction
        self._direction = direction
        while self.size < count:
            self.coming.append(now_s + self.start_s)
            self.world.at(now_s + self.start_s, self._come)
        while self.size > count:
            self._take_one(now_s)
        self.peak = max(self.peak, self.size)

    def _come(self, now_s: float) -> None:
        if not self.coming or self.coming[0] > now_s + 1e-9:
            return  # was called off
        self.pay(now_s)
        self.coming.pop(0)
        self.open(now_s)

    def open(self, now_s: float) -> None:
        """Let one serve at once."""
        self._names += 1
        self.ready.append(Replica(self._names, self.speeds))
        self.peak = max(self.peak, self.size)
        self.serve(now_s)

    def _take_one(self, now_s: float) -> None:
        if self.coming:
            self.coming.pop()
            return
        replica = min(self.ready, key=lambda one: (one.in_flight, -one.name))
        self.ready.remove(replica)
        if replica.in_flight:
            self.leaving.append(replica)


class World:
    """The events of some pools, in their order."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._turns: list[tuple[float, int, Pool, Replica, int]] = []
        self._sequence = 0

    def at(self, at_s: float, call: Callable[[float], None]) -> None:
        self._sequence += 1
        heapq.heappush(self._events, (at_s, self._sequence, call))

    def watch(self, pool: Pool, replica: Replica) -> None:
        """Expect what happens next on a replica; what was expected before is void."""
        next_s = replica.next_s()
        if next_s < math.inf:
            self._sequence += 1
            entry = (next_s, self._sequence, pool, replica, replica.version)
            heapq.heappush(self._turns, entry)

    def run(self, jobs: Sequence[tuple[Job, Pool]], until_s: float) -> None:
        """Run until `until_s`, and on until nothing is left to serve."""
        arrivals = iter(jobs)
        coming = next(arrivals, None)
        while True:
            arrival_s = coming[0].at_s if coming else math.inf
            event_s = self._events[0][0] if self._events else math.inf
            turn_s = self._turns[0][0] if self._turns else math.inf
            now_s = min(arrival_s, event_s, turn_s)
            idle = coming is None and turn_s == math.inf
            if now_s == math.inf or (idle and now_s > until_s):
                return
            self.now_s = now_s
            if turn_s <= now_s:
                _, _, pool, replica, version = heapq.heappop(self._turns)
                if version == replica.version:
                    pool.turn(replica, now_s)
            elif event_s <= now_s:
                heapq.heappop(self._events)[2](now_s)
            elif coming:
                job, pool = coming
                pool.arrive(job, now_s)
                coming = next(arrivals, None)


def govern(world: World, pool: Pool, law: Law, until_s: float) -> None:
    """Have a law decide the size of a pool, every tick of its own until `until_s`."""

    def tick(now_s: float) -> None:
        pool.serve(now_s)
        pool.resize(law.desired(Seen(now_s, pool)), now_s)
        if now_s < until_s:
            world.at(now_s + law.tick_s, tick)

    world.at(law.tick_s, tick)
