"""Engine workers: processes that load a model once and do the lines of jobs, and serve nobody else.

To a manager a worker is an engine like any other: it is started with ports and cards, is ready when
`/health` says 200, tells its load by `/metrics`, is adopted after a crash. Three things differ. It
gets its work from the desk, so nothing is to be routed to it and no request is waited for. On
SIGTERM it gives back what it has not done, so it is never drained. And it holds nothing that is
worth keeping for later, so it rests on no rung but cold.

A worker runs inside its engine's own Python. From a checkout that finds us by PYTHONPATH; where
Doherty is installed as a package, it must be installed beside the engine as well.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Final

import msgspec
from typing_extensions import override

from backends.engines.base import (
    Call,
    Entry,
    FlagError,
    KvEvents,
    Launch,
    Ports,
    PortsNeeded,
    count_option,
)
from backends.engines.facts import VLLM as VLLM_FACTS
from backends.engines.facts import Facts
from backends.engines.features import VLLM_RANGE
from backends.engines.flags import check_flags, check_range, flag_table, refuse
from backends.engines.release import Release
from backends.engines.simulator import Simulator
from backends.engines.vllm import Vllm, lora_flags
from backends.spec import ReplicaSpec
from proxy.contract import LoadSample
from proxy.contract.exposition import Dialect, read_figures, sample_of

MODULE: Final = ("-m", "backends.offline.worker")
_ROOT: Final = Path(__file__).resolve().parents[2]
_PYTHON_PATH: Final = str(_ROOT) if (_ROOT / "pyproject.toml").is_file() else ""

FACTS: Final = msgspec.structs.replace(
    VLLM_FACTS, serves="jobs", adapters_at_run_time=False, ready_tells_rest=True
)
_SERVER = "a worker has no HTTP server of its engine"
_REFUSED: Final = MappingProxyType(
    {
        "--host": "the manager says where a worker listens",
        "--port": "the manager leases it",
        "--uds": _SERVER,
        "--grpc": _SERVER,
        "--headless": _SERVER,
        "--api-key": _SERVER,
        "--api-server-count": _SERVER,
        "--ssl-keyfile": _SERVER,
        "--ssl-certfile": _SERVER,
        "--served-model-name": "lines name the model as the configuration does",
        "--model": "say model_path in the pool",
        "--enable-sleep-mode": "a worker that is not needed ends",
        "--kv-events-config": "nobody routes to a worker, so nobody listens",
    }
)
_METRICS: Final = Dialect(
    series={
        "running": ("doherty_worker_lines_running",),
        "waiting": ("doherty_worker_lines_waiting",),
        "kv_used_ratio": ("doherty_worker_kv_cache_usage_ratio",),
        "prompt_tokens_total": ("doherty_worker_prompt_tokens_total",),
        "cached_tokens_total": ("doherty_worker_cached_tokens_total",),
        "generation_tokens_total": ("doherty_worker_completion_tokens_total",),
    },
    rank_label="rank",
    counted=lambda samples: samples,
)


def _arguments(engine: str, spec: ReplicaSpec, ports: Ports) -> tuple[str, ...]:
    """Return what a worker is told; the user's arguments are its engine's."""
    return (
        *("--engine", engine, "--model", spec.model),
        *(("--model-path", spec.model_path) if spec.model_path else ()),
        *("--desk", spec.desk_url, "--worker-id", spec.replica_id),
        *(("--chunk-lines", str(spec.chunk_lines)) if spec.chunk_lines else ()),
        *("--port", str(ports.http), "--host", ports.host),
        *("--", *_adapters(engine, spec), *spec.args),
    )


def _adapters(engine: str, spec: ReplicaSpec) -> tuple[str, ...]:
    """Return what has it load adapters: lines may ask for them by their names."""
    if engine == "vllm":
        return lora_flags(spec)
    return ("--lora-modules", *spec.adapters) if spec.adapters else ()


class _Worker:
    """What workers have in common, whatever computes."""

    def kv_source(self, spec: ReplicaSpec, ports: Ports, release: Release) -> KvEvents | None:
        return None

    def sleep_calls(self, spec: ReplicaSpec, level: int) -> tuple[Call, ...]:
        raise FlagError("a worker of jobs does not sleep: one that is not needed ends")

    def adapter_calls(
        self, spec: ReplicaSpec, loaded: Mapping[str, str], wanted: Mapping[str, str]
    ) -> tuple[Call, ...]:
        return ()

    def facts(self, spec: ReplicaSpec) -> Facts:
        return FACTS

    def ready_paths(self, spec: ReplicaSpec) -> tuple[str, ...]:
        return FACTS.ready_paths

    def load_paths(self, spec: ReplicaSpec) -> tuple[str, ...]:
        return ("/metrics",)

    def read_load(self, answers: Sequence[bytes], at_s: float) -> LoadSample | None:
        return sample_of(read_figures(answers[0], _METRICS), at_s)


class VllmJobs(_Worker, Vllm):
    """A worker around vLLM's offline interface."""

    name = "vllm-jobs"
    # The script only says whose Python it is.
    entry = Entry("vllm", ("vllm",), MODULE, runs_module=True)

    @override
    def command(self, spec: ReplicaSpec, ports: Ports, release: Release) -> Launch:
        """In a container and on another machine no path of ours is: we must be installed there."""
        away = spec.image or spec.elsewhere
        head = ("python3", *MODULE) if away else self.entry.script
        env = {"VLLM_PORT": str(ports.internal)} if ports.internal else {}
        argv = (*head, *_arguments("vllm", spec, ports))
        return Launch(argv, env, "" if away else _PYTHON_PATH)

    @override
    def check(self, spec: ReplicaSpec, release: Release) -> tuple[str, ...]:
        table = flag_table("vllm")
        refuse(table, spec.args, _REFUSED, release)
        if count_option(spec.args, "--data-parallel-size", "-dp") > 1:
            raise FlagError(
                "vllm: a worker is one data-parallel rank: instead of --data-parallel-size take as "
                "many replicas, or a larger autoscale.max"
            )
        warnings = check_range("vllm", release, *VLLM_RANGE)
        return warnings + check_flags(table, spec.args, release)

    @override
    def ports_needed(self, spec: ReplicaSpec, release: Release) -> PortsNeeded:
        return PortsNeeded(internal=super().ports_needed(spec, release).internal)


class SimulatorJobs(_Worker, Simulator):
    """A worker of the same shape around the simulator's engine."""

    name = "simulator-jobs"

    @override
    def command(self, spec: ReplicaSpec, ports: Ports, release: Release) -> Launch:
        argv = (sys.executable, *MODULE, *_arguments("simulator", spec, ports))
        return Launch(argv, python_path="" if spec.image or spec.elsewhere else _PYTHON_PATH)

    @override
    def ports_needed(self, spec: ReplicaSpec, release: Release) -> PortsNeeded:
        return PortsNeeded()
