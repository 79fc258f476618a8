"""What the control law of a pool is told, and what it answers."""

from __future__ import annotations

import msgspec

from proxy.contract.demand import Elsewhere


class ScalingPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """What a pool's configuration says of its size."""

    min: int = 0
    max: int = 1
    buffer: int = 0  # more than demand asks for, while there is any
    target_inputs: float = 1.0  # requests in flight per replica to aim at
    target_tokens: int = 0  # uncached prompt tokens queued per replica to aim at; 0: not looked at
    max_inputs: int = 0  # what a replica can be given at most; 0: any number
    kv_target: float = 0.85  # share of the KV cache held by requests to aim at
    stable_window_s: float = 60.0
    panic_window_s: float = 6.0
    panic_threshold: float = 2.0  # demand of the panic window over what is there
    scaledown_window_s: float = 60.0
    scaledown_share: float = 0.7  # of the target, that the remaining replicas stay under


class Observation(msgspec.Struct, frozen=True, kw_only=True):
    """A pool at one moment. Counters only grow, over restarts of a proxy too."""

    at_s: float  # monotonic
    in_flight: int = 0
    queued: int = 0
    queued_tokens: int = 0  # uncached prompt tokens that wait in proxies
    in_flight_tokens: int = 0  # uncached prompt tokens that wait on replicas
    arrivals_total: int = 0
    refused_total: int = 0
    kv_used_ratio: float = 0.0  # mean over the replicas that serve
    preemptions_total: int = 0
    ready: int = 0  # replicas that serve
    coming_in_s: tuple[float, ...] = ()  # for each on its way up: seconds until it should serve
    start_s: float = 0.0  # what bringing up one more would take
    gpu_limit: int | None = None  # replicas that the GPU budget allows; None: not limited
    blocked: bool = False  # one that is wanted gets no card as things are
    wanted: float = 0.0  # requests in flight of other regions, that this one is to serve
    elsewhere: dict[str, Elsewhere] = {}  # by region: what it could do for this pool's requests


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """What should be, and why: `terms` has every figure that entered, by its name."""

    desired: int
    panicking: bool = False
    reason: str = ""
    terms: dict[str, float] = {}
    away: dict[str, float] = {}  # by region: requests in flight that it is to serve in our place
