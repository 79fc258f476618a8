"""The traces of one worker: who is in which, and their way to the exporter.

A request that is not recorded costs a look at its trace's id, and the replica still learns that
nothing is recorded, so that it begins no trace of its own. One that is keeps a few moments beside
those that every exchange has; spans are made of them once it is over, elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Final

from proxy.config import ConfigError, ProxyConfig
from proxy.contract.span_export import (
    SpanCounts,
    SpanExport,
    export_settings,
    missing_library,
    process_resource,
    switched_off,
)
from proxy.contract.spans import endpoint_url
from proxy.contract.version import package_version
from proxy.core.cost import Terms
from proxy.core.policy import Decision
from proxy.core.preamble import Preamble
from proxy.core.request_spans import NEWEST, Attempt, RequestFacts, Telling, Wait
from proxy.core.trace_context import (
    RANDOM,
    SAMPLED,
    Origin,
    read_origin,
    sampler_of,
    written,
)
from proxy.io.telemetry import Sample

_OPT_IN = "OTEL_SEMCONV_STABILITY_OPT_IN"
_DRAWN_BYTES: Final = 24  # a trace's id and a span's
_DRAWN_AT_ONCE: Final = 64  # the kernel takes longer to be asked than to draw


class Trace:
    """The trace that one request is in."""

    __slots__ = ("attempts", "linked", "parent", "recorded", "span_id", "trace_id", "waits")

    def __init__(self, drawn: bytes, origin: Origin | None, *, continues: bool) -> None:
        """`drawn` are the digits of a fresh trace and a fresh span."""
        self.parent = origin if continues else None
        self.linked = None if continues else origin
        self.trace_id = drawn[:32] if self.parent is None else self.parent.trace_id
        self.span_id = drawn[32:]
        self.recorded = False
        self.attempts: list[Attempt] = []
        self.waits: list[Wait] = []

    def chosen(self, decision: Decision, terms: Terms | None, now_s: float) -> None:
        """It goes to this replica now."""
        if self.recorded:
            span_id = os.urandom(8).hex().encode()
            self.attempts.append(Attempt(span_id, decision, terms, now_s))

    def left(self, sent_s: float, now_s: float) -> None:
        """It is over with the present replica. Harmless when repeated."""
        if self.attempts and not self.attempts[-1].ended_s:
            attempt = self.attempts[-1]
            attempt.ended_s = now_s
            if sent_s >= attempt.began_s:
                attempt.sent_s = sent_s

    def waited(self, began_s: float, ended_s: float, held_for: str) -> None:
        """It has waited for a replica."""
        if self.recorded:
            self.waits.append(Wait(began_s, ended_s, held_for))

    def fields(self) -> bytes:
        """Return what the replica is told: its parent is what went to it, or this request."""
        parent_id = self.attempts[-1].span_id if self.attempts else self.span_id
        parent = self.parent
        flags = RANDOM if parent is None else parent.flags & RANDOM
        if self.recorded:
            flags |= SAMPLED
        return written(self.trace_id, parent_id, flags, b"" if parent is None else parent.state)


class Tracer:
    """All traces of one worker."""

    def __init__(
        self, config: ProxyConfig, environment: Mapping[str, str], counts: SpanCounts | None = None
    ) -> None:
        """Raises `ValueError` where the endpoint is no URL; see `check_tracing`."""
        self._sampler, _ = sampler_of(config.trace_sample_ratio, environment)
        self._continues = config.trace_context == "continue"
        self._knows_regions = bool(config.access.remote_regions)
        self._listens_at = (config.host, config.port)
        newest = NEWEST in environment.get(_OPT_IN, "").replace(" ", "").split(",")
        self.telling = Telling(_draw_id, newest=newest)
        resource = process_resource("doherty", config.region, package_version())
        settings = export_settings(config.otlp_traces_endpoint, resource, environment)
        self.export = SpanExport(settings, self.telling.spans, counts)
        self._drawn: list[bytes] = []

    def begin(self, preamble: Preamble) -> Trace:
        """Return the trace of a request that comes with this head."""
        origin = read_origin(preamble.trace_fields) if preamble.trace_fields else None
        # A hop is another of our regions' word, whatever clients are believed; one that is not is
        # refused, so that at most this refusal is told in a stranger's trace.
        continues = self._continues or (self._knows_regions and preamble.hop is not None)
        if not self._drawn:
            self._drawn = _draw_ids()
        trace = Trace(self._drawn.pop(), origin, continues=continues)
        trace.recorded = self._sampler.records(trace.trace_id, trace.parent)
        return trace

    def over(self, facts: RequestFacts) -> None:
        """Hand over a request of a trace that is recorded. Never waits."""
        facts.listens_at = self._listens_at
        self.export.put(facts, 1 + len(facts.waits) + len(facts.attempts))


def span_samples(counts: SpanCounts) -> list[Sample]:
    """Return what has become of a worker's spans."""
    dropped = "trace_spans_dropped_total"
    return [
        Sample("trace_spans_exported_total", (), counts.exported_total),
        Sample(dropped, (("reason", "queue_full"),), counts.dropped_total),
        Sample(dropped, (("reason", "export_failed"),), counts.refused_total),
    ]


def _draw_ids() -> list[bytes]:
    """Return the digits of fresh traces, each with its first span."""
    digits = os.urandom(_DRAWN_BYTES * _DRAWN_AT_ONCE).hex().encode()
    size = 2 * _DRAWN_BYTES
    return [digits[at : at + size] for at in range(0, len(digits), size)]


def _draw_id() -> int:
    return int.from_bytes(os.urandom(8))


def tracer_of(
    config: ProxyConfig, environment: Mapping[str, str], counts: SpanCounts
) -> Tracer | None:
    """Return what traces a worker's requests; None: traces are off."""
    on = config.enable_trace or config.otlp_traces_endpoint is not None
    if not on or switched_off(environment):
        return None
    return Tracer(config, environment, counts)


def close_tracer(tracer: Tracer | None) -> None:
    """Send what waits, for a moment."""
    if tracer is not None:
        tracer.export.close()


def check_tracing(config: ProxyConfig, environment: Mapping[str, str]) -> list[str]:
    """Return what to warn of. Raises `ConfigError` where traces are on and could not be sent."""
    if not (config.enable_trace or config.otlp_traces_endpoint is not None):
        return []
    if switched_off(environment):
        return ["traces are off: the environment says so (OTEL_SDK_DISABLED, OTEL_TRACES_EXPORTER)"]
    if missing := missing_library():
        raise ConfigError(missing)
    if config.otlp_traces_endpoint is not None:
        try:
            endpoint_url(config.otlp_traces_endpoint)
        except ValueError as error:
            raise ConfigError(f"otlp_traces_endpoint: {error}") from error
    _, wrong = sampler_of(config.trace_sample_ratio, environment)
    return [wrong] if wrong else []
