"""What a trace tells of one request: the spans, out of the moments that the exchange has anyway.

    chat MODEL          SERVER    from its head to its last octet; how it ended, what it used
      queue             INTERNAL  each time that it waited in the proxy, and what for
      POST              CLIENT    each replica, or other region's proxy, that it was sent to: chosen
                                  why and at what price, handed over, first token, end

They are made when the request is over, in another thread. Names are OpenTelemetry's where it has
them (HTTP, and the conventions for generative AI), else `doherty.*`. No text of a prompt or an
answer is among what they are made of, no key, and no session's id.

The conventions for generative AI are in development. As they ask, version 1.36 is what is told,
and their newest form on demand (`OTEL_SEMCONV_STABILITY_OPT_IN=gen_ai_latest_experimental`): it
calls the provider `gen_ai.provider.name` and knows of cached tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from proxy import errors
from proxy.contract.spans import CLIENT, INTERNAL, SERVER, Attributes, SpanEvent, SpanRecord
from proxy.core.classes import NAMES, UNSAID
from proxy.core.cost import Terms
from proxy.core.policy import Decision
from proxy.core.trace_context import Origin
from proxy.core.usage import Usage

NEWEST: Final = "gen_ai_latest_experimental"
OURS: Final = "doherty"  # the provider, where the engine is not known
_UNKNOWN_ENGINES: Final = ("unknown", "proxy", "")
# `gen_ai.operation.name`, by the name of the route.
_OPERATIONS: Final = {
    "chat": "chat",
    "messages": "chat",
    "responses": "chat",
    "completions": "text_completion",
    "embeddings": "embeddings",
}
_PRICED: Final = (
    "wait_s", "prefill_s", "recompute_s", "stall_s", "extra_s", "shortage_s", "adapter_s",
    "pace_s", "round_trip_s",
)  # fmt: skip


class Attempt:
    """One replica that the request was sent to, or was to be. Moments are of the plane's clock."""

    __slots__ = ("began_s", "decision", "ended_s", "sent_s", "span_id", "terms")

    def __init__(
        self, span_id: bytes, decision: Decision, terms: Terms | None, began_s: float
    ) -> None:
        self.span_id = span_id
        self.decision = decision
        self.terms = terms
        self.began_s = began_s
        self.sent_s = self.ended_s = 0.0


class Wait:
    """One time that it waited for a replica."""

    __slots__ = ("began_s", "ended_s", "held_for")

    def __init__(self, began_s: float, ended_s: float, held_for: str) -> None:
        self.began_s = began_s
        self.ended_s = ended_s
        self.held_for = held_for


class RequestFacts:
    """What is known of a request when it is over. Moments that have not come are 0."""

    __slots__ = (
        "attempts", "client", "ended_s", "epoch_s", "first_octet_s", "key_id", "linked",
        "listens_at", "method", "model", "outcome", "overhead_s", "parent", "path",
        "received_bytes", "region", "request_id", "route", "span_id", "started_s", "status",
        "stream", "tenant", "token_s", "trace_id", "usage", "waits", "whole_s", "work_class",
    )  # fmt: skip

    attempts: list[Attempt]
    waits: list[Wait]
    parent: Origin | None  # in a trace that began elsewhere
    linked: Origin | None  # its client's, where that is not gone on with
    usage: Usage | None

    def __init__(self, trace_id: bytes, span_id: bytes, epoch_s: float) -> None:
        """`epoch_s` is the Unix time of the clock's 0."""
        self.trace_id = trace_id
        self.span_id = span_id
        self.epoch_s = epoch_s
        self.attempts = []
        self.waits = []
        self.parent = self.linked = None
        self.usage = None
        self.client = self.method = self.path = self.route = self.model = ""
        self.outcome = self.request_id = self.region = self.tenant = self.key_id = ""
        self.listens_at = ("", 0)
        self.status = self.received_bytes = 0
        self.work_class = UNSAID
        self.stream = False
        self.started_s = self.whole_s = self.first_octet_s = self.ended_s = self.overhead_s = 0.0
        self.token_s = -1.0  # from one token to the next; -1: nobody knows


class Telling:
    """Makes the spans of requests. `draw_id` gives fresh ids for those that nobody was told of."""

    def __init__(self, draw_id: Callable[[], int], *, newest: bool) -> None:
        self._draw_id = draw_id
        self._provider = "gen_ai.provider.name" if newest else "gen_ai.system"
        self._cached = "gen_ai.usage.cache_read.input_tokens" if newest else "doherty.cached_tokens"

    def spans(self, facts: RequestFacts) -> list[SpanRecord]:
        """Return all spans of one request, its own first."""
        server = self._server(facts)
        waits = [self._wait(facts, wait) for wait in facts.waits]
        attempts = [self._attempt(facts, number) for number in range(len(facts.attempts))]
        return [server, *waits, *attempts]

    def _server(self, facts: RequestFacts) -> SpanRecord:
        operation = _OPERATIONS.get(facts.route, "")
        served = " " + facts.model if facts.model and facts.attempts else ""
        name = operation + served if operation else f"{facts.method} {facts.route}"
        span = SpanRecord(
            name,
            SERVER,
            trace_id=int(facts.trace_id, 16),
            span_id=int(facts.span_id, 16),
            start_ns=_ns(facts, facts.started_s),
            end_ns=_ns(facts, facts.ended_s),
            attributes=self._attributes(facts, operation),
        )
        parent, linked = facts.parent, facts.linked
        if parent is not None:
            span.parent_id, span.remote_parent = int(parent.parent_id, 16), True
            span.state = parent.state.decode("ascii")
        if linked is not None:
            span.linked = int(linked.trace_id, 16), int(linked.parent_id, 16)
        if facts.whole_s:
            span.events.append(SpanEvent("request.read", _ns(facts, facts.whole_s)))
        if facts.first_octet_s:
            span.events.append(SpanEvent("first_token", _ns(facts, facts.first_octet_s)))
        failure = failure_of(facts.status, facts.outcome)
        if failure:
            span.attributes["error.type"] = failure
            if facts.status >= 500 or facts.outcome == errors.STREAM_CUT:
                span.error = failure  # of 4xx a server's span is none (HTTP spans, "Status")
        return span

    def _attributes(self, facts: RequestFacts, operation: str) -> Attributes:
        found: Attributes = {
            "http.request.method": facts.method,
            "url.path": facts.path,
            "http.response.status_code": facts.status,
            "client.address": facts.client,
            "doherty.outcome": facts.outcome,
            "doherty.region": facts.region,
            "doherty.request_id": facts.request_id,
            "doherty.attempts": len(facts.attempts),
            "doherty.received_bytes": facts.received_bytes,
        }
        host, port = facts.listens_at
        if port:
            found["server.address"], found["server.port"] = host, port
        if facts.tenant:
            found["doherty.tenant"] = facts.tenant
        if facts.key_id:
            found["doherty.key_id"] = facts.key_id
        if facts.work_class != UNSAID:
            found["doherty.class"] = NAMES[facts.work_class]
        if facts.waits:
            found["doherty.queue_s"] = sum([w.ended_s - w.began_s for w in facts.waits])
        if facts.overhead_s > 0.0:
            found["doherty.overhead_s"] = facts.overhead_s
        if operation:
            found["gen_ai.operation.name"] = operation
            found[self._provider] = _provider(facts)
            found["doherty.stream"] = facts.stream
            if facts.model:
                found["gen_ai.request.model"] = facts.model
        self._add_usage(found, facts)
        return found

    def _add_usage(self, found: Attributes, facts: RequestFacts) -> None:
        usage = facts.usage
        if facts.first_octet_s:
            found["doherty.time_to_first_token_s"] = facts.first_octet_s - facts.started_s
        if usage is None:
            return
        found["gen_ai.usage.input_tokens"] = usage.prompt_tokens
        found["gen_ai.usage.output_tokens"] = usage.completion_tokens
        if usage.cached_tokens is not None:
            found[self._cached] = usage.cached_tokens
        if facts.token_s >= 0.0:
            found["doherty.time_per_output_token_s"] = facts.token_s

    def _wait(self, facts: RequestFacts, wait: Wait) -> SpanRecord:
        return SpanRecord(
            "queue",
            INTERNAL,
            trace_id=int(facts.trace_id, 16),
            span_id=self._draw_id(),
            parent_id=int(facts.span_id, 16),
            start_ns=_ns(facts, wait.began_s),
            end_ns=_ns(facts, wait.ended_s),
            attributes={"doherty.held_for": wait.held_for},
        )

    def _attempt(self, facts: RequestFacts, number: int) -> SpanRecord:
        attempt = facts.attempts[number]
        replica = attempt.decision.replica
        attributes: Attributes = {
            "http.request.method": facts.method,
            "url.path": facts.path,
            "server.address": replica.host,
            "server.port": replica.port,
            "doherty.replica": replica.name,
            "doherty.region": replica.region,
            "doherty.decision": attempt.decision.reason,
        }
        if replica.engine not in _UNKNOWN_ENGINES:
            attributes["doherty.engine"] = replica.engine
        if number:
            attributes["http.request.resend_count"] = number
        if attempt.terms is not None:
            _add_price(attributes, attempt.terms)
        span = SpanRecord(
            facts.method,
            CLIENT,
            trace_id=int(facts.trace_id, 16),
            span_id=int(attempt.span_id, 16),
            parent_id=int(facts.span_id, 16),
            start_ns=_ns(facts, attempt.began_s),
            end_ns=_ns(facts, attempt.ended_s),
            attributes=attributes,
        )
        if attempt.sent_s:
            span.events.append(SpanEvent("sent", _ns(facts, attempt.sent_s)))
        if number == len(facts.attempts) - 1:
            self._end_last(span, attempt, facts)
        else:
            span.error = _failure_before(attempt)
        if span.error:
            attributes["error.type"] = span.error
        return span

    def _end_last(self, span: SpanRecord, attempt: Attempt, facts: RequestFacts) -> None:
        if facts.first_octet_s >= attempt.began_s:
            span.events.append(SpanEvent("first_token", _ns(facts, facts.first_octet_s)))
        if attempt.sent_s and facts.outcome in (errors.OK, errors.STREAM_CUT):
            span.attributes["http.response.status_code"] = facts.status
        if attempt.ended_s < facts.ended_s:  # it went on without this one
            span.error = _failure_before(attempt)
        elif facts.outcome != errors.OK:
            span.error = facts.outcome
        elif facts.status >= 400:  # of a client's span both are errors (HTTP spans, "Status")
            span.error = str(facts.status)


def failure_of(status: int, outcome: str) -> str:
    """Return the kind of a failure, one of few words; empty where it went well."""
    if outcome != errors.OK:
        return outcome
    return str(status) if status >= 500 else ""


def _failure_before(attempt: Attempt) -> str:
    """Say why it was tried again elsewhere."""
    if not attempt.sent_s:
        return "connect_failed"
    return "taken_back" if attempt.decision.replica.remote else "given_up"


def _provider(facts: RequestFacts) -> str:
    engine = facts.attempts[-1].decision.replica.engine if facts.attempts else ""
    return OURS if engine in _UNKNOWN_ENGINES else engine


def _add_price(attributes: Attributes, terms: Terms) -> None:
    """Tell the price, and those of its terms that are not nothing."""
    shown = terms.as_dict()
    attributes["doherty.price_s"] = shown["price_s"]
    attributes["doherty.cached_tokens"] = terms.cached_tokens
    attributes["doherty.uncached_tokens"] = terms.uncached_tokens
    for name in _PRICED:
        if shown[name]:
            attributes[f"doherty.price.{name}"] = shown[name]


def _ns(facts: RequestFacts, at_s: float) -> int:
    return int((facts.epoch_s + at_s) * 1e9)
