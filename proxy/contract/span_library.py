"""The one place that knows OpenTelemetry's classes; imported only where traces are on.

Of a collector's answer the status counts (OTLP 1, "OTLP/HTTP Response"). The exporter would read
the body to its end, however long, and take a redirection, which it does not follow, for success.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Final

import requests
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
_READ_BYTES_MAX: Final = 64 * 1024
# By these an operator has a session of another library's making (OpenTelemetry for Python).
_OWN_SESSIONS: Final = (
    "OTEL_PYTHON_EXPORTER_OTLP_HTTP_TRACES_CREDENTIAL_PROVIDER",
    "OTEL_PYTHON_EXPORTER_OTLP_HTTP_CREDENTIAL_PROVIDER",
)


class RedirectedError(Exception):
    """The collector is elsewhere. The keys in our fields are not for whom it names."""


def exporter_of(endpoint: str) -> OTLPSpanExporter:
    """Return the exporter; without an endpoint the environment names it, else it is local."""
    if any(os.environ.get(name) for name in _OWN_SESSIONS):
        return OTLPSpanExporter(endpoint=endpoint or None)
    session = requests.Session()
    session.hooks["response"].append(_only_the_status)
    return OTLPSpanExporter(endpoint=endpoint or None, session=session)


def _only_the_status(answer: Any, **_: object) -> None:
    """Read what has come of a body. Whole, its connection is used again, else it is closed."""
    if 300 <= answer.status_code < 400:
        answer.close()
        where = answer.headers.get("Location", "nowhere")
        raise RedirectedError(f"the collector redirects to {where[:200]!r}; name that, if it is it")
    answer.raw.read1(_READ_BYTES_MAX)
    answer.close()
    answer._content = b""  # noqa: SLF001 - else requests would read on


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
