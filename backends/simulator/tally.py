"""What an engine counts: the numbers behind /metrics and /simulator/state."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from operator import add
from typing import NamedTuple


class Bounds(NamedTuple):
    """Upper bounds of the buckets of one engine's histograms, in seconds and tokens."""

    first_token_s: tuple[float, ...]
    inter_token_s: tuple[float, ...]
    end_to_end_s: tuple[float, ...]
    queue_s: tuple[float, ...]
    tokens: tuple[float, ...]


def _bounds(text: str) -> tuple[float, ...]:
    return tuple(float(word) for word in text.split())


_VLLM_LATENCY = _bounds("0.3 0.5 0.8 1 1.5 2 2.5 5 10 15 20 30 40 50 60 120 240 480 960 1920 7680")
_SGLANG_TOKENS = _bounds(
    "100 300 500 700 1000 1500 2000 3000 4000 5000 6000 7000 8000 9000 10000 12500 15000 17500 "
    "20000 22500 25000 27500 30000 35000 40000 60000 80000 100000 200000 300000 400000 600000 "
    "800000 1000000 1100000"
)
# As vLLM 0.26.0 and SGLang 0.5.17 expose them.
BOUNDS = {
    "vllm": Bounds(
        _bounds(
            "0.001 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.25 0.5 0.75 1 2.5 5 7.5 10 20 40 80 160 "
            "640 2560"
        ),
        _bounds("0.01 0.025 0.05 0.075 0.1 0.15 0.2 0.3 0.4 0.5 0.75 1 2.5 5 7.5 10 20 40 80"),
        _VLLM_LATENCY,
        _VLLM_LATENCY,
        _bounds("1 2 5 10 20 50 100 200 500 1000 2000 5000 10000 20000"),
    ),
    "sglang": Bounds(
        _bounds("0.1 0.2 0.4 0.6 0.8 1 2 4 6 8 10 20 40 60 80 100 200 400"),
        _bounds(
            "0.002 0.004 0.006 0.008 0.01 0.015 0.02 0.025 0.03 0.035 0.04 0.06 0.08 0.1 0.2 0.4 "
            "0.6 0.8 1 2 4 6 8"
        ),
        _bounds("0.1 0.2 0.4 0.6 0.8 1 2 4 6 8 10 20 40 60 80 100 200 400 600 1200 1800 2400"),
        _bounds(
            "0 0.001 0.005 0.01 0.05 0.1 0.2 0.5 1 2 3 4 5 10 15 20 30 40 50 60 70 80 90 100 200 "
            "300 400 500 600 700 800 900 1000 1200 1400 1600 1800 2000 2500 3000"
        ),
        _SGLANG_TOKENS,
    ),
}


class Histogram:
    """Counts of observations per bucket."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one observation."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def take_in(self, other: Histogram) -> None:
        """Count what another of the same bounds has counted."""
        self.counts = list(map(add, self.counts, other.counts))
        self.total += other.total


class Tally:
    """Counters since the start. Of a pair, `[True]` counts streaming requests."""

    def __init__(self, bounds: Bounds = BOUNDS["vllm"]) -> None:
        self.bounds = bounds
        self.prompt_tokens = [0, 0]
        self.generation_tokens = [0, 0]
        self.requests = [0, 0]
        self.cached_tokens = 0
        self.queried_tokens = 0
        self.computed_tokens = 0  # by prefill
        self.prefill_busy_s = 0.0
        self.preemptions = 0
        self.steps = 0
        self.finished: Counter[str] = Counter()
        self.time_to_first_token = Histogram(bounds.first_token_s)
        self.inter_token_latency = Histogram(bounds.inter_token_s)
        self.end_to_end = Histogram(bounds.end_to_end_s)
        self.queue_time = Histogram(bounds.queue_s)
        self.prompt_sizes = Histogram(bounds.tokens)
        self.generation_sizes = Histogram(bounds.tokens)
        self.prefill_time = Histogram(bounds.end_to_end_s)
        self.prefill_sizes = Histogram(bounds.tokens)


def summed(tallies: list[Tally]) -> Tally:
    """Return what several have counted together."""
    total = Tally(tallies[0].bounds)
    for tally in tallies:
        for name, value in vars(tally).items():
            mine = getattr(total, name)
            if isinstance(value, Histogram):
                mine.take_in(value)
            elif isinstance(value, Counter):
                mine.update(value)
            elif isinstance(value, list):
                setattr(total, name, list(map(add, mine, value)))
            elif isinstance(value, int | float):
                setattr(total, name, mine + value)
    return total
