"""The page /metrics: what workers and supervisor counted, added up and put into words.

Types, labels and help are those of `io/families.py`, and a sample that is not declared there is an
error, not a surprise on somebody's dashboard. The page is Prometheus' text format, or OpenMetrics
for a reader that asks for it.
"""

from __future__ import annotations

import platform
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from typing_extensions import override

from proxy.compile import PACKAGE, import_root
from proxy.contract import FleetSnapshot, LoadSample
from proxy.contract.metrics import METRICS_VERSION, PREFIX, Family
from proxy.contract.version import package_version
from proxy.io.families import FAMILIES
from proxy.io.telemetry import Labels, Sample

_KINDS = {
    "counter": CounterMetricFamily,
    "gauge": GaugeMetricFamily,
    "histogram": HistogramMetricFamily,
}


class _Families(Collector):
    def __init__(self, samples: Iterable[Sample]) -> None:
        self._samples = sum_samples(samples)

    @override
    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for sample in self._samples:
            _add(families, sample)
        yield from families.values()


def sum_samples(samples: Iterable[Sample]) -> list[Sample]:
    """Add up the series of several workers; of some the largest counts, not the sum."""
    values: dict[tuple[str, Labels], float] = defaultdict(float)
    buckets: dict[tuple[str, Labels], list[int]] = {}
    for sample in samples:
        key = (sample.name, sample.labels)
        if FAMILIES[sample.name].largest:
            values[key] = max(values[key], sample.value)
            continue
        values[key] += sample.value
        if sample.buckets:
            total = buckets.setdefault(key, [0] * len(sample.buckets))
            for index, count in enumerate(sample.buckets):
                total[index] += count
    return [
        Sample(name, labels, value, tuple(buckets.get((name, labels), ())))
        for (name, labels), value in values.items()
    ]


def _add(families: dict[str, Metric], sample: Sample) -> None:
    """Add one series to its family, made when first met."""
    declared = FAMILIES[sample.name]
    family = families.get(sample.name)
    if family is None:
        kind = _KINDS[declared.kind]
        family = kind(PREFIX + declared.bare, declared.text + ".", labels=declared.labels)
        families[sample.name] = family
    said = dict(sample.labels)
    values = [said[name] for name in declared.labels]
    if isinstance(family, HistogramMetricFamily):
        family.add_metric(values, buckets=_cumulative(declared, sample), sum_value=sample.value)
    elif isinstance(family, CounterMetricFamily | GaugeMetricFamily):
        family.add_metric(values, sample.value)


def _cumulative(declared: Family, sample: Sample) -> list[tuple[str, float]]:
    running = 0
    found: list[tuple[str, float]] = []
    for edge, count in zip((*map(str, declared.edges), "+Inf"), sample.buckets, strict=True):
        running += count
        found.append((edge, running))
    return found


def render_metrics(
    counters: Iterable[Sample], gauges: Iterable[Sample], accept: str = ""
) -> tuple[bytes, str]:
    """Return the page, and what it is; `accept` is what its reader has asked for."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Families([*counters, *gauges]))
    ProcessCollector(registry=registry)
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type


def build_sample() -> Sample:
    """Return what runs here."""
    translated = import_root() != PACKAGE.parent
    labels = (
        ("version", package_version()),
        ("python", platform.python_version()),
        ("translation", "machine code" if translated else "none"),
        ("metrics_version", str(METRICS_VERSION)),
    )
    return Sample("build_info", labels, 1)


def fleet_samples(fleet: FleetSnapshot | None) -> list[Sample]:
    """Return what the fleet says of replicas, and these of themselves."""
    out = [build_sample()]
    now_s = time.time()
    for record in fleet.replicas if fleet else ():
        by = ("replica", record.replica_id)
        state = "asleep" if record.asleep else str(record.state)
        out.append(Sample("replica_state", (by, ("state", state)), 1))
        if record.load is not None:
            out += _load_samples((by,), record.load, now_s)
    return out


def _load_samples(by: Labels, load: LoadSample, now_s: float) -> list[Sample]:
    return [
        Sample("replica_kv_usage_ratio", by, load.kv_used_ratio),
        Sample("replica_running", by, load.running),
        Sample("replica_waiting", by, load.waiting),
        Sample("replica_info_age_seconds", by, max(0.0, now_s - load.at_s)),
    ]
