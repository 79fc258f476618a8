"""The story of one request, from its head to its last octet, in the order in which things happen.

1. `judge_head`     the path exists, the key is right, the body is not too large;
2. `begin`          the body is whole: read its model and prompt, choose a replica, take a lease;
                    or wait, while every replica has enough to do, until one is `open_for` it;
3. `connected`      the request goes out as the octets that came in, under a head of our own;
4. `response_*`     the answer goes back as octets, no faster than the client reads;
5. `_finish`        the lease is released, the line is logged, the counts are taken. Once
                    (`io/endings.py`, as are all failures).

What comes from another region, goes there, or is taken back from it: `io/crossing.py`.

An exchange decides nothing itself: verdicts are the core's. It fails in one of two ways. Before the
first octet of an answer, the client gets an error object and another replica may be tried while
none can have begun the work. After it, the stream ends visibly: an event stream gets a last event
with the error, and in every case the connection closes without the end that the engine never sent.
"""

from __future__ import annotations

import logging
from typing import Final

from typing_extensions import override

from proxy import errors
from proxy.core import head as heads
from proxy.core import limits, sse
from proxy.core.classes import OFFLINE, ONLINE
from proxy.core.http1 import ResponseHead
from proxy.core.policy import Decision
from proxy.core.preamble import Preamble
from proxy.core.response_id import find_id
from proxy.core.retry import Progress, may_retry
from proxy.core.routes import PromptKind, find_route
from proxy.core.session import response_key
from proxy.core.sse import Openings
from proxy.io.crossing import Crossing
from proxy.io.endings import Client
from proxy.io.engine_answer import EngineAnswer, keep_error, told_head
from proxy.io.plane import Plane
from proxy.io.upstream import Upstream

_log = logging.getLogger("doherty.exchange")

_CONNECTING: Final = Progress.CONNECTING  # looked up once: every request passes through them
_REQUEST_SENT: Final = Progress.REQUEST_SENT
_RESPONSE_STARTED: Final = Progress.RESPONSE_STARTED
_RESPONSES: Final = PromptKind.RESPONSES
# Events that an engine sends while the prompt is still to be computed.
_OPENINGS: Final = {
    PromptKind.RESPONSES: (b"response.created", b"response.queued", b"response.in_progress"),
    PromptKind.ANTHROPIC: (b"message_start", b"ping"),
}


class Exchange(Crossing):
    """One request and its response. How it ends stands in `Ending`, what is counted in `Facts`."""

    __slots__ = (
        "_beginning",
        "_error",
        "_openings",
    )

    def __init__(self, plane: Plane, client: Client, preamble: Preamble, length: int) -> None:
        super().__init__(plane, client, preamble, length)
        self._error: EngineAnswer | None = None  # the engine's, until it is whole
        self._beginning: bytes | None = None  # of an answer that others may go on from
        self._openings: Openings | None = None  # of a stream that begins before its first token

    # --- 1. the head -------------------------------------------------------------------------

    @override
    def judge_head(self) -> None:
        """Everything that can be refused before the body is read. Raises `ProxyError`."""
        preamble = self._preamble
        self._route = preamble.route or find_route(preamble.method, preamble.path)
        if preamble.crossed:
            self._arrive()
        known = self._principal if self._arrived is not None else None
        self._principal = self._plane.admit(self._route, preamble, self._length, known)
        if self._principal.tenant and not self._route.local:
            self._enter()

    @override
    def hold_body(self, size: int) -> None:
        """Count octets of the body against what may be held. Raises `ProxyError`."""
        self._held_bytes = self._plane.hold_body(self._held_bytes, size)

    # --- 2. the body, the choice -------------------------------------------------------------

    @override
    def begin(self, body: bytes) -> None:
        """The request is whole. Failures are answered here, and nothing is raised."""
        self._whole_s = self._plane.clock.now_s()
        self._body = body
        try:
            assert self._route is not None
            if self._route.local:
                self._answer_locally()
                return
            asked = self._plane.read(
                self._route, self._preamble, body, self._principal, self._started_s
            )
            self._model, self._stream, self._request = asked.model, asked.stream, asked.request
            self._added, self._tier = asked.added, asked.tier
            self._lay_claims()
            lookup = self._route.lookup
            self._pool = self._plane.find_pool(self._model, self._request.regions, lookup=lookup)
            self._meter(asked)
            self._plane.arrived(self._model, self._request)
            self._place(self._pool, self._whole_s)
        except errors.ProxyError as error:
            self.fail(error)
        except Exception:  # noqa: BLE001 - the top of this request: its neighbours must live
            self._broken()

    @override
    def open_for(self, decision: Decision) -> None:
        """It has waited, and now a replica is open, perhaps one that was not there before."""
        assert self._waiter is not None
        self._pool = self._waiter.pool_of()
        self._end_wait()
        try:
            self._go_to(decision)
        except Exception:  # noqa: BLE001 - as above
            self._broken()

    def _broken(self) -> None:
        self._plane.telemetry.internal_errors_total += 1
        _log.exception("request %s", self.request_id.decode())
        self.fail(errors.InternalError("the proxy failed; its log has the reason"))

    def _answer_locally(self) -> None:
        keep_alive = self._may_keep_alive()
        body = self._plane.local_answer(self._preamble.path, self._principal)
        answer = heads.local_answer(
            200,
            body,
            self.request_id,
            keep_alive=keep_alive,
            extra=self._persistence(keep_alive),
            head_only=self._preamble.method == b"HEAD",
        )
        self._answer_ourselves(200, answer)

    @override
    def _go_to(self, decision: Decision) -> None:
        """Take a lease on a replica, and get a connection to it."""
        plane, replica = self._plane, decision.replica
        now_s = plane.clock.now_s()
        self._decision = decision
        self._attempts += 1
        self._know_price(decision, now_s)
        request = self._request
        yields = request.work_class == OFFLINE and self._preempted < limits.PREEMPTIONS_MAX
        try:
            self._lease = plane.acquire(decision, request, now_s, yields=yields)
        except errors.InternalError as error:
            self.fail(error)
            return
        if yields:
            plane.preemption.add(self._lease, self.give_way)
        timeout_s = self._leave(replica.replica_id) if replica.remote else 0.0
        upstream = plane.upstreams.take(replica.replica_id)
        if upstream is not None:
            self.connected(upstream)
        else:
            self._progress = _CONNECTING
            self._connecting = plane.upstreams.connect(replica, self, timeout_s)

    def give_way(self) -> None:
        """Online work needs its place, before an octet of its answer has come: wait again."""
        plane = self._plane
        self._drop_replica()
        self._release(plane.clock.now_s())
        self._preempted += 1
        self._attempts = 0  # what was tried before says nothing of what is there then
        try:
            self._waiter = plane.wait(
                self._model,
                self._request,
                self._held_bytes,
                self.open_for,
                self.fail,
                self._whole_s,
            )
        except errors.OverloadedError:  # or it is one that never waits
            plane.preemption.refused_total += 1
            self.fail(errors.PreemptedError("online work needed the place of this request"))
        else:
            self._request.held_for = "preempted"
            self._progress = Progress.QUEUED
            plane.preemption.requeued_total += 1

    # --- 3. the replica ----------------------------------------------------------------------

    def connect_failed(self, reason: str) -> None:
        self._connecting = None
        if self._done:
            return
        plane = self._plane
        assert self._decision is not None
        replica_id = self._decision.replica.replica_id
        plane.suspect(replica_id, reason)
        if self._remote:
            plane.telemetry.retries["connect"] += 1
            self.take_back(reason)
            return
        self._request.tried.update(plane.fleet.names_of(replica_id))
        self._release(self._plane.clock.now_s())
        if not may_retry(self._progress, self._attempts, plane.retries_max):
            self.fail(errors.ReplicaUnreachableError(f"replica {replica_id}: {reason}"))
            return
        decision = self._choose_anew()
        if decision is None:
            if not self._waits_to_leave(reason):
                self.fail(self._nobody(reason))
            return
        plane.telemetry.retries["connect"] += 1
        self._go_to(decision)

    def no_means(self, reason: str) -> None:
        """No connection for want of our own descriptors or ports: no replica is to blame."""
        self._connecting = None
        if not self._done:
            self.fail(errors.OverloadedError(f"this proxy cannot open connections: {reason}"))

    def connected(self, upstream: Upstream) -> None:
        self._connecting = None
        if self._done:
            upstream.transport.abort()
            return
        assert self._decision is not None
        self._upstream = upstream
        self._progress = _REQUEST_SENT
        host_field = self._decision.replica.host_field
        self._rid = b""
        if self._trace is not None or self._preamble.trace_lines:
            host_field += self._trace_fields()
        if self._decision.replica.rid_header:
            host_field += self._name_itself()
        priorities, work_class = self._decision.replica.priority_fields, self._request.work_class
        if priorities and (work_class > ONLINE or self._principal.tenant):
            host_field += priorities[work_class]  # above whatever a tenant's body says
        upstream.send(self, *self._outward(host_field))
        self._sent_s = self._last_octet_s = self._plane.clock.now_s()

    def request_slow(self) -> None:
        """A body waits to go out, whole: there is nobody to hold back."""

    def request_moves(self) -> None:
        """The body has gone out far enough."""

    def response_started(self, head: ResponseHead, length: int) -> None:
        assert self._decision is not None
        assert self._upstream is not None
        self._sent_s = max(self._sent_s, self._upstream.sent_s)  # it may have been held a little
        self._upstream_status = head.status
        replica = self._decision.replica
        if self._remote:
            if self._was_refused(head):
                return
            self._land("answered")
        self._plane.answered(replica.replica_id, head.status)
        lookup = self._route is not None and self._route.lookup
        if head.status == 404 and lookup and self._ask_next(replica.replica_id):
            return
        if head.status >= 400:
            head = told_head(head, self._plane.clock.unix_s())
            self._error = keep_error(head, length, self._dialect)
        if self._error is None:
            self._start_answer(head, length)

    def _start_answer(self, head: ResponseHead, length: int) -> None:
        if self._commented_s and not sse.goes_on(head):
            self.fail(errors.BadReplicaAnswerError("the answer is no chunked stream of events"))
            return
        self._progress = _RESPONSE_STARTED
        self._response = head
        if self._arrived is not None:
            self._land("answered")
        if self._request.work_class == OFFLINE and self._lease is not None:
            self._plane.preemption.drop(self._lease)
        self._drop_body()  # it will not be sent again
        if self._route is not None and self._route.prompt is _RESPONSES and head.status == 200:
            self._beginning = b""
        if head.event_stream and self._route is not None and head.status == 200:
            names = _OPENINGS.get(self._route.prompt)
            self._openings = Openings(names) if names else None
        self._begin_echo(head, length)
        if not self._commented_s:
            self._render_head(head, length)
        if self._paused and self._upstream is not None:  # slow before there was what to pause
            self._upstream.pause()

    def _ask_next(self, replica_id: str) -> bool:
        """A stored response lives on one replica: ask the others before believing a 404."""
        self._request.tried.update(self._plane.fleet.names_of(replica_id))
        decision = self._choose_anew()
        if decision is None or self._upstream is None:
            return False
        self._upstream.abort()
        self._upstream = None
        self._release(self._plane.clock.now_s())
        self._go_to(decision)
        return True

    # --- 4. the answer -----------------------------------------------------------------------

    def response_octets(self, data: bytes) -> None:
        plane = self._plane
        now_s = plane.clock.now_s()
        if not self._first_octet_s:
            self._hear_first(data, now_s)
        self._last_octet_s = now_s
        self._received_bytes += len(data)
        self._count_events(data)
        if self._beginning is not None:
            self._find_response_id(self._beginning + data)
        if self._error is not None:
            if not (data := self._error.keep(data)):
                return
            head, self._error = self._error.head, None
            self._start_answer(head, -1)  # chunked, and too large for an error: it passes
            if self._done:
                return
        if self._echo is not None and not (data := self._echo.feed(data)):
            return
        self._pass_on(data)

    def _hear_first(self, data: bytes, now_s: float) -> None:
        """What is generated shows that the prompt is computed: neither an opening nor an error."""
        if self._openings is not None:
            if not self._openings.over(data):
                return
            self._openings = None
        self._first_octet_s = now_s
        failed = self._response is None or self._response.status >= 400
        if self._lease is not None and not failed:
            self._plane.prefill_ended(self._lease, now_s)

    def _find_response_id(self, beginning: bytes) -> None:
        """The answer stays where it was made, so what goes on from it has to come there."""
        response_id = find_id(beginning[: limits.RESPONSE_ID_SEARCH_BYTES_MAX])
        found = response_id or len(beginning) >= limits.RESPONSE_ID_SEARCH_BYTES_MAX
        self._beginning = None if found else beginning
        if response_id and self._decision is not None:
            self._plane.remember_response(response_key(response_id), self._decision.replica.name)

    def response_ended(self, *, reusable: bool) -> None:
        if self._done:
            return
        self._end_echo()
        response, route = self._response, self._route
        if response and route and sse.cut_by_close(route, response, self._tail):
            self.response_failed("connection closed before [DONE]")
            return
        self._upstream = None
        if self._error is not None and self._commented_s:
            self._end_begun(self._error.event(), self._error.head.status, errors.OK)
            return
        if self._error is not None:
            keep_alive = self._may_keep_alive()
            extra = self._persistence(keep_alive) + self._diagnostics()
            answer = self._error.told(self.request_id, keep_alive=keep_alive, extra=extra)
            self._answer_ourselves(self._error.head.status, answer)
            return
        assert self._response is not None
        self.response_head_due()
        self._finish(self._response.status, errors.OK)
        self._client.finished(keep_alive=self._keep_alive)

    def response_failed(self, reason: str) -> None:
        """The replica went away, or what it said is not HTTP."""
        if self._done:
            return
        open_chunk = self._open_chunk
        self._upstream = None
        assert self._decision is not None
        replica_id = self._decision.replica.replica_id
        self._plane.suspect(replica_id, reason)
        if self._remote:
            self.take_back(reason)
        elif self._response is None or self._unsent_head:
            lost = reason.startswith("connection")
            kind = errors.ReplicaLostError if lost else errors.BadReplicaAnswerError
            self.fail(kind(f"replica {replica_id} failed before it answered: {reason}"))
        else:
            error = errors.ReplicaLostError(f"replica {replica_id} failed: {reason}")
            self._end_visibly(error, open_chunk)

    def never_delivered(self, reason: str, *, reused: bool) -> None:
        """The replica closed before an octet of the request reached it: it goes out once more."""
        self._upstream = None
        self._progress = _CONNECTING
        if reused and not self._done:
            assert self._decision is not None
            self._plane.telemetry.retries["closed_idle"] += 1
            self._connecting = self._plane.upstreams.connect(self._decision.replica, self)
        else:  # a new one that it closes at once is as good as refused
            self.connect_failed(reason)

    # --- what may happen at any time ---------------------------------------------------------

    @override
    def check_deadline(self, now_s: float) -> None:
        """Called by the sweep: a replica that is silent for too long has lost the request."""
        if self._waiter is not None:
            if error := self._plane.end_of_wait(self._waiter, now_s):
                self.fail(error)
            else:
                self._plane.work_done()  # should no event have told of it
                self._comment(now_s)
            return
        if self._commented_s and self._response is None and not self._paused:
            self._comment(now_s)
        held_back = self._paused and self._response is not None  # by us, for the client
        waiting = self._progress >= _REQUEST_SENT and not held_back
        silence_s = now_s - self._last_octet_s
        if self._done or not waiting or silence_s <= limits.SILENCE_DOUBT_S:
            return
        assert self._decision is not None
        replica_id = self._decision.replica.replica_id
        self._plane.doubt(replica_id, now_s)
        if silence_s <= self._plane.config.request_timeout_secs:
            return
        error = errors.ReplicaTimeoutError(
            f"replica {replica_id} was silent for {silence_s:.0f} s (--request-timeout-secs)"
        )
        open_chunk = self._open_chunk
        self._drop_replica()
        if self._response is None or self._unsent_head:
            self.fail(error)
        else:
            self._end_visibly(error, open_chunk)
