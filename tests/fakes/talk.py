"""A raw client on a real socket, and the decorator that runs a test on uvloop."""

from __future__ import annotations

import asyncio
import functools
import ssl
from collections.abc import Awaitable, Callable
from typing import ParamSpec, Self

import uvloop

from tests.fakes.plane import Answer, AnswerReader

Parameters = ParamSpec("Parameters")


def on_uvloop(test: Callable[Parameters, Awaitable[None]]) -> Callable[Parameters, None]:
    """Run a test on the loop that the proxy runs on."""

    @functools.wraps(test)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> None:
        async def whole() -> None:
            async with asyncio.timeout(60):
                await test(*args, **kwargs)
            for _ in range(5):  # what was closed last is lost with the next turns
                await asyncio.sleep(0)

        uvloop.run(whole())

    return run


class Talk:
    """One connection to the proxy. Use as `async with Talk(port) as talk`."""

    def __init__(self, port: int, context: ssl.SSLContext | None = None) -> None:
        self._port = port
        self._context = context  # None: plain HTTP
        self.received = b""
        self.ended: str | None = None  # "eof" or "reset"

    async def __aenter__(self) -> Self:
        self.reader, self.writer = await asyncio.open_connection(
            "127.0.0.1", self._port, ssl=self._context
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.transport.abort()

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def read(self) -> bool:
        """Read what comes next; False at the end."""
        try:
            data = await self.reader.read(65536)
        except (ConnectionError, ssl.SSLError):
            self.ended = "reset"
            return False
        self.received += data
        if not data:
            self.ended = "eof"
        return bool(data)

    async def read_to_end(self) -> bytes:
        while await self.read():
            pass
        return self.received

    async def read_until(self, mark: bytes) -> None:
        while mark not in self.received:
            assert await self.read(), f"the connection ended before {mark!r}: {self.received!r}"

    async def answer(self, method: str = "POST") -> Answer:
        """Read one answer to its end, or as far as it came. What is left of it is none."""
        reader = AnswerReader(method)
        if self.received:
            reader.feed(self.received)
        while not reader.complete and not reader.broken:
            self.received = b""
            await self.read()
            reader.feed(self.received)
        assert reader.answer is not None, f"no answer came; the connection: {self.ended}"
        self.received = reader.rest if reader.complete else b""
        return reader.answer


async def ask(
    port: int, request: bytes, method: str = "POST", context: ssl.SSLContext | None = None
) -> Answer:
    """Send one request over a connection of its own and return the answer."""
    async with Talk(port, context) as talk:
        await talk.send(request)
        return await talk.answer(method)
