"""A cut event stream: wherever it is cut, its reader gets whole events and never a wrong one."""

from __future__ import annotations

import h11
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from proxy.core import limits
from proxy.core.chunked import ChunkFollower
from proxy.core.sse import Openings, error_ending

_ERROR = b'{"error":{"message":"replica lost"}}'
_ENDING = b"event: error\ndata: " + _ERROR + b"\n\n"
_Event = tuple[bytes, bytes]  # its name and its data


def _body_so_far(relayed: bytes) -> tuple[bytes, bool]:
    """Return what a client has of a chunked body, and whether it has ended."""
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method="GET", target="/", headers=[("Host", "a")]))
    client.send(h11.EndOfMessage())
    client.receive_data(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + relayed)
    assert isinstance(client.next_event(), h11.Response)
    body = b""
    while isinstance(event := client.next_event(), h11.Data):
        body += event.data
    return body, isinstance(event, h11.EndOfMessage)


def _events(body: bytes) -> list[_Event]:
    """Read events as the WHATWG specification has it: an incomplete last one is dropped."""
    lines = body.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    events: list[_Event] = []
    name, data = b"", list[bytes]()
    for line in lines[:-1]:  # the last has no end yet
        field, _, value = line.partition(b":")
        if not line:
            if data:
                events.append((name, b"\n".join(data)))
            name, data = b"", []
        elif field == b"data":
            data.append(value.removeprefix(b" "))
        elif field == b"event":
            name = value.removeprefix(b" ")
    return events


_LINES = st.sampled_from([b'{"a":1}', b"[DONE]", b"5", b"0", b"", b"x" * 300, b": no comment"])


@st.composite
def _streams(draw: st.DrawFn) -> tuple[bytes, list[_Event]]:
    """Return an event stream as an engine may write it, and its events."""
    end = draw(st.sampled_from([b"\n", b"\n", b"\r\n"]))
    body = b""
    for _ in range(draw(st.integers(0, 4))):
        if draw(st.booleans()):
            body += b"event: " + draw(st.sampled_from([b"ping", b"5"])) + end
        body += b"".join(b"data: " + line + end for line in draw(st.lists(_LINES, min_size=1)))
        body += end
        if draw(st.integers(0, 4)) == 0:
            body += b": ping" + end * 2
    return body, _events(body)


def _chunk(body: bytes, sizes: list[int]) -> bytes:
    wire = b""
    while body:
        size = sizes.pop() if sizes else len(body)
        wire += b"%x\r\n%b\r\n" % (len(body[:size]), body[:size])
        body = body[size:]
    return wire + b"0\r\n\r\n"


def _cut(wire: bytes, cut: int) -> tuple[bytes, bytes]:
    """Relay up to the cut; return what was relayed and what is added to it."""
    follower = ChunkFollower()
    relayed, _ = follower.feed(wire[:cut])
    return relayed, error_ending(relayed, follower.chunk_left, _ENDING)


@given(_streams(), st.lists(st.integers(1, 40), max_size=8), st.integers(0, 2000), st.data())
def test_a_reader_of_a_cut_stream_is_never_misled(
    stream: tuple[bytes, list[_Event]], sizes: list[int], place: int, data: st.DataObject
) -> None:
    body, events = stream
    wire = _chunk(body, sizes)
    cut = min(place, len(wire) - 1)
    relayed, added = _cut(wire, cut)
    got, ended = _body_so_far(relayed + added)
    assert not ended
    seen = _events(got)
    if added:
        assert seen.pop() == (b"error", _ERROR)
    assert seen == events[: len(seen)]
    # Only the end of what was relayed is kept: with less to see, the same or nothing is added.
    kept = data.draw(st.integers(0, len(relayed)))
    follower = ChunkFollower()
    follower.feed(wire[:cut])
    less = error_ending(relayed[len(relayed) - kept :], follower.chunk_left, _ENDING)
    if kept >= 30:
        assert less in (added, b"")


@given(st.lists(_LINES, min_size=1, max_size=4), st.data())
def test_between_events_that_are_chunks_the_error_is_told(
    lines: list[bytes], data: st.DataObject
) -> None:
    """As engines write: an event and its chunk in one piece."""
    chunks = [b"data: " + line + b"\n\n" for line in lines]
    wire = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)
    ends = [0]
    for chunk in chunks:
        ends.append(ends[-1] + len(b"%x" % len(chunk)) + len(chunk) + 4)
    place = data.draw(st.integers(0, len(chunks)))
    back = data.draw(st.integers(0, 2)) if place else 0  # within the line end of the chunk
    relayed, added = _cut(wire, ends[place] - back)
    assert added
    got, _ = _body_so_far(relayed + added)
    assert _events(got) == [(b"", line) for line in lines[:place]] + [(b"error", _ERROR)]


@pytest.mark.parametrize(
    ("relayed", "open_chunk", "added"),
    [
        (b"", (0, 0), True),  # nothing yet: a chunk of our own
        (b"9\r\ndata: a\n\n", (0, 2), True),
        (b"9\r\ndata: a\n\n\r", (0, 1), True),
        (b"9\r\ndata: a\n\n\r\n", (0, 0), True),
        (b"9\r\n", (9, 2), True),  # a size alone: its data can be ours
        (b"fff\r\n", (4095, 2), True),
        (b"b\r\ndata: a\n\n", (2, 2), True),
        (b"9\r\ndata: a\n", (1, 2), False),
        (b"9\r\ndata: ", (3, 2), False),
        (b"8\r\ndata: a\n", (0, 2), False),
        (b"1\r\n\n", (0, 2), False),  # what stands before it is not known to be a line end
        (b"data: a\r\n1\r\n\n", (0, 2), False),
    ],
)
def test_where_an_error_may_be_added(
    relayed: bytes, open_chunk: tuple[int, int], added: bool
) -> None:
    ending = error_ending(relayed, open_chunk, _ENDING)
    assert bool(ending) is added
    if ending:
        assert ending.count(_ENDING) == 1


@given(st.binary(max_size=60), st.integers(0, 80), st.integers(0, 2))
@example(b"", 80, 2)
def test_what_is_added_closes_the_open_chunk(relayed: bytes, left: int, line_end: int) -> None:
    expects = (left, 2) if left else (0, line_end)
    ending = error_ending(relayed, expects, _ENDING)
    if not ending:
        return
    before = b"%x\r\n" % left if left else b"1\r\nx\r\n"[: 6 - line_end]
    body, ended = _body_so_far(before + ending)
    assert not ended
    assert body.endswith(_ENDING)


# --- where a stream's first token is --------------------------------------------------------------

_NAMES = (b"response.created", b"response.in_progress")


def _named(name: bytes, data: bytes = b"{}") -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name, data)


def _framed(event: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(event), event)


_LONG_TEXT = (
    rb'{"instructions":"\\nevent: response.output_text.delta\\ndata: ' + b"x" * 5000 + b'"}'
)
_OPENING = [
    _named(_NAMES[0], _LONG_TEXT),
    b": ping\n\n",
    _named(_NAMES[1]).replace(b"\n", b"\r\n"),
    b"event:response.created\n\n",
]


@given(st.integers(1, 700), st.booleans())
def test_an_opening_is_over_with_the_first_event_of_another_name(size: int, framed: bool) -> None:
    frame = _framed if framed else bytes
    opening = b"".join(frame(event) for event in _OPENING)
    openings = Openings(_NAMES)
    for at in range(0, len(opening), size):
        assert not openings.over(opening[at : at + size])
    token = frame(_named(b"response.output_item.added"))
    pieces = [token[at : at + size] for at in range(0, len(token), size)]
    assert any(openings.over(piece) for piece in pieces)


def test_events_without_names_are_no_opening() -> None:
    openings = Openings(_NAMES)
    assert not openings.over(b"1f\r\n")
    assert openings.over(b'data: {"type": "response.created"}\n\n')


def test_an_opening_without_end_is_one_only_for_so_long() -> None:
    openings = Openings(_NAMES)
    assert not openings.over(_named(_NAMES[0], b"x" * (limits.OPENINGS_BYTES_MAX - 100)))
    assert openings.over(b"x" * 200)
    assert len(openings._line) < 100
