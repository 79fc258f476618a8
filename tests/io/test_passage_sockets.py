"""Files over real sockets: large ones, slow ends, ends that go, and a service that comes back."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Self

import openai
import pytest

from proxy.core import limits
from tests.fakes.engine import RESET
from tests.fakes.plane import RealPlane, assert_nothing_held, until
from tests.fakes.talk import Talk, ask, on_uvloop

MIB = 1024 * 1024
# What the kernel holds on both hops, with what the proxy may have under way, is some megabytes.
UNDER_WAY_BYTES_MAX = 24 * MIB
LARGE_BYTES = 50 * MIB


class Service:
    """A service for files that reads, counts and answers, and stands still when it is told to."""

    def __init__(self) -> None:
        self.moves = asyncio.Event()
        self.moves.set()
        self.port = 0
        self.come_bytes = 0  # of bodies
        self.sent_bytes = 0
        self.digest = hashlib.sha256()
        self.heads: list[bytes] = []
        self.gone = 0  # connections that ended before their request had come
        self.download_bytes = 0
        self._server: asyncio.Server | None = None
        self._serving: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in list(self._serving):
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)
        await self._server.wait_closed()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            self.heads.append(head)
            if head.startswith(b"POST "):
                await self._take(reader, head)
                body = json.dumps({"id": "file-1", "object": "file", "bytes": self.come_bytes})
                await self._answer(writer, body.encode())
            else:
                await self._give(writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            self.gone += 1
        except asyncio.CancelledError:
            pass  # by `__aexit__`
        finally:
            self._serving.discard(task)
            writer.transport.abort() if task.cancelling() else writer.close()

    async def _take(self, reader: asyncio.StreamReader, head: bytes) -> None:
        fields = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:-2])
        left = int(fields.get(b"content-length", b"-1"))
        while left:
            await self.moves.wait()
            if left > 0:
                data = await reader.read(min(left, 65536))
                left -= len(data)
            else:
                size = int(await reader.readuntil(b"\r\n"), 16)
                data = (await reader.readexactly(size + 2))[:-2]
                left = -1 if size else 0
            if not data and left:
                raise ConnectionResetError
            self.digest.update(data)
            self.come_bytes += len(data)

    async def _answer(self, writer: asyncio.StreamWriter, body: bytes) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\n")
        writer.write(b"content-length: %d\r\n\r\n%b" % (len(body), body))
        await writer.drain()

    async def _give(self, writer: asyncio.StreamWriter) -> None:
        size = self.download_bytes
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % size)
        while self.sent_bytes < size:
            writer.write(b"y" * 65536)
            await writer.drain()
            self.sent_bytes += 65536


@contextlib.asynccontextmanager
async def served() -> AsyncIterator[tuple[RealPlane, Service]]:
    async with Service() as service, RealPlane([], offline_url=service.url) as proxy:
        yield proxy, service


@contextlib.asynccontextmanager
async def sweeping(proxy: RealPlane) -> AsyncIterator[None]:
    """Have deadlines checked, as a worker does."""

    async def sweep() -> None:
        while True:
            await asyncio.sleep(limits.SWEEP_INTERVAL_S)
            for connection in list(proxy.connections):
                connection.check_deadline(proxy.plane.clock.now_s())

    task = asyncio.ensure_future(sweep())
    try:
        yield
    finally:
        task.cancel()


def upload(size: int, *fields: str) -> bytes:
    lines = ["POST /v1/files HTTP/1.1", "Host: a", *fields]
    return "\r\n".join([*lines, f"Content-Length: {size}" if size else "", "", ""]).encode()


async def steady(read: Callable[[], int]) -> int:
    """Wait until a count stands still; return it."""
    before = -1
    while before != (now := read()):
        before = now
        await asyncio.sleep(0.2)
    return now


@on_uvloop
async def test_the_official_client_uploads_a_large_file() -> None:
    data = b'{"custom_id":"1"}\n' * (LARGE_BYTES // 18)
    async with served() as (proxy, service):
        client = openai.AsyncOpenAI(
            api_key="k1", base_url=f"http://127.0.0.1:{proxy.port}/v1", max_retries=0
        )
        async with client:
            got = await client.files.create(file=("in.jsonl", io.BytesIO(data)), purpose="batch")
        assert got.id == "file-1"
        assert got.bytes == service.come_bytes > len(data)
        (head,) = service.heads
        assert head.startswith(b"POST /v1/files HTTP/1.1\r\n")
        assert b"\r\nauthorization: Bearer k1\r\n" in head
        assert proxy.plane.bodies_bytes == 0


@pytest.mark.parametrize("chunked", [False, True])
@on_uvloop
async def test_a_service_that_does_not_read_holds_the_client_back(*, chunked: bool) -> None:
    piece = bytes(range(256)) * 1024
    count = LARGE_BYTES // len(piece)
    async with served() as (proxy, service), Talk(proxy.port) as talk:
        service.moves.clear()
        sent = 0

        async def send() -> None:
            nonlocal sent
            coding = ("Transfer-Encoding: chunked",) if chunked else ()
            head = upload(0 if chunked else LARGE_BYTES, *coding)
            await talk.send(head.replace(b"\r\n\r\n\r\n", b"\r\n\r\n"))
            for _ in range(count):
                await talk.send(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
                sent += len(piece)
            await talk.send(b"0\r\n\r\n" if chunked else b"")

        sending = asyncio.ensure_future(send())
        assert await steady(lambda: sent) < UNDER_WAY_BYTES_MAX
        service.moves.set()
        await sending
        assert (await talk.answer()).status == 200
        assert service.come_bytes == LARGE_BYTES
        assert service.digest.digest() == hashlib.sha256(piece * count).digest()


@on_uvloop
async def test_a_client_that_does_not_read_holds_the_service_back() -> None:
    async with served() as (proxy, service), Talk(proxy.port) as talk:
        service.download_bytes = LARGE_BYTES
        await talk.send(b"GET /v1/files/file-1/content HTTP/1.1\r\nHost: a\r\n\r\n")
        assert await steady(lambda: service.sent_bytes) < UNDER_WAY_BYTES_MAX
        got = await talk.answer("GET")
        assert (got.status, len(got.body)) == (200, LARGE_BYTES)


@on_uvloop
async def test_a_client_that_leaves_within_its_upload_ends_it_there() -> None:
    async with served() as (proxy, service):
        async with Talk(proxy.port) as talk:
            await talk.send(upload(LARGE_BYTES) + b"x" * MIB)
            await until(lambda: service.come_bytes == MIB)
        await until(lambda: service.gone == 1)
        await until(lambda: proxy.plane.exchanges_open == 0)


@on_uvloop
async def test_a_client_that_leaves_while_it_is_held_back_is_missed() -> None:
    async with served() as (proxy, service):
        service.moves.clear()
        async with Talk(proxy.port) as talk:
            await talk.send(upload(LARGE_BYTES))
            talk.writer.write(b"x" * LARGE_BYTES)
            await until(lambda: len(service.heads) == 1)
            await asyncio.sleep(0.1)
            # A plain close would stand behind what it has sent, and nobody could see it.
            connected = talk.writer.get_extra_info("socket")
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        await until(lambda: proxy.plane.exchanges_open == 0)
        assert_nothing_held(proxy.plane)


@on_uvloop
async def test_a_service_that_dies_in_an_upload_and_comes_back_is_found_again() -> None:
    async with contextlib.AsyncExitStack() as stack:
        service = await stack.enter_async_context(Service())
        async with RealPlane([], offline_url=service.url) as proxy, Talk(proxy.port) as talk:
            await talk.send(upload(LARGE_BYTES) + b"x" * MIB)
            await until(lambda: service.come_bytes == MIB)
            await stack.aclose()
            got = await talk.answer()
            assert (got.status, json.loads(got.body)["error"]["code"]) == (502, "offline_lost")
            small = upload(3) + b"abc"
            got = await ask(proxy.port, small)
            assert (got.status, json.loads(got.body)["error"]["code"]) == (
                503,
                "offline_unreachable",
            )
            async with service:
                assert (await ask(proxy.port, small)).status == 200


@on_uvloop
async def test_a_refusal_reaches_a_client_that_still_sends() -> None:
    """As the service refuses what is too large: by its head, reading none of the body."""

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 Too Large\r\ncontent-length: 2\r\nconnection: close\r\n\r\nno")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server, RealPlane([], offline_url=url) as proxy:
        client = openai.AsyncOpenAI(
            api_key="k1", base_url=f"http://127.0.0.1:{proxy.port}/v1", max_retries=0
        )
        data = io.BytesIO(b"x" * LARGE_BYTES)
        async with client, sweeping(proxy):
            with pytest.raises(openai.APIStatusError) as failure:
                await client.files.create(file=("in.jsonl", data), purpose="batch")
        assert failure.value.status_code == 413


@on_uvloop
async def test_a_wrong_key_reaches_a_client_that_still_sends() -> None:
    async with Service() as service:
        async with RealPlane([], offline_url=service.url, api_key="right") as proxy:
            client = openai.AsyncOpenAI(
                api_key="wrong", base_url=f"http://127.0.0.1:{proxy.port}/v1", max_retries=0
            )
            data = io.BytesIO(b"x" * LARGE_BYTES)
            async with client:
                with pytest.raises(openai.AuthenticationError):
                    await client.files.create(file=("in.jsonl", data), purpose="batch")
        assert service.heads == []


@on_uvloop
async def test_many_at_once_do_not_hold_each_other_up() -> None:
    async def one(proxy: RealPlane, fill: Callable[[Talk], Awaitable[None]]) -> int:
        async with Talk(proxy.port) as talk:
            await fill(talk)
            return (await talk.answer()).status

    async def whole(talk: Talk) -> None:
        await talk.send(upload(MIB) + b"z" * MIB)

    async with served() as (proxy, service):
        statuses = await asyncio.gather(*(one(proxy, whole) for _ in range(24)))
        assert statuses == [200] * 24
        assert service.come_bytes == 24 * MIB
        await until(lambda: not proxy.plane.offline_links.open_count)


def test_sockets_here_are_not_larger_than_is_thought() -> None:
    """Else the tests above would see octets that lie in the kernel as read without measure."""
    with socket.socket() as probe:
        assert probe.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) < UNDER_WAY_BYTES_MAX // 4
