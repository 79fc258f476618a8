"""vLLM: `vllm serve`, ready when it listens (flags of 0.23 to 0.33).

The command keeps to flags that every supported release has, and that need no special hardware;
parallelism, quantisation and queue limits are the pool's own `args`. Dev mode and sleep mode are
left off: nothing here puts a replica to sleep, and dev mode opens unauthenticated control paths.
"""

from __future__ import annotations

from collections.abc import Sequence

from backends.engines.base import HOST, Launch
from backends.spec import ReplicaSpec
from proxy.contract import LoadSample
from proxy.contract.engines import VLLM


class Vllm:
    """How a vLLM server is launched, probed and read."""

    name = "vllm"

    def command(self, spec: ReplicaSpec, port: int) -> Launch:
        """Always with a model: `vllm serve` alone would fetch one of its own choice."""
        argv = (
            *("vllm", "serve", spec.model_path or spec.model),
            *("--host", HOST, "--port", str(port), "--served-model-name", spec.model),
            *("--scheduling-policy", "priority"),
            *("--enable-request-id-headers", "--enable-prompt-tokens-details"),
            *("--shutdown-timeout", str(int(spec.stop_grace_s))),
            *spec.args,
        )
        # The default keep-alive of 5 s would close connections that the proxy holds in its pool.
        return Launch(
            argv, {"VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "120", "VLLM_ENABLE_STARTUP_PLAN": "1"}
        )

    def ready_paths(self, spec: ReplicaSpec) -> tuple[str, ...]:
        return ("/health",)

    def load_paths(self, spec: ReplicaSpec) -> tuple[str, ...]:
        return VLLM.paths

    def read_load(self, answers: Sequence[bytes], at_s: float) -> LoadSample | None:
        return VLLM.read(answers, at_s)

    def abort_path(self, spec: ReplicaSpec) -> str | None:
        return None  # --shutdown-timeout bounds its own drain
