"""What the control plane tells the data plane: the replicas of a region and what is known of them.

The manager publishes whole snapshots, never differences: a proxy that missed ten of them is right
again after the next one, and a proxy whose manager died keeps the last. A watch is a stream of
newline-delimited JSON: the current snapshot at once, then one after each change; an empty line is a
heartbeat. `epoch` names one life of a manager and `version` counts within it, so that a reader can
tell an old snapshot of a new manager from a new snapshot of an old one.

What engines say of themselves is read here too (`exposition`, `engines`), for both planes in one
way. Imports nothing of ours: this and `proxy.config` are all that `backends` may know of the proxy.
"""

from __future__ import annotations

import enum

import msgspec

FLEET_PATH = "/v1/fleet"
FLEET_WATCH_PATH = "/v1/fleet/watch"
HEARTBEAT_INTERVAL_S = 2.0
SNAPSHOT_BYTES_MAX = 16 * 1024 * 1024
# The largest published deployment of one engine has 256 ranks; more would be a mistake.
DP_SIZE_MAX = 1024
# A replica's share of conversations; beyond these, one would be home to all or to none.
WEIGHT_MIN = 0.01
WEIGHT_MAX = 10.0


class ReplicaState(enum.StrEnum):
    """Where a replica stands. Only `ready` takes new requests; `draining` finishes what it has."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPING = "stopping"
    BACKOFF = "backoff"  # it died or never came up; the next start waits
    STOPPED = "stopped"


class Figures(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What an engine, or one data-parallel rank of it, says of itself.

    Counters are since the engine's start. What an engine does not say stays at its default.
    """

    running: int = 0  # requests being computed
    waiting: int = 0  # requests queued in the engine
    running_max: int = 0  # requests that it computes at once
    waiting_tokens: int = 0  # prompt tokens queued that no cache holds
    used_tokens: int = 0  # of the KV cache, held by requests; what is only cached is not
    kv_used_ratio: float = 0.0  # 0 to 1
    kv_capacity_tokens: int = 0
    block_tokens: int = 0
    prompt_tokens_total: int = 0
    cached_tokens_total: int = 0  # prompt tokens answered from the prefix cache
    generation_tokens_total: int = 0
    preemptions_total: int = 0
    prefill_tokens_total: int = 0  # prompt tokens computed
    # Time that went into those. SGLang's is the machine's; vLLM's is summed over requests, so that
    # a step which several share counts for each of them, and tokens by time are the least speed.
    prefill_busy_s_total: float = 0.0


class RankLoad(Figures, frozen=True, kw_only=True, omit_defaults=True):
    """The figures of one data-parallel rank."""

    rank: int


class LoadSample(Figures, frozen=True, kw_only=True, omit_defaults=True):
    """One reading of an engine's own metrics; over all ranks, where it has several.

    `ranks` is empty, or has every rank from 0 on, in order.
    """

    at_s: float  # Unix time of the reading
    asleep: bool = False  # its memory is given away, its cache is empty
    busy_adapters: tuple[str, ...] | None = None  # LoRA adapters that requests use at this moment
    ranks: tuple[RankLoad, ...] = ()


HELD_REASON = "drained by an operator"
NO_REGION = "local"  # the name of the region where nobody has named it


class ReplicaRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One engine server. `url` is scheme and authority only, such as `http://127.0.0.1:30000`."""

    replica_id: str
    url: str
    models: tuple[str, ...] = ()  # names it answers to; empty: not known, so any
    pool: str = "default"
    region: str = NO_REGION
    engine: str = "unknown"  # sglang, vllm, simulator, unknown
    state: ReplicaState = ReplicaState.READY
    reason: str = ""  # why it is in this state, for people
    target_inputs: int = 0  # requests in flight above which the pool should grow; 0: no target
    max_inputs: int = 0  # requests in flight that it may never exceed; 0: no limit
    held: bool = False  # drained by an operator, until he has it serve again
    restarts: int = 0
    pid: int = 0
    load: LoadSample | None = None
    # Its share of conversations, against that of others: from WEIGHT_MIN to WEIGHT_MAX.
    weight: float = 1.0
    # Data-parallel ranks behind this URL, each with a KV cache of its own: 0 to dp_size - 1.
    dp_size: int = 1
    # LoRA adapters that it has loaded: those in use, or, where it does not tell, those that it
    # lists (which are names among `models` as well); None: unknown.
    adapters: tuple[str, ...] | None = None
    # Its memory is given away: `ready` or not, it takes no requests until it has been woken.
    asleep: bool = False
    sleep_s: float = 0.0  # what its last falling asleep took, and its last waking
    wake_s: float = 0.0
    gpus: tuple[str, ...] = ()  # as CUDA_VISIBLE_DEVICES calls those that are leased to it
    engine_version: str = ""  # as installed; "": not known
    # Where it publishes KV events, as a proxy on the manager's machine reaches it: of rank 0, each
    # further rank one port on. "": the manager has not arranged it.
    kv_events: str = ""
    kv_replay: str = ""
    kv_topic: str = ""
    # It takes the id of a chat request from `x-override-rid`, and ends that at `/abort_request`.
    rid_header: bool = False
    # By class, online first: the field of the head, "name: number", by which it computes a request
    # before or after others. Empty: it reads none.
    priority_fields: tuple[str, ...] = ()


class PoolRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A pool that the manager scales: what a proxy must know when nothing of it is awake."""

    model: str
    pool: str
    work_class: str = (
        "online"  # of its requests that do not say another: online, semi-online, offline
    )
    wakes: bool = False  # demand brings replicas up, so that a request may be held for them
    awake: int = 0
    coming: int = 0  # replicas on their way up
    ready_in_s: float = 0.0  # when the next of these should serve; 0: none comes, or nobody knows
    start_s: float = 0.0  # what a start takes, as measured; 0: not known
    max_tokens: int = (
        0  # uncached prompt tokens queued on a replica that it may never exceed; 0: any
    )
    carries: float = 0.0  # requests in flight that a replica is meant to have; 0: nobody has said
    startable: int = 0  # further replicas that could be started now, nobody else's taken for them
    # Requests in flight, by the other region that is to have replicas for them.
    wanted: dict[str, float] = {}


class FleetSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """All replicas of a region at one moment."""

    epoch: str
    version: int
    region: str = NO_REGION
    replicas: tuple[ReplicaRecord, ...] = ()
    pools: tuple[PoolRecord, ...] = ()  # those that are scaled
    # Engine workers: they do the lines of jobs, and no request may be sent to them.
    workers: tuple[ReplicaRecord, ...] = ()


def with_load(
    record: ReplicaRecord, load: LoadSample, listed: tuple[str, ...] | None, *, anew: bool
) -> ReplicaRecord:
    """Return `record` with what a reading tells; `listed` are the adapters that it lists.

    `anew`: nothing has been read in this life of the engine. Ranks are told one by one, and one
    that missed an answer is not gone: within a life there can only be more of them.
    """
    dp_size = max(1, len(load.ranks))
    return msgspec.structs.replace(
        record,
        load=load,
        dp_size=dp_size if anew else max(dp_size, record.dp_size),
        adapters=known_adapters(listed, load),
        asleep=load.asleep,
    )


def known_adapters(
    listed: tuple[str, ...] | None, load: LoadSample | None
) -> tuple[str, ...] | None:
    """Return the adapters that an engine has loaded, as far as it tells.

    One that it lists may lie on a disk, and it may fetch some that it never lists.
    """
    return listed if load is None or load.busy_adapters is None else load.busy_adapters


def encode_snapshot(snapshot: FleetSnapshot) -> bytes:
    """Return one JSON line without its newline."""
    return msgspec.json.encode(snapshot)


def decode_snapshot(line: bytes) -> FleetSnapshot:
    """Return the snapshot in one line; raises `msgspec.MsgspecError` when it is not one."""
    if len(line) > SNAPSHOT_BYTES_MAX:
        raise msgspec.ValidationError(f"fleet snapshot over {SNAPSHOT_BYTES_MAX} bytes")
    return _DECODER.decode(line)


_DECODER = msgspec.json.Decoder(FleetSnapshot)
