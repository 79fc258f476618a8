"""Several regions in virtual time, each with a proxy that chooses by the project's own core.

A request comes to the proxy of its region, which sends it to a replica, holds it, or sends it to
the proxy of another region, half a round trip away; that one chooses among its own replicas, or
holds it, and sends it on to nobody. Proxies tell each other summaries, a quarter of a second apart,
which arrive half a round trip later. Replicas are those of the policy lab.

What the wire brings is left out, as there: no connection is made and none fails.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Final

import msgspec

from loadtest.policies.caches import SharedMemory
from loadtest.policies.chains import chains_of
from loadtest.policies.engines import Engine, Flight, Mixed, Timing
from loadtest.policies.workload import BLOCK_TOKENS, Job, Workload
from proxy.contract import FleetSnapshot, LoadSample, ReplicaRecord
from proxy.contract.regions import SUMMARY_INTERVAL_S, RegionSummary, RemoteState
from proxy.core import limits
from proxy.core.fleet import Pool, RemotesReceived, SnapshotReceived, apply, empty_fleet
from proxy.core.held import Held
from proxy.core.holding import Holding
from proxy.core.lease import Lease
from proxy.core.opening import is_open
from proxy.core.picture import Picture
from proxy.core.policy import Decision, Request, prefix
from proxy.core.regions import Place, choose_region, places_of, remotes_of
from proxy.core.summary import summarise
from proxy.core.usage import Usage

MODEL: Final = "lab"
GAUGES_S: Final = 1.0
POKE_S_MIN: Final = 0.001


class Ground(msgspec.Struct, frozen=True, kw_only=True):
    """What the regions are made of."""

    regions: tuple[str, ...] = ("eu", "us", "ap")
    round_trips_s: tuple[float, ...] = (0.005, 0.080, 0.160)  # of the pairs 0-1, 0-2, 1-2
    replicas: int = 4  # of each region
    cache_tokens: int = 1_000_000  # of each replica
    linked: bool = True  # else each region is an island
    timing: Timing = Timing()

    def round_trip_s(self, one: int, other: int) -> float:
        return self.round_trips_s[one + other - 1]


class Trip:
    """One request: what it holds where, and what its client has seen."""

    __slots__ = ("abroad", "ended_s", "first_s", "flight", "lease", "origin", "remote_lease")

    def __init__(self, flight: Flight, origin: int) -> None:
        self.flight = flight
        self.origin = origin
        self.abroad = -1  # the region that it was sent to
        self.lease: Lease | None = None  # on a replica, in the region that computes it
        self.remote_lease: Lease | None = None  # on another region, in that where it came
        self.first_s = self.ended_s = 0.0  # as seen where it came

    @property
    def ttft_s(self) -> float:
        return self.first_s - self.flight.arrived_s


class Region:
    """One region's proxy: its picture, what it holds back, and what it heard of others."""

    def __init__(self, number: int, ground: Ground) -> None:
        self.number = number
        self.name = ground.regions[number]
        self.picture = Picture()
        self.holding = Holding()
        self.held: dict[Held, Trip] = {}
        self.stirred = False
        self.poked = False
        self.sequence = 0
        records = tuple(
            ReplicaRecord(
                replica_id=f"{self.name}-{place}", url="http://127.0.0.1:1", models=(MODEL,)
            )
            for place in range(ground.replicas)
        )
        told = FleetSnapshot(epoch="lab", version=1, replicas=records)
        self.fleet = apply(empty_fleet(), SnapshotReceived(told, self.name))
        self.others: list[Place] = []
        self.states: dict[str, RemoteState] = {}
        self.places = {
            f"{self.name}-{p}": number * ground.replicas + p for p in range(ground.replicas)
        }

    @property
    def pool(self) -> Pool:
        return self.fleet.pools[MODEL]

    def pool_now(self) -> Pool:
        return self.pool

    def know(self, state: RemoteState, now_s: float) -> None:
        """A summary of another region has come."""
        self.states[state.name] = state
        states = list(self.states.values())
        places = places_of(states, self.others, self.name)
        if places != self.others:
            self.others = places
            found = remotes_of(places)
            self.fleet = apply(self.fleet, RemotesReceived(found))
            self.picture.know((*self.fleet.replicas.values(), *found), now_s)
        self.picture.know_remotes(states)
        if self.held and self.picture.may_leave(self.picture.seats(self.pool), now_s):
            self.stirred = True

    def choose(
        self, request: Request, pool: Pool, picture: Picture, now_s: float
    ) -> Decision | None:
        home = prefix(request, pool, picture, now_s)
        if not pool.remotes or not request.abroad:
            return home
        return choose_region(
            home, request, pool, picture, now_s, priced=True, held=lambda _: len(self.held)
        )

    def summary(self, now_s: float) -> RegionSummary:
        self.sequence += 1
        models = summarise(self.fleet, self.picture, {MODEL: len(self.held)}, now_s)
        return RegionSummary(region=self.name, sequence=self.sequence, models=models)


class Land:
    """All regions, their replicas, and the clock."""

    def __init__(self, workload: Workload, origins: Sequence[int], ground: Ground) -> None:
        """`origins` says of each job to which region it comes."""
        self.ground = ground
        self.now_s = 0.0
        self.trips: list[Trip] = []
        self._workload = workload
        self._origins = origins
        self._chains = chains_of(workload, "chain")
        self._left = len(workload.jobs)
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._trip_of: dict[int, Trip] = {}
        size = len(ground.regions) * ground.replicas
        memory = SharedMemory(size, ground.cache_tokens // BLOCK_TOKENS)
        self.engines = [Mixed(p, self, ground.timing, memory, speed=1.0) for p in range(size)]
        self.regions = [Region(number, ground) for number in range(len(ground.regions))]

    # --- time --------------------------------------------------------------------------------

    def later(self, delay_s: float, call: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._heap, (self.now_s + delay_s, self._count, call))

    def run(self) -> None:
        """Run until the last answer has ended."""
        for region in self.regions:
            self._read_gauges(region)
            if self.ground.linked:
                self.later(0.03 * region.number, partial(self._tell, region))
        for job in self._workload.jobs:
            self.later(job.at_s, partial(self._arrive, job))
        while self._left:
            self.now_s, _, call = heapq.heappop(self._heap)
            call()
            for region in self.regions:
                if region.stirred:
                    self._let_go(region)

    def _read_gauges(self, region: Region) -> None:
        known = [
            replace(
                replica,
                kv_capacity_tokens=self.ground.cache_tokens,
                load=self._gauges(self.engines[region.places[name]]),
            )
            for name, replica in region.fleet.replicas.items()
        ]
        region.picture.know((*known, *region.fleet.remotes.values()), self.now_s)
        region.stirred = True
        self.later(GAUGES_S, partial(self._read_gauges, region))

    def _gauges(self, engine: Mixed) -> LoadSample:
        return LoadSample(
            at_s=self.now_s,
            running=engine.running,
            waiting=len(engine.queue),
            kv_used_ratio=engine.held_tokens() / self.ground.cache_tokens,
            kv_capacity_tokens=self.ground.cache_tokens,
            running_max=self.ground.timing.slots_mixed,
        )

    def _tell(self, region: Region) -> None:
        """Have all others hear what there is here."""
        summary = region.summary(self.now_s)
        for other in self.regions:
            if other is not region:
                way_s = self.ground.round_trip_s(region.number, other.number)
                self.later(way_s / 2, partial(self._hear, other, region, summary, way_s))
        self.later(SUMMARY_INTERVAL_S, partial(self._tell, region))

    def _hear(self, region: Region, other: Region, summary: RegionSummary, way_s: float) -> None:
        state = RemoteState(
            name=f"{other.name}#0",
            region=other.name,
            url="http://127.0.0.1:1",
            linked=True,
            round_trip_s=way_s,
            at_s=self.now_s,
            summary=summary,
        )
        region.know(state, self.now_s)

    # --- one request -------------------------------------------------------------------------

    def _arrive(self, job: Job) -> None:
        trip = Trip(Flight(job, self.now_s, 0), self._origins[job.index])
        self.trips.append(trip)
        self._trip_of[job.index] = trip
        self._place(self.regions[trip.origin], trip, abroad=True)

    def _place(self, region: Region, trip: Trip, *, abroad: bool) -> None:
        request = Request(self._chains[trip.flight.job.index], has_session=False, stream=True)
        request.abroad = abroad
        decision = region.choose(request, region.pool, region.picture, self.now_s)
        assert decision is not None
        if not region.holding.awaits(decision.slot) and is_open(
            decision, request, region.picture, self.now_s
        ):
            self._go(region, trip, request, decision)
            return
        held = Held(request, region.pool_now, _nothing, self.now_s)
        region.holding.add(held, region.picture)
        region.held[held] = trip
        region.stirred = True

    def _let_go(self, region: Region) -> None:
        region.stirred = False
        holding, picture = region.holding, region.picture
        while (found := holding.take(region.choose, picture, self.now_s)) is not None:
            held, decision = found
            self._go(region, region.held.pop(held), held.request, decision)
        if region.poked or not region.held:
            return
        waits_s = [
            picture.loads.wait_s(picture.slots[name], self.now_s) - limits.RUNWAY_S
            for name in region.places
        ]
        opening_s = min((wait_s for wait_s in waits_s if wait_s > 0), default=0.0)
        if opening_s:
            region.poked = True
            self.later(max(POKE_S_MIN, opening_s), partial(self._poke, region))

    def _poke(self, region: Region) -> None:
        region.poked, region.stirred = False, True

    def _go(self, region: Region, trip: Trip, request: Request, decision: Decision) -> None:
        lease = region.picture.acquire(
            decision.replica,
            request.chain,
            cached_octets=decision.cached_octets,
            now_s=self.now_s,
            known=decision.known,
        )
        if not decision.replica.remote:
            trip.lease = lease
            place = trip.flight.replica = region.places[decision.replica.name]
            self.engines[place].submit(trip.flight, self.now_s)
            return
        trip.remote_lease = lease
        trip.abroad = self.ground.regions.index(decision.replica.region)
        there = self.regions[trip.abroad]
        self.later(self._way_s(trip), partial(self._place, there, trip, abroad=False))

    def _way_s(self, trip: Trip) -> float:
        """Return how long an octet takes between the client's region and that of the replica."""
        if trip.abroad < 0:
            return 0.0
        return self.ground.round_trip_s(trip.origin, trip.abroad) / 2

    # --- what engines tell -------------------------------------------------------------------

    def wake(self, engine: Engine, at_s: float, token: object) -> None:
        self.later(at_s - self.now_s, lambda: engine.woken(token, self.now_s))

    def first_token(self, flight: Flight, now_s: float) -> None:
        trip = self._trip_of[flight.job.index]
        flight.first_s = now_s
        region = self.regions[trip.origin if trip.abroad < 0 else trip.abroad]
        assert trip.lease is not None
        region.picture.prefill_ended(trip.lease, now_s)
        region.stirred = True
        self.later(self._way_s(trip), partial(self._seen, trip))

    def _seen(self, trip: Trip) -> None:
        trip.first_s = self.now_s
        if trip.remote_lease is not None:
            self.regions[trip.origin].picture.prefill_ended(trip.remote_lease, self.now_s)

    def ended(self, flight: Flight, now_s: float) -> None:
        trip = self._trip_of[flight.job.index]
        flight.ended_s = now_s
        region = self.regions[trip.origin if trip.abroad < 0 else trip.abroad]
        assert trip.lease is not None
        region.picture.release(trip.lease, now_s, _usage(flight))
        region.stirred = True
        self.later(self._way_s(trip), partial(self._over, trip))

    def _over(self, trip: Trip) -> None:
        trip.ended_s = self.now_s
        if trip.remote_lease is not None:
            usage = _usage(trip.flight)
            self.regions[trip.origin].picture.release(trip.remote_lease, self.now_s, usage)
        self._left -= 1


def _usage(flight: Flight) -> Usage:
    return Usage(
        prompt_tokens=flight.job.prompt_tokens,
        completion_tokens=flight.job.output_tokens,
        cached_tokens=flight.cached_tokens,
    )


def _nothing(_decision: Decision) -> None:
    """The land sends what is taken."""
