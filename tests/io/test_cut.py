"""An answer that is cut: whoever reads it can tell, and is told why where that is safe."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest

from tests.fakes.plane import (
    EVENTS,
    LAST_CHUNK,
    STREAM_HEAD,
    Bench,
    Client,
    answer,
    chat_request,
    chunk,
)

MakeBench = Callable[..., Bench]


# --- streams that are cut -------------------------------------------------------------------------


def events_of(stream: bytes) -> Iterator[str]:
    """Read events as a browser does (HTML §9.2.6): what has no blank line yet is dropped."""
    data: list[str] = []
    *lines, _ = stream.replace(b"\r\n", b"\n").split(b"\n")
    for line in lines:
        if not line:
            if data:
                yield "\n".join(data)
            data = []
        elif line.startswith(b"data:"):
            data.append(line[5:].removeprefix(b" ").decode())


def check_cut(client: Client, sent_events: list[bytes], *, error_due: bool) -> None:
    """What came is a beginning of what was sent, then at most the error, and it has no end."""
    (got,) = client.answers()
    assert not got.complete
    events = list(events_of(got.body))
    sent = [text for event in sent_events for text in events_of(event)]
    errors = [text for text in events if '"error"' in text]
    assert events == sent[: len(events) - len(errors)] + errors
    if error_due:
        assert len(errors) == 1
    for text in errors:
        assert json.loads(text)["error"]["code"] == "replica_lost"


FRAMINGS = {
    "an event a chunk": [chunk(event) for event in EVENTS],
    "all events in one chunk": [chunk(b"".join(EVENTS))],
    "two events a chunk": [
        chunk(b"".join(EVENTS[:2])),
        chunk(b"".join(EVENTS[2:4])),
        chunk(EVENTS[4]),
    ],
    "line ends of their own": [piece for e in EVENTS for piece in (chunk(e[:-1]), chunk(b"\n"))],
    "blank lines of their own": [
        piece for e in EVENTS for piece in (chunk(e[:-2]), chunk(b"\n\n"))
    ],
    "carriage returns": [chunk(event.replace(b"\n", b"\r\n")) for event in EVENTS],
    "a long comment at the end": [chunk(EVENTS[0] + b":" + b" " * 3000 + b"\n")],
}


def between_events(chunks: list[bytes], offset: int) -> bool:
    """Whether a cut at `offset` of the body falls between two whole chunks of whole events."""
    at = 0
    for piece in chunks:
        if at == offset:
            return True
        at += len(piece)
    return at == offset


@pytest.mark.parametrize("name", list(FRAMINGS))
async def test_a_cut_stream_shows_it_at_every_offset(make_bench: MakeBench, name: str) -> None:
    bench = make_bench()
    chunks = FRAMINGS[name]
    body = b"".join(chunks) + LAST_CHUNK
    whole_events = name in ("an event a chunk", "two events a chunk", "carriage returns")
    # Every offset, but few of the long comment's: they are all alike.
    offsets = [n for n in range(len(body)) if not 300 < n < len(body) - 1000 or n % 97 == 0]
    for offset in offsets:
        bench.plane.clear("a")
        client, engine = await bench.begun()
        engine.send(STREAM_HEAD + body[:offset])
        engine.transport.hang_up()
        await bench.settle()
        error_due = whole_events and between_events(chunks, offset)
        check_cut(client, [b"".join(EVENTS)], error_due=error_due)
        assert client.transport.is_closing()
    assert bench.outcomes() == {("200", "stream_cut"): len(offsets)}


async def test_an_open_chunk_between_two_events_is_filled_up_for_the_error(bench: Bench) -> None:
    """However much of it is still to come, the error event stands on its own."""
    for left in (1, 2, 50, 150, 151, 400, 100_000):
        bench.plane.clear("a")
        client, engine = await bench.begun()
        engine.send(STREAM_HEAD + b"%x\r\n%b" % (len(EVENTS[0]) + left, EVENTS[0]))
        engine.transport.hang_up()
        await bench.settle()
        check_cut(client, EVENTS[:1], error_due=True)


async def test_a_stream_that_turns_to_garbage_is_cut(bench: Bench) -> None:
    """Octets read with the garbage were counted but not relayed: nothing can be added safely."""
    body = b"".join(map(chunk, EVENTS))
    for offset in range(len(body)):
        bench.plane.clear("a")
        client, engine = await bench.begun()
        engine.send(STREAM_HEAD + body[:offset])
        engine.send(body[offset:] + b"zz\r\n")
        await bench.settle()
        check_cut(client, EVENTS, error_due=False)
        assert engine.cut_off


async def test_a_plain_body_that_is_cut_is_shorter_than_it_said(bench: Bench) -> None:
    client, engine = await bench.begun()
    engine.send(answer(b'{"answer":"half"}')[:-5])
    engine.transport.hang_up(ConnectionResetError())
    await bench.settle()
    (got,) = client.answers()
    assert got.body == b'{"answer":"h'
    assert not got.complete
    assert client.transport.is_closing()


async def test_only_a_close_ends_a_body_without_length(bench: Bench) -> None:
    client, engine = await bench.begun()
    engine.send(b"HTTP/1.1 200 OK\r\n\r\nhalf")
    assert client.received.endswith(b"\r\n\r\nhalf")
    engine.send(b" and half")
    engine.transport.hang_up()
    await bench.settle()
    got = client.answer()
    assert got.body == b"half and half"
    assert got.fields["connection"] == "close"
    assert client.transport.is_closing()
    assert not client.transport.socket.options
    assert bench.outcomes() == {("200", "ok"): 1}


@pytest.mark.parametrize("minor", [0, 1])
async def test_where_a_close_would_look_like_the_end_the_connection_is_reset(
    bench: Bench, minor: int
) -> None:
    client, engine = await bench.begun(chat_request(minor=minor))
    if minor:
        engine.send(b"HTTP/1.1 200 OK\r\n\r\nhalf")
    else:
        engine.send(STREAM_HEAD + chunk(EVENTS[0]))
    engine.transport.hang_up(ConnectionResetError())
    await bench.settle()
    assert client.transport.aborted
    assert client.transport.socket.options  # SO_LINGER 0: a plain close would end with FIN
    assert bench.outcomes() == {("200", "stream_cut"): 1}


@pytest.mark.parametrize("ended", [False, True])
async def test_a_stream_without_framing_that_was_cut_is_not_ended_as_if_whole(
    bench: Bench, ended: bool
) -> None:
    """The engine's process is killed, and its kernel closes as if the stream were over."""
    client, engine = await bench.begun()
    events = b"".join(EVENTS if ended else EVENTS[:-1])
    engine.send(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n" + events)
    engine.transport.hang_up()
    await bench.settle()
    assert client.received.endswith(events)
    assert bool(client.transport.socket.options) == (not ended)  # SO_LINGER 0
    assert client.transport.aborted == (not ended)
    assert bench.outcomes() == {("200", "ok" if ended else "stream_cut"): 1}
