"""Connections to the admin listener, over real sockets: deadlines, and what is no request."""

from __future__ import annotations

import asyncio
import logging

import pytest

from tests.fakes.admin import Standing, admin
from tests.fakes.talk import Talk, on_uvloop

GET = b"GET /livez HTTP/1.1\r\nhost: localhost\r\n"
POST = b"POST /debug/route HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\n"
PATIENCE_S = 0.3


async def until_end(talk: Talk) -> bytes:
    async with asyncio.timeout(20):
        while await talk.read():
            pass
    return talk.received


@on_uvloop
async def test_a_connection_without_a_whole_head_is_closed_in_time() -> None:
    async with admin(Standing("a"), patience_s=PATIENCE_S) as listener:
        for begun in (b"", b"G", GET):
            async with Talk(listener.port) as talk:
                await talk.send(begun)
                assert await until_end(talk) == b""


@on_uvloop
async def test_octets_now_and_then_do_not_lengthen_the_deadline_of_a_head() -> None:
    async with admin(Standing("a"), patience_s=PATIENCE_S) as listener, Talk(listener.port) as talk:
        async with asyncio.TaskGroup() as group:
            ending = group.create_task(until_end(talk))
            await talk.send(GET)
            while not ending.done():
                await asyncio.sleep(PATIENCE_S / 10)
                await talk.send(b"x: y\r\n")
        assert ending.result() == b""


@on_uvloop
async def test_the_next_head_has_a_deadline_from_the_last_answer_on() -> None:
    async with admin(Standing("a"), patience_s=PATIENCE_S) as listener, Talk(listener.port) as talk:
        await talk.send(GET + b"\r\n")
        while b"alive" not in talk.received:
            assert await talk.read()
        await talk.send(GET)
        assert (await until_end(talk)).count(b"HTTP/1.1") == 1


@on_uvloop
async def test_a_body_that_does_not_come_is_answered_in_time() -> None:
    async with admin(Standing("a"), patience_s=PATIENCE_S) as listener, Talk(listener.port) as talk:
        await talk.send(POST + b"{")
        while b"request_timeout" not in talk.received:
            assert await talk.read()
        assert talk.received.startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize(
    "octets",
    [
        b"GET /livez HTTP/9\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nhost localhost\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nx: a\nb: \x1b[31m\r\nc\x00: d\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nx: " + b"a" * 20_000 + b"\r\n\r\n",
        b"\x16\x03\x01 nonsense\r\n\r\n",  # a greeting of TLS comes to many ports: nothing to tell
    ],
)
def test_what_is_no_request_is_told_in_one_line(
    octets: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    @on_uvloop
    async def told() -> None:
        async with admin(Standing("a")) as listener, Talk(listener.port) as talk:
            await talk.send(octets)
            assert b"HTTP/1.1 400 " in await until_end(talk) or b"HTTP/1.0 400 " in talk.received

    with caplog.at_level(logging.DEBUG, "doherty.admin"):
        told()
    (record,) = [each for each in caplog.records if "no request" in str(each.msg)]
    assert record.levelno == (logging.WARNING if octets.startswith(b"GET") else logging.DEBUG)
    assert not [each for each in caplog.records if each.exc_info]
    line = record.getMessage()
    assert line.startswith("127.0.0.1 sent what is no request: ")
    assert line.isprintable()
    assert len(line) < 300


def test_a_fault_of_ours_keeps_its_trace(caplog: pytest.LogCaptureFixture) -> None:
    class Faulty(Standing):
        def ready(self) -> str | None:
            raise ZeroDivisionError("a fault")

    @on_uvloop
    async def told() -> None:
        async with admin(Faulty("a")) as listener:
            assert (await listener.get("/readyz")).status == 500

    told()
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.exc_info
