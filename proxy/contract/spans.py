"""A span as both planes hand it to the exporter: plain values, and no library.

Times are Unix nanoseconds, ids are numbers, as OpenTelemetry's own interfaces have them. Attributes
are chosen by whoever makes the span out of what is no secret: never a prompt, an answer, a key or
the id of a session.
"""

from __future__ import annotations

from typing import Final
from urllib.parse import urlsplit

INTERNAL: Final = 0  # in the order of `opentelemetry.trace.SpanKind`
SERVER: Final = 1
CLIENT: Final = 2

_PATH: Final = "/v1/traces"  # of OTLP over HTTP (OTLP 1, "OTLP/HTTP Request")
_GRPC_PORT: Final = 4317

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


def endpoint_url(given: str) -> str:
    """Return the URL that spans are posted to. Raises `ValueError` with what to do.

    A bare host and port is understood, as routers that take this flag have it.
    """
    url = given if "://" in given else f"http://{given}"
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
        raise ValueError(f"{given!r} is no URL of a collector, such as http://127.0.0.1:4318")
    if parts.port == _GRPC_PORT:
        raise ValueError(
            f"{given!r}: at 4317 collectors take gRPC; spans are sent by HTTP, mostly to 4318"
        )
    return url if parts.path not in ("", "/") else url.rstrip("/") + _PATH
