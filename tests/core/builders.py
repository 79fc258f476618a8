"""Values that several of the core's tests need."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import msgspec

from proxy.contract import FleetSnapshot, ReplicaRecord, ReplicaState
from proxy.core.fleet import Fleet, Pool, SnapshotReceived, apply, empty_fleet, make_pool
from proxy.core.prefix import PrefixChain
from proxy.core.replica import Replica, replica_of


def record(replica_id: str, *models: str, **fields: object) -> ReplicaRecord:
    base = ReplicaRecord(replica_id=replica_id, url="http://127.0.0.1:30000", models=models)
    return msgspec.structs.replace(base, **fields)


def replica(
    replica_id: str,
    *,
    state: ReplicaState = ReplicaState.READY,
    max_inputs: int = 0,
    suspect: bool = False,
    adapters: frozenset[str] | None = None,
) -> Replica:
    made = replica_of(record(replica_id, "m", state=state, max_inputs=max_inputs))
    return dataclasses.replace(made, suspect=suspect, adapters=adapters)


def pool(replicas: Iterable[Replica]) -> Pool:
    return make_pool({r.name: r for r in replicas}, {})


def fleet(*records: ReplicaRecord, before: Fleet | None = None) -> Fleet:
    snapshot = FleetSnapshot(epoch="e", version=1, replicas=records)
    return apply(before or empty_fleet(), SnapshotReceived(snapshot))


def chain(home_key: int, *lengths: int) -> PrefixChain:
    """A chain of made-up hashes, the same for the same key, with prefixes of these lengths."""
    hashes = tuple(home_key * 1000 + depth for depth in range(len(lengths)))
    return PrefixChain(home_key, hashes, lengths, lengths[-1] if lengths else 0)
