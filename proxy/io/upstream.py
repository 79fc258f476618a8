"""Connections to replicas: made, reused only when provably clean, cut without ceremony.

A connection carries one exchange at a time. It goes back to the pool only when request and response
both ended exactly; any octet that nobody asked for condemns it, because those octets would become
the next client's answer. Idle ones are closed before the engine would close them, and looked at
once more before use, so that a request does not meet a close that is already on its way. If one
does all the same, and the kernel can prove that the engine closed before anything of the request
reached it, the exchange is told so and sends it over another connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import errno
import select
import ssl
from collections.abc import Callable
from typing import Final, Protocol, cast

from proxy import tls
from proxy.core import http1, limits
from proxy.core.head import read_answer_head
from proxy.core.head_memory import HeadMemory
from proxy.core.idle import IdleTrust
from proxy.core.replica import Replica
from proxy.io.acknowledged import Acknowledged
from proxy.io.clock import Clock
from proxy.io.tasks import Tasks

# What says nothing about the replica: no descriptors, memory or local ports left.
_OUR_OWN_WANT: Final = frozenset(
    (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL)
)


class Consumer(Protocol):
    """What an exchange hears from its connection. Each method may close the connection."""

    def connected(self, upstream: Upstream) -> None: ...
    def connect_failed(self, reason: str) -> None: ...
    def no_means(self, reason: str) -> None: ...
    def response_started(self, head: http1.ResponseHead, length: int) -> None: ...
    def response_head_due(self) -> None: ...
    def response_octets(self, data: bytes) -> None: ...
    def response_ended(self, *, reusable: bool) -> None: ...
    def response_failed(self, reason: str) -> None: ...
    def never_delivered(self, reason: str, *, reused: bool) -> None: ...


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


class Upstream:
    """One connection to one replica."""

    __slots__ = (
        "_acknowledged",
        "_buffer",
        "_consumer",
        "_end_met",
        "_follower",
        "_informational",
        "_left",
        "_miscounted",
        "_paused",
        "_phase",
        "_poll",
        "_pool",
        "_reusable",
        "_sent_before_bytes",
        "_sent_bytes",
        "idle_since_s",
        "replica_id",
        "transport",
    )

    transport: asyncio.Transport

    def __init__(self, replica_id: str, pool: Upstreams) -> None:
        self.replica_id = replica_id
        self._pool = pool
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
        self.idle_since_s = 0.0

    # --- from the exchange -------------------------------------------------------------------

    def send(self, consumer: Consumer, head: bytes, body: bytes) -> None:
        """Send one request; its answer goes to `consumer`."""
        assert self._phase is _IDLE, "one exchange at a time"
        self._consumer = consumer
        self._phase = _HEAD
        self._informational = 0
        self._sent_before_bytes = self._sent_bytes
        self._sent_bytes += len(head) + len(body)
        if len(body) > limits.JOINED_BYTES_MAX:
            self.transport.writelines((head, body))
        elif body:
            self.transport.write(head + body)
        else:
            self.transport.write(head)

    def discard(self) -> None:
        """Nobody waits for this connection any more, whether or not it has been made."""
        if hasattr(self, "transport"):
            self.abort()

    def abort(self) -> None:
        """Cut the connection: this is how an engine learns that nobody wants the answer."""
        self._consumer = None
        self._phase = _DONE
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
        elif self._phase is _HEAD:
            self._head(data)
        elif self._phase is _IDLE:
            self._pool.unsolicited(self)
            self.abort()

    def eof_received(self) -> bool:
        # Not called when TLS ends without its goodbye: such an end may be anybody's (RFC 8446 §6.1)
        self._end_met = True
        return False  # the transport closes itself, and connection_lost says the rest

    def connection_lost(self, exc: Exception | None) -> None:
        consumer, self._consumer = self._consumer, None
        phase, self._phase = self._phase, _DONE
        self._pool.lost(self)
        if consumer is None:
            return
        if phase is _BODY and self._until_close and self._end_met and exc is None:
            consumer.response_ended(reusable=False)  # RFC 9112 §6.3: the close is the end
            return
        detail = "" if exc is None else f": {tls.explain(exc)}"
        reason = f"connection lost{detail}"
        if phase is _HEAD and self._sent_before_bytes:
            self._pool.closed_idle(self)  # as it seems: the request met the close
        if phase is _HEAD and self._closed_unseen(exc):
            consumer.never_delivered(reason, reused=self._sent_before_bytes > 0)
        else:
            consumer.response_failed(reason)

    def _closed_unseen(self, exc: Exception | None) -> bool:
        """Whether the engine closed, and provably before any octet of the request reached it."""
        closed_first = self._end_met or isinstance(exc, BrokenPipeError)
        if not closed_first or self._buffer or self._informational or self._acknowledged is None:
            return False
        try:
            return self._acknowledged.octets() <= self._sent_before_bytes
        except OSError:
            return False

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
            head, length = self._pool.answer_heads.read(buffer[:end])
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
            self._pool.unsolicited(self)
        reusable = (
            self._reusable
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
            self._pool.give_back(self)

    def _fail(self, reason: str) -> None:
        consumer = self._consumer
        self.abort()
        if consumer is not None:
            consumer.response_failed(reason)


class Upstreams:
    """The connections of one worker, by replica."""

    def __init__(
        self,
        clock: Clock,
        tasks: Tasks,
        connect_timeout_s: float,
        on_unsolicited: Callable[[], None],
        tls_context: Callable[[], ssl.SSLContext] = ssl.create_default_context,
    ) -> None:
        self._clock = clock
        self._tasks = tasks
        self._connect_timeout_s = connect_timeout_s
        self._on_unsolicited = on_unsolicited
        self._idle: dict[str, list[Upstream]] = {}
        self._open: set[Upstream] = set()
        self._make_tls = tls_context
        self._tls: ssl.SSLContext | None = None  # made when first needed: authorities are many
        self._trust = IdleTrust()
        self.answer_heads: HeadMemory[http1.ResponseHead] = HeadMemory(read_answer_head)

    @property
    def open_count(self) -> int:
        return len(self._open)

    @property
    def idle_count(self) -> int:
        return sum(map(len, self._idle.values()))

    def reconfigure(
        self, connect_timeout_s: float, tls_context: Callable[[], ssl.SSLContext]
    ) -> None:
        """From the next connection on. Idle ones with TLS go: certificates may have changed."""
        self._connect_timeout_s = connect_timeout_s
        self._make_tls, self._tls = tls_context, None
        for idle in self._idle.values():
            for upstream in [each for each in idle if each.secured]:
                idle.remove(upstream)
                upstream.abort()

    def take(self, replica_id: str) -> Upstream | None:
        """Return an idle connection that is clean, the most recently used first."""
        idle = self._idle.get(replica_id)
        if idle and self._trust.learnt:
            idle_s = self._clock.now_s() - idle[-1].idle_since_s
            if idle_s >= self._trust.trusted_s(replica_id):
                return None  # left to live, so that we learn how long it does
        while idle:
            upstream = idle.pop()
            if upstream.clean():
                return upstream
            self.closed_idle(upstream)
            upstream.abort()
        return None

    def connect(self, replica: Replica, consumer: Consumer) -> asyncio.Task[None]:
        """Open a connection and hand it to `consumer`; cancel the task to give up."""
        return self._tasks.spawn(f"connect {replica.replica_id}", self._connect(replica, consumer))

    async def _connect(self, replica: Replica, consumer: Consumer) -> None:
        upstream = Upstream(replica.replica_id, self)
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                await self._dial(replica, upstream)
        except TimeoutError:
            consumer.connect_failed("connect timed out")
            return
        except OSError as error:
            reason = tls.explain(error) if isinstance(error, ssl.SSLError) else error.strerror
            reason = reason or type(error).__name__
            if error.errno in _OUR_OWN_WANT:
                consumer.no_means(reason)
            else:
                consumer.connect_failed(reason)
            return
        except asyncio.CancelledError:
            upstream.discard()
            raise
        except Exception as error:
            consumer.connect_failed(type(error).__name__)
            raise  # a fault of ours: the owner of the task reports it
        if not upstream.clean():  # closed, or spoken on, before we said a word
            upstream.transport.abort()
            consumer.connect_failed("connection closed as soon as it was made")
            return
        self._open.add(upstream)
        consumer.connected(upstream)

    async def _dial(self, replica: Replica, upstream: Upstream) -> None:
        await asyncio.get_running_loop().create_connection(
            lambda: cast("asyncio.Protocol", upstream),
            replica.host,
            replica.port,
            ssl=self._tls_context() if replica.tls else None,
        )
        upstream.watch()

    def _tls_context(self) -> ssl.SSLContext:
        if self._tls is None:
            self._tls = self._make_tls()
        return self._tls

    def give_back(self, upstream: Upstream) -> None:
        idle = self._idle.setdefault(upstream.replica_id, [])
        useless = idle and not self._trust.trusted_s(upstream.replica_id)
        if useless or len(idle) >= limits.UPSTREAM_IDLE_CONNECTIONS_MAX:
            upstream.abort()
            return
        upstream.idle_since_s = self._clock.now_s()
        idle.append(upstream)

    def lost(self, upstream: Upstream) -> None:
        self._open.discard(upstream)
        idle = self._idle.get(upstream.replica_id)
        if idle and upstream in idle:
            idle.remove(upstream)
            self.closed_idle(upstream)

    def closed_idle(self, upstream: Upstream) -> None:
        idle_s = self._clock.now_s() - upstream.idle_since_s
        self._trust.closed(upstream.replica_id, idle_s)

    def unsolicited(self, upstream: Upstream) -> None:
        self._on_unsolicited()

    def retain(self, replica_ids: frozenset[str]) -> None:
        """Close the idle connections of replicas that are gone, and forget what they taught."""
        for replica_id in [k for k in self._idle if k not in replica_ids]:
            for upstream in self._idle.pop(replica_id):
                upstream.abort()
            self._trust.survived(replica_id)

    def sweep(self, now_s: float) -> None:
        """Close what has been idle so long that the engine may be closing it."""
        for idle in self._idle.values():
            while idle and now_s - idle[0].idle_since_s > limits.UPSTREAM_IDLE_S_MAX:
                survivor = idle.pop(0)
                survivor.abort()
                self._trust.survived(survivor.replica_id)

    def close(self) -> None:
        for upstream in list(self._open):
            upstream.abort()
