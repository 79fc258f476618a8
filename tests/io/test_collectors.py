"""Collectors that answer without end, in drops, with a redirection or with nonsense."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import pytest

from tests.io.test_tracing import closing, exporting, until

Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]
BODY_BYTES = 64 * 1024 * 1024


@asynccontextmanager
async def collector(answer: Answer) -> AsyncIterator[str]:
    serving = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.append(asyncio.current_task())
        with suppress(OSError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            await answer(writer)
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield "http://{}:{}".format(*server.sockets[0].getsockname())
        await asyncio.gather(*filter(None, serving))


async def test_of_an_answer_without_end_little_is_read() -> None:
    written = 0

    async def without_end(writer: asyncio.StreamWriter) -> None:
        nonlocal written
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while written < BODY_BYTES:
            writer.write(bytes(65_536))
            await writer.drain()
            written += 65_536

    async with collector(without_end) as url, closing(exporting(url)) as export:
        export.put(1)
        await until(lambda: export.counts.exported_total == 1)
    assert written < BODY_BYTES


async def test_one_that_comes_in_drops_is_not_waited_for() -> None:
    gone = asyncio.Event()

    async def in_drops(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nx")
        await gone.wait()

    async with collector(in_drops) as url, closing(exporting(url)) as export:
        export.put(1)
        await until(lambda: export.counts.exported_total == 1)
        gone.set()


async def test_a_redirection_is_neither_followed_nor_success(
    caplog: pytest.LogCaptureFixture,
) -> None:
    followed = []

    async def elsewhere(writer: asyncio.StreamWriter) -> None:
        followed.append(writer)
        writer.write(b"HTTP/1.1 307 X\r\nlocation: /stolen\r\ncontent-length: 0\r\n\r\n")

    async with collector(elsewhere) as url, closing(exporting(url)) as export:
        export.put(1)
        await until(lambda: export.counts.refused_total == 1)
    assert len(followed) == 1
    assert "redirects to '/stolen'" in caplog.text
