"""A span as both planes hand it to the exporter: plain values, and no library.

Times are Unix nanoseconds, ids are numbers, as OpenTelemetry's own interfaces have them. Attributes
are chosen by whoever makes the span out of what is no secret: never a prompt, an answer, a key or
the id of a session.
"""

from __future__ import annotations

from typing import Final

INTERNAL: Final = 0  # in the order of `opentelemetry.trace.SpanKind`
SERVER: Final = 1
CLIENT: Final = 2

Attributes = dict[str, str | int | float | bool]


class SpanEvent:
    """A moment within a span."""

    __slots__ = ("at_ns", "attributes", "name")

    def __init__(self, name: str, at_ns: int, attributes: Attributes | None = None) -> None:
        self.name = name
        self.at_ns = at_ns
        self.attributes = attributes or {}


class SpanRecord:
    """One span that is over. `parent_id` 0: it has none; `linked` is a trace and a span in it."""

    __slots__ = (
        "attributes", "end_ns", "error", "events", "kind", "linked", "name", "parent_id",
        "remote_parent", "span_id", "start_ns", "state", "trace_id",
    )  # fmt: skip

    def __init__(
        self,
        name: str,
        kind: int,
        *,
        trace_id: int,
        span_id: int,
        parent_id: int = 0,
        start_ns: int,
        end_ns: int,
        attributes: Attributes,
    ) -> None:
        self.name = name
        self.kind = kind
        self.trace_id = trace_id
        self.span_id = span_id
        self.parent_id = parent_id
        self.remote_parent = False  # the parent is another service's
        self.start_ns = start_ns
        self.end_ns = max(start_ns, end_ns)
        self.attributes = attributes
        self.events: list[SpanEvent] = []
        self.error: str | None = None  # it failed, and this says how; None: it did not
        self.linked: tuple[int, int] | None = None
        self.state = ""  # the `tracestate` that the trace has
