"""What the manager knows about each engine: launch, readiness, shutdown, metrics."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from backends.engines.base import Engine
from backends.engines.sglang import Sglang
from backends.engines.simulator import Simulator
from backends.engines.vllm import Vllm

ENGINES: Mapping[str, Engine] = MappingProxyType(
    {"simulator": Simulator(), "sglang": Sglang(), "vllm": Vllm()}
)
