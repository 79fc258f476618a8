"""One connection to a replica: reused only when provably clean, cut without ceremony.

A connection carries one exchange at a time. It goes back to its keeper only when request and
response both ended exactly; any octet that nobody asked for condemns it, because those octets would
become the next client's answer. If a request meets a close that was already on its way, and the
kernel can prove that the engine closed before anything of the request reached it, the exchange is
told so and sends it over another connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import select
from abc import ABC, abstractmethod
from typing import Final, Protocol, cast

from typing_extensions import override

from proxy import tls
from proxy.core import http1, limits
from proxy.core.head_memory import HeadMemory
from proxy.io.acknowledged import Acknowledged
from proxy.io.outbox import Outbox, Outlet


class Consumer(Protocol):
    """What an exchange hears from its connection. Each method may close the connection."""

    def connected(self, upstream: Upstream) -> None: ...
    def connect_failed(self, reason: str) -> None: ...
    def request_slow(self) -> None: ...
    def request_moves(self) -> None: ...
    def no_means(self, reason: str) -> None: ...
    def response_started(self, head: http1.ResponseHead, length: int) -> None: ...
    def response_head_due(self) -> None: ...
    def response_octets(self, data: bytes) -> None: ...
    def response_ended(self, *, reusable: bool) -> None: ...
    def response_failed(self, reason: str) -> None: ...
    def never_delivered(self, reason: str, *, reused: bool) -> None: ...


class Keeper(ABC):
    """Who keeps the connections between exchanges: `io/upstreams.py`."""

    answer_heads: HeadMemory[http1.ResponseHead]
    outbox: Outbox

    @abstractmethod
    def give_back(self, upstream: Upstream) -> None:
        """An exchange has ended exactly, and the next may have the connection."""

    @abstractmethod
    def lost(self, upstream: Upstream) -> None:
        """The connection has ended."""

    @abstractmethod
    def closed_idle(self, upstream: Upstream) -> None:
        """The engine closed it while it was idle, or as a request came."""

    @abstractmethod
    def unsolicited(self, upstream: Upstream) -> None:
        """It brought octets that nobody had asked for."""


class _Phase(enum.Enum):
    IDLE = enum.auto()
    HEAD = enum.auto()  # request sent, response head not yet whole
    BODY = enum.auto()
    DONE = enum.auto()  # closed, or to be closed


# Looked up once: every piece of data asks.
_IDLE: Final = _Phase.IDLE
_HEAD: Final = _Phase.HEAD
_BODY: Final = _Phase.BODY
_DONE: Final = _Phase.DONE


class Upstream(Outlet):
    """One connection to one replica."""

    __slots__ = (
        "_acknowledged",
        "_buffer",
        "_consumer",
        "_due_body",
        "_due_head",
        "_end_met",
        "_follower",
        "_informational",
        "_keeper",
        "_left",
        "_miscounted",
        "_paused",
        "_phase",
        "_poll",
        "_reusable",
        "_sent_before_bytes",
        "_sent_bytes",
        "idle_since_s",
        "moved",
        "replica_id",
        "sent_s",
        "transport",
    )

    transport: asyncio.Transport

    def __init__(self, replica_id: str, keeper: Keeper) -> None:
        self.replica_id = replica_id
        self._keeper = keeper
        self._phase = _IDLE
        self._consumer: Consumer | None = None
        self._buffer = b""
        self._follower: http1.ChunkFollower | None = None
        self._left = 0  # octets of a counted body still to come; -1 until close
        self._miscounted = False  # the follower has read octets that were not relayed
        self._reusable = True
        self._informational = 0
        self._paused = False
        self._poll: select.poll | None = None
        self._acknowledged: Acknowledged | None = None
        self._sent_bytes = 0  # of all requests
        self._sent_before_bytes = 0  # of those before the present one
        self._end_met = False  # the other side has said that nothing more will come
        self._due_head = b""  # of a request that is still to be written
        self._due_body = b""
        self.sent_s = 0.0  # when the last request was written
        self.idle_since_s = 0.0
        self.moved = False  # the replica is gone from here; somebody else may answer

    # --- from the exchange -------------------------------------------------------------------

    def send(self, consumer: Consumer, head: bytes, body: bytes) -> None:
        """Send one request; its answer goes to `consumer`."""
        assert self._phase is _IDLE, "one exchange at a time"
        self._consumer = consumer
        self._phase = _HEAD
        self._informational = 0
        self._sent_before_bytes = self._sent_bytes
        self._sent_bytes += len(head) + len(body)
        self._due_head, self._due_body = head, body
        self._keeper.outbox.hold(self)

    @override
    def write_due(self) -> None:
        head, body = self._due_head, self._due_body
        if not head or self.transport.is_closing():  # cut meanwhile; or `connection_lost` tells
            return
        self._due_head = self._due_body = b""
        self.sent_s = self._keeper.outbox.written_at_s
        if len(body) > limits.JOINED_BYTES_MAX:
            self.transport.writelines((head, body))
        elif body:
            self.transport.write(head + body)
        else:
            self.transport.write(head)

    def send_on(self, data: bytes) -> None:
        """Send further octets of a body that `send` was not given whole."""
        self.write_due()
        self._sent_bytes += len(data)
        if not self.transport.is_closing():
            self.transport.write(data)

    def discard(self) -> None:
        """Nobody waits for this connection any more, whether or not it has been made."""
        if hasattr(self, "transport"):
            self.abort()

    def abort(self) -> None:
        """Cut the connection: this is how an engine learns that nobody wants the answer."""
        self._consumer = None
        self._phase = _DONE
        self._due_head = self._due_body = b""
        self.transport.abort()

    def pause(self) -> None:
        if self._phase is _BODY:
            self._paused = True
            self.transport.pause_reading()

    def resume(self) -> None:
        if self._paused:
            self._paused = False
            self.transport.resume_reading()

    @property
    def _until_close(self) -> bool:
        return self._follower is None and self._left < 0

    @property
    def open_chunk(self) -> tuple[int, int] | None:
        """Data octets and line-end octets that a reader of the relayed stream still expects.

        None when nothing may be added to the stream: it is not chunked, or what its reader expects
        is not known.
        """
        if self._follower is None or self._miscounted:
            return None
        return self._follower.chunk_left

    @property
    def secured(self) -> bool:
        return self.transport.get_extra_info("sslcontext") is not None

    def clean(self) -> bool:
        """Whether nothing has arrived on this idle connection, neither octets nor its end."""
        if self._phase is not _IDLE or self.transport.is_closing():
            return False
        return self._poll is None or not self._poll.poll(0)

    # --- from the transport ------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is none by name

    def watch(self) -> None:
        """From now on the kernel is asked, too, whether this connection is clean."""
        # With TLS records of the session may come at any time; but an end is an end.
        self._poll = select.poll()
        self._poll.register(
            self.transport.get_extra_info("socket").fileno(),
            select.POLLRDHUP if self.secured else select.POLLIN,
        )
        if not self.secured:
            with contextlib.suppress(OSError):
                self._acknowledged = Acknowledged(self.transport.get_extra_info("socket"))

    def data_received(self, data: bytes) -> None:
        if self._phase is _BODY:
            self._body(data)
        elif self._phase is _HEAD and self._due_head:
            self._answered_early()
        elif self._phase is _HEAD:
            self._head(data)
        elif self._phase is _IDLE:
            self._keeper.unsolicited(self)
            self.abort()

    def eof_received(self) -> bool:
        # Not called when TLS ends without its goodbye: such an end may be anybody's (RFC 8446 §6.1)
        self._end_met = True
        return False  # the transport closes itself, and connection_lost says the rest

    def connection_lost(self, exc: Exception | None) -> None:
        consumer, self._consumer = self._consumer, None
        phase, self._phase = self._phase, _DONE
        self._keeper.lost(self)
        if consumer is None:
            return
        if phase is _BODY and self._until_close and self._end_met and exc is None:
            consumer.response_ended(reusable=False)  # RFC 9112 §6.3: the close is the end
            return
        undelivered = bool(self._due_head)
        self._due_head = self._due_body = b""
        detail = "" if exc is None else f": {tls.explain(exc)}"
        reason = f"connection lost{detail}"
        if phase is _HEAD and self._sent_before_bytes:
            self._keeper.closed_idle(self)  # as it seems: the request met the close
        if phase is _HEAD and (undelivered or self._closed_unseen(exc)):
            consumer.never_delivered(reason, reused=self._sent_before_bytes > 0)
        else:
            consumer.response_failed(reason)

    def _answered_early(self) -> None:
        """Octets have come before the request was written: nobody asked for them."""
        consumer = self._consumer
        self._keeper.unsolicited(self)
        self.abort()
        if consumer is not None:
            reused = self._sent_before_bytes > 0
            consumer.never_delivered("octets came before the request went", reused=reused)

    def _closed_unseen(self, exc: Exception | None) -> bool:
        """Whether the engine closed, and provably before any octet of the request reached it."""
        closed_first = self._end_met or isinstance(exc, BrokenPipeError)
        if not closed_first or self._buffer or self._informational or self._acknowledged is None:
            return False
        try:
            return self._acknowledged.octets() <= self._sent_before_bytes
        except OSError:
            return False

    def pause_writing(self) -> None:
        if self._consumer is not None:
            self._consumer.request_slow()

    def resume_writing(self) -> None:
        if self._consumer is not None:
            self._consumer.request_moves()

    # --- the response ------------------------------------------------------------------------

    def _head(self, data: bytes) -> None:
        buffer = self._buffer + data if self._buffer else data
        end = buffer.find(b"\r\n\r\n")
        if end < 0 or end > limits.RESPONSE_HEAD_BYTES_MAX:
            if end >= 0 or len(buffer) > limits.RESPONSE_HEAD_BYTES_MAX + 3:
                self._fail("response head too large")
            else:
                self._buffer = buffer
            return
        self._buffer = b""
        rest = buffer[end + 4 :]
        try:
            head, length = self._keeper.answer_heads.read(buffer[:end])
        except http1.BadResponse as error:
            self._fail(str(error))
            return
        if head.status < 200:
            self._skip_informational(head, rest)
            return
        self._start_body(head, length, rest)

    def _skip_informational(self, head: http1.ResponseHead, rest: bytes) -> None:
        """RFC 9110 §15.2: pass over 1xx; but nobody asked for 101, and there is no tunnel."""
        self._informational += 1
        if head.status == 101 or self._informational > limits.INFORMATIONAL_RESPONSES_MAX:
            self._fail("unexpected informational response")
        elif rest:
            self._head(rest)

    def _start_body(self, head: http1.ResponseHead, length: int, rest: bytes) -> None:
        consumer = self._consumer
        assert consumer is not None
        self._phase = _BODY
        self._reusable = head.keep_alive
        self._follower = http1.ChunkFollower() if head.chunked else None
        self._left = length
        consumer.response_started(head, length)
        if self._phase is not _BODY:
            return  # the exchange cut us
        if rest or (not head.chunked and length == 0):
            self._body(rest)
        consumer.response_head_due()

    def _body(self, data: bytes) -> None:
        consumer = self._consumer
        assert consumer is not None
        follower = self._follower
        if follower is not None:
            try:
                octets, surplus = follower.feed(data)
            except http1.BadResponse as error:
                self._miscounted = True
                self._fail(str(error))
                return
            ended = follower.ended
        elif self._left >= 0:
            octets, surplus = data[: self._left], data[self._left :]
            self._left -= len(octets)
            ended = self._left == 0
        else:
            octets, surplus, ended = data, b"", False
        if octets:
            consumer.response_octets(octets)
        if ended and self._consumer is consumer:
            self._end(consumer, surplus)

    def _end(self, consumer: Consumer, surplus: bytes) -> None:
        self._consumer = None
        self._follower = None
        if surplus:
            self._keeper.unsolicited(self)
        reusable = (
            self._reusable
            and not self.moved
            and not surplus
            and not self.transport.is_closing()
            and not self.transport.get_write_buffer_size()  # the request has not ended yet
        )
        self._phase = _IDLE if reusable else _DONE
        if reusable:
            self.resume()  # the exchange may have paused us for a client slower than the engine
        else:
            self.transport.abort()
        consumer.response_ended(reusable=reusable)
        if reusable:
            self._keeper.give_back(self)

    def _fail(self, reason: str) -> None:
        consumer = self._consumer
        self.abort()
        if consumer is not None:
            consumer.response_failed(reason)
