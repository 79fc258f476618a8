"""The data plane on real sockets and its real loop, before engines that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from proxy.contract import ReplicaRecord
from tests.fakes.engine import (
    Connection,
    Received,
    Script,
    ScriptedEngine,
    free_port,
    reply,
    streaming,
)
from tests.fakes.plane import CHAT_BODY, RealPlane, chat_request, until
from tests.fakes.talk import Talk, ask, on_uvloop


@contextlib.asynccontextmanager
async def served(
    count: int = 1, **config: Any
) -> AsyncIterator[tuple[RealPlane, list[ScriptedEngine]]]:
    """A plane before `count` engines."""
    async with contextlib.AsyncExitStack() as stack:
        engines = [await stack.enter_async_context(ScriptedEngine()) for _ in range(count)]
        records = [engine.record(name) for name, engine in zip("abcdef", engines, strict=False)]
        yield await stack.enter_async_context(RealPlane(records, **config)), engines


# --- delivery ------------------------------------------------------------------------------------


async def close(connection: Connection, _: Received) -> None:
    connection.close()


async def reset(connection: Connection, _: Received) -> None:
    connection.reset()


async def half_a_head(connection: Connection, _: Received) -> None:
    await connection.send(b"HTTP/1.1 200 OK\r\ncontent-le")
    connection.close()


async def garbage(connection: Connection, _: Received) -> None:
    await connection.send(b"\0\1\2 what is this\r\n\r\n")


@pytest.mark.parametrize(
    ("script", "code"),
    [
        (close, "replica_lost"),
        (reset, "replica_lost"),
        (half_a_head, "replica_lost"),
        (garbage, "bad_replica_answer"),
    ],
)
@pytest.mark.parametrize("warm", [False, True])
@on_uvloop
async def test_a_request_that_an_engine_took_is_delivered_once(
    script: Callable[[Connection, Received], Awaitable[None]], code: str, *, warm: bool
) -> None:
    async with served(3) as (proxy, engines):
        if warm:
            assert (await ask(proxy.port, chat_request())).status == 200
        taken = sum(len(engine.requests) for engine in engines)
        for engine in engines:
            engine.script = script
        got = await ask(proxy.port, chat_request())
        assert got.status == 502
        assert json.loads(got.body)["error"]["code"] == code
        assert sum(len(engine.requests) for engine in engines) == taken + 1
        assert len(proxy.suspects) == 1


@on_uvloop
async def test_a_refused_request_is_tried_on_the_others() -> None:
    async with ScriptedEngine() as engine:
        dead = [
            ReplicaRecord(replica_id=name, url=f"http://127.0.0.1:{await free_port()}")
            for name in "ab"
        ]
        async with RealPlane([*dead, engine.record("c")]) as proxy:
            for n in range(20):
                body = CHAT_BODY.replace(b"hello", b"%d" % n)
                assert (await ask(proxy.port, chat_request(body))).status == 200
            assert len(engine.requests) == 20
            assert sorted(name for name, _ in proxy.suspects) == ["a", "b"]


@on_uvloop
async def test_a_connection_that_cannot_be_made_in_time_is_a_failed_one() -> None:
    """A listener whose queue is full takes no connection and refuses none."""
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        port = full.getsockname()[1]
        fillers = [socket.socket() for _ in range(4)]
        try:
            for filler in fillers:
                filler.setblocking(False)
                filler.connect_ex(("127.0.0.1", port))
            record = ReplicaRecord(replica_id="a", url=f"http://127.0.0.1:{port}", models=("m",))
            async with RealPlane([record], connect_timeout_secs=0.1) as proxy:
                got = await ask(proxy.port, chat_request())
                assert got.status == 502
                assert proxy.suspects == [("a", "connect timed out")]
        finally:
            for filler in fillers:
                filler.close()


# --- connections ---------------------------------------------------------------------------------


@on_uvloop
async def test_connections_are_kept_on_both_sides() -> None:
    async with served() as (proxy, (engine,)), Talk(proxy.port) as talk:
        for _ in range(5):
            await talk.send(chat_request())
            assert (await talk.answer()).status == 200
        assert engine.connections_total == 1
        assert proxy.plane.telemetry.connections_total == 1


@on_uvloop
async def test_an_idle_connection_that_the_engine_closed_is_not_used() -> None:
    """Even when the close has arrived and the loop has not read it yet."""

    async def reply_and_close(connection: Connection, request: Received) -> None:
        await reply(connection, request)
        connection.close()

    async with served() as (proxy, (engine,)), Talk(proxy.port) as talk:
        engine.script = reply_and_close
        for n in range(10):
            await talk.send(chat_request())
            assert (await talk.answer()).status == 200
            await until(lambda: not engine.connections_open)
            assert len(engine.requests) == n + 1
        assert not proxy.suspects
        assert proxy.plane.upstreams.idle_count == 0


@on_uvloop
async def test_an_unsolicited_answer_never_reaches_the_next_client() -> None:
    async def reply_twice(connection: Connection, request: Received) -> None:
        await reply(connection, request)
        await connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\nx-poison: 1\r\n\r\npoison")

    async with served() as (proxy, (engine,)), Talk(proxy.port) as talk:
        engine.script = reply_twice
        for _ in range(10):
            await talk.send(chat_request())
            got = await talk.answer()
            assert got.body == b'{"received":%d}' % len(CHAT_BODY)
            assert "x-poison" not in got.fields
        assert engine.connections_total == 10
        await until(lambda: proxy.plane.telemetry.unsolicited_total == 10)


# --- bodies --------------------------------------------------------------------------------------

SIZES = [1, 1000, 65_536, 65_537, 1_000_000, 8_000_000]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("chunked", [False, True])
@on_uvloop
async def test_a_body_arrives_as_it_was_sent(size: int, *, chunked: bool) -> None:
    text = os.urandom((size + 1) // 2).hex()[:size].encode()
    body = b'{"model":"m","prompt":"%b"}' % text
    if chunked:
        steps = range(0, len(body), 100_000)
        pieces = [body[at : at + 100_000] for at in steps]
        framed = b"".join(b"%X;x=y\r\n%b\r\n" % (len(p), p) for p in pieces) + b"0\r\nt: 1\r\n\r\n"
        head = b"POST /v1/completions HTTP/1.1\r\nhost: p\r\ntransfer-encoding: chunked\r\n\r\n"
        octets = head + framed
    else:
        octets = chat_request(body).replace(b"/v1/chat/completions", b"/v1/completions")
    async with served() as (proxy, (engine,)):
        got = await ask(proxy.port, octets)
        assert got.body == b'{"received":%d}' % len(body)
        assert len(engine.requests) == 1
        due, sent = hashlib.sha256(body).digest(), hashlib.sha256(engine.requests[0].body).digest()
        assert sent == due
        assert engine.requests[0].fields["content-length"] == str(len(body))
        assert "transfer-encoding" not in engine.requests[0].fields


@pytest.mark.parametrize("size", [1, 100_000, 8_000_000])
@pytest.mark.parametrize("framing", ["counted", "chunked", "until close"])
@on_uvloop
async def test_an_answer_arrives_as_it_was_sent(size: int, framing: str) -> None:
    body = os.urandom(size)

    async def script(connection: Connection, _: Received) -> None:
        head = b"HTTP/1.1 200 OK\r\n"
        if framing == "counted":
            await connection.send(head + b"content-length: %d\r\n\r\n" % size + body)
        elif framing == "chunked":
            await connection.send(head + b"transfer-encoding: chunked\r\n\r\n")
            for at in range(0, size, 70_000):
                piece = body[at : at + 70_000]
                await connection.send(b"%x\r\n%b\r\n" % (len(piece), piece))
            await connection.send(b"0\r\n\r\n")
        else:
            await connection.send(head + b"\r\n" + body)
            connection.close()

    async with served() as (proxy, (engine,)):
        engine.script = script
        got = await ask(proxy.port, chat_request())
        assert got.complete
        assert hashlib.sha256(got.body).digest() == hashlib.sha256(body).digest()


@on_uvloop
async def test_a_slow_reader_holds_its_engine_back_and_loses_nothing() -> None:
    size = 24_000_000
    sent = 0

    async def script(connection: Connection, _request: Received) -> None:
        nonlocal sent
        await connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size)
        for _ in range(size // 100_000):
            await connection.send(b"x" * 100_000)
            sent += 100_000

    async with served() as (proxy, (engine,)), Talk(proxy.port) as slow:
        engine.script = script
        slow.writer.transport.pause_reading()  # type: ignore[attr-defined]  # of its read half
        await slow.send(chat_request())
        before = -1
        while before != sent:  # until nothing moves any more
            before = sent
            await asyncio.sleep(0.05)
        assert sent < size
        engine.script = reply
        assert (await ask(proxy.port, chat_request())).status == 200
        slow.writer.transport.resume_reading()  # type: ignore[attr-defined]
        assert len((await slow.answer()).body) == size


# --- ends ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("minor", [0, 1])
@pytest.mark.parametrize("framing", ["chunked", "until close"])
@on_uvloop
async def test_a_cut_answer_never_looks_whole(minor: int, framing: str) -> None:
    async def cut(connection: Connection, _: Received) -> None:
        head = b"HTTP/1.1 200 OK\r\n"
        if framing == "chunked":
            await connection.send(head + b"transfer-encoding: chunked\r\n\r\n4\r\nhalf\r\n")
        else:
            await connection.send(head + b"\r\nhalf")
        await flush.wait()
        connection.reset()

    flush = asyncio.Event()
    async with served() as (proxy, (engine,)), Talk(proxy.port) as talk:
        engine.script = cut
        await talk.send(chat_request(minor=minor))
        await talk.read_until(b"half")
        flush.set()
        await talk.read_to_end()
        by_length = framing == "chunked" and minor == 1
        assert talk.ended == ("eof" if by_length else "reset")
        assert not talk.received.endswith(b"0\r\n\r\n")


@on_uvloop
async def test_a_cut_stream_ends_with_an_error_event() -> None:
    async def cut(connection: Connection) -> None:
        connection.reset()

    async with served() as (proxy, (engine,)), Talk(proxy.port) as talk:
        engine.script = streaming(b"data: 1\n\n", then=cut)
        await talk.send(chat_request())
        await talk.read_to_end()
        assert talk.ended == "eof"
        error = talk.received.split(b"data: ")[-1]
        assert json.loads(error.split(b"\n")[0])["error"]["code"] == "replica_lost"
        assert not talk.received.endswith(b"0\r\n\r\n")


@on_uvloop
async def test_a_client_that_goes_stops_its_engine() -> None:
    async def forever(connection: Connection) -> None:
        while True:
            await connection.send(b"8\r\ndata: x\n\r\n")
            await asyncio.sleep(0.001)

    async with served() as (proxy, (engine,)):
        engine.script = streaming(b"data: 1\n\n", then=forever)
        for wait_for in (b"data: 1", b""):
            async with Talk(proxy.port) as talk:
                await talk.send(chat_request())
                await talk.read_until(wait_for)
        await until(lambda: not engine.connections_open)
        await until(lambda: proxy.plane.exchanges_open == 0)


@on_uvloop
async def test_an_early_answer_reaches_a_client_that_is_still_sending() -> None:
    """A refusal before the body must not be lost to a reset by the octets that follow."""
    async with served(api_key="k") as (proxy, _), Talk(proxy.port) as talk:
        body = b"x" * 3_000_000
        await talk.send(chat_request(body))
        got = await talk.answer()
        assert (got.status, talk.ended) == (401, None)
        await talk.read_to_end()
        assert talk.ended == "eof"


@on_uvloop
async def test_an_engine_that_answers_before_it_took_the_body() -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 413 Too Large\r\ncontent-length: 2\r\n\r\nno")
            await reader.read()
        finally:
            writer.transport.abort()
            left.set()

    left = asyncio.Event()

    server = await asyncio.start_server(refuse, "127.0.0.1", 0, limit=65536)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    record = ReplicaRecord(replica_id="a", url=url, models=("m",))
    async with server, RealPlane([record]) as proxy:
        body = CHAT_BODY[:-1] + b" " * 20_000_000 + b"}"
        got = await ask(proxy.port, chat_request(body))
        assert (got.status, json.loads(got.body)["error"]["message"]) == (413, "no")
        assert proxy.plane.upstreams.idle_count == 0
        await left.wait()


@on_uvloop
async def test_many_at_once_each_get_their_own_answer() -> None:
    async def echo(connection: Connection, request: Received) -> None:
        await asyncio.sleep(0)
        word = request.body.split(b'"content":"')[1].split(b'"')[0]
        await connection.send(
            b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(word), word)
        )

    async def one(port: int, name: int) -> None:
        async with Talk(port) as talk:
            for turn in range(10):
                word = b"%d-%d" % (name, turn)
                await talk.send(chat_request(CHAT_BODY.replace(b"hello", word)))
                assert (await talk.answer()).body == word

    async with served(3) as (proxy, engines):
        for engine in engines:
            engine.script = echo
        await asyncio.gather(*(one(proxy.port, name) for name in range(20)))
        assert sum(len(engine.requests) for engine in engines) == 200
        assert proxy.plane.telemetry.connections_total == 20


def moody(draw: random.Random) -> Script:
    """Return a script that closes, resets, answers or streams, as drawn."""

    async def script(connection: Connection, request: Received) -> None:
        mood = draw.random()
        if mood < 0.1:
            connection.close()
        elif mood < 0.2:
            connection.reset()
        elif mood < 0.6:
            await reply(connection, request)
        else:
            await streaming(*[b"data: x\n\n"] * draw.randint(1, 5))(connection, request)

    return script


async def hasty(port: int, draw: random.Random) -> None:
    """Send a part of a request, perhaps wait a moment, and go."""
    async with Talk(port) as talk:
        request = chat_request()
        with contextlib.suppress(TimeoutError, ConnectionError):
            await talk.send(request[: draw.randint(1, len(request))])
            if draw.random() < 0.5:
                await asyncio.wait_for(talk.read(), 0.02)


@on_uvloop
async def test_random_aborts_leave_nothing_behind() -> None:
    """Clients and engines that go at any moment: every account comes back to zero."""
    draw = random.Random(7)
    async with served(2) as (proxy, engines):
        for engine in engines:
            engine.script = moody(draw)
        for _ in range(15):
            for name in "ab":  # no probe runs here that would clear them
                proxy.plane.clear(name)
            await asyncio.gather(*(hasty(proxy.port, draw) for _ in range(20)))
        await until(lambda: proxy.plane.exchanges_open == 0 and not proxy.connections)
        assert len(proxy.plane.leases) == 0
