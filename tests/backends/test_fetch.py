"""Questions to engines over real sockets, and tasks that fail."""

from __future__ import annotations

import asyncio
import io
import json
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from backends import fetch as module
from backends.fetch import Answer, HttpFetch, Silence
from backends.log import Log
from backends.tasks import cancel_all, spawn


@pytest.fixture
async def fetch() -> AsyncIterator[HttpFetch]:
    fetch = HttpFetch()
    yield fetch
    await fetch.close()


@pytest.fixture
async def engine() -> AsyncIterator[tuple[str, list[bytes]]]:
    """Answer each connection with the given octets and close it; with none, say nothing."""
    replies: list[bytes] = []
    silent: list[asyncio.StreamWriter] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        if not replies:
            silent.append(writer)
            return
        writer.write(replies[0])
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}", replies
    for writer in silent:
        writer.close()
    server.close()


OK = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 5\r\n\r\nhello"


async def test_an_answer(fetch: HttpFetch, engine: tuple[str, list[bytes]]) -> None:
    url, replies = engine
    replies.append(OK)
    assert await fetch.get(url + "/metrics", 5.0) == Answer(200, b"hello")
    assert await fetch.post(url + "/abort_request", b"{}", 5.0) == Answer(200, b"hello")


async def test_a_redirect_is_an_answer(fetch: HttpFetch, engine: tuple[str, list[bytes]]) -> None:
    url, replies = engine
    replies.append(b"HTTP/1.1 302 Found\r\nlocation: http://x/\r\ncontent-length: 0\r\n\r\n")
    assert (await fetch.get(url, 5.0)).status == 302


async def test_silence_is_a_timeout(fetch: HttpFetch, engine: tuple[str, list[bytes]]) -> None:
    assert (await fetch.get(engine[0], 0.05)).silence is Silence.TIMEOUT


async def test_nobody_there_is_a_refusal(fetch: HttpFetch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert (await fetch.get(f"http://127.0.0.1:{port}", 5.0)).silence is Silence.REFUSED


@pytest.mark.parametrize("reply", [b"", b"garbage\r\n\r\n", OK[:-2]])
async def test_half_an_answer_is_none(
    fetch: HttpFetch, engine: tuple[str, list[bytes]], reply: bytes
) -> None:
    url, replies = engine
    replies.append(reply)
    assert (await fetch.get(url, 5.0)).silence is Silence.BROKEN


async def test_answers_are_bounded(
    fetch: HttpFetch, engine: tuple[str, list[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ANSWER_BYTES_MAX", 100)
    url, replies = engine
    replies.append(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n" + b"x" * 100_000)
    assert await fetch.get(url, 5.0) == Answer(200, b"x" * 100)


async def test_a_task_that_fails_is_reported_at_once() -> None:
    stream = io.StringIO()

    async def fail() -> None:
        raise ValueError("unexpected")

    task = spawn(fail(), "doomed", Log(stream))
    with pytest.raises(ValueError, match="unexpected"):
        await task
    said = json.loads(stream.getvalue())
    assert (said["task"], said["error"]) == ("doomed", "ValueError: unexpected")
    assert re.match(r"test_fetch\.py:\d+ fail", said["where"]), "innermost first"


async def test_cancelled_tasks_are_waited_for_and_are_no_failure() -> None:
    stream = io.StringIO()
    ended: list[str] = []

    async def wait() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("yes")

    task = spawn(wait(), "waiting", Log(stream))
    await asyncio.sleep(0)
    await cancel_all([task])
    assert (ended, task.cancelled(), stream.getvalue()) == (["yes"], True, "")


async def test_connections_to_one_replica_are_dropped_and_to_no_other(fetch: HttpFetch) -> None:
    open_to: list[list[asyncio.StreamWriter]] = [[], []]

    def server(mine: list[asyncio.StreamWriter]) -> Callable[..., Awaitable[None]]:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            mine.append(writer)
            while await reader.readline():
                while (await reader.readline()).strip():
                    pass
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
            mine.remove(writer)
            writer.close()

        return answer

    servers = [await asyncio.start_server(server(mine), "127.0.0.1", 0) for mine in open_to]
    urls = [f"http://127.0.0.1:{one.sockets[0].getsockname()[1]}" for one in servers]
    for url in urls:
        for path in ("/a", "/b"):
            assert (await fetch.get(url + path, 5.0)).status == 200
    assert list(map(len, open_to)) == [1, 1], "one connection, kept"
    await fetch.drop(urls[0])
    async with asyncio.timeout(20.0):
        while open_to[0]:
            await asyncio.sleep(0.001)
    assert len(open_to[1]) == 1
    assert (await fetch.get(urls[0] + "/a", 5.0)).status == 200, "it may be asked again"
    await fetch.drop(urls[0])
    await fetch.drop(urls[1])
    for one in servers:
        one.close()
