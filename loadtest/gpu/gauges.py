"""What an engine and the proxy say of themselves, read by a stranger.

Of the engine the sources that do not lag are read: vLLM's `/metrics`, which move with every step,
and SGLang's `/v1/loads`, because its gauges move every so many decode steps. *Busy* is an engine
that computes or queues a request, or holds KV memory for one.
"""

from __future__ import annotations

import re

import msgspec

from loadtest.client import Client
from loadtest.fleet import get
from loadtest.run import RunError

_SAMPLE = re.compile(r"^([A-Za-z_:][A-Za-z0-9_:]*)(?:\{(.*)\})? (\S+)", re.MULTILINE)
_LABEL = re.compile(r'([A-Za-z_][A-Za-z0-9_]*)="((?:[^"\\]|\\.)*)"')
LOADS_PATH, METRICS_PATH = "/v1/loads", "/metrics"

Series = list[tuple[str, dict[str, str], float]]


class EngineLoad(msgspec.Struct, frozen=True, kw_only=True):
    """One reading of an engine."""

    running: int = 0
    waiting: int = 0
    kv_used_ratio: float = 0.0
    kv_capacity_tokens: int = 0

    @property
    def requests(self) -> int:
        return self.running + self.waiting


class _RankLoads(msgspec.Struct):
    num_running_reqs: float = 0.0
    num_waiting_reqs: float = 0.0
    num_used_tokens: float = 0.0
    max_total_num_tokens: float = 0.0


class _Loads(msgspec.Struct):
    loads: list[_RankLoads]


def series(page: str) -> Series:
    """Read an exposition: name, labels, value."""
    return [
        (name, dict(_LABEL.findall(labels or "")), float(value))
        for name, labels, value in _SAMPLE.findall(page)
    ]


def read_loads(body: bytes) -> EngineLoad | None:
    """Read SGLang's `/v1/loads`; None when it is none."""
    try:
        ranks = msgspec.json.decode(body, type=_Loads).loads
    except msgspec.MsgspecError:
        return None
    used = sum(rank.num_used_tokens for rank in ranks)
    capacity = sum(rank.max_total_num_tokens for rank in ranks)
    return EngineLoad(
        running=int(sum(rank.num_running_reqs for rank in ranks)),
        waiting=int(sum(rank.num_waiting_reqs for rank in ranks)),
        kv_used_ratio=used / capacity if capacity else 0.0,
        kv_capacity_tokens=int(capacity),
    )


def read_metrics(page: str) -> EngineLoad | None:
    """Read vLLM's metrics; None when they are none."""
    sums: dict[str, float] = {}
    capacity = 0
    for name, labels, value in series(page):
        if name == "vllm:cache_config_info":
            blocks, size = labels.get("num_gpu_blocks", ""), labels.get("block_size", "")
            if blocks.isdecimal() and size.isdecimal():
                capacity += int(blocks) * int(size)
        sums[name] = sums.get(name, 0.0) + value
    if "vllm:num_requests_running" not in sums:
        return None
    return EngineLoad(
        running=int(sums["vllm:num_requests_running"]),
        waiting=int(sums.get("vllm:num_requests_waiting", 0.0)),
        kv_used_ratio=sums.get("vllm:kv_cache_usage_perc", 0.0),
        kv_capacity_tokens=capacity,
    )


class Gauge:
    """Asks one engine how busy it is."""

    def __init__(self, engine: Client) -> None:
        self._engine = engine
        self._path = ""

    async def read(self) -> EngineLoad:
        """Return its load now. Raises `RunError` when it tells none."""
        for path in (self._path,) if self._path else (LOADS_PATH, METRICS_PATH):
            status, body = await get(self._engine, path)
            if status != 200:
                continue
            load = read_loads(body) if path == LOADS_PATH else read_metrics(body.decode())
            if load is not None:
                self._path = path
                return load
        raise RunError("the engine tells no load, neither at /v1/loads nor at /metrics")


async def proxy_series(admin: Client) -> Series:
    """Return the proxy's metrics. Raises `RunError`."""
    status, body = await get(admin, METRICS_PATH)
    if status != 200:
        raise RunError(f"the proxy's {METRICS_PATH} answered {status}")
    return series(body.decode())


def total(found: Series, name: str, **labels: str) -> float:
    """Return the sum of the series of this name that carry these labels."""
    return sum(
        value
        for series_name, has, value in found
        if series_name == name and labels.items() <= has.items()
    )
