"""The one place that knows OpenTelemetry's classes; imported only where traces are on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, TraceFlags, TraceState
from opentelemetry.trace.status import Status, StatusCode

from proxy.contract.spans import SpanRecord

_KINDS = (SpanKind.INTERNAL, SpanKind.SERVER, SpanKind.CLIENT)
_SAMPLED = TraceFlags(TraceFlags.SAMPLED)
_FINE = Status(StatusCode.UNSET)


def exporter_of(endpoint: str) -> OTLPSpanExporter:
    """Return the exporter; without an endpoint the environment names it, else it is local."""
    return OTLPSpanExporter(endpoint=endpoint or None)


class Converter:
    """Makes of a record what the exporter takes."""

    def __init__(self, resource: Mapping[str, str]) -> None:
        # What the environment says goes before our words.
        said = OTELResourceDetector().detect().attributes
        ours = {name: value for name, value in resource.items() if name not in said}
        self._resource = Resource.create(ours)
        self._scope = InstrumentationScope("doherty", resource.get("service.version", ""))

    def __call__(self, span: SpanRecord) -> Any:
        state = TraceState.from_header([span.state]) if span.state else None
        return ReadableSpan(
            name=span.name,
            context=SpanContext(span.trace_id, span.span_id, False, _SAMPLED, state),
            parent=(
                SpanContext(span.trace_id, span.parent_id, span.remote_parent, _SAMPLED)
                if span.parent_id
                else None
            ),
            resource=self._resource,
            attributes=span.attributes,
            events=[Event(e.name, e.attributes, e.at_ns) for e in span.events],
            links=[Link(SpanContext(*span.linked, True, _SAMPLED))] if span.linked else (),
            kind=_KINDS[span.kind],
            status=_FINE if span.error is None else Status(StatusCode.ERROR, span.error or None),
            start_time=span.start_ns,
            end_time=span.end_ns,
            instrumentation_scope=self._scope,
        )
