"""Tenants and classes in virtual time: workers that hold requests by the project's own core.

A request comes to a worker by chance. That sends it to a replica or holds it, as `io/choice` and
`io/waiting` would: shares, order, reserve and runways are `proxy.core`'s. Workers hear each
other's decisions some milliseconds later, and what each tenant was given they count in the same
cells. Replicas are those of the policy lab; no two prompts share their beginning.

What the wire brings is left out, and so is that offline work which has begun is ended for online
work: what is seen here is what the order does by itself.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Final

import msgspec

from loadtest.policies.caches import SharedMemory
from loadtest.policies.chains import chains_of
from loadtest.policies.engines import Engine, Flight, Mixed, Timing
from loadtest.policies.ours import lab_replicas
from loadtest.policies.workload import BLOCK_TOKENS, Job, Workload
from proxy.contract import LoadSample
from proxy.core import limits
from proxy.core.charging import account_of, charge, settle
from proxy.core.classes import OFFLINE, ONLINE
from proxy.core.fleet import make_pool
from proxy.core.held import Held, class_of
from proxy.core.holding import Holding
from proxy.core.lease import Lease
from proxy.core.opening import Opening, is_open, runway_beside_s
from proxy.core.picture import Picture
from proxy.core.policy import Decision, Request, prefix
from proxy.core.share_cells import ROWS, ShareCells, share_table_bytes
from proxy.core.usage import Usage

GAUGES_S: Final = 1.0
NOTE_S: Final = 0.002
POKE_S_MIN: Final = 0.001
CACHE_TOKENS: Final = 1_000_000
_NEVER: Final = float("inf")


class Claimant(msgspec.Struct, frozen=True, kw_only=True):
    """Who sends: as which tenant and class, and how much."""

    name: str
    tenant: str
    rate: float  # requests a second
    weight: float = 1.0
    work_class: int = ONLINE


class Scene(msgspec.Struct, frozen=True, kw_only=True):
    """What serves, and how long."""

    replicas: int = 2
    workers: int = 4
    prompts: tuple[int, ...] = (1000, 2000, 4000, 8000)
    output_tokens: int = 100
    seconds: float = 60.0
    seed: int = 1
    timing: Timing = Timing(chunk_tokens=2048)


class Trip:
    """One request: who sent it, what it holds, and what its client has seen."""

    __slots__ = ("by", "flight", "lease", "request", "worker")

    def __init__(self, flight: Flight, by: Claimant) -> None:
        self.flight = flight
        self.by = by
        self.request: Request | None = None
        self.lease: Lease | None = None
        self.worker = -1

    @property
    def ttft_s(self) -> float:
        return self.flight.first_s - self.flight.arrived_s


class Worker:
    """One worker of the proxy."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.picture = Picture()
        self.holding = Holding()
        self.held: dict[Held, Trip] = {}
        self.online = 0  # of those who wait
        self.stirred = False
        self.poke_s = 0.0  # when it looks again by itself; 0: never


class Stage:
    """All workers, the replicas, and the clock."""

    def __init__(self, claimants: Sequence[Claimant], scene: Scene) -> None:
        self.scene = scene
        self.now_s = 0.0
        self.trips: list[Trip] = []
        self._claimants = claimants
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._draw = random.Random(f"{scene.seed} workers")
        workload, self._by = arrivals(claimants, scene)
        self._jobs = workload.jobs
        self._chains = chains_of(workload, "chain")
        self._trip_of: dict[int, Trip] = {}
        self._others: dict[int, list[tuple[Worker, Lease]]] = {}  # what others heard of each
        memory = SharedMemory(scene.replicas, CACHE_TOKENS // BLOCK_TOKENS)
        places = range(scene.replicas)
        self.engines = [Mixed(p, self, scene.timing, memory, speed=1.0) for p in places]
        self._replicas = lab_replicas(scene.replicas, CACHE_TOKENS)
        self._places = {each.name: place for place, each in enumerate(self._replicas)}
        self._pool = make_pool({each.name: each for each in self._replicas}, {})
        self.workers = [Worker(number) for number in range(scene.workers)]
        self._share_cells()

    def _share_cells(self) -> None:
        workers = self.scene.workers
        size = share_table_bytes(workers)
        names = memoryview(bytearray(ROWS * 8)).cast("Q")
        cells = memoryview(bytearray(size - ROWS * 8)).cast("d")
        for worker in self.workers:
            shares = worker.holding.shares
            shares.on = True
            shares.cells = ShareCells(names, cells, worker.number, workers, _nothing, _nothing)
            shares.know_speed(self.scene.replicas * self.scene.timing.prefill_tokens_per_s)

    # --- time --------------------------------------------------------------------------------

    def later(self, delay_s: float, call: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._heap, (self.now_s + delay_s, self._count, call))

    def run(self) -> None:
        """Run until the last moment at which somebody comes."""
        self._read_gauges()
        for job in self._jobs:
            self.later(job.at_s, partial(self._arrive, job))
        while self._heap and self.now_s < self.scene.seconds:
            self.now_s, _, call = heapq.heappop(self._heap)
            call()
            for worker in self.workers:
                if worker.stirred:
                    self._let_go(worker)

    def _read_gauges(self) -> None:
        known = [replace(each, load=self._gauges(each.name)) for each in self._replicas]
        for worker in self.workers:
            worker.picture.know(known, self.now_s)
            worker.stirred = True
        self.later(GAUGES_S, self._read_gauges)

    def _gauges(self, name: str) -> LoadSample:
        engine = self.engines[self._places[name]]
        return LoadSample(
            at_s=self.now_s,
            running=engine.running,
            waiting=len(engine.queue),
            kv_used_ratio=engine.held_tokens() / CACHE_TOKENS,
            kv_capacity_tokens=CACHE_TOKENS,
            running_max=self.scene.timing.slots_mixed,
        )

    # --- one request -------------------------------------------------------------------------

    def _arrive(self, job: Job) -> None:
        by = self._by[job.index]
        trip = Trip(Flight(job, self.now_s, 0), by)
        self.trips.append(trip)
        self._trip_of[job.index] = trip
        worker = self._draw.choice(self.workers)
        trip.worker = worker.number
        request = Request(self._chains[job.index], has_session=False, stream=True)
        request.work_class = by.work_class
        request.tenant, request.tenant_weight = by.tenant, by.weight
        if by.work_class == OFFLINE:
            request.weight = limits.FLEX_WEIGHT
        trip.request = request
        decision = prefix(request, self._pool, worker.picture, self.now_s)
        assert decision is not None
        if self._holds(worker, request, decision):
            self._hold(worker, trip, request)
        else:
            self._go(worker, trip, request, decision)

    def _holds(self, worker: Worker, request: Request, decision: Decision) -> bool:
        picture, shares = worker.picture, worker.holding.shares
        picture.loads.prefilling.settle(decision.slot, self.now_s)
        runway_s = limits.RUNWAY_S
        if worker.held:
            account = account_of(shares, request, self.now_s)
            shares.refresh(self.now_s)
            runway_s = shares.runway_s(account)
        if request.work_class == OFFLINE:
            if worker.online:
                return True
            runway_s = min(runway_s, runway_beside_s(decision.slot, picture, self.now_s))
        awaited = worker.held and worker.holding.awaits(decision.slot)
        return bool(awaited) or not is_open(decision, request, picture, self.now_s, runway_s)

    def _hold(self, worker: Worker, trip: Trip, request: Request) -> None:
        held = Held(request, lambda: self._pool, _nothing_decided, self.now_s)
        held.account = account_of(worker.holding.shares, request, self.now_s)
        worker.holding.add(held, worker.picture)
        worker.held[held] = trip
        worker.online += class_of(held) == ONLINE
        worker.stirred = True

    def _let_go(self, worker: Worker) -> None:
        worker.stirred = False
        holding, picture = worker.holding, worker.picture
        bits = picture.seats(self._pool).bits
        while True:
            braked = bits if worker.online else 0
            found = holding.take(prefix, picture, self.now_s, braked=braked)
            if found is None:
                break
            held, decision = found
            worker.online -= class_of(held) == ONLINE
            self._go(worker, worker.held.pop(held), held.request, decision)
        if not worker.held:
            return
        opening = Opening(self._pool, picture, self.now_s, holding.runway_s_min, offline=True)
        next_s = opening.next_s
        if next_s < _NEVER and not self.now_s < worker.poke_s <= next_s:
            worker.poke_s = max(self.now_s + POKE_S_MIN, next_s)
            self.later(worker.poke_s - self.now_s, partial(self._poke, worker))

    def _poke(self, worker: Worker) -> None:
        worker.stirred = True

    def _go(self, worker: Worker, trip: Trip, request: Request, decision: Decision) -> None:
        picture = worker.picture
        trip.lease = picture.acquire(
            decision.replica,
            request.chain,
            cached_octets=decision.cached_octets,
            now_s=self.now_s,
            weight=request.weight,
            known=decision.known,
        )
        charge(worker.holding.shares, trip.lease, request, self.now_s)
        place = trip.flight.replica = self._places[decision.replica.name]
        self.engines[place].submit(trip.flight, self.now_s)
        for other in self.workers:
            if other is not worker:
                self.later(NOTE_S, partial(self._hear, other, trip, decision.replica.name))

    def _hear(self, other: Worker, trip: Trip, name: str) -> None:
        picture, request = other.picture, trip.request
        assert request is not None
        lease = picture.lease(
            name,
            picture.slots[name],
            request.chain,
            cached_octets=0,
            streamed=True,
            weight=request.weight,
        )
        picture.dispatched(lease, request.chain, self.now_s)
        self._others.setdefault(trip.flight.job.index, []).append((other, lease))

    # --- what engines tell -------------------------------------------------------------------

    def wake(self, engine: Engine, at_s: float, token: object) -> None:
        self.later(at_s - self.now_s, lambda: engine.woken(token, self.now_s))

    def first_token(self, flight: Flight, now_s: float) -> None:
        trip = self._trip_of[flight.job.index]
        flight.first_s = now_s
        worker = self.workers[trip.worker]
        assert trip.lease is not None
        worker.picture.prefill_ended(trip.lease, now_s)
        worker.stirred = True
        self.later(NOTE_S, partial(self._first_heard, flight.job.index))

    def _first_heard(self, index: int) -> None:
        for other, lease in self._others.get(index, ()):
            other.picture.prefill_ended(lease, self.now_s)
            other.stirred = True

    def ended(self, flight: Flight, now_s: float) -> None:
        trip = self._trip_of[flight.job.index]
        flight.ended_s = now_s
        worker = self.workers[trip.worker]
        usage = _usage(flight)
        lease = trip.lease
        assert lease is not None
        worker.picture.decoded(lease, flight.job.output_tokens, now_s - flight.first_s)
        settle(worker.holding.shares, lease, worker.picture.loads, usage, flight.first_s, now_s)
        worker.picture.release(lease, now_s, usage)
        worker.stirred = True
        self.later(NOTE_S, partial(self._end_heard, flight.job.index, usage))

    def _end_heard(self, index: int, usage: Usage) -> None:
        for other, lease in self._others.pop(index, ()):
            other.picture.release(lease, self.now_s, usage)
            other.stirred = True


def arrivals(claimants: Sequence[Claimant], scene: Scene) -> tuple[Workload, list[Claimant]]:
    """Return all requests in the order in which they come, and who sends each."""
    drawn: list[tuple[float, int, int]] = []
    for number, claimant in enumerate(claimants):
        draw = random.Random(f"{scene.seed} {claimant.name}")
        at_s = draw.expovariate(claimant.rate)
        while at_s < scene.seconds:
            drawn.append((at_s, number, draw.choice(scene.prompts)))
            at_s += draw.expovariate(claimant.rate)
    jobs, by = [], []
    for index, (at_s, number, prompt) in enumerate(sorted(drawn)):
        blocks = tuple((index + 1) << 20 | place for place in range(-(-prompt // BLOCK_TOKENS)))
        job = Job(index, index, blocks, tokens=(prompt, scene.output_tokens))
        job.at_s = at_s
        jobs.append(job)
        by.append(claimants[number])
    return Workload("claims", jobs, closed_loop=False), by


def _usage(flight: Flight) -> Usage:
    return Usage(
        prompt_tokens=flight.job.prompt_tokens,
        completion_tokens=flight.job.output_tokens,
        cached_tokens=flight.cached_tokens,
    )


def _nothing() -> None:
    """One process, one thread: nobody is to be kept out."""


def _nothing_decided(_decision: Decision) -> None:
    """The stage sends what is taken."""
