"""A region of one pool, and what it knows of others, for the tests of the choice between them."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from proxy.contract import FleetSnapshot, PoolRecord, ReplicaRecord
from proxy.contract.regions import ModelSummary, RegionSummary, RemoteState
from proxy.core.fleet import Fleet, RemotesReceived, SnapshotReceived, apply, empty_fleet
from proxy.core.lease import Lease
from proxy.core.picture import Picture
from proxy.core.policy import Decision, Policy, Request, prefix
from proxy.core.regions import (
    Place,
    Residency,
    choose_region,
    places_of,
    prices_regions,
    remotes_of,
)
from tests.core import builders

NOW_S = 100.0
FREE = ModelSummary(awake=2, free=4, s_per_token=1 / 30_000)


def state(name: str, said: ModelSummary | None = FREE, **fields: object) -> RemoteState:
    """A proxy that is linked and has just told of one model, `m`, unless `fields` say otherwise."""
    region = name.partition("#")[0]
    models = {"m": said} if said is not None else {}
    base = RemoteState(
        name=name,
        region=region,
        url="http://127.0.0.1:9",
        linked=True,
        round_trip_s=0.08,
        at_s=NOW_S,
        summary=RegionSummary(region=region, sequence=1, models=models),
    )
    return msgspec.structs.replace(base, **fields)


class Bench:
    """One worker's choice, as `io.choice` makes it, without a queue."""

    def __init__(
        self,
        records: Sequence[ReplicaRecord],
        states: Sequence[RemoteState] = (),
        policy: Policy = prefix,
        pools: Sequence[PoolRecord] = (),
    ) -> None:
        told = FleetSnapshot(epoch="e", version=1, replicas=tuple(records), pools=tuple(pools))
        self.fleet: Fleet = apply(empty_fleet(), SnapshotReceived(told, "eu"))
        self.picture = Picture(lambda: 0.5)
        self.places: list[Place] = []
        self.policy = policy
        self.residency = Residency("eu")
        self.hear(*states)

    def hear(self, *states: RemoteState, now_s: float = NOW_S) -> None:
        places = places_of(states, self.places, "eu")
        if places != self.places:
            self.places = places
            self.fleet = apply(self.fleet, RemotesReceived(remotes_of(places)))
        self.picture.know((*self.fleet.replicas.values(), *self.fleet.remotes.values()), now_s)
        self.picture.know_remotes(states)

    def choose(self, request: Request, now_s: float = NOW_S, held: int = 0) -> Decision | None:
        pool = self.residency.within(self.fleet.pools["m"], request.regions)
        home = self.policy(request, pool, self.picture, now_s)
        if not pool.remotes or not request.abroad:
            return home
        return choose_region(
            home, request, pool, self.picture, now_s,
            priced=prices_regions(self.policy), held=lambda _: held,
        )  # fmt: skip

    def send(self, request: Request, decision: Decision, now_s: float = NOW_S) -> Lease:
        return self.picture.acquire(
            decision.replica, request.chain, cached_octets=decision.cached_octets, now_s=now_s
        )

    def load(self, tokens: int, now_s: float = NOW_S) -> None:
        """Have every replica here compute a prompt of so many tokens, nothing of it cached."""
        for number, replica in enumerate(self.fleet.replicas.values()):
            self.picture.acquire(
                replica, builders.chain(900 + number, tokens * 4), cached_octets=0, now_s=now_s
            )


def asked(key: int = 1, octets: int = 4000, regions: frozenset[str] | None = None) -> Request:
    request = Request(builders.chain(key, octets), has_session=False)
    request.regions = regions
    return request
