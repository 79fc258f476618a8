"""The service's figures for Prometheus: what is stored, read when it is asked for, and what passed.

Jobs, lines and octets are the store's, so they are the same from each of several services; what
came and went is counted by each service for itself since its start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from aiohttp import web
from prometheus_client.core import Metric

from backends.exposition import Declared, answer
from backends.metric_lists import OFFLINE, OFFLINE_PREFIX
from backends.offline.counted_desk import CountedDesk
from backends.offline.dispatch import GroupReport
from backends.offline.files_api import FilesApi
from backends.offline.store import Store
from backends.offline.store_figures import Figures

COUNTED = (
    *("asks", "chunks", "lines_given", "reports", "results", "results_dropped"),
    *("prompt_tokens", "cached_tokens", "completion_tokens"),
)
DECLARED = Declared(OFFLINE_PREFIX, OFFLINE)


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

    async def answer(self, request: web.Request) -> web.Response:
        stored = self._stored(await self._store.figures())
        page = [*stored, *self._passed(), *self._sent(), DECLARED.build()]
        return answer(request, page)

    def _stored(self, figures: Figures) -> Iterator[Metric]:
        jobs = DECLARED.gauge("jobs")
        for state, count in sorted(figures.jobs.items()):
            jobs.add_metric([state], count)
        lines = DECLARED.gauge("lines")
        for state, count in sorted(figures.lines.items()):
            lines.add_metric([state], count)
        yield from (jobs, lines)
        yield DECLARED.gauge("files", figures.files)
        yield DECLARED.gauge("stored_bytes", figures.bytes)
        yield DECLARED.gauge("due_seconds", figures.due_in_s)  # without a series: none is due

    def _passed(self) -> Iterator[Metric]:
        for name in COUNTED:
            yield DECLARED.counter(name + "_total", self._desk.totals[name])
        yield DECLARED.counter("uploaded_bytes_total", self._files.uploaded_bytes)
        yield DECLARED.gauge("uploads", self._files.uploads)
        rates = DECLARED.gauge("worker_tokens_per_second")
        for worker_id, rate in sorted(self._store.rates().items()):
            rates.add_metric([worker_id], rate)
        yield rates

    def _sent(self) -> Iterator[Metric]:
        """Tell of the lines that go to replicas with room to spare, by the models these serve."""
        lines_max = DECLARED.gauge("spare_lines_max")
        in_flight = DECLARED.gauge("spare_in_flight")
        tokens_per_s = DECLARED.gauge("spare_tokens_per_second")
        ends = DECLARED.counter("spare_attempts_total")
        for group in self._spare():
            models = [",".join(group.names)]
            lines_max.add_metric(models, group.lines_max)
            in_flight.add_metric(models, group.in_flight)
            tokens_per_s.add_metric(models, group.tokens_per_s)
            for outcome in ("results", "failures", "turned_back", "preempted", "cut", "dropped"):
                ends.add_metric([*models, outcome], getattr(group.counts, outcome))
        yield from (lines_max, in_flight, tokens_per_s, ends)
