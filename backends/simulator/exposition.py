"""/metrics in the names of the engine that is imitated: what routers and dashboards read.

Not all series of an engine are here, but those that are have its types, labels and buckets.
Durations are of the simulated machine.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from backends.simulator.engine import Engine
from backends.simulator.ranks import Ranks
from backends.simulator.tally import Histogram, Tally

Labels = dict[str, str]

# Where an engine of a kind stands, by its sleep level.
_SLEEP_STATES = ("awake", "weights_offloaded", "discard_all")


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _series(name: str, labels: Labels, value: float) -> str:
    inner = ",".join(f'{key}="{_escape(labels[key])}"' for key in sorted(labels))
    return f"{name}{{{inner}}} {float(value)}"


class _Page:
    """Lines of the text format under one set of labels."""

    def __init__(self, prefix: str, labels: Labels) -> None:
        self._prefix = prefix
        self._labels = labels
        self._families: dict[str, list[str]] = {}  # the first two lines are about the family

    def family(self, name: str, kind: str, samples: Iterable[tuple[Labels, float]]) -> None:
        """Add a gauge or counter; a counter gets its suffix here."""
        suffix = "_total" if kind == "counter" and not name.endswith("_total") else ""
        full = f"{self._prefix}{name}{suffix}"
        self._add(
            full, name, kind, (_series(full, self._labels | more, value) for more, value in samples)
        )

    def _add(self, full: str, name: str, kind: str, lines: Iterable[str]) -> None:
        about = [f"# HELP {full} {name.replace('_', ' ')}", f"# TYPE {full} {kind}"]
        self._families.setdefault(full, about).extend(lines)

    def join(self, other: _Page) -> None:
        """Add the series of another page, each to its family."""
        for full, lines in other._families.items():  # one of us
            mine = self._families.setdefault(full, lines[:2])
            mine += lines[2:]

    def gauge(self, name: str, value: float) -> None:
        """Add a gauge."""
        self.family(name, "gauge", [({}, value)])

    def counter(self, name: str, value: float) -> None:
        """Add a counter."""
        self.family(name, "counter", [({}, value)])

    def histogram(self, name: str, histogram: Histogram, labels: Labels | None = None) -> None:
        """Add a histogram."""
        full = f"{self._prefix}{name}"
        buckets = self._buckets(full, histogram, self._labels | (labels or {}))
        self._add(full, name, "histogram", buckets)

    def _buckets(self, full: str, histogram: Histogram, labels: Labels) -> Iterator[str]:
        seen = 0
        for bound, count in zip((*histogram.bounds, float("inf")), histogram.counts, strict=True):
            seen += count
            le = "+Inf" if bound == float("inf") else str(bound)
            yield _series(f"{full}_bucket", labels | {"le": le}, seen)
        yield _series(f"{full}_count", labels, seen)
        yield _series(f"{full}_sum", labels, histogram.total)

    def text(self) -> str:
        """Return the page."""
        return "\n".join(line for lines in self._families.values() for line in lines) + "\n"


def render_metrics(ranks: Ranks) -> str:
    """Return the page in the engine's dialect."""
    return _render_vllm(ranks) if ranks.settings.dialect == "vllm" else _render_sglang(ranks)


def usage_ratio(engine: Engine) -> float:
    """Return the share of the pool that sequences hold."""
    return engine.cache.used_blocks / engine.cache.blocks_max


def _render_vllm(ranks: Ranks) -> str:
    """All series are by rank, but for the adapters."""
    page = _Page("vllm:", {"model_name": ranks.settings.models[0]})
    for rank, engine in enumerate(ranks):
        page.join(_vllm_rank(engine, str(rank)))
    if ranks.settings.adapters or ranks.settings.lora_updates:
        running, waiting = ranks.adapters_in_use()
        labels = {"running_lora_adapters": ",".join(running)}
        labels |= {"waiting_lora_adapters": ",".join(waiting)}
        labels |= {"max_lora": str(len(ranks.settings.adapters))}
        page.family("lora_requests_info", "gauge", [(labels, time.time())])
    return page.text()


def _vllm_rank(engine: Engine, rank: str) -> _Page:
    tally, cache, settings = engine.tally, engine.cache, engine.settings
    page = _Page("vllm:", {"engine": rank, "model_name": settings.models[0]})
    waiting = engine.clockwork.waiting_count
    page.gauge("num_requests_running", len(engine.clockwork.running))
    page.gauge("num_requests_waiting", waiting)
    page.family(
        "num_requests_waiting_by_reason",
        "gauge",
        [({"reason": "capacity"}, waiting), ({"reason": "deferred"}, 0)],
    )
    state = _SLEEP_STATES[engine.sleep_level or 0]
    page.family(
        "engine_sleep_state",
        "gauge",
        [({"sleep_state": name}, name == state) for name in _SLEEP_STATES],
    )
    page.gauge("kv_cache_usage_perc", usage_ratio(engine))
    page.counter("prefix_cache_queries", tally.queried_tokens)
    page.counter("prefix_cache_hits", tally.cached_tokens)
    page.counter("num_preemptions", tally.preemptions)
    page.counter("prompt_tokens", sum(tally.prompt_tokens))
    page.family(
        "prompt_tokens_by_source",
        "counter",
        [
            ({"source": "local_compute"}, sum(tally.prompt_tokens) - tally.cached_tokens),
            ({"source": "local_cache_hit"}, tally.cached_tokens),
            ({"source": "external_kv_transfer"}, 0),
        ],
    )
    page.counter("prompt_tokens_cached", tally.cached_tokens)
    page.counter("generation_tokens", sum(tally.generation_tokens))
    reasons = ("stop", "length", "abort", "error", "repetition")
    page.family(
        "request_success",
        "counter",
        [({"finished_reason": reason}, tally.finished[reason]) for reason in reasons],
    )
    page.histogram("time_to_first_token_seconds", tally.time_to_first_token)
    page.histogram("inter_token_latency_seconds", tally.inter_token_latency)
    page.histogram("e2e_request_latency_seconds", tally.end_to_end)
    page.histogram("request_queue_time_seconds", tally.queue_time)
    page.histogram("request_prompt_tokens", tally.prompt_sizes)
    page.histogram("request_generation_tokens", tally.generation_sizes)
    page.histogram("request_prefill_time_seconds", tally.prefill_time)
    page.histogram("request_prefill_kv_computed_tokens", tally.prefill_sizes)
    info = {
        "block_size": str(settings.block_tokens),
        "cache_dtype": "auto",
        "enable_prefix_caching": "True",
        "kv_cache_size_tokens": str(cache.blocks_max * settings.block_tokens),
        "num_gpu_blocks": str(cache.blocks_max),
        "prefix_caching_hash_algo": "xxhash",
    }
    cache_page = _Page("vllm:", {"engine": rank})
    cache_page.family("cache_config_info", "gauge", [(info, 1)])
    page.join(cache_page)
    return page


def _render_sglang(ranks: Ranks) -> str:
    """Schedulers tell of their rank, the side of the clients of all of them together."""
    settings = ranks.settings
    client_side = {"engine_type": "unified", "model_name": settings.models[0]}
    page = _Page("sglang:", client_side)
    radix = _Page("sglang:", {"cache_type": "RadixCache"})
    for rank, engine in enumerate(ranks):
        labels = {"moe_ep_rank": "0", "pp_rank": "0", "tp_rank": "0"}
        if settings.dp_size > 1:
            labels["dp_rank"] = str(rank)
        page.join(_sglang_rank(engine, client_side | labels))
    evicted_blocks = ranks.count(lambda engine: engine.cache.evicted_blocks)
    radix.counter("evicted_tokens_total", evicted_blocks * settings.block_tokens)
    page.join(_sglang_clients(ranks.tally, client_side))
    page.join(radix)
    return page.text()


def _sglang_rank(engine: Engine, labels: Labels) -> _Page:
    tally, cache, settings = engine.tally, engine.cache, engine.settings
    page = _Page("sglang:", labels)
    block_tokens = settings.block_tokens
    used_tokens = cache.used_blocks * block_tokens
    hit_rate = tally.cached_tokens / tally.queried_tokens if tally.queried_tokens else 0.0
    gauges: dict[str, float] = {
        "num_running_reqs": len(engine.clockwork.running),
        "num_queue_reqs": engine.clockwork.waiting_count,
        "token_usage": usage_ratio(engine),
        "full_token_usage": usage_ratio(engine),
        "num_used_tokens": used_tokens,
        "kv_used_tokens": used_tokens,
        "kv_evictable_tokens": cache.cached_blocks * block_tokens,
        "kv_available_tokens": (cache.available_blocks - cache.cached_blocks) * block_tokens,
        "cache_hit_rate": hit_rate,
        "max_total_num_tokens": cache.blocks_max * block_tokens,
        "page_size": block_tokens,
        "num_pages": cache.blocks_max,
        "context_len": settings.context_tokens_max,
    }
    for name, value in gauges.items():
        page.gauge(name, value)
    page.histogram("queue_time_seconds", tally.queue_time)
    return page


def _sglang_clients(tally: Tally, labels: Labels) -> _Page:
    page = _Page("sglang:", labels)
    streaming = ({"is_streaming": "false"}, {"is_streaming": "true"})
    for name, pair in (
        ("prompt_tokens_total", tally.prompt_tokens),
        ("generation_tokens_total", tally.generation_tokens),
        ("num_requests_total", tally.requests),
    ):
        page.family(name, "counter", zip(streaming, pair, strict=True))
    page.family(
        "cached_tokens_total", "counter", [({"cache_source": "device"}, tally.cached_tokens)]
    )
    page.counter("num_aborted_requests_total", tally.finished["abort"])
    page.counter("num_retracted_requests_total", tally.preemptions)
    page.histogram(
        "time_to_first_token_seconds", tally.time_to_first_token, {"is_streaming": "true"}
    )
    page.histogram("inter_token_latency_seconds", tally.inter_token_latency)
    page.histogram("e2e_request_latency_seconds", tally.end_to_end, {"is_streaming": "true"})
    page.histogram("prompt_tokens_histogram", tally.prompt_sizes)
    page.histogram("generation_tokens_histogram", tally.generation_sizes)
    return page
