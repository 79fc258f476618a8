"""A scripted engine: what a request asks for in `user` is what it does, and it takes notes.

`user` is a mode and a number that names the request: `answer 7`. The engine notes when it got each
request, how often, and when the connection that a request was on had gone.
"""

from __future__ import annotations

import asyncio
import re
import socket
import time
from collections import Counter
from collections.abc import Callable
from typing import Final, Self, cast

from typing_extensions import override

MODEL: Final = "siege"
BODY_KEPT_BYTES = 4096  # of a request: `user` stands in front
EVENT = b"data: %b\n\n" % (b"x" * 1006)  # a kibibyte of a stream in a chunk
CHUNK = b"%x\r\n%b\r\n" % (len(EVENT), EVENT)
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
)
PAUSE_S = 0.4  # between the two events of mode `pause`
STREAM_BYTES = 4 << 20
SEND_BUFFER_BYTES = 64 * 1024  # so that a reader's pause reaches the engine, not its kernel


def request_body(mode: str, number: int, filler: int = 0) -> bytes:
    """Return a chat request that asks for a mode, with `filler` octets of prompt."""
    prompt = "x" * filler
    return (
        f'{{"user":"{mode} {number}","model":"{MODEL}","messages":'
        f'[{{"role":"user","content":"{number} {prompt}"}}]}}'
    ).encode()


class Engine:
    """Use as `async with Engine() as engine`."""

    def __init__(self) -> None:
        self.port = 0
        self.got: Counter[int] = Counter()  # deliveries, by request
        self.got_s: dict[int, float] = {}
        self.gone_s: dict[int, float] = {}  # when its connection had gone
        self.sent_bytes: Counter[int] = Counter()  # of streams, by request
        self.connections: set[Serving] = set()
        self.connections_total = 0
        self.body_bytes = 0  # received
        # After an answer: seconds until an idle connection is closed, 0 for at once, None for never
        self.idle_s: Callable[[int], float | None] = lambda _served: None
        self._server: asyncio.Server | None = None
        self._news = asyncio.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: Serving(self), "127.0.0.1", 0, backlog=4096)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the port and every connection."""
        server, self._server = self._server, None
        if server is not None:
            server.close()
            for connection in list(self.connections):
                connection.transport.abort()
            await server.wait_closed()

    def tell(self) -> None:
        self._news.set()

    async def until(self, claim: Callable[[], bool], limit_s: float) -> bool:
        """Wait until `claim` holds of the notes; False when it has not within the limit."""
        try:
            async with asyncio.timeout(limit_s):
                while not claim():
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            return claim()
        return True


class Serving(asyncio.Protocol):
    """One connection to the engine. Requests on it come one after another."""

    transport: asyncio.Transport

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._buffer = b""
        self._left = -1  # octets of the body still to come; -1 before the head is whole
        self._served = 0
        self._number = -1  # of the request that is being answered
        self._timer: asyncio.TimerHandle | None = None
        self._streaming = 0  # octets of a stream still to be sent
        self._paused = False

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.transport.set_write_buffer_limits(high=SEND_BUFFER_BYTES // 4)
        self.transport.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES
        )
        self._engine.connections.add(self)
        self._engine.connections_total += 1

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._engine.connections.discard(self)
        self._cancel_timer()
        if self._number >= 0:
            self._engine.gone_s[self._number] = time.monotonic()
        self._engine.tell()

    @override
    def data_received(self, data: bytes) -> None:
        self._cancel_timer()
        if self._left < 0:
            self._buffer += data
            head, mark, data = self._buffer.partition(b"\r\n\r\n")
            if not mark:
                return
            found = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
            self._left = int(found[1]) if found else 0
            self._buffer = b""
            if head.startswith(b"GET "):
                self._left = -1
                self._say_who()
                return
        self._left -= len(data)
        self._engine.body_bytes += len(data)
        if len(self._buffer) < BODY_KEPT_BYTES:
            self._buffer += data[:BODY_KEPT_BYTES]
        if self._left <= 0:
            body, self._buffer, self._left = self._buffer, b"", -1
            self._serve(body)

    def _say_who(self) -> None:
        body = b'{"object":"list","data":[{"id":"%b","object":"model"}]}' % MODEL.encode()
        self._answer(body)

    def _serve(self, body: bytes) -> None:
        found = re.search(rb'"user":"(\w+) (\d+)"', body)
        assert found is not None, body[:200]
        mode, number = str(found[1], "ascii"), int(found[2])
        engine = self._engine
        self._number = number
        engine.got[number] += 1
        engine.got_s[number] = time.monotonic()
        match mode:
            case "answer":
                self._answer(b'{"number":%d}' % number)
                self._rest()
            case "hold":
                pass
            case "head":
                self.transport.write(STREAM_HEAD)
            case "drip":
                self.transport.write(STREAM_HEAD + CHUNK)
            case "pause":
                self.transport.write(STREAM_HEAD + CHUNK)
                self._timer = asyncio.get_running_loop().call_later(PAUSE_S, self._second_event)
            case "stream":
                self.transport.write(STREAM_HEAD)
                self._streaming = STREAM_BYTES
                self._stream()
            case _:
                raise ValueError(f"no mode {mode}")
        engine.tell()

    def _answer(self, body: bytes) -> None:
        self.transport.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
            % (len(body), body)
        )

    def _rest(self) -> None:
        """The answer is out: the connection is idle, for as long as the script says."""
        self._number = -1
        self._served += 1
        idle_s = self._engine.idle_s(self._served)
        if idle_s == 0:
            self.transport.close()
        elif idle_s is not None:
            self._timer = asyncio.get_running_loop().call_later(idle_s, self.transport.close)

    def _second_event(self) -> None:
        self._timer = None
        self.transport.write(CHUNK + b"0\r\n\r\n")
        self._rest()

    # --- a stream no faster than its reader --------------------------------------------------

    @override
    def pause_writing(self) -> None:
        self._paused = True

    @override
    def resume_writing(self) -> None:
        self._paused = False
        self._stream()

    def _stream(self) -> None:
        if self._streaming <= 0:
            return
        while self._streaming > 0 and not self._paused:
            self.transport.write(CHUNK)
            self._streaming -= len(EVENT)
            self._engine.sent_bytes[self._number] += len(EVENT)
        self._engine.tell()
        if self._streaming <= 0:
            self.transport.write(b"0\r\n\r\n")
            self._rest()

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
