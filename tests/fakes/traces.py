"""The spans of a bench's plane, made at once and kept; and a client's trace."""

from __future__ import annotations

from proxy.contract.spans import SpanRecord
from proxy.core.request_spans import RequestFacts
from proxy.io.tracing import Tracer, close_tracer
from tests.fakes.plane import Bench

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"traceparent: 00-{TRACE}-{SPAN}-01"


class Kept:
    """In the place of the exporter: makes the spans at once, and keeps them."""

    def __init__(self, tracer: Tracer) -> None:
        close_tracer(tracer)
        self.spans: list[SpanRecord] = []
        self._make = tracer.telling.spans
        tracer.export = self  # type: ignore[assignment]

    def put(self, facts: RequestFacts, spans: int) -> None:
        made = self._make(facts)
        assert len(made) == spans
        self.spans += made

    def __getitem__(self, index: int) -> SpanRecord:
        return self.spans[index]


def traced(bench: Bench, environment: dict[str, str] | None = None) -> Kept:
    """Have the bench's plane record all traces."""
    bench.plane.tracer = Tracer(bench.plane.config, environment or {})
    return Kept(bench.plane.tracer)
