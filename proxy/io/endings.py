"""How a request ends, in whatever state it is: answered, refused, cut, or given up by its client.

Failures are answered here and nowhere else (`fail`, or `end_visibly` where part of an answer is out
already), and `_finish` is the one place where what an exchange holds is given back: its body, its
place among those that wait, its lease. It asserts that it is passed once.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from proxy import errors
from proxy.core import head as heads
from proxy.core import sse
from proxy.core.chunked import ChunkedDecoder
from proxy.core.classes import OFFLINE
from proxy.core.http1 import ResponseHead
from proxy.core.lease import Lease
from proxy.core.preamble import Preamble
from proxy.core.replica import RID_FIELD
from proxy.core.routes import PromptKind
from proxy.core.usage import read_usage
from proxy.io.metered import Metered
from proxy.io.plane import Plane
from proxy.io.queues import Waiter
from proxy.io.upstream import Upstream


class Client(Protocol):
    """The client's connection, as an exchange sees it."""

    peer: str

    def write(self, data: bytes) -> None: ...
    def finished(self, *, keep_alive: bool) -> None: ...
    def cut(self, *, reset: bool) -> None: ...
    def hold_back(self) -> None: ...
    def read_on(self) -> None: ...
    def mind_path(self) -> None: ...


class Ending(Metered):
    """What an exchange holds, and how it lets go of it."""

    __slots__ = (
        "_body",
        "_client",
        "_commented_s",
        "_connecting",
        "_decoder",
        "_done",
        "_entered",
        "_held_bytes",
        "_keep_alive",
        "_lease",
        "_length",
        "_response",
        "_rid",
        "_upstream",
        "_waiter",
    )

    def __init__(self, plane: Plane, client: Client, preamble: Preamble, length: int) -> None:
        """`length` is what Content-Length gives the body, 0 where there is none."""
        super().__init__(plane, preamble, client.peer)
        self._client = client
        self._length = length
        self._body = b""
        self._held_bytes = 0
        self._waiter: Waiter | None = None
        self._lease: Lease | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._upstream: Upstream | None = None
        self._response: ResponseHead | None = None
        self._rid = b""  # under which the replica knows it, if under any
        self._decoder: ChunkedDecoder | None = None  # only for clients that know no chunks
        self._keep_alive = preamble.head.keep_alive
        self._commented_s = 0.0  # when a comment was sent last; 0: the answer has not begun so
        self._done = False
        self._entered = ""  # the tenant that it is counted for
        plane.exchanges_open += 1

    def _enter(self) -> None:
        """Count it for its tenant, who may not have all places. Raises `OverloadedError`."""
        plane, principal = self._plane, self._principal
        most = plane.config.max_concurrent_requests
        if not plane.crowd.may_enter(
            principal.tenant, principal.weight, plane.exchanges_open - 1, most
        ):
            raise errors.OverloadedError(
                f"of {most} requests that may be in flight, this tenant has as many as leave room "
                "for others"
            )
        self._entered = principal.tenant
        plane.crowd.enter(self._entered)

    def fail(self, error: errors.ProxyError) -> None:
        """Answer a failure, in the one place where failures are answered."""
        if self._done:
            return
        self._drop_replica()
        self._end_wait()  # so that its client is told of that, too
        if self._commented_s:
            self._end_begun(error.event(self._dialect), error.status, error.code)
            return
        preamble = self._preamble
        body_unread = not self._whole_s and (preamble.chunked or self._length > 0)
        # Errors name no persistence, so HTTP/1.0 does not get it.
        keep_alive = (
            self._may_keep_alive() and preamble.minor == 1 and not error.closes and not body_unread
        )
        answer = heads.error_answer(
            error,
            self.request_id,
            keep_alive=keep_alive,
            dialect=self._dialect,
            head_only=preamble.method == b"HEAD",
            extra=self._diagnostics(),
        )
        self._answer_ourselves(error.status, answer, error.code, keep_alive=keep_alive)

    def _end_visibly(self, error: errors.ProxyError, open_chunk: tuple[int, int] | None) -> None:
        """Part of an answer is out: say so in the stream if it is one, then cut."""
        response = self._response
        assert response is not None
        chunked = response.chunked and self._decoder is None  # as the client sees it
        if response.event_stream and chunked and open_chunk is not None:
            ending = sse.error_ending(self._tail, open_chunk, error.event(self._dialect))
            if ending:
                self._client.write(ending)
        self._finish(response.status, errors.STREAM_CUT)
        # Where only the close ends the body, a plain close would look like the end.
        self._client.cut(reset=response.content_length < 0 and not chunked)

    def _end_begun(self, event: bytes, status: int, outcome: str) -> None:
        """Tell of a failure in a stream that has only begun; its status is one for our books."""
        self._finish(status, outcome)
        self._client.write(sse.chunk_of(event))
        self._client.cut(reset=False)

    def _comment(self, now_s: float) -> None:
        """Begin the stream of one that waits, or show that it lives, if the time has come.

        Only where the answer will be a stream of events; and from then on its status is 200.
        """
        pause_s, route = self._plane.config.keepalive_comment_secs, self._route
        if not pause_s or now_s - max(self._commented_s, self._whole_s) < pause_s:
            return
        if not self._commented_s:
            streamed = self._stream and route is not None and sse.may_begin_early(route)
            if not streamed or not self._preamble.minor:
                return  # a client of HTTP/1.0 knows no chunks
            self._keep_alive = self._may_keep_alive()
            self._client.write(
                heads.waiting_head(
                    self.request_id, keep_alive=self._keep_alive, extra=self._limit_fields
                )
            )
        self._commented_s = now_s
        self._plane.telemetry.keepalive_comments_total += 1
        self._client.write(sse.COMMENT)

    def _answer_ourselves(
        self, status: int, answer: bytes, outcome: str = errors.OK, *, keep_alive: bool = True
    ) -> None:
        self._finish(status, outcome)
        self._client.write(answer)
        self._client.finished(keep_alive=keep_alive and self._may_keep_alive())

    def _may_keep_alive(self) -> bool:
        return self._keep_alive and not self._plane.draining

    # --- letting go --------------------------------------------------------------------------

    def _drop_replica(self) -> None:
        if self._connecting is not None:
            self._connecting.cancel()
            self._connecting = None
        if self._upstream is not None:
            self._upstream.abort()
            self._upstream = None
            if self._rid and self._response is None and self._decision is not None:
                self._plane.aborts.send(self._decision.replica, self._rid)

    def _name_itself(self) -> bytes:
        """Return the field by which the replica gets an id to know this request by.

        Never one that a client has given: two may be alike, and whoever knows it could end it.
        """
        if self._route is None or self._route.prompt is not PromptKind.CHAT:
            return b""
        self._rid = self._plane.clock.request_id()
        return b"%b: %b\r\n" % (RID_FIELD, self._rid)

    def _drop_body(self) -> None:
        self._body = b""
        self._plane.bodies_bytes -= self._held_bytes
        self._held_bytes = 0

    def _end_wait(self) -> None:
        if self._waiter is not None:
            self._plane.waiting.drop(self._waiter)
            now_s = self._plane.clock.now_s()
            self._queue_s = now_s - self._waiter.since_s
            if self._trace is not None:
                self._trace.waited(self._waiter.since_s, now_s, self._request.held_for)
            self._waiter = None

    def _release(self, now_s: float, *, served: bool = False, refused: bool = False) -> None:
        lease, self._lease = self._lease, None
        if lease is not None:
            if self._trace is not None:
                self._trace.left(self._sent_s, now_s)
            if self._request.work_class == OFFLINE:
                self._plane.preemption.drop(lease)
            first_s = self._first_octet_s
            self._plane.release(lease, self._usage, first_s, now_s, served=served, refused=refused)

    def _served(self, outcome: str) -> bool:
        """Whether the replica has computed the prompt: an error, or nothing, does not show it."""
        response = self._response
        if response is None or response.status >= 300:
            return False
        return outcome == errors.OK or self._first_octet_s > 0.0

    def _finish(self, status: int, outcome: str) -> None:
        """Release and record. Exactly once: every path to the end of an exchange leads here."""
        assert not self._done
        self._done = True
        self._plane.exchanges_open -= 1
        if self._entered:
            self._plane.crowd.leave(self._entered)
        self._drop_body()
        self._end_wait()
        self._usage = read_usage(self._tail) if status == 200 else None
        refused = outcome == errors.OK and (status == 429 or status >= 500)  # in its own words
        now_s = self._plane.clock.now_s()
        self._release(now_s, served=self._served(outcome), refused=refused and status != 501)
        self._write_down(status, outcome, now_s)
        self._settle(status, outcome)
