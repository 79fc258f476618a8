"""What the access log says of one request.

Not among the modules that are translated: mypyc passes no keywords of a class on to msgspec.
"""

from __future__ import annotations

import msgspec

from proxy.core.cost import Terms


class AccessRecord(msgspec.Struct, gc=False, rename={"work_class": "class"}):
    """One line, explained in deploy/guides/logs.md. None where it did not come so far."""

    at: float  # Unix time
    request_id: str
    client: str
    method: str
    path: str
    status: int
    upstream_status: int | None
    outcome: str
    termination: str
    tenant: str = ""
    key_id: str = ""
    work_class: str = ""
    model: str = ""
    stream: bool = False
    replica: str | None = None
    region: str | None = None
    origin: str | None = None
    decision: str | None = None
    attempts: int = 0
    preempted: int = 0
    client_retries: int | None = None
    prompt_tokens_estimated: int = 0
    cached_tokens_believed: int = 0
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    received_bytes: int = 0
    price: Terms | None = None
    queue_ms: float = 0.0
    queue_reason: str | None = None
    overhead_us: int | None = None
    first_octet_ms: float | None = None
    tpot_ms: float | None = None
    duration_ms: float = 0.0
    trace_id: str | None = None
    span_id: str | None = None
