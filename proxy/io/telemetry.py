"""What happened, counted: plain integers in each worker, summed and rendered by the supervisor.

Counting must cost nothing against a request, so a worker adds to attributes and small lists; names,
labels and text come only when somebody asks. Labels that clients choose are capped.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from typing import Final

import msgspec

from proxy.core import limits
from proxy.core.policy import REASONS

# Router overhead shows at a millisecond, a long prompt's first token at minutes; 400 ms is what the
# project is named after (Doherty & Thadhani, 1982).
SECONDS_BUCKETS: Final[tuple[float, ...]] = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.4, 0.5, 1.0,
    2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0,
)  # fmt: skip
# A token comes in milliseconds from a model on several cards, in seconds from one that is swamped.
TOKEN_BUCKETS: Final[tuple[float, ...]] = (
    0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.035, 0.05, 0.075, 0.1,
    0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
OVERHEAD_BUCKETS: Final[tuple[float, ...]] = (
    0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.1,
)  # fmt: skip

Labels = tuple[tuple[str, str], ...]


class Sample(msgspec.Struct, frozen=True):
    """One series of one worker. A histogram has counts per bucket, the last one +Inf, and a sum."""

    name: str
    labels: Labels
    value: float = 0.0
    buckets: tuple[int, ...] = ()


class Histogram:
    """Counts per bucket; the last is what exceeds every edge."""

    __slots__ = ("_edges", "counts", "total")

    def __init__(self, edges: tuple[float, ...]) -> None:
        self._edges = edges
        self.counts = [0] * (len(edges) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self._edges, value)] += 1
        self.total += value

    def sample(self, name: str, labels: Labels) -> Sample:
        return Sample(name, labels, self.total, tuple(self.counts))


class RequestSeries:
    """What is counted per route and model."""

    __slots__ = (
        "cached_tokens",
        "duration_s",
        "first_token_s",
        "generation_tokens",
        "outcomes",
        "prompt_tokens",
        "token_s",
    )

    def __init__(self) -> None:
        self.outcomes: dict[tuple[int, str], int] = defaultdict(int)
        self.duration_s = Histogram(SECONDS_BUCKETS)
        self.first_token_s = Histogram(SECONDS_BUCKETS)
        self.token_s = Histogram(TOKEN_BUCKETS)
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.generation_tokens = 0


class Telemetry:
    """One worker's counts."""

    def __init__(self) -> None:
        self._requests: dict[tuple[str, str], RequestSeries] = {}
        self.decisions = defaultdict(int, dict.fromkeys(REASONS, 0))
        self.retries: dict[str, int] = defaultdict(int)  # by reason
        self.cancellations: dict[str, int] = defaultdict(int)  # by progress
        self.replica_requests: dict[str, int] = defaultdict(int)
        self.tls_failures: dict[str, int] = defaultdict(int)  # handshakes with clients, by reason
        self.overhead_s = Histogram(OVERHEAD_BUCKETS)
        self.unsolicited_total = 0
        self.internal_errors_total = 0
        self.connections_total = 0
        self.connections_refused_total = 0
        self.usage_missing_total = 0
        self.keepalive_comments_total = 0
        self.loop_lag_s_max = 0.0
        self.loop_delay_s = Histogram(SECONDS_BUCKETS)

    def series(self, route: str, model: str) -> RequestSeries:
        found = self._requests.get((route, model))
        if found is None:
            if len(self._requests) >= limits.REQUEST_SERIES_MAX:
                model = "other"
            found = self._requests.setdefault((route, model), RequestSeries())
        return found

    def retain_replicas(self, replica_ids: frozenset[str]) -> None:
        """Stop counting for replicas that are gone, so that churn cannot grow the table."""
        for gone in [k for k in self.replica_requests if k not in replica_ids]:
            del self.replica_requests[gone]

    def late_by(self, lag_s: float) -> None:
        """A timer was late by so much: the loop had something else to do."""
        self.loop_lag_s_max = max(self.loop_lag_s_max, lag_s)
        self.loop_delay_s.observe(lag_s)

    def take_lag_s(self) -> float:
        """Return the longest lateness since the last reading."""
        lag_s, self.loop_lag_s_max = self.loop_lag_s_max, 0.0
        return lag_s

    def samples(self) -> list[Sample]:
        out: list[Sample] = []
        for (route, model), series in self._requests.items():
            by = (("route", route), ("model", model))
            for (status, outcome), count in series.outcomes.items():
                labels = (*by, ("code", str(status)), ("outcome", outcome))
                out.append(Sample("requests_total", labels, count))
            out += (
                series.duration_s.sample("request_duration_seconds", by),
                series.first_token_s.sample("time_to_first_token_seconds", by),
                series.token_s.sample("time_per_output_token_seconds", by),
                Sample("prompt_tokens_total", by, series.prompt_tokens),
                Sample("prefix_cached_tokens_total", by, series.cached_tokens),
                Sample("generation_tokens_total", by, series.generation_tokens),
            )
        tables = (
            ("routing_decisions_total", "reason", self.decisions),
            ("retries_total", "reason", self.retries),
            ("cancellations_total", "state", self.cancellations),
            ("replica_requests_total", "replica", self.replica_requests),
            ("tls_handshakes_failed_total", "reason", self.tls_failures),
        )
        out += (
            Sample(name, ((label, value),), count)
            for name, label, table in tables
            for value, count in table.items()
        )
        out += (
            self.overhead_s.sample("overhead_seconds", ()),
            self.loop_delay_s.sample("event_loop_delay_seconds", ()),
            Sample("unsolicited_answers_total", (), self.unsolicited_total),
            Sample("internal_errors_total", (), self.internal_errors_total),
            Sample("connections_accepted_total", (), self.connections_total),
            Sample("connections_refused_total", (), self.connections_refused_total),
            Sample("answers_without_usage_total", (), self.usage_missing_total),
            Sample("keepalive_comments_total", (), self.keepalive_comments_total),
        )
        return out
