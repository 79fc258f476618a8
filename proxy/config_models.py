"""The part of the configuration that says which models are served, by which replicas, how many."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from proxy.config_reading import Count, Name, Path, Seconds, Section

REPLICAS_MAX = 4096
RestingRung = Literal["asleep", "suspended", "snapshotted", "cold"]
Price = Annotated[float, Meta(ge=0, le=1e6)]  # infinity is none that could be counted
WorkClass = Literal["online", "semi-online", "offline"]
Serves = Literal["requests", "jobs"]
_Window = Annotated[float, Meta(ge=1, le=3600)]
_Replicas = Annotated[int, Meta(ge=0, le=REPLICAS_MAX)]


class AutoscaleConfig(Section, frozen=True, kw_only=True):
    """How many replicas a pool has, by demand."""

    max: Annotated[int, Meta(ge=1, le=REPLICAS_MAX, description="most replicas that serve")]
    min: Annotated[_Replicas, Meta(description="fewest; 0: none while nobody asks")] = 0
    buffer: Annotated[
        _Replicas, Meta(description="more than demand asks for, kept only while there is any")
    ] = 0
    scaledown_window_secs: Annotated[
        Seconds, Meta(description="time that a replica must have been dispensable before it rests")
    ] = 60.0
    stable_window_secs: Annotated[
        _Window, Meta(description="window over which steady demand is averaged")
    ] = 60.0
    panic_window_secs: Annotated[
        _Window, Meta(description="window over which a burst is averaged")
    ] = 6.0
    panic_threshold: Annotated[
        float, Meta(ge=1, le=100, description="demand over capacity at which a burst is one")
    ] = 2.0
    kv_target: Annotated[
        float, Meta(gt=0, le=1, description="share of the KV cache held by requests to aim at")
    ] = 0.85
    rungs: Annotated[
        tuple[RestingRung, ...],
        Meta(
            min_length=1,
            description="how deep replicas that are not needed may rest: asleep (with sleep: "
            "true), suspended, snapshotted (with snapshot: true), cold (no process)",
        ),
    ] = ("asleep", "suspended", "snapshotted", "cold")

    def __post_init__(self) -> None:
        """Refuse bounds and windows that contradict each other."""
        if self.max < self.min:
            raise ValueError(f"max {self.max} is below min {self.min}")
        if self.panic_window_secs > self.stable_window_secs:
            raise ValueError(
                f"panic_window_secs {self.panic_window_secs:g} is above stable_window_secs "
                f"{self.stable_window_secs:g}"
            )


class PoolConfig(Section, frozen=True, kw_only=True, rename={"work_class": "class"}):
    """Replicas of one model that share an engine and its settings."""

    engine: Annotated[
        Literal["simulator", "sglang", "vllm"], Meta(description="which engine serves the model")
    ]
    name: Annotated[Name | None, Meta(description="defaults to the model's name")] = None
    replicas: Annotated[
        Annotated[int, Meta(ge=0, le=REPLICAS_MAX)] | None,
        Meta(description="engine processes to keep running (default: 1, or as autoscale says)"),
    ] = None
    model_path: Annotated[str | None, Meta(description="local folder or hub id of the weights")] = (
        None
    )
    args: Annotated[
        tuple[str, ...], Meta(description="further command-line arguments of the engine")
    ] = ()
    env: Annotated[dict[str, str], Meta(description="further environment of the engine")] = (
        msgspec.field(default_factory=dict)
    )
    gpus: Annotated[
        Count | None,
        Meta(description="GPUs of each replica (default: what its arguments ask for)"),
    ] = None
    adapters: Annotated[
        dict[Name, Path],
        Meta(description="LoRA adapters to load: name to local folder or hub id"),
    ] = msgspec.field(default_factory=dict)
    sleep: Annotated[
        bool, Meta(description="start engines so that `doherty sleep` can free their GPU memory")
    ] = False
    target_inputs: Annotated[
        Count, Meta(description="requests in flight per replica to aim at; 0: none")
    ] = 0
    max_inputs: Annotated[
        Count,
        Meta(description="requests in flight on a replica that no proxy worker exceeds; 0: any"),
    ] = 0
    weight: Annotated[
        float,
        Meta(
            ge=0.01,
            le=10.0,
            description="share of conversations of each of its replicas, and of scarce GPUs",
        ),
    ] = 1.0
    start_timeout_secs: Annotated[Seconds, Meta(description="time from start to ready")] = 900.0
    stop_grace_secs: Annotated[
        Seconds, Meta(description="time to drain, and again from SIGTERM to SIGKILL")
    ] = 30.0
    autoscale: Annotated[
        AutoscaleConfig | None, Meta(description="scale by demand, in place of replicas")
    ] = None
    target_tokens: Annotated[
        Count, Meta(description="uncached prompt tokens queued per replica to aim at; 0: none")
    ] = 0
    max_tokens: Annotated[
        Count, Meta(description="such tokens on a replica that no proxy worker exceeds; 0: any")
    ] = 0
    work_class: Annotated[
        WorkClass, Meta(description="who goes first where GPUs are short: online, then the others")
    ] = "online"
    snapshot: Annotated[
        bool,
        Meta(
            description="keep an image of a warm replica on disk and start from it; SGLang then "
            "reads its weights anew after a sleep",
        ),
    ] = False
    image: Annotated[
        Path | None,
        Meta(description="with provider docker: image of its containers (default: its engine's)"),
    ] = None
    resources: Annotated[
        dict[str, Annotated[float, Meta(gt=0)]],
        Meta(
            description="with provider ray: what a replica needs of its node beside GPUs, such as "
            "{CPU: 8, 'accelerator_type:H200': 0.001}"
        ),
    ] = msgspec.field(default_factory=dict)
    serves: Annotated[
        Serves,
        Meta(
            description="requests: engine servers behind the proxy; jobs: engine workers that "
            "do the lines of batches, scaled by what is left of them and when it is due, and "
            "offline unless their class is semi-online"
        ),
    ] = "requests"
    gpu_price_per_hour: Annotated[
        Annotated[float, Meta(ge=0)] | None,
        Meta(description="of one of its GPUs, in any currency, the same for all pools"),
    ] = None

    @property
    def replicas_fixed(self) -> int | None:
        """How many to keep running; None: as `autoscale` says."""
        if self.autoscale is not None:
            return None
        return 1 if self.replicas is None else self.replicas

    def __post_init__(self) -> None:
        """Refuse settings that contradict each other."""
        if "GPU" in self.resources:
            raise ValueError("resources: GPU is said by gpus, or by the engine's arguments")
        if self.autoscale is not None and self.replicas is not None:
            raise ValueError("replicas and autoscale exclude each other; take autoscale.min")
        if self.serves == "jobs":
            self._check_jobs()
        elif self.autoscale is not None and not self.target_inputs and not self.max_inputs:
            raise ValueError(
                "autoscale needs target_inputs: how many requests a replica should have in flight"
            )
        for unit in ("inputs", "tokens"):
            target, most = getattr(self, f"target_{unit}"), getattr(self, f"max_{unit}")
            if most and target > most:
                raise ValueError(f"target_{unit} {target} is above max_{unit} {most}")

    def _check_jobs(self) -> None:
        """Refuse what says something of requests, or would mean nothing to engine workers."""
        if self.engine == "sglang":
            raise ValueError(
                "serves: jobs needs engine vllm or simulator: sglang has no worker here; its "
                "replicas of serves: requests do lines of jobs while they have room"
            )
        settings = ("target_inputs", "max_inputs", "target_tokens", "max_tokens")
        for name in (*settings, "sleep", "snapshot"):
            if getattr(self, name):
                raise ValueError(
                    f"{name} is for serves: requests; engine workers take as many lines as they "
                    "can, and end when there are none"
                )
        if self.autoscale is not None and self.autoscale.buffer:
            raise ValueError("autoscale.buffer is for serves: requests; no line of a job hurries")


class ModelConfig(Section, frozen=True, kw_only=True):
    """One model name that clients ask for."""

    name: Annotated[Name, Meta(description="what clients call it")]
    pools: Annotated[
        tuple[PoolConfig, ...], Meta(min_length=1, description="the replicas that serve it")
    ]
    regions: Annotated[
        tuple[Name, ...], Meta(description="regions in which it may be computed (default: all)")
    ] = ()
    prompt_price: Annotated[
        Price, Meta(description="of a million prompt tokens, for budgets and usage records")
    ] = 0.0
    cached_price: Annotated[
        Price | None,
        Meta(description="of a million prompt tokens that a cache held (default: prompt_price)"),
    ] = None
    completion_price: Annotated[
        Price, Meta(description="of a million tokens that were generated")
    ] = 0.0

    def __post_init__(self) -> None:
        """Refuse an adapter of the model's own name."""
        if any(self.name in pool.adapters for pool in self.pools):
            raise ValueError(
                f"model '{self.name}' has an adapter of the same name; clients could not ask for "
                "it, so give it another"
            )
