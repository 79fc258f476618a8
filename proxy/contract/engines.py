"""What engines say of themselves over HTTP: how busy they are, and which names they answer to.

vLLM tells its load by metrics that move with every step (names of 0.23 to 0.33). SGLang's gauges
lag (they move every so many decode steps, and about every half minute when idle), so `/v1/loads` is
asked as well and wins for what it tells (0.5.10 to 0.5.23); its metrics are off unless asked for,
and then that page is all there is. Everything here is tolerant: a figure that is not told, or not
understood, is not known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec

from proxy.contract import LoadSample
from proxy.contract.exposition import (
    NO_RANK,
    ByRank,
    Dialect,
    Sample,
    Samples,
    rank_of,
    read_figures,
    read_samples,
    sample_of,
)

MODELS_PATH: Final = "/v1/models"
MODEL_NAMES_MAX: Final = 256  # names taken from one engine (adapters count)
_BUSY_ADAPTERS_MAX: Final = 256
_UNKNOWN: Final = "unknown"


class LoadReader(msgspec.Struct, frozen=True):
    """How one kind of engine tells its load.

    `read(answers, at_s)` takes the answers in the order of `paths`, empty where there is none.
    """

    kind: str
    paths: tuple[str, ...]
    read: Callable[[Sequence[bytes], float], LoadSample | None]


# --- vLLM -----------------------------------------------------------------------------------

_CACHE_INFO: Final = "vllm:cache_config_info"
_SLEEP_STATE: Final = "vllm:engine_sleep_state"
_ADAPTERS_INFO: Final = "vllm:lora_requests_info"


def _every(samples: list[Sample]) -> list[Sample]:
    return samples


_VLLM_METRICS: Final = Dialect(
    series={
        "running": ("vllm:num_requests_running",),
        "waiting": ("vllm:num_requests_waiting",),
        "kv_used_ratio": ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"),
        "prompt_tokens_total": ("vllm:prompt_tokens_total",),
        "cached_tokens_total": (
            "vllm:prompt_tokens_cached_total",
            "vllm:prefix_cache_hits_total",
        ),
        "generation_tokens_total": ("vllm:generation_tokens_total",),
        "preemptions_total": ("vllm:num_preemptions_total",),
        # Both are taken as a request ends, so that they belong together at any moment.
        "prefill_tokens_total": ("vllm:request_prefill_kv_computed_tokens_sum",),
        "prefill_busy_s_total": ("vllm:request_prefill_time_seconds_sum",),
    },
    rank_label="engine",
    counted=_every,
)


def _read_vllm(answers: Sequence[bytes], at_s: float) -> LoadSample | None:
    page = answers[0]
    by_rank = read_figures(page, _VLLM_METRICS)
    told = read_samples(page, (_CACHE_INFO, _SLEEP_STATE, _ADAPTERS_INFO))
    _add_capacity(by_rank, told.get(_CACHE_INFO, []))
    for figures in by_rank.values():
        computed = figures.get("prompt_tokens_total", 0.0) - figures.get("cached_tokens_total", 0.0)
        figures.setdefault("prefill_tokens_total", computed)
        capacity_tokens = figures.get("kv_capacity_tokens", 0.0)
        figures["used_tokens"] = round(figures.get("kv_used_ratio", 0.0) * capacity_tokens)
    awake = [
        value
        for labels, value in told.get(_SLEEP_STATE, ())
        if labels.get("sleep_state") == "awake"
    ]
    return sample_of(
        by_rank, at_s, asleep=bool(awake) and not any(awake), busy_adapters=_busy_adapters(told)
    )


def _add_capacity(by_rank: ByRank, infos: list[Sample]) -> None:
    """Blocks times block size, told as labels."""
    for labels, _ in infos:
        blocks, size = rank_of(labels.get("num_gpu_blocks")), rank_of(labels.get("block_size"))
        rank = rank_of(labels.get("engine"))
        if blocks > 0 and size > 0 and (rank in by_rank or len(by_rank) == 1):
            figures = by_rank.get(rank) or next(iter(by_rank.values()))
            figures["kv_capacity_tokens"] = figures.get("kv_capacity_tokens", 0.0) + blocks * size
            figures["block_tokens"] = float(size)


def _busy_adapters(told: Samples) -> tuple[str, ...]:
    """The names are labels, and the value says when they were true: the latest of each rank."""
    latest: dict[int, Sample] = {}
    for sample in told.get(_ADAPTERS_INFO, ()):
        rank = rank_of(sample[0].get("engine"))
        if rank not in latest or sample[1] >= latest[rank][1]:
            latest[rank] = sample
    names: set[str] = set()
    for labels, _ in latest.values():
        for label in ("running_lora_adapters", "waiting_lora_adapters"):
            names.update(name.strip() for name in labels.get(label, "").split(","))
    return tuple(sorted(names - {""})[:_BUSY_ADAPTERS_MAX])


# --- SGLang ---------------------------------------------------------------------------------


def _once(samples: list[Sample]) -> list[Sample]:
    """Every tensor- and pipeline-parallel rank may repeat the figures; `priority` "" is the total.

    Of each data-parallel rank the first of them counts, which with DP attention is not number 0.
    """
    samples = [sample for sample in samples if not sample[0].get("priority")]
    places = [_place(labels) for labels, _ in samples]
    firsts: dict[int, tuple[int, int]] = {}
    for rank, place in places:
        firsts[rank] = min(place, firsts.get(rank, place))
    return [
        sample
        for sample, (rank, place) in zip(samples, places, strict=True)
        if place == firsts[rank]
    ]


def _place(labels: dict[str, str]) -> tuple[int, tuple[int, int]]:
    place = rank_of(labels.get("pp_rank")), rank_of(labels.get("tp_rank"))
    return rank_of(labels.get("dp_rank")), place


_SGLANG_METRICS: Final = Dialect(
    series={
        "running": ("sglang:num_running_reqs",),
        "waiting": ("sglang:num_queue_reqs",),
        "used_tokens": ("sglang:num_used_tokens", "sglang:kv_used_tokens"),
        "kv_used_ratio": ("sglang:token_usage",),
        "kv_capacity_tokens": ("sglang:max_total_num_tokens",),
        "block_tokens": ("sglang:page_size",),
        "prompt_tokens_total": ("sglang:prompt_tokens_total",),
        "cached_tokens_total": ("sglang:cached_tokens_total",),
        "generation_tokens_total": ("sglang:generation_tokens_total",),
        "preemptions_total": ("sglang:num_retracted_requests_total",),
    },
    rank_label="dp_rank",
    counted=_once,
)


class _RankLoads(msgspec.Struct):
    """One rank in `/v1/loads`; the names of ours and theirs in `_FIELDS`."""

    num_running_reqs: float
    dp_rank: int | None = None
    num_waiting_reqs: float | None = None
    num_waiting_uncached_tokens: float | None = None
    num_used_tokens: float | None = None
    max_total_num_tokens: float | None = None
    max_running_requests: float | None = None
    token_usage: float | None = None
    total_prefill_uncached_tokens: float | None = None
    total_prefill_busy_us: float | None = None


class _Loads(msgspec.Struct):
    loads: list[_RankLoads] = []


_FIELDS: Final = (
    ("running", "num_running_reqs", 1.0),
    ("waiting", "num_waiting_reqs", 1.0),
    ("waiting_tokens", "num_waiting_uncached_tokens", 1.0),
    ("used_tokens", "num_used_tokens", 1.0),
    ("kv_capacity_tokens", "max_total_num_tokens", 1.0),
    ("running_max", "max_running_requests", 1.0),
    ("kv_used_ratio", "token_usage", 1.0),
    ("prefill_tokens_total", "total_prefill_uncached_tokens", 1.0),
    ("prefill_busy_s_total", "total_prefill_busy_us", 1e-6),
)


def _read_sglang(answers: Sequence[bytes], at_s: float) -> LoadSample | None:
    by_rank = read_figures(answers[0], _SGLANG_METRICS)
    fresh = _read_loads(answers[1]) if len(answers) > 1 else {}
    for field in {field for figures in fresh.values() for field in figures}:
        for figures in by_rank.values():
            figures.pop(field, None)
    for rank, figures in fresh.items():
        by_rank.setdefault(rank, {}).update(figures)
    return sample_of(by_rank, at_s)


def _read_loads(body: bytes) -> ByRank:
    try:
        ranks = msgspec.json.decode(body, type=_Loads).loads
    except msgspec.MsgspecError:
        return {}
    by_rank: ByRank = {}
    for told in ranks:
        rank = NO_RANK if told.dp_rank is None else max(told.dp_rank, NO_RANK)
        by_rank[rank] = {
            field: value * unit
            for field, name, unit in _FIELDS
            if (value := getattr(told, name)) is not None
        }
    return by_rank


VLLM: Final = LoadReader("vllm", ("/metrics",), _read_vllm)
SGLANG: Final = LoadReader("sglang", ("/metrics", "/v1/loads"), _read_sglang)
READERS: Final = (VLLM, SGLANG)


def read_any(
    answers: Sequence[bytes], at_s: float, believed: str = _UNKNOWN
) -> tuple[str, LoadSample] | None:
    """Tell the engine from the names: an answer speaks one dialect. Return it and the load.

    That of the kind that it is `believed` to be is looked for first.
    """
    for reader in sorted(READERS, key=lambda reader: reader.kind != believed):
        load = reader.read(answers, at_s)
        if load is not None:
            return reader.kind, load
    return None


# --- names ----------------------------------------------------------------------------------


class Listing(msgspec.Struct, frozen=True):
    """What `/v1/models` tells."""

    names: tuple[str, ...]
    adapters: tuple[str, ...] | None  # those of the names; None: it does not tell them apart
    kind: str  # of engine; `unknown` when it does not say


class _Model(msgspec.Struct):
    id: str
    parent: Any = msgspec.UNSET
    owned_by: Any = None


class _ModelList(msgspec.Struct):
    data: list[_Model]


def read_listing(body: bytes | bytearray) -> Listing | None:
    """Return the names in an answer of `/v1/models`; None when it is none."""
    try:
        models = msgspec.json.decode(body, type=_ModelList).data
    except msgspec.MsgspecError:
        return None
    names = tuple(dict.fromkeys(model.id for model in models))[:MODEL_NAMES_MAX]
    adapters = None
    if any(model.parent is not msgspec.UNSET for model in models):
        adapters = tuple(sorted({model.id for model in models if model.parent} & set(names)))
    owners = [model.owned_by for model in models]
    kinds = [reader.kind for reader in READERS if reader.kind in owners]
    return Listing(names, adapters, kinds[0] if kinds else _UNKNOWN)
