"""One run: jobs arrive, a chooser places them, replicas work, in virtual time.

The world owns the clock and the heap of what is to come. Everything that a chooser learns it learns
here, at the moment at which a proxy would: that it sent a request, that the first token came back,
that the answer ended and what its usage said, that replicas came.
"""

from __future__ import annotations

import abc
import heapq
import random
import time
from collections.abc import Callable, Iterable
from typing import Final

import msgspec

from loadtest.policies.caches import Caches, SharedMemory
from loadtest.policies.engines import Engine, Flight, Mixed, Serial, Timing
from loadtest.policies.workload import BLOCK_TOKENS, Job, Workload

HELD: Final = -1
ARRIVES, WAKES, SCALES, CALLS = range(4)


class Fleet(msgspec.Struct, frozen=True, kw_only=True):
    """The replicas of a run."""

    replicas: int
    capacity_tokens: int
    model: str = "mixed"
    slow: float = 1.0  # speed of the first replica; nobody is told
    timing: Timing = Timing()

    @property
    def slots(self) -> int:
        """Return how many requests a replica computes at a time."""
        serial = self.model == "serial"
        return self.timing.slots_serial if serial else self.timing.slots_mixed


class Drive(msgspec.Struct, frozen=True, kw_only=True):
    """How the jobs come, and how many proxies place them."""

    scale: float = 1.0  # time is compressed by so much
    proxies: int = 1
    seed: int = 7
    plan: tuple[tuple[float, int], ...] = ()  # at which second how many replicas are there
    late_s_max: float = 0.0  # stop when too many first tokens come later than this; 0: never
    late_share_max: float = 0.05
    jitter_s: float = 0.0  # a job comes up to so much later than it was sent


class Chooser(abc.ABC):
    """Places requests. Which proxy a request came to is in the flight."""

    holds = False  # whether `take` has anything to say

    @abc.abstractmethod
    def choose(self, flight: Flight, now_s: float) -> int:
        """Return the replica, or `HELD`: it will come out of `take`."""

    def take(self, now_s: float) -> Iterable[tuple[Flight, int]]:
        """Return held requests that go now, and where."""
        return ()

    @abc.abstractmethod
    def sent(self, flight: Flight, now_s: float) -> None:
        """The request is on its way to `flight.replica`."""

    @abc.abstractmethod
    def first_token(self, flight: Flight, now_s: float) -> None:
        """Its first token came."""

    @abc.abstractmethod
    def ended(self, flight: Flight, now_s: float) -> None:
        """Its last token came, and its usage."""

    @abc.abstractmethod
    def alive(self, count: int, now_s: float) -> None:
        """The first `count` replicas are there from now on."""


class Stage:
    """The replicas and the clock; and what only an oracle may see of them."""

    def __init__(self, workload: Workload, fleet: Fleet, drive: Drive) -> None:
        self.workload = workload
        self.fleet = fleet
        self.drive = drive
        self.now_s = 0.0
        self.flights: list[Flight] = []
        self.late = 0
        self.decisions = 0
        self.deciding_ns = 0
        self.peak_held = 0
        self._heap: list[tuple[float, int, int, object, object]] = []
        self._count = 0
        self._held = 0
        self._random = random.Random(drive.seed + 1)
        self.truth, self.engines = self._build()
        self.chooser: Chooser | None = None

    def _build(self) -> tuple[Caches, list[Engine]]:
        fleet = self.fleet
        blocks = fleet.capacity_tokens // BLOCK_TOKENS
        speeds = [fleet.slow if place == 0 else 1.0 for place in range(fleet.replicas)]
        engines: list[Engine] = []
        if fleet.model == "serial":
            caches = Caches(fleet.replicas, blocks)
            for place, speed in enumerate(speeds):
                engines.append(Serial(place, self, fleet.timing, caches, speed=speed))
            return caches, engines
        memory = SharedMemory(fleet.replicas, blocks)
        for place, speed in enumerate(speeds):
            engines.append(Mixed(place, self, fleet.timing, memory, speed=speed))
        return memory, engines

    # --- what engines and choosers ask for ----------------------------------------------------

    def _push(self, at_s: float, kind: int, what: object, token: object = None) -> None:
        self._count += 1
        heapq.heappush(self._heap, (at_s, self._count, kind, what, token))

    def wake(self, engine: Engine, at_s: float, token: object) -> None:
        self._push(at_s, WAKES, engine, token)

    def call_later(self, delay_s: float, call: Callable[[], None]) -> None:
        """Let a chooser do something later, such as hear of what another proxy did."""
        self._push(self.now_s + delay_s, CALLS, call)

    def first_token(self, flight: Flight, now_s: float) -> None:
        assert self.chooser is not None
        flight.first_s = now_s
        if self.drive.late_s_max and flight.ttft_s > self.drive.late_s_max:
            self.late += 1
        self.chooser.first_token(flight, now_s)

    def ended(self, flight: Flight, now_s: float) -> None:
        assert self.chooser is not None
        flight.ended_s = now_s
        self.chooser.ended(flight, now_s)
        following = self.workload.next_of.get(flight.job.index)
        if following is not None:
            self._push(now_s + following.think_s, ARRIVES, following)

    # --- the run ------------------------------------------------------------------------------

    def run(self, chooser: Chooser) -> bool:
        """Run to the end. False: stopped, since too many were late."""
        self.chooser = chooser
        drive = self.drive
        chooser.alive(drive.plan[0][1] if drive.plan else self.fleet.replicas, 0.0)
        for at_s, count in drive.plan[1:]:
            self._push(at_s, SCALES, count)
        for job in self.workload.jobs:
            if job.follows < 0:
                late_s = self._random.uniform(0, drive.jitter_s) if drive.jitter_s else 0.0
                self._push(job.at_s / drive.scale + late_s, ARRIVES, job)
        late_max = drive.late_share_max * len(self.workload.jobs)
        heap = self._heap
        while heap:
            self.now_s, _, kind, what, token = heapq.heappop(heap)
            if kind == WAKES:
                assert isinstance(what, Engine)
                what.woken(token, self.now_s)
            elif kind == ARRIVES:
                assert isinstance(what, Job)
                self._arrive(what)
            elif kind == SCALES:
                assert isinstance(what, int)
                chooser.alive(what, self.now_s)
            else:
                assert callable(what)
                what()
            if self._held:
                self._let_go()
            if self.late > late_max:
                return False
        assert not self._held, "a held request was never let go"
        return True

    def _arrive(self, job: Job) -> None:
        assert self.chooser is not None
        proxy = self._random.randrange(self.drive.proxies) if self.drive.proxies > 1 else 0
        flight = Flight(job, self.now_s, proxy)
        self.flights.append(flight)
        self.decisions += 1
        begin_ns = time.thread_time_ns()
        replica = self.chooser.choose(flight, self.now_s)
        self.deciding_ns += time.thread_time_ns() - begin_ns
        if replica == HELD:
            self._held += 1
            self.peak_held = max(self.peak_held, self._held)
        else:
            self._send(flight, replica)

    def _let_go(self) -> None:
        assert self.chooser is not None
        begin_ns = time.thread_time_ns()
        going = list(self.chooser.take(self.now_s))
        self.deciding_ns += time.thread_time_ns() - begin_ns
        for flight, replica in going:
            self._held -= 1
            self._send(flight, replica)

    def _send(self, flight: Flight, replica: int) -> None:
        assert self.chooser is not None
        flight.replica = replica
        self.chooser.sent(flight, self.now_s)
        self.engines[replica].submit(flight, self.now_s)
