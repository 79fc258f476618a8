"""A client that goes is heard of even while nothing of it is read."""

from __future__ import annotations

import asyncio
import socket

import pytest

from proxy.core import limits
from tests.fakes.engine import RESET, Connection, Received, ScriptedEngine
from tests.fakes.plane import RealPlane, chat_request, until
from tests.fakes.talk import Talk, on_uvloop

AHEAD = chat_request(b'{"model":"m","x":"' + b"y" * (limits.PIPELINED_BYTES_MAX + 20_000) + b'"}')


async def hold(_: Connection, __: Received) -> None:
    await asyncio.Event().wait()


@pytest.mark.parametrize("how", ["half close", "reset"])
@on_uvloop
async def test_a_client_that_goes_with_much_sent_ahead_is_heard_of(how: str) -> None:
    async with (
        ScriptedEngine(hold) as engine,
        RealPlane([engine.record("a")]) as proxy,
        Talk(proxy.port) as talk,
    ):
        await talk.send(chat_request())
        await until(lambda: engine.requests)
        talk.writer.write(AHEAD)
        await until(lambda: any(c._reading_paused for c in proxy.connections))
        if how == "half close":
            talk.writer.write_eof()
        else:
            connected = talk.writer.get_extra_info("socket")
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            talk.writer.transport.abort()
        await until(lambda: not proxy.plane.exchanges_open)
        await until(lambda: not proxy.connections)
        assert proxy.plane.telemetry.cancellations == {"request_sent": 1}
        assert len(engine.requests) == 1


@on_uvloop
async def test_a_client_that_stays_with_much_sent_ahead_is_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "PAUSED_LOOK_S", 0.001)
    go_on = asyncio.Event()

    async def script(connection: Connection, request: Received) -> None:
        await go_on.wait()
        await connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")

    async with (
        ScriptedEngine(script) as engine,
        RealPlane([engine.record("a")]) as proxy,
        Talk(proxy.port) as talk,
    ):
        talk.writer.write(chat_request() + AHEAD + AHEAD)
        await until(lambda: any(c._reading_paused for c in proxy.connections))
        await asyncio.sleep(0.02)  # it is looked at some times
        go_on.set()
        for _ in range(3):
            assert (await talk.answer()).status == 200
        assert [len(r.body) > 1000 for r in engine.requests] == [False, True, True]
