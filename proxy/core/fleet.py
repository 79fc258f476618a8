"""The replicas of a region: an immutable value, and the events that give the next one.

One writer applies events in order; everybody else reads the value they hold. What a proxy finds
out itself (a refused connection) is kept apart from what the manager says, so that neither erases
the other: a suspect stays one through new snapshots until a probe has cleared it.

The ring of a model holds every replica that could serve it, ready or not: a replica that restarts
comes back to its own keys, and meanwhile they go to their successors.

Proxies of other regions are in the pools of the models that they have, and apart: on no ring, among
no replicas of ours, and the same as long as it is the same proxies with the same models, whatever
they tell of their load meanwhile.

Replicas go by their names. Events are about servers, and so about all ranks of one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

from msgspec import structs

from proxy.contract import NO_REGION, FleetSnapshot, PoolRecord, ReplicaState
from proxy.core.prospects import UNSCALED, Prospect, prospects_of
from proxy.core.replica import Replica, replicas_of
from proxy.core.ring import Ring


@dataclass(frozen=True)
class SnapshotReceived:
    snapshot: FleetSnapshot
    region: str = NO_REGION  # that of replicas whose record names none


@dataclass(frozen=True)
class RemotesReceived:
    """These are what other regions have, in place of what they had."""

    remotes: tuple[Replica, ...]


@dataclass(frozen=True)
class ReplicaSuspected:
    replica_id: str


@dataclass(frozen=True)
class ReplicaCleared:
    replica_id: str


Event = SnapshotReceived | RemotesReceived | ReplicaSuspected | ReplicaCleared

_NEVER: Final = float("inf")

# States in which a replica will not come back under its name soon enough to keep its keys.
_OFF_RING = frozenset((ReplicaState.STOPPED,))


@dataclass(frozen=True)
class Pool:
    """All replicas that answer to one model name. `available` are those that may take requests.

    A model whose pool is at zero has none at all, and is served all the same: demand brings them.
    """

    replicas: Mapping[str, Replica]
    ring: Ring
    available: tuple[Replica, ...]  # by name
    remotes: tuple[Replica, ...] = ()  # proxies of other regions that have it
    starts_in_s: float = _NEVER  # where none is available, when one may be
    anywhere: bool = False  # for state that one of them holds: no other would do


@dataclass(frozen=True)
class Fleet:
    """All replicas known, and the pools that clients can name."""

    replicas: Mapping[str, Replica]  # by name
    servers: Mapping[str, Replica]  # one of each server's replicas, by replica_id
    names: Mapping[str, tuple[str, ...]]  # of each server's replicas
    pools: Mapping[str, Pool]  # by model name
    any_model: Pool  # replicas whose models are not known
    everyone: Pool  # all of them: for state that some replica holds, and nobody says which
    adapters: frozenset[str]  # those that some replica has loaded; a model name may be one
    remotes: Mapping[str, Replica]  # proxies of other regions, by name, for each model once
    scaled: tuple[PoolRecord, ...]  # what the manager says of its pools
    prospects: Mapping[
        str, Prospect
    ]  # and so of models, by name; those of no scaled pool have none

    def pool_for(self, model: str) -> Pool | None:
        """Return the pool of a model. Replicas that do not say what they serve serve anything."""
        pool = self.pools.get(model)
        if pool is None and self.any_model.replicas:
            return self.any_model
        return pool

    def names_of(self, replica_id: str) -> tuple[str, ...]:
        """Return the names of a server's replicas: its own, or those of its ranks."""
        return self.names.get(replica_id, ())

    def prospect_of(self, model: str) -> Prospect:
        """Return what is to be expected of a model's replicas."""
        return self.prospects.get(model, UNSCALED)

    def only_pool(self) -> Pool | None:
        """Return the pool to use when a request names no model; None when that is unclear.

        What only other regions have counts where there is nothing else.
        """
        pools = [p for m, p in self.pools.items() if p.replicas or m in self.prospects]
        pools = pools or list(self.pools.values())
        if len(pools) == 1:
            return pools[0]
        if pools and pools[0].replicas and all(p.replicas == pools[0].replicas for p in pools):
            return pools[0]
        return self.any_model if not pools and self.any_model.replicas else None


def empty_fleet() -> Fleet:
    return _build({})


def apply(fleet: Fleet, event: Event) -> Fleet:
    """Return the fleet after `event`. Records that cannot be used raise `ValueError`."""
    match event:
        case SnapshotReceived(snapshot, region):
            replicas: dict[str, Replica] = {}
            tokens_max = {record.pool: record.max_tokens for record in snapshot.pools}
            for record in snapshot.replicas:
                known = fleet.servers.get(record.replica_id)
                # A restart is news from the manager: what we suspected is gone.
                suspect = known is not None and known.suspect and known.restarts == record.restarts
                unsaid = record.region == NO_REGION != region
                placed = structs.replace(record, region=region) if unsaid else record
                for replica in replicas_of(placed, tokens_max.get(record.pool, 0)):
                    replicas[replica.name] = replace(replica, suspect=True) if suspect else replica
            return _build(replicas, snapshot.pools, fleet.remotes, previous=fleet)
        case RemotesReceived(remotes):
            known_remotes = {remote.name: remote for remote in remotes}
            return _build(fleet.replicas, fleet.scaled, known_remotes, previous=fleet)
        case ReplicaSuspected(replica_id):
            return _with_suspect(fleet, replica_id, suspect=True)
        case ReplicaCleared(replica_id):
            return _with_suspect(fleet, replica_id, suspect=False)


def _with_suspect(fleet: Fleet, replica_id: str, *, suspect: bool) -> Fleet:
    server = fleet.servers.get(replica_id)
    if server is None or server.suspect == suspect:
        return fleet
    replicas = {
        name: replace(replica, suspect=suspect) if replica.replica_id == replica_id else replica
        for name, replica in fleet.replicas.items()
    }
    return _build(replicas, fleet.scaled, fleet.remotes, previous=fleet)


# Names and weights of a ring's replicas, in order.
Shares = tuple[tuple[str, float], ...]


def make_pool(members: Mapping[str, Replica], rings: dict[Shares, Ring]) -> Pool:
    """Return the pool of `members`, by name, with a ring out of `rings` when there is theirs.

    Building a ring costs milliseconds, and most events change no membership.
    """
    names = tuple(sorted(members))
    shares = tuple([(name, members[name].weight) for name in names])
    ring = rings.get(shares)
    if ring is None:
        ring = rings[shares] = Ring(names, weights=dict(shares))
    available = tuple(members[name] for name in names if members[name].available)
    return Pool(members, ring, available)


def _build(
    replicas: Mapping[str, Replica],
    scaled: tuple[PoolRecord, ...] = (),
    remotes: Mapping[str, Replica] = MappingProxyType({}),
    previous: Fleet | None = None,
) -> Fleet:
    rings: dict[Shares, Ring] = {}
    if previous is not None:
        before = (previous.any_model, previous.everyone, *previous.pools.values())
        rings = {_shares(pool): pool.ring for pool in before}
    on_ring = {k: r for k, r in replicas.items() if r.state not in _OFF_RING}
    # Those that have not been asked yet are not known to serve anything at all.
    unknown = {k: r for k, r in on_ring.items() if not r.models and r.state is ReplicaState.READY}
    models = sorted(
        {model for r in (*on_ring.values(), *remotes.values()) for model in r.models}
        | {p.model for p in scaled}
    )
    pools = {
        model: make_pool(
            {k: r for k, r in on_ring.items() if model in r.models or k in unknown}, rings
        )
        for model in models
    }
    servers = {r.replica_id: r for r in replicas.values()}
    names: dict[str, tuple[str, ...]] = {}
    for name, replica in (*replicas.items(), *remotes.items()):
        names[replica.replica_id] = (*names.get(replica.replica_id, ()), name)
    any_model, everyone = make_pool(unknown, rings), make_pool(on_ring, rings)
    adapters = frozenset({name for r in on_ring.values() for name in r.adapters or ()})
    pools_of = {m: frozenset({r.pool for r in p.replicas.values()}) for m, p in pools.items()}
    prospects = prospects_of(scaled, pools_of) if scaled else {}
    if remotes:
        pools = _with_remotes(pools, remotes, prospects)
        everyone = replace(everyone, remotes=tuple(remotes.values()), anywhere=True)
    return Fleet(
        replicas, servers, names, pools, any_model, everyone, adapters, remotes, scaled, prospects
    )


def _with_remotes(
    pools: Mapping[str, Pool], remotes: Mapping[str, Replica], prospects: Mapping[str, Prospect]
) -> dict[str, Pool]:
    """Return the pools with what other regions have of each model."""
    found: dict[str, list[Replica]] = {}
    for remote in remotes.values():
        for model in remote.models:
            found.setdefault(model, []).append(remote)
    out: dict[str, Pool] = {}
    for model, pool in pools.items():
        starts_in_s = prospects.get(model, UNSCALED).starts_in_s
        out[model] = replace(pool, remotes=tuple(found.get(model, ())), starts_in_s=starts_in_s)
    return out


def _shares(pool: Pool) -> Shares:
    return tuple([(name, pool.replicas[name].weight) for name in pool.ring.names])
