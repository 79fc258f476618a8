"""vLLM: `vllm serve`, ready when it listens, read by its metrics (names of 0.23 to 0.33).

The command keeps to flags that every supported release has, and that need no special hardware;
parallelism, quantisation and queue limits are the pool's own `args`. Dev mode and sleep mode are
left off: nothing here puts a replica to sleep, and dev mode opens unauthenticated control paths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from backends.engines.base import HOST, Launch
from backends.engines.exposition import Dialect, Fold, Series, read_load, read_samples
from backends.spec import ReplicaSpec
from proxy.contract import LoadSample

_CACHE_INFO = "vllm:cache_config_info"


def _counts(_labels: Mapping[str, str]) -> bool:
    return True


METRICS = Dialect(
    series={
        "running": Series(("vllm:num_requests_running",)),
        "waiting": Series(("vllm:num_requests_waiting",)),
        "kv_used_ratio": Series(
            ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"), Fold.MAX
        ),
        "prompt_tokens_total": Series(("vllm:prompt_tokens_total",)),
        "cached_tokens_total": Series(
            ("vllm:prompt_tokens_cached_total", "vllm:prefix_cache_hits_total")
        ),
        "generation_tokens_total": Series(("vllm:generation_tokens_total",)),
        "preemptions_total": Series(("vllm:num_preemptions_total",)),
    },
    counts=_counts,
)


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
        return ("/metrics",)

    def read_load(self, answers: Sequence[bytes], at_s: float) -> LoadSample | None:
        sample = read_load(answers[0], METRICS, at_s)
        if sample is None:
            return None
        return msgspec.structs.replace(sample, kv_capacity_tokens=_capacity_tokens(answers[0]))

    def abort_path(self, spec: ReplicaSpec) -> str | None:
        return None  # --shutdown-timeout bounds its own drain


def _capacity_tokens(text: bytes) -> int:
    """Blocks times block size, told as labels; summed over data-parallel ranks."""
    capacity_tokens = 0
    for labels, _ in read_samples(text, (_CACHE_INFO,)).get(_CACHE_INFO, ()):
        blocks, size = labels.get("num_gpu_blocks", ""), labels.get("block_size", "")
        if blocks.isascii() and blocks.isdigit() and size.isascii() and size.isdigit():
            capacity_tokens += min(int(blocks[:12]) * int(size[:6]), 2**53)
    return capacity_tokens
