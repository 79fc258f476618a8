"""What one exchange did: the facts that are counted, logged and, if asked for, told the client.

They are plain attributes of the exchange and not an object of their own, because every request has
them and few lines read them.
"""

from __future__ import annotations

import logging
from typing import Final

from proxy.core.classes import NAMES, UNSAID
from proxy.core.cost import Terms
from proxy.core.explanation import priced
from proxy.core.fleet import Pool
from proxy.core.http1 import Field
from proxy.core.policy import Decision, Request
from proxy.core.preamble import Preamble
from proxy.core.prefix import NO_CHAIN
from proxy.core.principal import ANYBODY
from proxy.core.request_spans import RequestFacts
from proxy.core.retry import Progress
from proxy.core.routes import Route
from proxy.core.termination import termination
from proxy.core.usage import Usage
from proxy.errors import OK, Dialect, ProxyError, dialect_of
from proxy.io.access_record import AccessRecord
from proxy.io.plane import Plane
from proxy.io.tracing import Trace

_log = logging.getLogger("doherty.facts")

_CHOOSING: Final = Progress.CHOOSING


class Facts:
    """One request's way, as far as it came. Moments that have not come yet are 0."""

    __slots__ = (
        "_attempts",
        "_decision",
        "_first_octet_s",
        "_last_octet_s",
        "_model",
        "_origin",
        "_peer",
        "_plane",
        "_pool",
        "_preamble",
        "_preempted",
        "_principal",
        "_progress",
        "_queue_s",
        "_received_bytes",
        "_request",
        "_route",
        "_sent_s",
        "_started_s",
        "_stream",
        "_tail",
        "_terms",
        "_trace",
        "_upstream_status",
        "_usage",
        "_whole_s",
        "request_id",
    )

    def __init__(self, plane: Plane, preamble: Preamble, peer: str) -> None:
        self._plane = plane
        self._preamble = preamble
        self._peer = peer
        self.request_id = preamble.request_id or plane.clock.request_id()
        self._route: Route | None = None
        self._principal = ANYBODY
        self._model = ""
        self._stream = False
        self._pool: Pool | None = None
        self._request = Request(NO_CHAIN, has_session=False)
        self._decision: Decision | None = None
        self._terms: Terms | None = None  # the price at the moment of the decision
        self._queue_s = -1.0  # how long it waited for a replica; -1: it went at once
        self._origin: str | None = None  # the region that it has come from, if it has crossed
        self._progress = _CHOOSING
        self._upstream_status = 0  # of the answer that came last; 0: none has
        self._attempts = 0
        self._preempted = 0  # how often it was dispatched and then had to give way
        self._received_bytes = 0
        self._tail = b""
        self._usage: Usage | None = None
        tracer = plane.tracer
        self._trace: Trace | None = None if tracer is None else tracer.begin(preamble)
        self._started_s = plane.clock.now_s()
        self._whole_s = self._sent_s = self._first_octet_s = 0.0
        self._last_octet_s = self._started_s

    @property
    def _dialect(self) -> Dialect:
        return dialect_of(self._preamble.path)

    def _persistence(self, keep_alive: bool) -> tuple[Field, ...]:
        """A client of HTTP/1.0 keeps its connection only if it is told so (RFC 9112 §9.3)."""
        if keep_alive and self._preamble.minor == 0:
            return ((b"connection", b"keep-alive"),)
        return ()

    def _diagnostics(self) -> tuple[Field, ...]:
        """How long it waited and for what, if it did; where it went and why, for those who ask."""
        decision, terms = self._decision, self._terms
        waited: tuple[Field, ...] = ()
        if self._queue_s >= 0.0:
            waited = (
                (b"x-doherty-queue-ms", b"%d" % int(self._queue_s * 1e3)),
                (b"x-doherty-queue-reason", self._request.held_for.encode()),
            )
        if decision is None or terms is None or not self._explained:
            return waited
        return (
            *(waited or ((b"x-doherty-queue-ms", b"0"),)),
            (b"x-doherty-class", NAMES[self._request.work_class].encode()),
            (b"x-doherty-replica", decision.replica.name.encode()),
            (b"x-doherty-region", decision.replica.region.encode()),
            (b"x-doherty-decision", decision.reason.encode()),
            (b"x-doherty-attempts", b"%d" % self._attempts),
            (b"x-doherty-price-s", b"%.6f" % terms.price_s),
            (b"x-doherty-price-terms", _terms_field(terms)),
            (b"x-doherty-wait-s", b"%.6f" % terms.wait_s),
            (b"x-doherty-cached-tokens", b"%d" % terms.cached_tokens),
            (b"x-doherty-uncached-tokens", b"%d" % terms.uncached_tokens),
            (b"x-doherty-overhead-us", b"%d" % max(0, int(self._overhead_s * 1e6))),
        )

    @property
    def _explained(self) -> bool:
        return self._preamble.asks_for_reasons or self._plane.config.expose_routing

    @property
    def _overhead_s(self) -> float:
        """What the proxy itself took before the request left: not the wait for a replica."""
        return self._sent_s - self._whole_s - max(0.0, self._queue_s)

    def _know_price(self, decision: Decision, now_s: float) -> None:
        """Keep the terms for those who will read them, before the request is itself one of them."""
        plane, trace = self._plane, self._trace
        recorded = trace is not None and trace.recorded
        if plane.access_log.enabled or recorded or self._explained:
            assert self._pool is not None
            self._terms = priced(decision, self._request, self._pool, plane.picture, now_s)
        if trace is not None:
            trace.chosen(decision, self._terms, now_s)

    def _trace_fields(self) -> bytes:
        """Return what whoever gets the request is told of its trace, with line ends."""
        trace = self._trace
        return self._preamble.trace_lines if trace is None else trace.fields()

    def _write_down(self, status: int, outcome: str, now_s: float) -> None:
        """Take the counts and log the line. Whatever happens here, the client gets its answer."""
        try:
            self._count(status, outcome, now_s)
            if self._plane.access_log.enabled and self._is_logged(status, outcome):
                self._log_line(status, outcome, now_s)
            if self._trace is not None and self._trace.recorded:
                self._tell_trace(self._trace, status, outcome, now_s)
        except Exception:  # noqa: BLE001 - the books of one request, and not the request
            self._plane.telemetry.internal_errors_total += 1
            _log.exception("writing down request %s", self.request_id.decode())

    def _count(self, status: int, outcome: str, now_s: float) -> None:
        plane = self._plane
        route_name = self._route.name if self._route is not None else "none"
        # A model that is not served is the client's invention, and no label.
        known = self._model if self._pool is not None else ""
        series = plane.telemetry.series(route_name, known)
        series.outcomes[status, outcome] += 1
        series.duration_s.observe(now_s - self._started_s)
        usage = self._usage
        token_s = self._token_s(usage, outcome)
        if token_s >= 0.0:
            series.token_s.observe(token_s)
        if self._request.deadline_s:
            plane.waiting.lateness.count(self._request, self._first_octet_s, status, outcome)
        if self._first_octet_s:
            series.first_token_s.observe(self._first_octet_s - self._started_s)
        if self._decision is not None:
            plane.telemetry.decisions[self._decision.reason] += 1
            plane.telemetry.replica_requests[self._decision.replica.replica_id] += 1
        if self._sent_s:
            plane.telemetry.overhead_s.observe(self._overhead_s)
        if self._request.work_class > UNSAID:
            first_s = self._first_octet_s - self._started_s if self._first_octet_s else 0.0
            wishes = self._preamble.wishes
            plane.classes.count(self._request, wishes, outcome, first_s, token_s, self._queue_s)
        if usage is None:
            plane.telemetry.usage_missing_total += status == 200 and self._decision is not None
        else:
            series.prompt_tokens += usage.prompt_tokens
            series.cached_tokens += usage.cached_tokens or 0
            series.generation_tokens += usage.completion_tokens
            if self._decision is not None and not self._request.response_key:
                # With one, the engine put into the prompt what is not in the request.
                plane.picture.lengths.learn(
                    self._request.chain,
                    self._decision.cached_octets,
                    usage.prompt_tokens,
                    usage.cached_tokens or 0,
                )

    def _is_logged(self, status: int, outcome: str) -> bool:
        """Say whether the access log has it: a share of what went well, and all else."""
        plane = self._plane
        share = plane.config.access_log_ratio
        return share >= 1.0 or status >= 400 or outcome != OK or plane.clock.draw() < share

    def _tell_trace(self, trace: Trace, status: int, outcome: str, now_s: float) -> None:
        """Hand over what spans are made of. Of what the proxy answers by itself there are none."""
        plane, route, principal = self._plane, self._route, self._principal
        if plane.tracer is None or (route is not None and route.local):
            return
        facts = RequestFacts(trace.trace_id, trace.span_id, plane.clock.unix_s() - now_s)
        facts.parent, facts.linked = trace.parent, trace.linked
        facts.attempts, facts.waits = trace.attempts, trace.waits
        facts.client, facts.method = self._peer, self._preamble.method_text
        facts.path, facts.request_id = self._preamble.path_text, self.request_id.decode("ascii")
        facts.route = route.name if route is not None else "none"
        facts.model, facts.stream = self._model, self._stream
        facts.status, facts.outcome, facts.usage = status, outcome, self._usage
        facts.region, facts.received_bytes = plane.region, self._received_bytes
        facts.tenant, facts.key_id = principal.tenant, principal.key_id
        facts.work_class = self._request.work_class
        facts.overhead_s = self._overhead_s if self._sent_s else 0.0
        facts.started_s, facts.whole_s = self._started_s, self._whole_s
        facts.first_octet_s, facts.ended_s = self._first_octet_s, now_s
        facts.token_s = self._token_s(self._usage, outcome)
        plane.tracer.over(facts)

    def _token_s(self, usage: Usage | None, outcome: str) -> float:
        """Return the mean time between the tokens of a whole stream, -1 where it has none.

        From the first to the last, over the spaces between them, as vLLM counts its time per output
        token. What comes in one piece shows only how long it took.
        """
        first_s = self._first_octet_s
        if not self._stream or not first_s or usage is None or outcome != OK:
            return -1.0
        spaces = usage.completion_tokens - 1
        return (self._last_octet_s - first_s) / spaces if spaces > 0 else -1.0

    def _tokens(self, octets: int) -> int:
        """Return how many tokens that should be, where the request went."""
        return self._plane.picture.tokens_of(octets, self._decision.slot) if self._decision else 0

    def _class_name(self) -> str:
        work_class = self._request.work_class
        return NAMES[work_class] if work_class != UNSAID else ""

    def _log_line(self, status: int, outcome: str, now_s: float) -> None:
        decision, started_s, principal = self._decision, self._started_s, self._principal
        first_s, usage, route, trace = self._first_octet_s, self._usage, self._route, self._trace
        recorded = trace if trace is not None and trace.recorded else None
        token_s = self._token_s(usage, outcome)
        waited, retries = self._queue_s >= 0.0, self._preamble.wishes.retries
        # In the order of its fields: given by name, they take four times as long.
        self._plane.access_log.write(
            AccessRecord(
                int(self._plane.clock.unix_s() * 1e3) / 1e3,
                self.request_id.decode("ascii"),
                self._peer,
                self._preamble.method_text,
                self._preamble.path_text,
                status,
                self._upstream_status or None,
                outcome,
                termination(outcome, self._progress, local=route is not None and route.local),
                principal.tenant,
                principal.key_id,
                self._class_name(),
                self._model,
                self._stream,
                decision.replica.name if decision else None,
                decision.replica.region if decision else None,
                self._origin,
                decision.reason if decision else None,
                self._attempts,
                self._preempted,
                retries if retries >= 0 else None,
                self._tokens(self._request.chain.prompt_bytes),
                self._terms.cached_tokens if self._terms else 0,
                usage.prompt_tokens if usage else None,
                usage.cached_tokens if usage else None,
                usage.completion_tokens if usage else None,
                self._received_bytes,
                self._terms,
                int(self._queue_s * 1e6) / 1e3 if waited else 0.0,
                self._request.held_for if waited else None,
                int(self._overhead_s * 1e6) if self._sent_s else None,
                int((first_s - started_s) * 1e6) / 1e3 if first_s else None,
                int(token_s * 1e6) / 1e3 if token_s >= 0.0 else None,
                int((now_s - started_s) * 1e6) / 1e3,
                recorded.trace_id.decode("ascii") if recorded else None,
                recorded.span_id.decode("ascii") if recorded else None,
            )
        )


def write_down_refused(plane: Plane, peer: str, request_id: bytes, error: ProxyError) -> None:
    """Count and log what was refused before its head could be read."""
    plane.telemetry.series("none", "").outcomes[error.status, error.code] += 1
    if plane.access_log.enabled:
        plane.access_log.write(
            AccessRecord(
                at=int(plane.clock.unix_s() * 1e3) / 1e3,
                request_id=request_id.decode("ascii"),
                client=peer,
                method="",
                path="",
                status=error.status,
                upstream_status=None,
                outcome=error.code,
                termination=termination(error.code, _CHOOSING, local=False),
            )
        )


def _terms_field(terms: Terms) -> bytes:
    """Return what a price is the sum of: a dictionary of decimals (RFC 8941 §3.2, §3.3.2)."""
    return (
        b"wait_ms=%.3f, prefill_ms=%.3f, recompute_ms=%.3f, stall_ms=%.3f, extra_ms=%.3f, "
        b"shortage_ms=%.3f, adapter_ms=%.3f, pace_ms=%.3f, round_trip_ms=%.3f"
    ) % (
        1e3 * terms.wait_s,
        1e3 * terms.prefill_s,
        1e3 * terms.recompute_s,
        1e3 * terms.stall_s,
        1e3 * terms.extra_s,
        1e3 * terms.shortage_s,
        1e3 * terms.adapter_s,
        1e3 * terms.pace_s,
        1e3 * terms.round_trip_s,
    )
