"""The pages /metrics of the control plane: families as they are declared, and answers to GETs."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator, Mapping

from aiohttp import web
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

from proxy.contract.metrics import METRICS_VERSION, Family
from proxy.contract.version import package_version


class Declared:
    """The families of one service, under its prefix."""

    def __init__(self, prefix: str, families: Mapping[str, Family]) -> None:
        self._prefix = prefix
        self._families = families

    def gauge(self, name: str, value: float | None = None) -> GaugeMetricFamily:
        """Return an empty family, or one with this value where it has no labels."""
        full, text, labels = self._words(name, "gauge")
        if value is None:
            return GaugeMetricFamily(full, text, labels=labels)
        return GaugeMetricFamily(full, text, value)

    def counter(self, name: str, value: float | None = None) -> CounterMetricFamily:
        full, text, labels = self._words(name, "counter")
        if value is None:
            return CounterMetricFamily(full, text, labels=labels)
        return CounterMetricFamily(full, text, value)

    def histogram(self, name: str) -> HistogramMetricFamily:
        full, text, labels = self._words(name, "histogram")
        return HistogramMetricFamily(full, text, labels=labels)

    def build(self) -> GaugeMetricFamily:
        """Return what runs here."""
        family = self.gauge("build_info")
        family.add_metric([package_version(), platform.python_version(), str(METRICS_VERSION)], 1)
        return family

    def _words(self, name: str, kind: str) -> tuple[str, str, tuple[str, ...]]:
        declared = self._families[name]
        assert declared.kind == kind
        return self._prefix + declared.bare, declared.text + ".", declared.labels


class _Page(Collector):
    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = metrics

    @override
    def collect(self) -> Iterator[Metric]:
        yield from self._metrics


def answer(request: web.Request, metrics: Iterable[Metric]) -> web.Response:
    """Return the page with these and what the process uses, in the form that its reader wants."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Page(metrics))
    ProcessCollector(registry=registry)
    encode, content_type = choose_encoder(request.headers.get("Accept", ""))
    return web.Response(body=encode(registry), headers={"Content-Type": content_type})
