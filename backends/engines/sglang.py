"""SGLang: `sglang serve`, ready by `/ready` (0.5.17 to 0.5.23).

`/health` would run a generation unless it is told not to; the environment tells it. The memory
saver stays off: a wrong release or resume call kills the server, nothing here makes one, and the
copy of the weights doubles the host memory. With `--schedule-low-priority-values-first` both
engines count priority in one direction.
"""

from __future__ import annotations

from collections.abc import Sequence

from backends.engines.base import HOST, Launch
from backends.spec import ReplicaSpec
from proxy.contract import LoadSample
from proxy.contract.engines import SGLANG


class Sglang:
    """How an SGLang server is launched, probed and read."""

    name = "sglang"

    def command(self, spec: ReplicaSpec, port: int) -> Launch:
        argv = (
            *("sglang", "serve", "--model-path", spec.model_path or spec.model),
            *("--host", HOST, "--port", str(port), "--served-model-name", spec.model),
            *("--page-size", "64", "--enable-metrics", "--enable-cache-report"),
            *("--enable-priority-scheduling", "--schedule-low-priority-values-first"),
            *spec.args,
        )
        return Launch(argv, {"SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0"})

    def ready_paths(self, spec: ReplicaSpec) -> tuple[str, ...]:
        return ("/ready", "/health")  # releases before 0.5.20 lack /ready

    def load_paths(self, spec: ReplicaSpec) -> tuple[str, ...]:
        return SGLANG.paths

    def read_load(self, answers: Sequence[bytes], at_s: float) -> LoadSample | None:
        return SGLANG.read(answers, at_s)

    def abort_path(self, spec: ReplicaSpec) -> str | None:
        return "/abort_request"  # after SIGTERM it waits for its requests without any limit
