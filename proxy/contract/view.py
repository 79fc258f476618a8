"""What an operator is shown, in one value: the dashboard, `doherty top` and tools read this.

The admin listener answers `VIEW_PATH` with one view, and `VIEW_WATCH_PATH` with a stream of
server-sent events, one view in each. A view is whole, never a difference, so that whoever missed
ten of them is right again after the next. Rates and percentiles are of the last `window_s` seconds,
over all workers; percentiles are read off histograms, so they lie between two of their edges. None
says that nobody knows, which is not zero.

Bounded: tables hold at most what `*_MAX` here says, the first of an order that each field names.
Additions may come in any release, and readers ignore what they do not know; a field is renamed or
taken away only with `VIEW_VERSION`.
"""

from __future__ import annotations

import msgspec

VIEW_PATH = "/view"
VIEW_WATCH_PATH = "/view/watch"
# POST; `{wish}` is drain or undrain.
WISH_PATH = "/replicas/{replica_id}/{wish}"
VIEW_VERSION = 1

ARCS_MAX = 720  # of all rings together: half a degree each, where there is one
RINGS_MAX = 8
PREFIXES_MAX = 64
HOLDERS_MAX = 16  # of a prefix, by name
POOLS_MAX = 64
NOTES_MAX = 50
MODELS_MAX = 64
CODES_MAX = 32


class Percentiles(msgspec.Struct, frozen=True, kw_only=True):
    """Of `count` values in the window; None where there were none."""

    p50_s: float | None = None
    p95_s: float | None = None
    p99_s: float | None = None
    count: int = 0


class ProxyView(msgspec.Struct, frozen=True, kw_only=True):
    """The proxy itself."""

    version: str
    policy: str
    region: str
    workers: int  # that serve
    not_ready: str | None = None  # why; None: ready
    draining: bool = False
    fleet_age_s: float | None = None  # since its manager was last heard of; None: never. A list: 0
    manager_url: str | None = None
    in_flight: int = 0
    connections: int = 0
    requests_per_s: float = 0.0
    errors_per_s: float = 0.0  # of 500 and above, and streams that were cut
    tokens_per_s: float = 0.0  # generated
    cached_ratio: float | None = None  # of the prompt tokens that answers told of
    loop_lag_s: float | None = None  # the longest, since the last view
    can_drain: str | None = None  # why drain and undrain are refused; None: they are taken


class ReplicaView(msgspec.Struct, frozen=True, kw_only=True):
    """One replica: what its manager says, what the workers have there, what it says of itself."""

    replica_id: str
    pool: str
    region: str
    engine: str
    engine_version: str = ""
    models: tuple[str, ...] = ()
    state: str  # a `ReplicaState`, or `asleep`
    reason: str = ""
    suspect: bool = False  # workers hold it for gone
    held: bool = False  # drained by an operator; `undrain` has it serve again
    dp_size: int = 1
    gpus: tuple[str, ...] = ()
    restarts: int = 0
    inflight: int = 0
    inflight_max: int = 0  # 0: no limit
    queued_tokens: int = 0
    wait_s: float = 0.0
    decoding: float = 0.0
    prefill_tokens_per_s: float = 0.0
    requests_per_s: float = 0.0
    running: int | None = None  # by the engine
    waiting: int | None = None
    kv_used_ratio: float | None = None
    cached_ratio: float | None = None  # of the prompt tokens of the window, as the engine counts
    cache_tokens: int = 0
    cache_source: str = "record"  # or events
    cache_source_age_s: float | None = None
    ring_ratio: float = 0.0  # its share of the ring


class ClassView(msgspec.Struct, frozen=True, kw_only=True):
    """One class of work: who waits, and how long answers take."""

    work_class: str  # online, semi-online, offline
    depth: int = 0
    queue_bytes: int = 0
    oldest_s: float | None = None
    requests_per_s: float = 0.0
    refused_per_s: float = 0.0
    first_token: Percentiles = Percentiles()
    token: Percentiles = Percentiles()  # time per output token
    queue_wait: Percentiles = Percentiles()


class ModelView(msgspec.Struct, frozen=True, kw_only=True):
    """One model, the busiest first."""

    model: str
    requests_per_s: float = 0.0
    tokens_per_s: float = 0.0
    cached_ratio: float | None = None
    first_token: Percentiles = Percentiles()
    token: Percentiles = Percentiles()


class PoolView(msgspec.Struct, frozen=True, kw_only=True):
    """One pool, as its manager scales it, by name."""

    pool: str
    model: str
    work_class: str
    scaled: bool
    min: int
    max: int
    desired: int
    ready: int
    coming: int = 0
    going: int = 0
    resting: int = 0
    waiting: str = ""  # why one that is wanted does not come


class NoteView(msgspec.Struct, frozen=True, kw_only=True):
    """One decision of the scaling, the newest first."""

    at_s: float  # Unix time
    pool: str
    was: int
    desired: int
    reason: str
    moves: tuple[str, ...] = ()


class ArcView(msgspec.Struct, frozen=True):
    """A piece of the ring that is home to one replica: from `begin` to `end`, of 1."""

    begin: float
    end: float
    replica_id: str


class PrefixView(msgspec.Struct, frozen=True, kw_only=True):
    """A prefix that many requests share, the hottest first; its text is known to nobody here."""

    name: str  # its hash, in hexadecimal
    octets: int
    heat: float  # requests of late, decayed
    spread: int  # replicas that a request with it may choose from as if all had it; 0: its own
    at: float  # on the ring, of 1
    home: str | None  # whose arc that is
    holders: tuple[str, ...] = ()  # replicas that are believed to have it cached
    held_by: int = 0  # how many do


class RingView(msgspec.Struct, frozen=True, kw_only=True):
    """The ring of a model, the busiest first; models on the same replicas share it.

    A prefix is on the first of the rings whose replicas hold it: which model it is of, its hash
    does not tell.
    """

    model: str  # empty: of replicas that do not say what they serve
    models: tuple[str, ...] = ()  # all that share it
    arcs: tuple[ArcView, ...] = ()  # one after another from 0 to 1
    prefixes: tuple[PrefixView, ...] = ()


class RegionView(msgspec.Struct, frozen=True, kw_only=True):
    """A proxy of another region."""

    region: str
    peer: str
    linked: bool
    draining: bool = False
    round_trip_s: float | None = None
    summary_age_s: float | None = None
    inflight: int = 0


class View(msgspec.Struct, frozen=True, kw_only=True):
    """All of it at one moment."""

    view_version: int = VIEW_VERSION
    at_s: float  # Unix time
    window_s: float
    proxy: ProxyView
    replicas: tuple[ReplicaView, ...] = ()  # by pool, then by name
    classes: tuple[ClassView, ...] = ()  # online first
    models: tuple[ModelView, ...] = ()
    pools: tuple[PoolView, ...] = ()
    scaling: tuple[NoteView, ...] = ()
    scaling_age_s: float | None = None  # of pools and scaling, by the manager; None: never told
    rings: tuple[RingView, ...] = ()
    regions: tuple[RegionView, ...] = ()
    decisions: dict[str, float] = {}  # choices of a replica a second, by reason
    codes: dict[str, float] = {}  # answers a second, by status


def encode_view(view: View) -> bytes:
    return msgspec.json.encode(view)


def decode_view(octets: bytes) -> View:
    """Return the view in `octets`; raises `msgspec.MsgspecError` when it is not one."""
    return msgspec.json.decode(octets, type=View)
