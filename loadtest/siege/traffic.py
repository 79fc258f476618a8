"""Both sides of a siege: good traffic that must not notice, and connections that behave badly."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable
from typing import Final, cast

import msgspec
from typing_extensions import override

from loadtest.client import Client, RequestError
from loadtest.measure import quantile
from loadtest.siege.engine import request_body
from loadtest.siege.target import client_of

PATH: Final = "/v1/chat/completions"
HEAD: Final = (
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: siege\r\ncontent-type: application/json\r\n"
)
RESET: Final = struct.pack("ii", 1, 0)  # l_onoff, l_linger
CONNECTS_AT_ONCE = 50
numbers = itertools.count(1)  # of requests, over all scenarios


def post(body: bytes) -> bytes:
    """Return a whole request."""
    return HEAD + b"content-length: %d\r\n\r\n%b" % (len(body), body)


# --- the good --------------------------------------------------------------------------------


class Answered(msgspec.Struct, frozen=True):
    due_s: float
    took_s: float
    status: int  # 0: no answer


class Traffic:
    """Small requests at a steady pace that no answer slows; times count from when each was due."""

    def __init__(self, port: int, rate: float) -> None:
        self._client: Client = client_of(port)
        self._rate = rate
        self._answers: list[Answered] = []
        self._requests: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def flowing(self) -> AsyncIterator[None]:
        task = asyncio.get_running_loop().create_task(self._send())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            await asyncio.gather(*self._requests)
            self._client.close()

    async def _send(self) -> None:
        loop = asyncio.get_running_loop()
        begin_s = time.monotonic()
        for count in itertools.count():
            due_s = begin_s + count / self._rate
            if (wait_s := due_s - time.monotonic()) > 0:
                await asyncio.sleep(wait_s)
            task = loop.create_task(self._one(due_s))
            self._requests.add(task)
            task.add_done_callback(self._requests.discard)

    async def _one(self, due_s: float) -> None:
        status = 0
        with contextlib.suppress(RequestError, TimeoutError):
            async with asyncio.timeout(30):
                body = request_body("answer", next(numbers), 900)
                status = (await self._client.post(PATH, body)).status
        self._answers.append(Answered(due_s, time.monotonic() - due_s, status))

    async def window(self, seconds: float) -> Window:
        """Let it flow for so long; return what became of the requests that were due meanwhile."""
        begin_s = time.monotonic()
        await asyncio.sleep(seconds)
        end_s = time.monotonic()
        await asyncio.gather(*self._requests)
        return Window([a for a in self._answers if begin_s <= a.due_s < end_s])


class Window:
    """What became of the good requests of some seconds."""

    def __init__(self, answers: list[Answered]) -> None:
        self.count = len(answers)
        self.failed = sum(a.status != 200 for a in answers)
        self.p99_s = quantile([a.took_s for a in answers], 0.99) or 0.0


# --- the bad ---------------------------------------------------------------------------------


class Raw(asyncio.Protocol):
    """One client connection in the hand of a scenario."""

    transport: asyncio.Transport

    def __init__(self, keep: int = 1 << 16) -> None:
        self._keep = keep
        self.received = b""
        self.received_bytes = 0
        self.arrivals_s: list[float] = []
        self.first_s = 0.0  # when the first octet, or the end, came
        self.ended_s = 0.0
        self.news = asyncio.Event()

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    @override
    def data_received(self, data: bytes) -> None:
        now_s = time.monotonic()
        self.first_s = self.first_s or now_s
        self.arrivals_s.append(now_s)
        self.received_bytes += len(data)
        if len(self.received) < self._keep:
            self.received += data
        self.news.set()

    @override
    def eof_received(self) -> bool:
        self._end()
        return True  # a bad client does not go when it is told to

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._end()

    def _end(self) -> None:
        now_s = time.monotonic()
        self.first_s = self.first_s or now_s
        self.ended_s = self.ended_s or now_s
        self.news.set()

    @property
    def status(self) -> int:
        return int(self.received[9:12]) if self.received.startswith(b"HTTP/1.1 ") else 0

    async def until(self, claim: Callable[[], bool], limit_s: float) -> bool:
        try:
            async with asyncio.timeout(limit_s):
                while not claim():
                    self.news.clear()
                    await self.news.wait()
        except TimeoutError:
            return claim()
        return True

    def write(self, data: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(data)

    def close(self) -> None:
        """Go away with FIN."""
        self.transport.abort()

    def reset(self) -> None:
        """Go away with RST."""
        connected = self.transport.get_extra_info("socket")
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self.transport.abort()


async def connect(port: int, receive_bytes: int = 0, keep: int = 1 << 16) -> Raw:
    """Open a connection, with a receive buffer of `receive_bytes` if any are named."""
    sock = socket.socket()
    if receive_bytes:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    try:
        await loop.sock_connect(sock, ("127.0.0.1", port))
    except BaseException:
        sock.close()
        raise
    _, raw = await loop.create_connection(lambda: Raw(keep), sock=sock)
    return raw


async def connect_many(port: int, count: int, receive_bytes: int = 0) -> list[Raw]:
    """Open many connections, some at a time, so that opening them is not the siege."""
    opened: list[Raw] = []
    while len(opened) < count:
        more = min(CONNECTS_AT_ONCE, count - len(opened))
        opened += await asyncio.gather(*(connect(port, receive_bytes, 1024) for _ in range(more)))
    return opened
