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

from backends.exposition import Declared
from backends.ladder import Rung
from backends.members import Rise
from backends.metric_lists import WAKE_BUCKETS_S
from backends.scaling_report import Note, PoolReport, ScalingReport

TERMS_MAX = 32  # of one pool
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

    def collect(self, declared: Declared) -> Iterator[Metric]:
        decisions = declared.counter("decisions_total")
        for (pool, direction), count in self._decisions.items():
            decisions.add_metric([pool, direction], count)
        yield decisions
        wakes = declared.histogram("wake_seconds")
        bounds = [*(str(bound) for bound in WAKE_BUCKETS_S), "+Inf"]
        for rung, counts in self._wakes.items():
            pairs = list(zip(bounds, accumulate(counts), strict=True))
            wakes.add_metric([rung.value], buckets=pairs, sum_value=self._wakes_s[rung])
        yield wakes


def collect(declared: Declared, report: ScalingReport) -> Iterator[Metric]:
    """Yield what is now."""
    for name in _GAUGES:
        gauge = declared.gauge("scale_" + name)
        for pool in report.pools:
            gauge.add_metric([pool.pool], getattr(pool, name))
        yield gauge
    panicking = declared.gauge("scale_panicking")
    terms = declared.gauge("scale_term")
    rungs = declared.gauge("scale_resting")
    for pool in report.pools:
        _add_pool(pool, panicking, terms, rungs)
    yield from (panicking, terms, rungs)
    gpus = declared.gauge("gpus")
    gpus.add_metric(["used"], report.gpus.total - report.gpus.free)
    gpus.add_metric(["free"], report.gpus.free)
    yield gpus
    yield declared.gauge("demand_proxies", report.proxies)


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


_GAUGES = ("desired", "ready", "coming", "presses", "min", "max")
