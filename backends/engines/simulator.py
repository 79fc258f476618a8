"""The simulator: an engine server of our own that speaks the dialect its arguments name."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from backends.engines.base import HOST, Engine, Launch, option
from backends.engines.sglang import Sglang
from backends.engines.vllm import Vllm
from backends.spec import ReplicaSpec
from proxy.contract import LoadSample
from proxy.contract.engines import read_any

_DIALECTS: dict[str, Engine] = {"vllm": Vllm(), "sglang": Sglang()}


class Simulator:
    """How the simulator is launched; probed and read as the engine whose part it plays."""

    name = "simulator"

    def command(self, spec: ReplicaSpec, port: int) -> Launch:
        argv = (
            *(sys.executable, "-m", "backends.simulator"),
            *("--host", HOST, "--port", str(port), "--model", spec.model),
            *spec.args,
        )
        # As with vLLM, so that the proxy's pooled connections are not closed under it.
        return Launch(argv, {"VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "120"})

    def ready_paths(self, spec: ReplicaSpec) -> tuple[str, ...]:
        return _dialect(spec).ready_paths(spec)

    def load_paths(self, spec: ReplicaSpec) -> tuple[str, ...]:
        return _dialect(spec).load_paths(spec)

    def read_load(self, answers: Sequence[bytes], at_s: float) -> LoadSample | None:
        """Tell the dialect from the names."""
        found = read_any(answers, at_s)
        return found[1] if found else None

    def abort_path(self, spec: ReplicaSpec) -> str | None:
        return _dialect(spec).abort_path(spec)


def _dialect(spec: ReplicaSpec) -> Engine:
    return _DIALECTS.get(option(spec.args, "--dialect") or "vllm", _DIALECTS["vllm"])
