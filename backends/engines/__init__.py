"""What the manager knows about each engine: launch, readiness, shutdown, metrics."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from backends.engines.base import Engine
from backends.engines.jobs import SimulatorJobs, VllmJobs
from backends.engines.sglang import Sglang
from backends.engines.simulator import Simulator
from backends.engines.vllm import Vllm

ENGINES: Mapping[str, Engine] = MappingProxyType(
    {engine.name: engine for engine in (Simulator(), Sglang(), Vllm(), VllmJobs(), SimulatorJobs())}
)
