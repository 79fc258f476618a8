"""The replicas that a configuration has from the beginning, written out."""

from __future__ import annotations

from backends.spec import ReplicaSpec, pool_specs
from proxy.config import Config


def replica_specs(config: Config) -> tuple[ReplicaSpec, ...]:
    """Return those of pools of a fixed size, in the configuration's order."""
    pools = pool_specs(config)
    return tuple(pool.replica(number) for pool in pools for number in range(pool.replicas or 0))
