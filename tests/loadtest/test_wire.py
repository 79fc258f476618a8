"""One answer, however its bytes are cut; and what is no answer."""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest.wire import AnswerReader, WireError, error_text


def event(value: object) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def token(text: str) -> dict[str, object]:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}


USAGE = {"prompt_tokens": 9, "completion_tokens": 3}
EVENTS = [
    event({"choices": [{"delta": {"role": "assistant", "content": ""}}]}),
    b": keep-alive\n\n",
    *[event(token(text)) for text in ("a", '"choices": [{', '{"error":1}')],
    event({"choices": [], "usage": USAGE}),
    b"data: [DONE]\n\n",
]
STREAM = b"".join(EVENTS)
HEAD = (
    b"HTTP/1.1 200 OK\r\n"
    b"content-type: text/event-stream; charset=utf-8\r\n"
    b"X-Doherty-Replica: r1\r\n"
)


def chunked(pieces: list[bytes]) -> bytes:
    body = b"".join(b"%x;ext=1\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    return body + b"0\r\ntrailer: 1\r\n\r\n"


FRAMINGS = {
    "chunked": HEAD + b"transfer-encoding: chunked\r\n\r\n" + chunked(EVENTS),
    "length": HEAD + b"content-length: %d\r\n\r\n" % len(STREAM) + STREAM,
    "interim first": b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n"
    + HEAD
    + b"content-length: %d\r\n\r\n" % len(STREAM)
    + STREAM,
    "carriage returns": HEAD
    + b"transfer-encoding: chunked\r\n\r\n"
    + chunked([e.replace(b"\n", b"\r\n") for e in EVENTS]),
    "one chunk": HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunked([STREAM]),
}


def read(data: bytes, cuts: list[int]) -> tuple[AnswerReader, bool]:
    """Feed `data` in pieces, at times 1, 2, 3, …"""
    reader = AnswerReader()
    complete = False
    edges = [0, *sorted({c % len(data) for c in cuts} - {0}), len(data)]
    for place, (start, end) in enumerate(itertools.pairwise(edges), 1):
        assert not complete
        complete = reader.feed(data[start:end], float(place))
    return reader, complete


@pytest.mark.parametrize("framing", FRAMINGS)
@settings(derandomize=True, max_examples=60, deadline=None)
@given(cuts=st.lists(st.integers(0, 2000), max_size=30))
def test_the_answer_is_the_same_however_it_is_cut(framing: str, cuts: list[int]) -> None:
    reader, complete = read(FRAMINGS[framing], cuts)
    assert complete
    assert reader.status == 200
    assert reader.done_seen
    assert reader.keep_alive
    assert reader.content_events == 3
    assert reader.usage == USAGE
    assert reader.stream_error is None
    assert reader.headers["x-doherty-replica"] == "r1"
    assert 0 < reader.first_content_s <= reader.last_content_s


def test_times_are_of_the_first_and_last_token() -> None:
    reader = AnswerReader()
    reader.feed(HEAD + b"connection: close\r\n\r\n" + EVENTS[0], 1.0)
    for place, piece in enumerate(EVENTS[1:], 2):
        reader.feed(piece, float(place))
    assert (reader.first_content_s, reader.last_content_s) == (3.0, 5.0)
    assert not reader.keep_alive
    assert reader.feed_end()


def test_usage_in_the_last_token_event_is_found() -> None:
    last = {**token("b"), "usage": USAGE}
    stream = event(token("a")) + event(last) + b"data: [DONE]\n\n"
    reader, complete = read(HEAD + b"content-length: %d\r\n\r\n" % len(stream) + stream, [])
    assert complete
    assert reader.usage == USAGE


def test_an_error_within_the_stream_is_noted() -> None:
    stream = event(token("a")) + event({"error": {"message": "engine\nlost"}})
    reader, _ = read(HEAD + b"content-length: %d\r\n\r\n" % len(stream) + stream, [])
    assert reader.stream_error == "engine lost"
    assert not reader.done_seen


def test_an_ended_connection_completes_only_what_has_no_length() -> None:
    for framing in ("chunked", "length"):
        reader, complete = read(FRAMINGS[framing][:-3], [])
        assert not complete
        assert not reader.feed_end()


def test_other_answers_keep_their_body() -> None:
    reader, complete = read(b"HTTP/1.1 503 Busy\r\ncontent-length: 4\r\n\r\nbusy", [40])
    assert complete
    assert (reader.status, reader.body, reader.streamed) == (503, b"busy", False)
    reader, complete = read(b"HTTP/1.0 204 \r\n\r\n", [])
    assert complete
    assert not reader.keep_alive


BROKEN = {
    "not http": b"SSH-2.0-x\r\n\r\n",
    "http/2": b"HTTP/2 200\r\n\r\n",
    "header without colon": b"HTTP/1.1 200 OK\r\nhello\r\n\r\n",
    "switched": b"HTTP/1.1 101 Switching\r\n\r\n",
    "length of letters": b"HTTP/1.1 200 OK\r\ncontent-length: 1_0\r\n\r\n",
    "unknown encoding": b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\n",
    "chunk size": HEAD + b"transfer-encoding: chunked\r\n\r\n0x5\r\n",
    "chunk overrun": HEAD + b"transfer-encoding: chunked\r\n\r\n1\r\nab\r\n",
    "bytes after the end": b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\nab",
    "event not json": HEAD + b"content-length: 12\r\n\r\ndata: {no}\n\n",
    "event not an object": HEAD + b"content-length: 10\r\n\r\ndata: []\n\n",
    "endless head": b"HTTP/1.1 200 OK\r\nx: " + b"a" * 70_000,
    "endless chunk line": HEAD + b"transfer-encoding: chunked\r\n\r\n1;" + b"a" * 2000,
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_answer_is_an_error(name: str) -> None:
    with pytest.raises(WireError):
        AnswerReader().feed(BROKEN[name], 1.0)


def test_events_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loadtest.wire.EVENT_BYTES_MAX", 100)
    reader = AnswerReader()
    reader.feed(HEAD + b"connection: close\r\n\r\n", 1.0)
    with pytest.raises(WireError, match="event over 100 bytes"):
        reader.feed(b"data: " + b"x" * 200, 2.0)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"error": {"message": "a  b\nc"}}, "a b c"),
        ({"object": "error", "message": "flat"}, "flat"),
        ({"error": "words"}, "words"),
        ("plain", "plain"),
    ],
    ids=["nested", "flat", "text", "no object"],
)
def test_errors_of_all_shapes_become_one_line(value: object, text: str) -> None:
    assert error_text(value) == text
