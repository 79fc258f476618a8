"""The service's figures for Prometheus: what is stored, read when it is asked for, and what passed.

Jobs, lines and octets are the store's, so they are the same from each of several services; what
came and went is counted by each service for itself since its start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from typing_extensions import override

from backends.offline.counted_desk import CountedDesk
from backends.offline.dispatch import GroupReport
from backends.offline.files_api import FilesApi
from backends.offline.store import Store
from backends.offline.store_figures import Figures

PREFIX = "doherty_offline_"
COUNTED = {
    "asks": "Times that a worker asked for lines.",
    "chunks": "Chunks given out.",
    "lines_given": "Lines given out, again each time.",
    "reports": "Reports of workers.",
    "results": "Results that counted.",
    "results_dropped": "Results that came too late, twice, or for a job that had ended.",
    "prompt_tokens": "Prompt tokens of lines.",
    "cached_tokens": "Those of them that an engine had in its cache.",
    "completion_tokens": "Tokens of answers.",
}


class Metrics:
    """The page /metrics."""

    def __init__(
        self,
        store: Store,
        desk: CountedDesk,
        files: FilesApi,
        spare: Callable[[], Sequence[GroupReport]],
    ) -> None:
        self._store, self._desk, self._files, self._spare = store, desk, files, spare

    async def answer(self, _request: web.Request) -> web.Response:
        registry = CollectorRegistry()
        stored = self._stored(await self._store.figures())
        registry.register(_Page([*stored, *self._passed(), *self._sent()]))
        headers = {"content-type": CONTENT_TYPE_LATEST}
        return web.Response(body=generate_latest(registry), headers=headers)

    def _stored(self, figures: Figures) -> Iterator[Metric]:
        jobs = GaugeMetricFamily(PREFIX + "jobs", "Batches by state.", labels=["state"])
        for state, count in sorted(figures.jobs.items()):
            jobs.add_metric([state], count)
        lines = GaugeMetricFamily(
            PREFIX + "lines", "Lines of batches that have not ended, by state.", labels=["state"]
        )
        for state, count in sorted(figures.lines.items()):
            lines.add_metric([state], count)
        files = GaugeMetricFamily(PREFIX + "files", "Files.", figures.files)
        stored = GaugeMetricFamily(
            PREFIX + "stored_bytes", "Content of all files and results.", figures.bytes
        )
        due = GaugeMetricFamily(
            PREFIX + "due_seconds", "Time until the next batch in progress expires."
        )
        if figures.due_in_s is not None:
            due.add_metric([], figures.due_in_s)
        yield from (jobs, lines, files, stored, due)

    def _passed(self) -> Iterator[Metric]:
        for name, text in COUNTED.items():
            yield CounterMetricFamily(PREFIX + name, text, self._desk.totals[name])
        yield CounterMetricFamily(
            PREFIX + "uploaded_bytes", "Octets of files uploaded.", self._files.uploaded_bytes
        )
        yield GaugeMetricFamily(PREFIX + "uploads", "Uploads in progress.", self._files.uploads)
        rates = GaugeMetricFamily(
            PREFIX + "worker_tokens_per_second",
            "Tokens of a worker in the last minute, prompts and answers.",
            labels=["worker"],
        )
        for worker_id, rate in sorted(self._store.rates().items()):
            rates.add_metric([worker_id], rate)
        yield rates

    def _sent(self) -> Iterator[Metric]:
        """Tell of the lines that go to replicas with room to spare, by the models these serve."""
        told = {
            "lines_max": "Lines that may be in flight on replicas with room to spare.",
            "in_flight": "Lines in flight on these.",
            "tokens_per_second": "Tokens of such lines lately.",
        }
        gauges = {
            name: GaugeMetricFamily(f"{PREFIX}spare_{name}", text, labels=["models"])
            for name, text in told.items()
        }
        ends = CounterMetricFamily(
            PREFIX + "spare_attempts",
            "How attempts at such lines ended.",
            labels=["models", "outcome"],
        )
        for group in self._spare():
            models = [",".join(group.names)]
            gauges["lines_max"].add_metric(models, group.lines_max)
            gauges["in_flight"].add_metric(models, group.in_flight)
            gauges["tokens_per_second"].add_metric(models, group.tokens_per_s)
            for outcome in ("results", "failures", "turned_back", "preempted", "cut", "dropped"):
                ends.add_metric([*models, outcome], getattr(group.counts, outcome))
        yield from (*gauges.values(), ends)


class _Page(Collector):
    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics

    @override
    def collect(self) -> Iterator[Metric]:
        yield from self._metrics
