"""SGLang: `sglang serve`, ready by `/ready`, read by metrics and `/v1/loads` (0.5.17 to 0.5.23).

Its gauges lag (they move every so many decode steps, and about every half minute when idle), so
`/v1/loads` is asked as well and wins for what it tells. `/health` would run a generation unless it
is told not to; the environment tells it. The memory saver stays off: a wrong release or resume call
kills the server, nothing here makes one, and the copy of the weights doubles the host memory.
With `--schedule-low-priority-values-first` both engines count priority in one direction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from backends.engines.base import HOST, Launch
from backends.engines.exposition import Dialect, Fold, Series, read_load
from backends.spec import ReplicaSpec
from proxy.contract import LoadSample


def _counts(labels: Mapping[str, str]) -> bool:
    """Every tensor- and pipeline-parallel rank repeats the figures; `priority` "" is the total."""
    first_rank = labels.get("tp_rank", "0") == "0" and labels.get("pp_rank", "0") == "0"
    return first_rank and not labels.get("priority")


METRICS = Dialect(
    series={
        "running": Series(("sglang:num_running_reqs",)),
        "waiting": Series(("sglang:num_queue_reqs",)),
        "kv_used_ratio": Series(("sglang:token_usage",), Fold.MAX),
        "kv_capacity_tokens": Series(("sglang:max_total_num_tokens",)),
        "prompt_tokens_total": Series(("sglang:prompt_tokens_total",)),
        "cached_tokens_total": Series(("sglang:cached_tokens_total",)),
        "generation_tokens_total": Series(("sglang:generation_tokens_total",)),
        "preemptions_total": Series(("sglang:num_retracted_requests_total",)),
    },
    counts=_counts,
)


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
        return ("/metrics", "/v1/loads")

    def read_load(self, answers: Sequence[bytes], at_s: float) -> LoadSample | None:
        sample = read_load(answers[0], METRICS, at_s)
        ranks = _read_loads(answers[1]) if len(answers) > 1 else []
        if not ranks:
            return sample
        fresh: dict[str, int | float] = {
            "running": sum(rank.num_running_reqs for rank in ranks),
            "waiting": sum(rank.num_waiting_reqs for rank in ranks),
            "kv_used_ratio": min(1.0, max(0.0, *(rank.token_usage for rank in ranks))),
            "kv_capacity_tokens": sum(rank.max_total_num_tokens for rank in ranks),
        }
        return msgspec.structs.replace(sample or LoadSample(at_s=at_s), **fresh)

    def abort_path(self, spec: ReplicaSpec) -> str | None:
        return "/abort_request"  # after SIGTERM it waits for its requests without any limit


class _Rank(msgspec.Struct):
    num_running_reqs: int = 0
    num_waiting_reqs: int = 0
    token_usage: float = 0.0
    max_total_num_tokens: int = 0


class _Loads(msgspec.Struct):
    loads: list[_Rank] = []


def _read_loads(body: bytes) -> list[_Rank]:
    try:
        return msgspec.json.decode(body, type=_Loads).loads
    except msgspec.MsgspecError:
        return []
