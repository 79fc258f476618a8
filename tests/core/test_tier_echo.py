"""The tier in an answer: in which of them, in what of it, however its octets are cut."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.core import claim_limits
from proxy.core.chunked import ChunkedDecoder, decode_followed
from proxy.core.head import read_answer_head
from proxy.core.tier_echo import StreamEcho, WholeEcho, echo_for, told

_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.just("service_tier"), inner),
    max_leaves=6,
)
_CHUNK = {"id": "c", "object": "chat.completion.chunk", "choices": [{"delta": {"content": "hi"}}]}


@settings(max_examples=40)
@given(
    st.dictionaries(st.text() | st.just("service_tier"), _JSON),
    st.sampled_from(["chat.completion", "chat.completion.chunk", "text_completion", "response"]),
    st.sampled_from([None, 1]),
    st.booleans(),
)
def test_of_an_answer_just_the_member_at_its_top_is_another(
    members: dict[str, Any], kind: str, indent: int | None, ascii_only: bool
) -> None:
    members |= {"object": kind, "type": ""}
    document = json.dumps(members, indent=indent, ensure_ascii=ascii_only)
    got = told(document.encode(), b"flex")
    found: list[str] = []

    def _names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found[:] = [name for name, _ in pairs]  # those of the outermost come last
        return dict(pairs)

    assert json.loads(got, object_pairs_hook=_names) == members | {"service_tier": "flex"}
    assert found.count("service_tier") == 1


@pytest.mark.parametrize(
    "document",
    [
        b"[DONE]",
        b"",
        b"{}",
        b"null",
        b'{"object":"list","data":[]}',
        b'{"error":{"message":"no","service_tier":null}}',
        b'{"object":"chat.completion"',
        b'{"object":"chat.completion",}',
        b'{"object":7}',
        b'{"object":["chat.completion"]}',
        b'{"type":"response.output_text.delta","delta":"x"}',
        b'{"type":"response.completed","response":null}',
        b'{"type":"response.completed","response":{ }}',
        b'{"type":"response.completed"}',
        b'{"type":"message_start","message":{"usage":{"service_tier":"standard"}}}',
        b"\xff{",
    ],
)
def test_what_is_no_answer_stays_as_it_is(document: bytes) -> None:
    assert told(document, b"flex") == document


@pytest.mark.parametrize("before", [b'"auto"', b"null", b"  null  ", b'{"a":[1,2]}', b""])
def test_an_event_of_a_response_has_it_within_that(before: bytes) -> None:
    tier = b',"service_tier":%b' % before if before else b""
    event = (
        b'{"response":{"id":"r","object":"response","metadata":{"service_tier":"mine"}%b},'
        b'"service_tier":"not here","type":"response.completed"}' % tier
    )
    got = json.loads(told(event, b"priority"))
    assert got["service_tier"] == "not here"
    assert got["response"]["service_tier"] == "priority"
    assert got["response"]["metadata"] == {"service_tier": "mine"}


def test_an_escaped_name_is_that_name() -> None:
    nested = b'{"object":"response","metadata":{"service_tier":"auto"},"service\\u005ftier":'
    assert told(nested + b'"auto"}', b"flex") == nested + b'"flex"}'


def test_of_two_equal_objects_the_response_is_the_member_of_that_name() -> None:
    answer = b'{"id":"r","service_tier":"auto"}'
    event = b'{"type":"response.completed","copy":%b,"response":%b}'
    assert told(event % (answer, answer), b"flex") == event % (
        answer,
        answer.replace(b"auto", b"flex"),
    )


# --- streams ----------------------------------------------------------------------------------

_LINES = [
    b"data: " + json.dumps(_CHUNK).encode(),
    b"",
    b": a comment",
    b"event: response.created\r",
    b'data:{"type":"response.created","response":{"service_tier":"auto"}}\r',
    b"\r",
    b'data: {"error":{"message":"no"}}',
    b"id: 7",
    b"data: [DONE]",
    b"",
]
_STREAM = b"\n".join((*_LINES, b""))
_DUE = b"\n".join(
    (
        b"data: " + told(json.dumps(_CHUNK).encode(), b"flex"),
        *_LINES[1:4],
        b'data:{"type":"response.created","response":{"service_tier":"flex"}}\r',
        *_LINES[5:],
        b"",
    )
)


def _cut(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({cut % (len(data) + 1) for cut in cuts})
    return [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True)]


def _framed(pieces: list[bytes]) -> bytes:
    return b"".join([b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces if piece])


@settings(max_examples=40)
@given(st.lists(st.integers(0, 10_000)), st.lists(st.integers(0, 10_000)))
def test_a_stream_says_it_in_each_chunk_however_it_is_cut(
    frames: list[int], reads: list[int]
) -> None:
    framed = _framed(_cut(_STREAM, frames)) + b"0\r\n\r\n"
    echo = StreamEcho(b"flex", chunked=True)
    out = b"".join([echo.feed(piece) for piece in _cut(framed, reads)]) + echo.end()
    reader = ChunkedDecoder()
    assert reader.feed(out) == b""
    assert reader.body() == _DUE
    plain = StreamEcho(b"flex", chunked=False)
    assert b"".join([plain.feed(piece) for piece in _cut(_STREAM, reads)]) + plain.end() == _DUE


def test_an_event_goes_on_with_the_octets_that_end_it() -> None:
    echo = StreamEcho(b"flex", chunked=True)
    event = b"data: %b\n\n" % json.dumps(_CHUNK).encode()
    out = decode_followed(ChunkedDecoder(), echo.feed(_framed([event])))
    assert json.loads(out[6:])["service_tier"] == "flex"
    assert echo.feed(_framed([b"data: [DONE]\n\n"])) == _framed([b"data: [DONE]\n\n"])
    assert echo.end() == b"0\r\n\r\n"


def test_a_line_that_is_too_long_passes_and_the_next_is_read_again() -> None:
    echo = StreamEcho(b"flex", chunked=False)
    text = b"x" * 10_000
    long = [b'data: {"object":"response","text":"', *[text] * 60, b'"}\n']
    held, out = 0, b""
    for piece in long:
        passed = echo.feed(piece)
        out += passed
        held = 0 if passed else held + len(piece)
        assert held <= claim_limits.TIER_HELD_BYTES_MAX
    assert out == b"".join(long)
    assert b"flex" in echo.feed(b'data: {"object":"response"}\n')
    assert echo.end() == b""


def test_events_that_end_in_carriage_returns_alone_are_not_held() -> None:
    echo = StreamEcho(b"flex", chunked=False)
    event = b'data: {"object":"chat.completion.chunk","choices":[]}\r\r'
    assert echo.feed(event) == event
    assert echo.feed(event) == event
    assert echo.end() == b""


def test_the_beginning_of_an_event_that_never_ended_is_relayed_at_the_end() -> None:
    echo = StreamEcho(b"flex", chunked=False)
    assert echo.feed(b'data: {"object":"resp') == b""
    assert echo.end() == b'data: {"object":"resp'


# --- whole answers ----------------------------------------------------------------------------


@pytest.mark.parametrize("chunked", [True, False])
@settings(max_examples=40)
@given(cuts=st.lists(st.integers(0, 1000)))
def test_a_whole_answer_is_held_until_it_is_whole(chunked: bool, cuts: list[int]) -> None:
    body = b'{"object":"chat.completion","service_tier":null}\n'
    sent = _framed(_cut(body, cuts)) + b"0\r\n\r\n" if chunked else body
    echo = WholeEcho(b"default", chunked=chunked)
    for piece in _cut(sent, cuts):
        assert echo.feed(piece) == b""
    assert echo.holds
    out = echo.end()
    if chunked:
        out = decode_followed(ChunkedDecoder(), out)
    assert out == b'{"object":"chat.completion","service_tier":"default"}\n'


def test_a_chunked_answer_that_is_too_long_passes() -> None:
    echo = WholeEcho(b"default", chunked=True)
    pieces = [b'{"object":"response","text":"', *[b"x" * 60_000] * 6, b'"}']
    out = b"".join([echo.feed(_framed([piece])) for piece in pieces])
    assert not echo.holds
    assert decode_followed(ChunkedDecoder(), out + echo.end()) == b"".join(pieces)


@pytest.mark.parametrize(
    ("fields", "length", "due"),
    [
        (b"content-type: application/json\r\ncontent-length: 40", 40, WholeEcho),
        (b"content-type: Application/JSON; charset=utf-8\r\ncontent-length: 9", 9, WholeEcho),
        (b"content-type: application/json\r\ntransfer-encoding: chunked", -1, WholeEcho),
        (b"content-type: text/event-stream\r\ntransfer-encoding: chunked", -1, StreamEcho),
        (b"content-type: text/event-stream", -1, StreamEcho),
        (b"content-type: text/event-stream\r\ncontent-length: 400", 400, None),
        (b"content-type: application/json", -1, None),
        (b"content-type: application/json\r\ncontent-length: 0", 0, None),
        (b"content-type: application/json\r\ncontent-length: 999999", 999999, None),
        (b"content-type: text/plain\r\ncontent-length: 40", 40, None),
        (b"content-length: 40", 40, None),
        (
            b"content-type: text/event-stream\r\ntransfer-encoding: chunked\r\n"
            b"content-encoding: gzip",
            -1,
            None,
        ),
    ],
)
def test_it_is_told_where_an_answer_can_be_read_and_framed_anew(
    fields: bytes, length: int, due: type | None
) -> None:
    echo = echo_for(read_answer_head(b"HTTP/1.1 200 OK\r\n" + fields), length, b"flex")
    assert (type(echo) if echo is not None else None) == due
    assert echo_for(read_answer_head(b"HTTP/1.1 400 No\r\n" + fields), length, b"flex") is None
