"""Keys of the configuration that say what is told of requests, and to whom: traces and logs."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from proxy.config_reading import Path

EnableTrace = Annotated[
    bool,
    Meta(description="send OpenTelemetry traces of requests (needs the extra otel)"),
]
TracesEndpoint = Annotated[
    Path | None,
    Meta(
        description="collector that traces go to by OTLP over HTTP, such as "
        "http://127.0.0.1:4318; given, traces are on (default: as OTEL_EXPORTER_OTLP_* say)",
    ),
]
TraceSampleRatio = Annotated[
    Annotated[float, Meta(ge=0.0, le=1.0)] | None,
    Meta(
        description="share of traces that begin here which are recorded; clients that are in one "
        "are followed (default: as OTEL_TRACES_SAMPLER says, else all)",
    ),
]
TraceContext = Annotated[
    Literal["continue", "restart"],
    Meta(
        description="what a client's traceparent means: continue its trace, or restart: begin "
        "another that is linked to it, where clients are not to say what is recorded"
    ),
]
LogJson = Annotated[bool, Meta(description="write the log as one JSON object a line")]
AccessLogRatio = Annotated[
    float,
    Meta(
        ge=0.0,
        le=1.0,
        description="share of the requests that went well of which the access log has a line; it "
        "has all others",
    ),
]
