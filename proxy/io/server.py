"""The client's side of a connection: octets in, heads and bodies out, deadlines, backpressure.

One protocol object a connection and no task a request. Requests on a connection are served one
after another; what a client sends ahead waits, bounded, with reading paused. Whatever leaves doubt
about where a message ends is answered and the connection closed, after reading on for a moment so
that the client sees the answer and not a reset (RFC 9112 §9.6).
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from typing import Final, NoReturn, cast

from typing_extensions import override

from proxy import errors
from proxy.core import head as heads
from proxy.core import limits
from proxy.core.http1 import ChunkedDecoder, check_partial_head
from proxy.core.pieces import Pieces
from proxy.io.connection import (
    BODY,
    CLOSED,
    HEAD,
    IDLE,
    LINGERING,
    PASSING,
    SERVING,
    Connection,
)
from proxy.io.exchange import Exchange
from proxy.io.facts import write_down_refused
from proxy.io.passage import Passage
from proxy.io.plane import Plane
from proxy.io.relay import Relay

_log = logging.getLogger("doherty.server")


# l_onoff, l_linger: close by RST. A plain abort of a transport sends FIN, as a whole answer does.
_RESET: Final = struct.pack("ii", 1, 0)


class ServerProtocol(Connection):
    """One client connection."""

    __slots__ = (
        "_ahead", "_body_since_s", "_connections", "_decoder", "_empty_line_met", "_exchange",
        "_head_buffer", "_left", "_pieces", "_stalled_since_s", "_waiting_bytes", "_write_paused",
        "carrier", "peer",
    )  # fmt: skip

    def __init__(self, plane: Plane, connections: set[ServerProtocol]) -> None:
        super().__init__(plane)
        self._connections = connections
        self._exchange: Relay | None = None
        self._head_buffer = bytearray()
        self._empty_line_met = False
        self._pieces = Pieces()
        self._left = 0
        self._body_since_s = 0.0
        self._decoder: ChunkedDecoder | None = None
        self._ahead = b""  # octets of later requests
        self._write_paused = False
        self._waiting_bytes = 0  # octets that the client had not taken at the last sweep
        self._stalled_since_s = 0.0
        self.peer = ""
        self.carrier: asyncio.Transport | None = None  # what carries TLS; its octets wait, too

    # --- from the transport ------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by name
        self._transport.set_write_buffer_limits(high=limits.WRITE_HIGH_WATER_BYTES)
        peer = transport.get_extra_info("peername")
        self.peer = str(peer[0]) if peer else ""
        self._connections.add(self)
        if len(self._connections) > self._plane.connections_max:
            self._plane.telemetry.connections_refused_total += 1
            self._state = CLOSED
            self._transport.abort()
            return
        self._plane.telemetry.connections_total += 1
        self._deadline_s = self._plane.clock.now_s() + limits.CLIENT_KEEP_ALIVE_S

    def data_received(self, data: bytes) -> None:
        try:
            state = self._state
            if state is IDLE and (self._ahead or self._write_paused):
                # What came before goes first, and who reads nothing is served nothing more.
                self._keep_for_later(data)
            elif state is IDLE or state is HEAD:
                self._read_head(data)
            elif state is BODY:
                self._read_body(data)
            elif state is SERVING:
                self._keep_for_later(data)
            elif state is PASSING:
                self._pass(data)
            elif state is LINGERING:
                self._linger(len(data))
        except errors.ProxyError as error:
            self._refuse(error)
        except Exception:  # noqa: BLE001 - the top of this connection: the others must live
            self._plane.telemetry.internal_errors_total += 1
            _log.exception("connection from %s", self.peer)
            self._refuse(errors.InternalError("the proxy failed; its log has the reason"))

    @override
    def eof_received(self) -> bool:
        # A client that has closed its sending side cannot be told from one that has gone; what it
        # asked for would be computed for nobody (nginx and Caddy read it so, too). Not left to
        # connection_lost: that waits for octets which such a client may never take.
        self.write_due()
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            self._state = CLOSED
            exchange.client_gone()
            self._transport.abort()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._state = CLOSED
        self._connections.discard(self)
        exchange, self._exchange = self._exchange, None
        self._pieces.take()
        self._ahead = b""
        if exchange is not None:
            exchange.client_gone()

    def pause_writing(self) -> None:
        self._write_paused = True
        if self._exchange is not None:
            self._exchange.client_slow()

    def resume_writing(self) -> None:
        self._write_paused = False
        if self._exchange is not None:
            self._exchange.client_reads()
        elif self._ahead or self._reading_paused:
            asyncio.get_running_loop().call_soon(self._next)

    # --- reading -----------------------------------------------------------------------------

    def _read_head(self, data: bytes) -> None:
        buffer = self._head_buffer
        if buffer == b"\r":  # perhaps the first half of that empty line
            data = b"\r" + data
            buffer.clear()
        searched = max(0, len(buffer) - 3)
        if buffer:
            buffer += data
            end = buffer.find(b"\r\n\r\n", searched)
            data = bytes(buffer) if end >= 0 else b""
        else:
            # RFC 9112 §2.2: one empty line before a request is forgiven
            if data.startswith(b"\r\n") and not self._empty_line_met:
                self._empty_line_met = True
                data = data[2:]
                if not data:
                    return
            end = data.find(b"\r\n\r\n")
            if end < 0:
                buffer += data
        if end < 0:
            self._wait_for_head(buffer, searched)
            return
        if end > limits.HEAD_BYTES_MAX:
            self._head_too_large(bytearray(data), searched)
        buffer.clear()
        self._take_head(data[:end], data[end + 4 :])

    def _wait_for_head(self, buffer: bytearray, searched: int) -> None:
        if self._state is IDLE:
            self._state = HEAD
            self._deadline_s = self._plane.clock.now_s() + limits.HEAD_TIMEOUT_S
        if len(buffer) > limits.HEAD_BYTES_MAX + 3:  # the empty line may have begun
            self._head_too_large(buffer, searched)
        check_partial_head(buffer, searched)

    def _head_too_large(self, buffer: bytearray, searched: int) -> NoReturn:
        """However it is cut, what is wrong with its first octets is said first."""
        check_partial_head(buffer[: limits.HEAD_BYTES_MAX + 3], searched)
        raise errors.HeadTooLargeError(f"the head is over {limits.HEAD_BYTES_MAX} octets")

    def _take_head(self, block: bytes, rest: bytes) -> None:
        self._state = BODY
        self._empty_line_met = False
        preamble, length = self._plane.preambles.read(block)
        if preamble.passes:
            passage = Passage(self._plane, self, preamble, length)
            self._take_passage(passage, rest, empty=not length and not preamble.chunked)
            return
        exchange = self._exchange = Exchange(self._plane, self, preamble, length)
        if not preamble.chunked and not length:
            # Whole already: even if it is refused, the next request begins where this one ends.
            self._state = SERVING
            if rest:
                self._keep_for_later(rest)
            exchange.judge_head()
            exchange.begin(b"")
            return
        exchange.judge_head()
        if preamble.chunked:
            self._decoder = ChunkedDecoder()
        else:
            self._left = length
        if preamble.head.expects_continue and not rest:
            self.write(heads.CONTINUE)
        self._body_since_s = self._plane.clock.now_s()
        self._deadline_s = self._body_since_s + limits.BODY_IDLE_TIMEOUT_S
        if rest:
            self._read_body(rest)

    def _take_passage(self, passage: Passage, rest: bytes, *, empty: bool) -> None:
        self._exchange = passage
        self._state = SERVING if empty else PASSING
        if empty and rest:
            self._keep_for_later(rest)  # the next request, whatever becomes of this one
        try:
            passage.judge_head()
            passage.begin(b"")
        except errors.ProxyError as error:
            passage.fail(error)
        if rest and self._state is PASSING:
            self._pass(rest)

    def _pass(self, data: bytes) -> None:
        passage = self._exchange
        assert isinstance(passage, Passage)
        rest = passage.take(data)
        if rest is not None and self._state is PASSING:
            self._state = SERVING
            if rest:
                self._keep_for_later(rest)

    def _read_body(self, data: bytes) -> None:
        if self._decoder is not None:
            assert self._exchange is not None
            before_bytes = self._decoder.body_bytes
            rest = self._decoder.feed(data)
            self._exchange.hold_body(self._decoder.body_bytes - before_bytes)
            if rest is None:
                self._deadline_s = self._plane.clock.now_s() + limits.BODY_IDLE_TIMEOUT_S
                return
            body, self._decoder = self._decoder.body(), None
            self._serve(body, rest)
            return
        assert self._exchange is not None
        size = len(data)
        if size < self._left:
            self._exchange.hold_body(size)
            self._left -= size
            self._pieces.add(data)
            self._deadline_s = self._plane.clock.now_s() + limits.BODY_IDLE_TIMEOUT_S
            return
        self._exchange.hold_body(self._left)
        if self._pieces.size:
            self._pieces.add(data[: self._left])
            body = self._pieces.take()
        else:
            body = data[: self._left]
        rest = data[self._left :]
        self._left = 0
        self._serve(body, rest)

    def _serve(self, body: bytes, rest: bytes) -> None:
        exchange = self._exchange
        assert exchange is not None
        self._state = SERVING
        if rest:
            self._keep_for_later(rest)
        if len(body) > limits.JOINED_BYTES_MAX:
            self._outbox.write()  # reading this one takes a while
        exchange.begin(body)

    def _keep_for_later(self, data: bytes) -> None:
        self._ahead += data
        if len(self._ahead) > limits.PIPELINED_BYTES_MAX:
            self.hold_back()

    # --- from the exchange -------------------------------------------------------------------

    def finished(self, *, keep_alive: bool) -> None:
        """The answer is out. Go on with the next request, or close."""
        self._exchange = None
        # Refused before its body was read, or followed by what will never be answered: closing on
        # unread octets makes the kernel reset, and the answer may be lost with it.
        begun = self._state is BODY or self._state is PASSING
        unread = begun or bool(self._ahead) or self._reading_paused
        if not keep_alive or begun:
            self._close_gently(unread=unread)
            return
        self._state = IDLE
        self._deadline_s = self._plane.clock.now_s() + limits.CLIENT_KEEP_ALIVE_S
        if self._ahead or self._reading_paused:
            asyncio.get_running_loop().call_soon(self._next)

    def cut(self, *, reset: bool) -> None:
        """End the connection without ending the message; `reset` where a close would end it."""
        self._exchange = None
        self.write_due()
        if reset:
            self._state = CLOSED
            connected = self._transport.get_extra_info("socket")
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            self._transport.abort()
        else:
            self._close()

    @override
    def _forget(self) -> None:
        self._head_buffer.clear()
        self._pieces.take()
        self._decoder = None
        self._ahead = b""

    # --- the end of a request ----------------------------------------------------------------

    def _next(self) -> None:
        if self._state is not IDLE or self._write_paused:
            return
        if self._reading_paused:
            self._reading_paused = False
            self._transport.resume_reading()
        ahead, self._ahead = self._ahead, b""
        if ahead:
            self.data_received(ahead)

    def _refuse(self, error: errors.ProxyError) -> None:
        """Answer what the exchange, if there is one, has not answered."""
        exchange = self._exchange
        if exchange is not None:
            exchange.fail(error)
            return
        if self._state in (LINGERING, CLOSED):
            return
        request_id = self._plane.clock.request_id()
        write_down_refused(self._plane, self.peer, request_id, error)
        self.write(heads.error_answer(error, request_id, keep_alive=False))
        self._close_gently(unread=True)

    # --- time --------------------------------------------------------------------------------

    def check_deadline(self, now_s: float) -> None:
        """Called by the sweep: close what has been silent for too long."""
        if self._stalled(now_s):
            self._transport.abort()
            return
        if self._exchange is not None and self._state in (SERVING, PASSING):
            self._exchange.check_deadline(now_s)
            return
        if now_s < self._deadline_s and not self._crawls(now_s):
            return
        if self._waiting_bytes and self._state not in (HEAD, BODY):
            return  # the client is still taking an answer: only a stall ends that
        if self._state in (HEAD, BODY):
            self._refuse(errors.RequestTimeoutError("the request did not arrive in time"))
        elif self._state is IDLE:
            self._close()
        elif self._state is not SERVING:
            self._transport.abort()

    def _crawls(self, now_s: float) -> bool:
        """Whether a body comes so slowly that its client only means to hold the connection."""
        if self._state is not BODY:
            return False
        due_s = now_s - self._body_since_s - limits.BODY_PATIENCE_S
        if due_s <= 0:
            return False
        decoder = self._decoder
        come_bytes = self._pieces.size if decoder is None else decoder.body_bytes
        return come_bytes < due_s * limits.BODY_PACE_BYTES

    def _stalled(self, now_s: float) -> bool:
        """Whether the client has long taken none of the octets that wait for it."""
        waiting_bytes = self._transport.get_write_buffer_size()
        if self.carrier is not None:
            waiting_bytes += self.carrier.get_write_buffer_size()
        if not waiting_bytes or waiting_bytes != self._waiting_bytes:
            self._waiting_bytes = waiting_bytes
            self._stalled_since_s = now_s
            return False
        return now_s - self._stalled_since_s > limits.WRITE_STALL_TIMEOUT_S

    def kill(self) -> None:
        """The grace is over."""
        self._transport.abort()

    def drain(self) -> None:
        """Close now if idle; a request under way ends the connection with its answer."""
        if self._state is IDLE:
            self._close()
