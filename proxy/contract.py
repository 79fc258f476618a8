"""What the control plane tells the data plane: the replicas of a region and what is known of them.

The manager publishes whole snapshots, never differences: a proxy that missed ten of them is right
again after the next one, and a proxy whose manager died keeps the last. A watch is a stream of
newline-delimited JSON: the current snapshot at once, then one after each change; an empty line is a
heartbeat. `epoch` names one life of a manager and `version` counts within it, so that a reader can
tell an old snapshot of a new manager from a new snapshot of an old one.

Imports nothing of ours: this and `proxy.config` are all that `backends` may know of the proxy.
"""

from __future__ import annotations

import enum

import msgspec

FLEET_PATH = "/v1/fleet"
FLEET_WATCH_PATH = "/v1/fleet/watch"
HEARTBEAT_INTERVAL_S = 2.0
SNAPSHOT_BYTES_MAX = 16 * 1024 * 1024


class ReplicaState(enum.StrEnum):
    """Where a replica stands. Only `ready` takes new requests; `draining` finishes what it has."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPING = "stopping"
    BACKOFF = "backoff"  # it died or never came up; the next start waits
    STOPPED = "stopped"


class LoadSample(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One reading of an engine's own metrics. Counters are since the engine's start."""

    at_s: float  # Unix time of the reading
    running: int = 0  # requests being computed
    waiting: int = 0  # requests queued in the engine
    waiting_tokens: int = 0  # uncached prompt tokens queued in the engine; 0 also: not said
    kv_used_ratio: float = 0.0  # 0 to 1
    kv_capacity_tokens: int = 0  # 0: the engine does not say
    prompt_tokens_total: int = 0
    cached_tokens_total: int = 0  # prompt tokens answered from the prefix cache
    generation_tokens_total: int = 0
    preemptions_total: int = 0


class ReplicaRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One engine server. `url` is scheme and authority only, such as `http://127.0.0.1:30000`."""

    replica_id: str
    url: str
    models: tuple[str, ...] = ()  # names it answers to; empty: not known, so any
    pool: str = "default"
    region: str = "local"
    engine: str = "unknown"  # sglang, vllm, simulator, unknown
    state: ReplicaState = ReplicaState.READY
    reason: str = ""  # why it is in this state, for people
    target_inputs: int = 0  # requests in flight above which the pool should grow; 0: no target
    max_inputs: int = 0  # requests in flight that it may never exceed; 0: no limit
    restarts: int = 0
    pid: int = 0
    load: LoadSample | None = None


class FleetSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """All replicas of a region at one moment."""

    epoch: str
    version: int
    region: str = "local"
    replicas: tuple[ReplicaRecord, ...] = ()


def encode_snapshot(snapshot: FleetSnapshot) -> bytes:
    """Return one JSON line without its newline."""
    return msgspec.json.encode(snapshot)


def decode_snapshot(line: bytes) -> FleetSnapshot:
    """Return the snapshot in one line; raises `msgspec.MsgspecError` when it is not one."""
    if len(line) > SNAPSHOT_BYTES_MAX:
        raise msgspec.ValidationError(f"fleet snapshot over {SNAPSHOT_BYTES_MAX} bytes")
    return _DECODER.decode(line)


_DECODER = msgspec.json.Decoder(FleetSnapshot)
