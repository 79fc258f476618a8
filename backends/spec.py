"""What one replica is to be: the configuration's pools written out, one value for each replica.

Ids are stable and readable, `MODEL-0` or `POOL-0`, because people type them, logs are named after
them and the proxy's ring hashes them: the same configuration gives the same ids in every life of
the manager. They go into URLs and file names, so every other octet becomes a dash.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import msgspec

from proxy.config import (
    AutoscaleConfig,
    Config,
    ModelConfig,
    OfflineConfig,
    PoolConfig,
    Serves,
    WorkClass,
)
from proxy.contract.spans import endpoint_url

WORK_KEY_VARIABLE = "DOHERTY_WORK_KEY"  # by which a worker shows the desk that it is one


class ReplicaSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One replica as the configuration wants it."""

    replica_id: str
    model: str
    pool: str
    engine: str
    model_path: str | None = None
    args: tuple[str, ...] = ()
    env: dict[str, str] = {}
    gpus: int | None = None  # of this replica; None: what its arguments ask for
    adapters: dict[str, str] = {}  # LoRA: name to folder or hub id
    sleep: bool = False  # may be put to sleep
    target_inputs: int = 0
    max_inputs: int = 0
    weight: float = 1.0
    start_timeout_s: float = 900.0
    stop_grace_s: float = 30.0
    target_tokens: int = 0
    max_tokens: int = 0
    work_class: WorkClass = "online"
    image: str = ""  # of its containers; empty: it is a process of this machine
    elsewhere: bool = False  # a cluster says where it runs: nothing of this machine is there
    release: str = ""  # of the engine there; empty: nobody says
    resources: dict[str, float] = {}  # of its node there, beside GPUs
    snapshot: bool = False  # starts from an image of a warm one, and makes it where there is none
    serves: Serves = "requests"
    desk_url: str = ""  # where a worker of jobs gets its lines
    chunk_lines: int = 0  # and how many at once
    gpu_price_per_hour: float | None = None  # None: nobody has said
    traces_url: str = ""  # where its traces are posted to; empty: it sends none


class PoolSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A pool as the configuration wants it."""

    pool_id: str  # no other pool has it; its replicas are called so, with a number
    first: ReplicaSpec
    replicas: int | None  # None: as `autoscale` says
    autoscale: AutoscaleConfig | None = None

    @property
    def serves(self) -> Serves:
        return self.first.serves

    def replica(self, number: int) -> ReplicaSpec:
        """Return the specification of its replica of this number."""
        return msgspec.structs.replace(self.first, replica_id=f"{self.pool_id}-{number}")

    def number_of(self, replica_id: str) -> int | None:
        """Return which of its replicas this is; None: it is none of them."""
        stem, _, number = replica_id.rpartition("-")
        mine = stem == self.pool_id and number.isascii() and number.isdecimal()
        return int(number) if mine else None


def pool_specs(config: Config) -> tuple[PoolSpec, ...]:
    """Return every pool that the configuration names, in its order."""
    return tuple(
        PoolSpec(
            pool_id=pool_id,
            first=_spec(config, model, pool, f"{pool_id}-0"),
            replicas=pool.replicas_fixed,
            autoscale=_scale(pool),
        )
        for model, pool, pool_id in _named_pools(config)
    )


def _named_pools(config: Config) -> Iterator[tuple[ModelConfig, PoolConfig, str]]:
    """Yield each pool with a name of its own: two pools of one model may both lack one.

    A replica's id ends in its number, so ids are unique as soon as these names are.
    """
    taken: set[str] = set()
    for model in config.models:
        for pool in model.pools:
            stem = _slug(pool.name or model.name)
            name = stem if stem not in taken else f"{stem}-{_engine(pool)}"
            count = 2
            while name in taken:
                name = f"{stem}-{_engine(pool)}-{count}"
                count += 1
            taken.add(name)
            yield model, pool, name


def _spec(config: Config, model: ModelConfig, pool: PoolConfig, replica_id: str) -> ReplicaSpec:
    spec = ReplicaSpec(
        replica_id=replica_id,
        model=model.name,
        pool=pool.name or model.name,
        engine=_engine(pool),
        model_path=pool.model_path,
        args=pool.args,
        env=pool.env,
        gpus=pool.gpus,
        adapters=pool.adapters,
        sleep=pool.sleep,
        target_inputs=pool.target_inputs,
        max_inputs=pool.max_inputs,
        weight=pool.weight,
        start_timeout_s=pool.start_timeout_secs,
        stop_grace_s=pool.stop_grace_secs,
        target_tokens=pool.target_tokens,
        max_tokens=pool.max_tokens,
        work_class=pool.work_class,
        snapshot=pool.snapshot,
        image=config.image_of(pool),
        serves=pool.serves,
        gpu_price_per_hour=pool.gpu_price_per_hour,
        elsewhere=config.manager.provider == "ray",
        release=config.manager.ray.versions.get(pool.engine, ""),
        resources=pool.resources,
        traces_url=_traces_url(config),
    )
    return _worker(spec, config.offline) if pool.serves == "jobs" else spec


def _traces_url(config: Config) -> str:
    """Return where engines post their traces: where the proxy's go, if that is said."""
    endpoint = config.proxy.otlp_traces_endpoint
    return endpoint_url(endpoint) if endpoint and config.manager.trace_engines else ""


def _worker(spec: ReplicaSpec, offline: OfflineConfig) -> ReplicaSpec:
    """Return an engine worker: told where the desk is, and of the lowest class.

    A pool is online unless it says otherwise; who does jobs is offline unless it does.
    """
    key = {} if offline.work_key is None else {WORK_KEY_VARIABLE: offline.work_key}
    return msgspec.structs.replace(
        spec,
        desk_url=offline.desk_url,
        chunk_lines=offline.chunk_lines,
        env=key | spec.env,
        work_class="offline" if spec.work_class == "online" else spec.work_class,
    )


def _engine(pool: PoolConfig) -> str:
    """Return the name of its table in `backends.engines`."""
    return f"{pool.engine}-jobs" if pool.serves == "jobs" else pool.engine


def _scale(pool: PoolConfig) -> AutoscaleConfig | None:
    """Return how it is scaled; an engine worker that is not needed ends, whatever may rest."""
    if pool.autoscale is None or pool.serves == "requests":
        return pool.autoscale
    return msgspec.structs.replace(pool.autoscale, rungs=("cold",))


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)
