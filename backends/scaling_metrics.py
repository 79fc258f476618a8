"""The figures of scaling for Prometheus: what is, read when it is asked for, and what has happened.

Label values are names of pools, of rungs and of the law's terms: all from the configuration or from
our own code. A law that would name ever new terms is cut off at `TERMS_MAX`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from itertools import accumulate

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)

from backends.ladder import Rung
from backends.members import Rise
from backends.scaling_report import Note, PoolReport, ScalingReport

TERMS_MAX = 32  # of one pool
WAKE_BUCKETS_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
PREFIX = "doherty_manager_"
Metric = GaugeMetricFamily | CounterMetricFamily | HistogramMetricFamily


class Tally:
    """What has happened since this manager came up."""

    def __init__(self) -> None:
        self._decisions: Counter[tuple[str, str]] = Counter()
        self._wakes: dict[Rung, list[int]] = {}
        self._wakes_s: Counter[Rung] = Counter()

    def decided(self, note: Note) -> None:
        self._decisions[note.pool, note.direction] += 1

    def rose(self, rise: Rise) -> None:
        counts = self._wakes.setdefault(rise.rung, [0] * (len(WAKE_BUCKETS_S) + 1))
        counts[bisect_left(WAKE_BUCKETS_S, rise.up_s)] += 1
        self._wakes_s[rise.rung] += rise.up_s  # type: ignore[assignment]

    def collect(self) -> Iterator[Metric]:
        decisions = CounterMetricFamily(
            PREFIX + "decisions",
            "Changes of a pool's desired size, and moves without one.",
            labels=["pool", "direction"],
        )
        for (pool, direction), count in self._decisions.items():
            decisions.add_metric([pool, direction], count)
        yield decisions
        wakes = HistogramMetricFamily(
            PREFIX + "wake_seconds", "Time until a replica served, by where from.", labels=["from"]
        )
        bounds = [*(str(bound) for bound in WAKE_BUCKETS_S), "+Inf"]
        for rung, counts in self._wakes.items():
            pairs = list(zip(bounds, accumulate(counts), strict=True))
            wakes.add_metric([rung.value], buckets=pairs, sum_value=self._wakes_s[rung])
        yield wakes


def collect(report: ScalingReport) -> Iterator[Metric]:
    """Yield what is now."""
    for name, words in _GAUGES.items():
        gauge = GaugeMetricFamily(PREFIX + "scale_" + name, words, labels=["pool"])
        for pool in report.pools:
            gauge.add_metric([pool.pool], getattr(pool, name))
        yield gauge
    panicking = GaugeMetricFamily(
        PREFIX + "scale_panicking", "Whether a burst is under way.", labels=["pool"]
    )
    terms = GaugeMetricFamily(
        PREFIX + "scale_term", "What entered the last decision.", labels=["pool", "term"]
    )
    rungs = GaugeMetricFamily(
        PREFIX + "scale_resting", "Replicas at rest.", labels=["pool", "rung"]
    )
    for pool in report.pools:
        _add_pool(pool, panicking, terms, rungs)
    yield from (panicking, terms, rungs)
    gpus = GaugeMetricFamily(PREFIX + "gpus", "GPUs, by whether leased.", labels=["state"])
    gpus.add_metric(["used"], report.gpus.total - report.gpus.free)
    gpus.add_metric(["free"], report.gpus.free)
    yield gpus
    yield GaugeMetricFamily(PREFIX + "demand_proxies", "Proxies that report.", report.proxies)


def _add_pool(
    pool: PoolReport,
    panicking: GaugeMetricFamily,
    terms: GaugeMetricFamily,
    rungs: GaugeMetricFamily,
) -> None:
    if pool.decision is not None:
        panicking.add_metric([pool.pool], float(pool.decision.panicking))
        for term, value in list(pool.decision.terms.items())[:TERMS_MAX]:
            terms.add_metric([pool.pool, term], value)
    for rung in (Rung.ASLEEP, Rung.SUSPENDED):
        rungs.add_metric([pool.pool, rung.value], list(pool.resting.values()).count(rung.value))


_GAUGES = {
    "desired": "Replicas that should serve.",
    "ready": "Replicas that serve.",
    "coming": "Replicas on their way up.",
    "presses": "Whether its jobs have moved up a class.",
    "min": "Fewest replicas, as configured.",
    "max": "Most replicas, as configured.",
}
