"""The load maker itself: it must tell the endings apart, or the kills prove nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.fakes.load import Load, Outcome
from tests.fakes.programs import free_port

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nx-doherty-replica: demo-7\r\n\r\n"
BUSY = b'{"error": {"message": "later", "code": "draining"}}'


def chunk(event: bytes) -> bytes:
    data = b"data: " + event + b"\n\n"
    return b"%x\r\n%b\r\n" % (len(data), data)


WORD = chunk(b'{"choices": [{"delta": {"content": "word"}}]}')
LOST = chunk(b'{"error": {"message": "replica demo-7 failed", "code": "replica_lost"}}')
DONE, END = chunk(b"[DONE]"), b"0\r\n\r\n"
SPLIT = b"5\r\ndata:\r\n9\r\n [DONE]\n\n\r\n"

ANSWERS = {
    "whole": (HEAD + WORD * 3 + DONE + END, Outcome.COMPLETE),
    "an event in two chunks": (HEAD + WORD + SPLIT + END, Outcome.COMPLETE),
    "whole, and more": (HEAD + WORD + DONE + WORD[:-9], Outcome.CUT_VISIBLY),
    "no end of the message": (HEAD + WORD + DONE, Outcome.CUT_VISIBLY),
    "cut in a chunk": (HEAD + WORD + WORD[:20], Outcome.CUT_VISIBLY),
    "cut between chunks": (HEAD + WORD, Outcome.CUT_VISIBLY),
    "cut after the head": (HEAD, Outcome.CUT_VISIBLY),
    "an error, then cut": (HEAD + WORD + LOST, Outcome.CUT_VISIBLY),
    "an error, then the end": (HEAD + WORD + LOST + DONE + END, Outcome.CUT_VISIBLY),
    "ended without a word": (HEAD + WORD + END, Outcome.CUT_SILENTLY),
    "ended within an event": (HEAD + WORD + b"5\r\ndata:\r\n" + END, Outcome.CUT_SILENTLY),
    "no answer": (b"", Outcome.UNANSWERED),
    "half a head": (HEAD[:30], Outcome.UNANSWERED),
    "refused with words": (
        b"HTTP/1.1 503 S\r\nContent-Length: %d\r\n\r\n%b" % (len(BUSY), BUSY),
        Outcome.ERROR,
    ),
}


@asynccontextmanager
async def answering(answer: bytes) -> AsyncIterator[str]:
    """Listen, and answer every request with these octets and the end of the connection."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        size = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
        await reader.readexactly(size)
        writer.write(answer)
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.mark.parametrize("name", ANSWERS)
async def test_each_ending_is_told_apart(name: str) -> None:
    answer, outcome = ANSWERS[name]
    async with answering(answer) as url, Load(url, clients=1) as load:
        await load.until(lambda: bool(load.having(outcome)), name)
        await load.stop()
    assert {record.outcome for record in load.records} == {outcome}
    first = load.records[0]
    if name == "whole":
        assert (first.tokens, first.replica, first.status) == (3, "demo-7", 200)
    if name.startswith("an error"):
        assert (first.code, first.message) == ("replica_lost", "replica demo-7 failed")
    if name == "refused with words":
        assert (first.status, first.code) == (503, "draining")


async def test_a_closed_port_is_refused() -> None:
    async with Load(f"http://127.0.0.1:{free_port()}", clients=1) as load:
        await load.until(lambda: bool(load.having(Outcome.REFUSED)), "a refusal")
