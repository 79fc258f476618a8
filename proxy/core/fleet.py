"""The replicas of a region: an immutable value, and the events that give the next one.

One writer applies events in order; everybody else reads the value they hold. What a proxy finds
out itself (a refused connection) is kept apart from what the manager says, so that neither erases
the other: a suspect stays one through new snapshots until a probe has cleared it.

The ring of a model holds every replica that could serve it, ready or not: a replica that restarts
comes back to its own keys, and meanwhile they go to their successors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from proxy.contract import FleetSnapshot, ReplicaState
from proxy.core.replica import Replica, replica_of
from proxy.core.ring import Ring


@dataclass(frozen=True)
class SnapshotReceived:
    snapshot: FleetSnapshot


@dataclass(frozen=True)
class ReplicaSuspected:
    replica_id: str


@dataclass(frozen=True)
class ReplicaCleared:
    replica_id: str


Event = SnapshotReceived | ReplicaSuspected | ReplicaCleared

# States in which a replica will not come back under its name soon enough to keep its keys.
_OFF_RING = frozenset((ReplicaState.STOPPED,))


@dataclass(frozen=True)
class Pool:
    """All replicas that answer to one model name. `available` are those that may take requests."""

    replicas: Mapping[str, Replica]
    ring: Ring
    available: tuple[Replica, ...]  # by name


@dataclass(frozen=True)
class Fleet:
    """All replicas known, and the pools that clients can name."""

    replicas: Mapping[str, Replica]
    pools: Mapping[str, Pool]  # by model name
    any_model: Pool  # replicas whose models are not known
    everyone: Pool  # all of them: for state that some replica holds, and nobody says which

    def pool_for(self, model: str) -> Pool | None:
        """Return the pool of a model. Replicas that do not say what they serve serve anything."""
        pool = self.pools.get(model)
        if pool is None and self.any_model.replicas:
            return self.any_model
        return pool

    def only_pool(self) -> Pool | None:
        """Return the pool to use when a request names no model; None when that is unclear."""
        pools = list(self.pools.values())
        if len(pools) == 1 or (pools and all(p.replicas == pools[0].replicas for p in pools)):
            return pools[0]
        return self.any_model if not pools and self.any_model.replicas else None


def empty_fleet() -> Fleet:
    return _build({})


def apply(fleet: Fleet, event: Event) -> Fleet:
    """Return the fleet after `event`. Records with an unusable URL raise `ValueError`."""
    match event:
        case SnapshotReceived(snapshot):
            replicas = {}
            for record in snapshot.replicas:
                replica = replica_of(record)
                known = fleet.replicas.get(replica.replica_id)
                # A restart is news from the manager: what we suspected is gone.
                if known is not None and known.suspect and known.restarts == replica.restarts:
                    replica = replace(replica, suspect=True)
                replicas[replica.replica_id] = replica
            return _build(replicas, previous=fleet)
        case ReplicaSuspected(replica_id):
            return _with_suspect(fleet, replica_id, suspect=True)
        case ReplicaCleared(replica_id):
            return _with_suspect(fleet, replica_id, suspect=False)


def _with_suspect(fleet: Fleet, replica_id: str, *, suspect: bool) -> Fleet:
    replica = fleet.replicas.get(replica_id)
    if replica is None or replica.suspect == suspect:
        return fleet
    changed = replace(replica, suspect=suspect)
    return _build({**fleet.replicas, replica_id: changed}, previous=fleet)


def make_pool(members: Mapping[str, Replica], rings: dict[tuple[str, ...], Ring]) -> Pool:
    """Return the pool of `members`, with a ring out of `rings` when there is one of these names.

    Building a ring costs milliseconds, and most events change no membership.
    """
    names = tuple(sorted(members))
    ring = rings.get(names)
    if ring is None:
        ring = rings[names] = Ring(names)
    available = tuple(members[name] for name in names if members[name].available)
    return Pool(members, ring, available)


def _build(replicas: Mapping[str, Replica], previous: Fleet | None = None) -> Fleet:
    rings: dict[tuple[str, ...], Ring] = {}
    if previous is not None:
        before = (previous.any_model, previous.everyone, *previous.pools.values())
        rings = {pool.ring.names: pool.ring for pool in before}
    on_ring = {k: r for k, r in replicas.items() if r.state not in _OFF_RING}
    # Those that have not been asked yet are not known to serve anything at all.
    unknown = {k: r for k, r in on_ring.items() if not r.models and r.state is ReplicaState.READY}
    models = sorted({model for r in on_ring.values() for model in r.models})
    pools = {
        model: make_pool(
            {k: r for k, r in on_ring.items() if model in r.models or k in unknown}, rings
        )
        for model in models
    }
    return Fleet(replicas, pools, make_pool(unknown, rings), make_pool(on_ring, rings))
