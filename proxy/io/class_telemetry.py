"""What is counted of each class of work: how much, how soon, and what it waited for.

There are three classes and a few reasons, so these tables are bounded by themselves.
"""

from __future__ import annotations

from collections import defaultdict

from proxy.core.classes import NAMES
from proxy.core.policy import Request
from proxy.core.wishes import Wishes
from proxy.io.telemetry import SECONDS_BUCKETS, TOKEN_BUCKETS, Histogram, Sample


class ClassSeries:
    """One class."""

    __slots__ = ("first_token_s", "outcomes", "queue_wait_s", "token_s", "waits", "wishes")

    def __init__(self) -> None:
        self.outcomes: dict[str, int] = defaultdict(int)
        self.first_token_s = Histogram(SECONDS_BUCKETS)
        self.token_s = Histogram(TOKEN_BUCKETS)
        self.queue_wait_s = Histogram(SECONDS_BUCKETS)  # of those that waited
        self.waits: dict[str, int] = defaultdict(int)  # by what for
        self.wishes: dict[str, int] = defaultdict(int)  # by what was wanted


class ClassTelemetry:
    """All classes."""

    def __init__(self) -> None:
        self._series = [ClassSeries() for _ in NAMES]

    def count(
        self,
        request: Request,
        wishes: Wishes,
        outcome: str,
        first_token_s: float,
        token_s: float,
        queue_s: float,
    ) -> None:
        """Count a request that is over. `first_token_s` is 0 where there was none, others below.

        `token_s` is the mean time between its tokens.
        """
        series = self._series[request.work_class]
        series.outcomes[outcome] += 1
        if first_token_s:
            series.first_token_s.observe(first_token_s)
        if token_s >= 0.0:
            series.token_s.observe(token_s)
        if queue_s >= 0.0:
            series.queue_wait_s.observe(queue_s)
            series.waits[request.held_for] += 1
        if wishes.ttft_s:
            series.wishes["ttft"] += 1
        if wishes.tpot_s:
            series.wishes["tpot"] += 1
        if wishes.patience_s:
            series.wishes["patience"] += 1

    def samples(self) -> list[Sample]:
        out: list[Sample] = []
        for name, series in zip(NAMES, self._series, strict=True):
            by = (("class", name),)
            tables = (
                ("class_requests_total", "outcome", series.outcomes),
                ("queue_waits_total", "reason", series.waits),
                ("slo_requests_total", "wish", series.wishes),
            )
            out += [
                Sample(metric, (*by, (label, value)), count)
                for metric, label, table in tables
                for value, count in table.items()
            ]
            out += (
                series.first_token_s.sample("class_time_to_first_token_seconds", by),
                series.token_s.sample("class_time_per_output_token_seconds", by),
                series.queue_wait_s.sample("queue_wait_seconds", by),
            )
        return out
