"""The story of a request for files or jobs: it passes to the offline service, octet by octet.

An upload may be larger than what this proxy would hold, and an answer longer than what it would
read; so neither is ever whole here. What comes goes on no faster than the other side takes it: a
service that is slow stops the reading of the client, and a client that is slow that of the service.
How large a file may be is the service's to say, and who asks is judged here as on every path. The
service tells tenants apart by a credential: that which came, or, where keys are tenants', one that
is derived from the tenant (`contract.behalf`), so that no key leaves this proxy, and files outlive
the key by which they came.

Each request has a connection of its own, closed by its end. That costs a local connect for each of
few requests, and there is no idle one that the service may be closing as the next request comes:
what was sent twice could be two jobs. For the same reason nothing is ever sent twice from here.

A refusal comes at once, but a client may read nothing before it has sent its file: so the rest of
the body is read on for a while, and dropped.
"""

from __future__ import annotations

from typing import Final

from typing_extensions import override

from proxy import errors
from proxy.core import head as heads
from proxy.core import limits
from proxy.core.chunked import ChunkedDecoder, decode_followed
from proxy.core.http1 import ResponseHead
from proxy.core.pieces import Pieces
from proxy.core.preamble import Preamble
from proxy.core.principal import Principal
from proxy.core.retry import Progress
from proxy.core.routes import JOBS_PATH, find_route, unknown_path
from proxy.io.endings import Client
from proxy.io.plane import Plane
from proxy.io.relay import Relay
from proxy.io.upstream import Upstream

_CONNECTING: Final = Progress.CONNECTING
_REQUEST_SENT: Final = Progress.REQUEST_SENT
_RESPONSE_STARTED: Final = Progress.RESPONSE_STARTED


class Passage(Relay):
    """One request to the offline service, and its answer."""

    __slots__ = (
        "_come_bytes", "_credential", "_drop_end_s", "_early", "_framing", "_held_back", "_left",
        "_waited_s",
    )  # fmt: skip

    def __init__(self, plane: Plane, client: Client, preamble: Preamble, length: int) -> None:
        super().__init__(plane, client, preamble, length)
        self._framing = ChunkedDecoder() if preamble.chunked else None  # of the body that comes
        self._left = length  # octets of a counted body still to come
        self._early = Pieces()  # what came before there was a connection
        self._come_bytes = 0
        self._credential: bytes | None = None  # that goes on; None: the client's own
        self._held_back = False  # the client is, until the service takes more
        self._waited_s = 0.0  # how long it was held back until now
        self._drop_end_s = 0.0  # answered; until then what comes of the body is dropped

    # --- the request -------------------------------------------------------------------------

    @override
    def judge_head(self) -> None:
        preamble, plane = self._preamble, self._plane
        if self._framing is None and not self._left:  # whole already, even if it is refused
            self._whole_s = self._started_s
        if plane.offline is None:
            raise unknown_path(preamble.path)
        self._route = preamble.route or find_route(preamble.method, preamble.path)
        # Its length is the service's to judge.
        who = plane.admit(self._route, preamble, 0)
        self._judge_claims(who)
        self._credential = plane.authentication.passed_credential(who)

    def _judge_claims(self, who: Principal) -> None:
        """Refuse what would be kept, or computed, beyond what this key may. Raises `ProxyError`.

        Files hold prompts and answers, and lie in the region to which they come. A job outlives the
        key by which it came, so its lines are computed with what the tenant may.
        """
        plane, preamble = self._plane, self._preamble
        if not plane.resides(who.regions):
            raise errors.RegionNotAllowedError(
                f"files and jobs stay where they come, which is {plane.region}, and those of this "
                f"key may be in {' or '.join(sorted(who.regions or ()))} only"
            )
        if who.narrowed and preamble.method == b"POST" and preamble.path == JOBS_PATH:
            raise errors.KeyTooNarrowError(
                "jobs are computed with what their tenant may, and this key may ask for less: of "
                "its models or regions; use a key of the tenant that is not narrowed"
            )

    @override
    def hold_body(self, size: int) -> None:
        """Nothing of it is held beyond what is under way."""

    @override
    def begin(self, body: bytes) -> None:
        """The head is right: get a connection. The body, where there is one, waits for it."""
        plane = self._plane
        assert plane.offline is not None
        self._last_octet_s = plane.clock.now_s()
        if not self._whole_s:
            self._hold_back()
        self._progress = _CONNECTING
        self._connecting = plane.offline_links.connect(plane.offline, self)

    def take(self, data: bytes) -> bytes | None:
        """Take octets of the body; return what follows it once it has ended. May raise."""
        try:
            rest, octets = self._read(data)
        except errors.ProxyError:
            if not self._done:
                raise
            self._client.finished(keep_alive=False)  # it has its answer
            return None
        self._come_bytes += len(octets)
        self._last_octet_s = self._plane.clock.now_s()
        if rest is not None:
            self._whole_s = self._last_octet_s
        if not self._done:
            self._pass_on(octets, last=rest is not None)
        elif rest is not None:
            self._client.finished(keep_alive=False)
        return rest

    def _read(self, data: bytes) -> tuple[bytes | None, bytes]:
        """Return what follows the body, if it has ended, and what of it is in these octets."""
        rest: bytes | None = None
        if self._framing is not None:
            rest = self._framing.feed(data)
            octets = self._framing.body()
        elif len(data) < self._left:
            octets = data
            self._left -= len(data)
        else:
            octets, rest = data[: self._left], data[self._left :]
            self._left = 0
        return rest, octets

    def _pass_on(self, octets: bytes, *, last: bool) -> None:
        if self._framing is not None:
            octets = b"%x\r\n%b\r\n" % (len(octets), octets) if octets else b""
            if last:
                octets += b"0\r\n\r\n"
        if self._upstream is not None:
            self._upstream.send_on(octets)
        elif self._progress is _CONNECTING:
            self._early.add(octets)

    def _hold_back(self) -> None:
        if not self._held_back:
            self._held_back = True
            self._client.hold_back()

    # --- the service -------------------------------------------------------------------------

    def connected(self, upstream: Upstream) -> None:
        self._connecting = None
        plane, preamble = self._plane, self._preamble
        if self._done or plane.offline is None:
            upstream.transport.abort()
            self.connect_failed("the configuration names none any more")
            return
        upstream.moved = True  # never to be used again
        self._upstream = upstream
        self._progress = _REQUEST_SENT
        head = preamble.passed_head(
            plane.offline.host_field + self._trace_fields(),
            *(self.request_id, self._length, self._credential),
        )
        upstream.send(self, head, b"")
        if self._early.size:
            upstream.send_on(self._early.take())
        elif preamble.head.expects_continue and not self._whole_s:
            self._client.write(heads.CONTINUE)
        self.request_moves()

    def connect_failed(self, reason: str) -> None:
        self._connecting = None
        self.fail(
            errors.OfflineUnreachableError(
                f"the service that keeps files and batches cannot be reached: {reason}"
            )
        )

    def no_means(self, reason: str) -> None:
        self._connecting = None
        self.fail(errors.OverloadedError(f"this proxy cannot open connections: {reason}"))

    def request_slow(self) -> None:
        """What was sent is not taken: read no more before it is."""
        if not self._whole_s:
            self._hold_back()

    def request_moves(self) -> None:
        now_s = self._plane.clock.now_s()
        if self._held_back:
            self._held_back = False
            self._waited_s += now_s - self._last_octet_s
            self._client.read_on()
        self._last_octet_s = now_s

    def response_started(self, head: ResponseHead, length: int) -> None:
        self._progress = _RESPONSE_STARTED
        self._response = head
        self._upstream_status = head.status
        if not self._whole_s:
            self._keep_alive = False  # refused before it was read: what still comes is no request
        self._render_head(head, length)
        if self._paused and self._upstream is not None:
            self._upstream.pause()

    def response_octets(self, data: bytes) -> None:
        self._last_octet_s = self._plane.clock.now_s()
        self._received_bytes += len(data)
        if self._decoder is not None:
            data = decode_followed(self._decoder, data)
        self._send(data)

    def response_ended(self, *, reusable: bool) -> None:
        self._upstream = None
        if self._done:
            return
        assert self._response is not None
        self.response_head_due()
        self._finish(self._response.status, errors.OK)
        self._over(keep_alive=self._keep_alive)

    def response_failed(self, reason: str) -> None:
        open_chunk = self._upstream.open_chunk if self._upstream is not None else None
        self._upstream = None
        self._end(self._lost(reason), open_chunk)

    def never_delivered(self, reason: str, *, reused: bool) -> None:
        self.response_failed(reason)

    def _lost(self, reason: str) -> errors.ProxyError:
        reads = self._preamble.method == b"GET"
        kind = errors.OfflineReadLostError if reads else errors.OfflineLostError
        return kind(f"the service that keeps files and batches failed: {reason}")

    def _end(self, error: errors.ProxyError, open_chunk: tuple[int, int] | None) -> None:
        if self._done:
            return
        if self._response is None or self._unsent_head:
            self.fail(error)
        else:
            self._end_visibly(error, open_chunk)

    # --- the end -----------------------------------------------------------------------------

    @override
    def fail(self, error: errors.ProxyError) -> None:
        if not self._done and error.closes:
            self._whole_s = self._whole_s or self._plane.clock.now_s()  # no more of it is read
            self._keep_alive = False
        super().fail(error)

    @override
    def _answer_ourselves(
        self, status: int, answer: bytes, outcome: str = errors.OK, *, keep_alive: bool = True
    ) -> None:
        self._finish(status, outcome)
        self._client.write(answer)
        self._over(keep_alive=keep_alive and self._may_keep_alive())

    def _over(self, *, keep_alive: bool) -> None:
        """The answer is out. What still comes of the body is dropped, for a while."""
        now_s = self._plane.clock.now_s()
        uninvited = self._preamble.head.expects_continue and not self._come_bytes
        if self._whole_s or uninvited:
            self._client.finished(keep_alive=keep_alive)
            return
        self._early.take()
        self._drop_end_s = now_s + limits.UNWANTED_BODY_S
        self._last_octet_s = now_s
        if self._held_back:
            self._held_back = False
            self._client.read_on()

    # --- time --------------------------------------------------------------------------------

    @override
    def check_deadline(self, now_s: float) -> None:
        """Called by the sweep: whoever has to move, and does not, ends it."""
        if self._drop_end_s:
            if now_s > min(self._drop_end_s, self._last_octet_s + limits.LINGER_S):
                self._client.finished(keep_alive=False)
            return
        if self._done or self._connecting is not None:  # connecting has a deadline of its own
            return
        silence_s = now_s - self._last_octet_s
        if not self._whole_s and not self._held_back and self._response is None:
            if silence_s > limits.BODY_IDLE_TIMEOUT_S or self._crawls(now_s):
                self.fail(errors.RequestTimeoutError("the request did not arrive in time"))
            return
        for_client = self._paused and self._response is not None  # held back by us
        if not for_client and silence_s > self._plane.config.request_timeout_secs:
            open_chunk = self._upstream.open_chunk if self._upstream is not None else None
            self._drop_replica()
            self._end(self._silent(silence_s), open_chunk)

    def _crawls(self, now_s: float) -> bool:
        """Whether a body comes so slowly that its client only means to hold the connection."""
        due_s = now_s - self._started_s - self._waited_s - limits.BODY_PATIENCE_S
        return due_s > 0.0 and self._come_bytes < due_s * limits.BODY_PACE_BYTES

    def _silent(self, silence_s: float) -> errors.ProxyError:
        return errors.OfflineTimeoutError(
            "the service that keeps files and batches was silent for "
            f"{silence_s:.0f} s (--request-timeout-secs)"
        )
