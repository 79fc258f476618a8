"""The project's own choice, not a copy of it: `proxy.core`'s policies, picture and late binding.

Each proxy has a picture of its own. It decides what comes to it, and learns what a proxy learns:
the first token, the end, and the usage that the answer reports. Where proxies share, each hears of
the others' decisions and their outcomes some milliseconds later, by the calls that notes make.
From time to time it reads the engines' own gauges, as a proxy does.

`doherty` is the default policy with late binding, `doherty:early` the same without, and
`doherty:NAME` another policy of the core.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

from typing_extensions import override

from loadtest.policies.chains import chains_of
from loadtest.policies.engines import Flight
from loadtest.policies.router import uncached
from loadtest.policies.world import HELD, Chooser, Stage
from proxy.contract import LoadSample, ReplicaRecord
from proxy.core import limits
from proxy.core.fleet import Pool, Shares, make_pool
from proxy.core.held import Held
from proxy.core.holding import Holding
from proxy.core.lease import Lease
from proxy.core.opening import is_open
from proxy.core.picture import Picture
from proxy.core.policy import POLICIES, Decision, Policy, Request
from proxy.core.replica import Replica, replica_of
from proxy.core.ring import Ring
from proxy.core.usage import Usage

NAME = "doherty"
POKE_S_MIN = 0.001


def is_ours(spec: str) -> bool:
    return spec.partition(":")[0] == NAME


def check(spec: str) -> None:
    """Raise `ValueError` for a policy that the core has not."""
    _parse(spec)


def _parse(spec: str) -> tuple[Policy, bool]:
    name = spec.partition(":")[2]
    if name in ("", "early"):
        return POLICIES["prefix"], not name
    if name not in POLICIES:
        raise ValueError(f"policy {spec!r}: the core has {', '.join(POLICIES)}, and early")
    return POLICIES[name], False


class Proxy:
    """One proxy: its picture, and what it holds back."""

    def __init__(self) -> None:
        self.picture = Picture()
        self.holding = Holding()
        self.held: dict[Held, Flight] = {}


class Trip:
    """A flight's leases: in the picture of its own proxy, and in those of the others."""

    __slots__ = ("lease", "others")

    def __init__(self, lease: Lease) -> None:
        self.lease = lease
        self.others: list[tuple[Picture, Lease]] = []


class Ours(Chooser):
    """The proxies of one run."""

    def __init__(
        self,
        stage: Stage,
        spec: str,
        *,
        believed: float,
        delay_s: float | None,
        scrape_s: float,
        points: str,
    ) -> None:
        """`delay_s` is how long notes take between proxies; None: they tell each other nothing.

        `scrape_s` lies between two readings of the engines' gauges; 0: they are not read.
        """
        self._stage = stage
        self._policy, self.holds = _parse(spec)
        self._chains = chains_of(stage.workload, points)
        self._replicas = lab_replicas(
            stage.fleet.replicas, int(stage.fleet.capacity_tokens * believed)
        )
        self._places = {r.name: place for place, r in enumerate(self._replicas)}
        self._proxies = [Proxy() for _ in range(stage.drive.proxies)]
        self._delay_s = delay_s
        self._pool: Pool = make_pool({}, {})
        self._rings: dict[Shares, Ring] = {}
        self._trips: dict[int, Trip] = {}
        self._poked = False
        self._stirred = False  # something happened that may let a held request go
        self._scrape_s = scrape_s
        if scrape_s:
            stage.call_later(scrape_s, self._scrape)

    @override
    def alive(self, count: int, now_s: float) -> None:
        self._pool = make_pool({r.name: r for r in self._replicas[:count]}, self._rings)
        self._read_gauges(now_s)

    def _read_gauges(self, now_s: float) -> None:
        """Tell every proxy what the engines say of themselves, as the fleet's records do."""
        known = self._pool.available
        if self._scrape_s:
            known = tuple(replace(r, load=self._gauges(r, now_s)) for r in known)
        for proxy in self._proxies:
            proxy.picture.know(known, now_s)
        self._stirred = True

    def _gauges(self, replica: Replica, now_s: float) -> LoadSample:
        stage, place = self._stage, self._places[replica.name]
        engine = stage.engines[place]
        waiting = [flight.job for flight in engine.queue]
        return LoadSample(
            at_s=now_s,
            running=engine.running,
            waiting=len(waiting),
            waiting_tokens=sum(uncached(j, stage.truth.depth(place, j.blocks)) for j in waiting),
            kv_used_ratio=engine.held_tokens() / stage.fleet.capacity_tokens,
            kv_capacity_tokens=replica.kv_capacity_tokens,
            running_max=stage.fleet.slots,
        )

    def _scrape(self) -> None:
        """Read the gauges, and again later while anything is under way."""
        stage = self._stage
        self._read_gauges(stage.now_s)
        if self._trips or len(stage.flights) < len(stage.workload.jobs):
            stage.call_later(self._scrape_s, self._scrape)

    # --- decisions --------------------------------------------------------------------------

    @override
    def choose(self, flight: Flight, now_s: float) -> int:
        proxy = self._proxies[flight.proxy]
        request = Request(self._chains[flight.job.index], has_session=False)
        decision = self._policy(request, self._pool, proxy.picture, now_s)
        assert decision is not None
        if not self.holds or (
            not proxy.holding.awaits(decision.slot)
            and is_open(decision, request, proxy.picture, now_s)
        ):
            return self._acquire(proxy, flight, decision, now_s)
        held = Held(request, self._pool_now, _nothing, now_s)
        proxy.holding.add(held, proxy.picture)
        proxy.held[held] = flight
        self._stirred = True
        return HELD

    def _pool_now(self) -> Pool:
        return self._pool

    @override
    def take(self, now_s: float) -> Iterable[tuple[Flight, int]]:
        if not self._stirred:
            return
        self._stirred = False
        for proxy in self._proxies:
            while (found := proxy.holding.take(self._policy, proxy.picture, now_s)) is not None:
                held, decision = found
                flight = proxy.held.pop(held)
                yield flight, self._acquire(proxy, flight, decision, now_s)
        self._poke_later(now_s)

    def _poke_later(self, now_s: float) -> None:
        """Look again when the next replica should be near the end of its line."""
        if self._poked:
            return
        waits_s = [
            proxy.picture.loads.wait_s(slot, now_s) - limits.RUNWAY_S
            for proxy in self._proxies
            if len(proxy.holding)
            for slot in proxy.picture.slots.values()
        ]
        opening_s = min((wait_s for wait_s in waits_s if wait_s > 0), default=0.0)
        if opening_s:
            self._poked = True
            self._stage.call_later(max(POKE_S_MIN, opening_s), self._poke)

    def _poke(self) -> None:
        self._poked = False
        self._stirred = True  # the stage asks for what goes after every event, this one too

    @override
    def sent(self, flight: Flight, now_s: float) -> None:
        """Counted when it was decided: the next decision of `take` has to see it."""

    def _acquire(self, proxy: Proxy, flight: Flight, decision: Decision, now_s: float) -> int:
        chain = self._chains[flight.job.index]
        octets = decision.cached_octets
        lease = proxy.picture.acquire(
            decision.replica, chain, cached_octets=octets, now_s=now_s, known=decision.known
        )
        trip = self._trips[flight.job.index] = Trip(lease)
        name = decision.replica.name
        self._tell(proxy.picture, lambda other: self._hear(trip, other, flight, name, octets))
        return self._places[name]

    def _hear(
        self, trip: Trip, other: Picture, flight: Flight, name: str, cached_octets: int
    ) -> None:
        chain, slot = self._chains[flight.job.index], other.slots[name]
        lease = other.lease(
            name, slot, chain, cached_octets=cached_octets, streamed=True, weight=1.0
        )
        other.dispatched(lease, chain, self._stage.now_s)
        trip.others.append((other, lease))

    def _tell(self, own: Picture, note: Callable[[Picture], None]) -> None:
        """Let all other proxies hear a note, when it has arrived."""
        if self._delay_s is None:
            return
        for proxy in self._proxies:
            if proxy.picture is not own:
                self._stage.call_later(self._delay_s, partial(note, proxy.picture))

    # --- what is learned --------------------------------------------------------------------

    @override
    def first_token(self, flight: Flight, now_s: float) -> None:
        trip = self._trips[flight.job.index]
        picture = self._proxies[flight.proxy].picture
        self._stirred = True
        picture.prefill_ended(trip.lease, now_s)
        self._tell(picture, lambda other: self._hear_prefill_ended(trip, other))

    def _hear_prefill_ended(self, trip: Trip, other: Picture) -> None:
        for picture, lease in trip.others:
            if picture is other:
                picture.prefill_ended(lease, self._stage.now_s)
                self._stirred = True

    @override
    def ended(self, flight: Flight, now_s: float) -> None:
        job = flight.job
        trip = self._trips.pop(job.index)
        picture = self._proxies[flight.proxy].picture
        usage = Usage(
            prompt_tokens=job.prompt_tokens,
            completion_tokens=job.output_tokens,
            cached_tokens=flight.cached_tokens,
        )
        picture.decoded(trip.lease, job.output_tokens, now_s - flight.first_s)
        picture.release(trip.lease, now_s, usage)
        self._tell(picture, lambda other: self._hear_released(trip, other, usage))

    def _hear_released(self, trip: Trip, other: Picture, usage: Usage) -> None:
        for picture, lease in trip.others:
            if picture is other:
                picture.release(lease, self._stage.now_s, usage)


def _nothing(_decision: Decision) -> None:
    """The stage sends what `take` returns."""


def lab_replicas(count: int, capacity_tokens: int) -> list[Replica]:
    """Return replicas that differ in their name alone."""
    record = [
        ReplicaRecord(replica_id=f"lab-{place}", url="http://127.0.0.1:1", models=("lab",))
        for place in range(count)
    ]
    return [replace(replica_of(r), kv_capacity_tokens=capacity_tokens) for r in record]
