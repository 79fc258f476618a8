"""Chunked bodies: whatever the pieces, the same payload, the same end, and nothing else relayed."""

from __future__ import annotations

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy import errors
from proxy.core import limits
from proxy.core.chunked import BadResponse, ChunkedDecoder, ChunkFollower
from tests.conformance.reader import cut_at, octet_by_octet

_EXTENSIONS = st.sampled_from([b"", b"", b";a", b";a=b", b' ;q="x;y"', b"\t; n=\x80"])
_TRAILERS = st.lists(st.sampled_from([b"X-Sum: 1\r\n", b"Y:\r\n", b"Content-Length: 9\r\n"]))


@st.composite
def _chunked(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """Return a chunked body with its ornaments, and its payload."""
    payloads = draw(
        st.lists(st.binary(min_size=1, max_size=40) | st.sampled_from([b"0\r\n\r\n", b"\r\n"]))
    )
    wire = b""
    for payload in payloads:
        digits = draw(st.sampled_from([b"%x", b"%X", b"00%x"])) % len(payload)
        wire += digits + draw(_EXTENSIONS) + b"\r\n" + payload + b"\r\n"
    wire += draw(st.sampled_from([b"0", b"000"])) + draw(_EXTENSIONS) + b"\r\n"
    return wire + b"".join(draw(_TRAILERS)) + b"\r\n", b"".join(payloads)


_CUTS = st.lists(st.integers(0, 200), max_size=10)
_SURPLUS = st.sampled_from([b"", b"x", b"HTTP/1.1 200 OK\r\n\r\n", b"\r\n", b"0\r\n\r\n"])


def _h11_payload(chunked: bytes) -> tuple[bytes, bytes, bool]:
    """Return the payload as a client sees it, what is left, and whether it ended."""
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method="GET", target="/", headers=[("Host", "a")]))
    client.send(h11.EndOfMessage())
    client.receive_data(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked)
    assert isinstance(client.next_event(), h11.Response)
    payload = b""
    while isinstance(event := client.next_event(), h11.Data):
        payload += event.data
    if event is h11.NEED_DATA:
        return payload, b"", False
    assert isinstance(event, h11.EndOfMessage)
    assert list(event.headers) == []
    return payload, client.trailing_data[0], True


def _check_plain(relayed: bytes) -> None:
    """Nothing but sizes, data and line ends: no extension and no trailer."""
    at = 0
    while True:
        size, line_end, _ = relayed[at:].partition(b"\r\n")
        assert line_end
        assert set(size) <= set(b"0123456789abcdefABCDEF")
        at += len(size) + 2 + int(size, 16) + 2
        assert relayed[at - 2 : at] == b"\r\n"
        if not int(size, 16):
            assert at == len(relayed)
            return


@given(_chunked(), _CUTS, _SURPLUS)
def test_what_is_relayed_means_the_same(
    body: tuple[bytes, bytes], cuts: list[int], surplus: bytes
) -> None:
    wire, payload = body
    for pieces in ([wire], cut_at(wire, cuts), octet_by_octet(wire)):
        follower = ChunkFollower()
        relayed = b""
        for piece in pieces[:-1]:
            octets, after = follower.feed(piece)
            relayed += octets
            assert not follower.ended
            assert after == b""
        octets, after = follower.feed(pieces[-1] + surplus)
        assert follower.ended
        assert after == surplus
        relayed += octets
        _check_plain(relayed)
        assert _h11_payload(relayed) == (payload, b"", True)


@given(_chunked(), _CUTS, _SURPLUS)
def test_what_is_decoded_is_the_payload(
    body: tuple[bytes, bytes], cuts: list[int], surplus: bytes
) -> None:
    wire, payload = body
    for pieces in ([wire], cut_at(wire, cuts), octet_by_octet(wire)):
        decoder = ChunkedDecoder()
        for piece in pieces[:-1]:
            assert decoder.feed(piece) is None
        assert decoder.feed(pieces[-1] + surplus) == surplus
        assert decoder.body_bytes == len(payload)
        assert decoder.body() == payload
        assert decoder.body() == b""


@given(_chunked(), st.integers(0, 200))
def test_a_cut_body_stays_open_and_can_be_continued(body: tuple[bytes, bytes], place: int) -> None:
    """Up to the very end another chunk may follow what was relayed: an error event, say."""
    wire, payload = body
    cut = min(place, len(wire) - 1)
    follower = ChunkFollower()
    relayed, _ = follower.feed(wire[:cut])
    assert not follower.ended
    got, _, ended = _h11_payload(relayed)
    assert payload.startswith(got)
    assert not ended
    data_left, line_end_left = follower.chunk_left
    rest = b"x" * data_left + b"\r\n"[2 - line_end_left :] + b"3\r\nEND\r\n0\r\n\r\n"
    assert _h11_payload(relayed + rest) == (got + b"x" * data_left + b"END", b"", True)


def test_plain_chunks_are_relayed_without_a_copy() -> None:
    piece = b"5\r\nhello\r\n3\r\nab"
    octets, _ = ChunkFollower().feed(piece)
    assert octets is piece


def _refused(reader: ChunkedDecoder | ChunkFollower, pieces: list[bytes]) -> bool:
    try:
        for piece in pieces:
            reader.feed(piece)
    except (errors.BadBodyFramingError, BadResponse):
        return True
    return False


@pytest.mark.parametrize("digits", [1, limits.CHUNK_SIZE_DIGITS_MAX])
@pytest.mark.parametrize("over", [0, 1])
def test_the_bound_of_an_extension_is_the_same_in_pieces(digits: int, over: int) -> None:
    extension = b";" + b"x" * (limits.CHUNK_EXTENSION_BYTES_MAX - 1 + over)
    wire = b"1".rjust(digits, b"0") + extension + b"\r\nx\r\n0\r\n\r\n"
    for pieces in ([wire], octet_by_octet(wire)):
        assert _refused(ChunkedDecoder(), pieces) is bool(over)


@pytest.mark.parametrize("over", [0, 1])
def test_the_bound_of_trailers_is_the_same_in_pieces(over: int) -> None:
    line = b"X: " + b"y" * (limits.TRAILER_BYTES_MAX - 5 + over) + b"\r\n"
    wire = b"0\r\n" + line + b"\r\n"
    for pieces in ([wire], octet_by_octet(wire)):
        assert _refused(ChunkedDecoder(), pieces) is bool(over)


@pytest.mark.parametrize("over", [0, 1])
@pytest.mark.parametrize("start", [b"5;", b"0\r\nX: "])
def test_the_bound_of_a_followed_line_is_the_same_in_pieces(start: bytes, over: int) -> None:
    line_start = start.rpartition(b"\n")[2]
    filling = b"x" * (limits.TRAILER_BYTES_MAX - 1 - len(line_start) + over)
    wire = start + filling + b"\r\n"
    for pieces in ([wire], octet_by_octet(wire)):
        assert _refused(ChunkFollower(), pieces) is bool(over)


_ODD = st.sampled_from(
    [b"\r", b"\n", b"\r\n", b"5", b"0", b";", b" ", b"x", b"\x00", b"g", b"hello", b"0\r\n\r\n"]
)


@given(st.lists(_ODD, max_size=12).map(b"".join), _CUTS)
def test_any_octets_give_one_verdict_however_they_are_cut(wire: bytes, cuts: list[int]) -> None:
    def follow(pieces: list[bytes]) -> tuple[bool, bytes | None]:
        follower = ChunkFollower()
        surplus = b""
        try:
            for piece in pieces:
                if follower.ended:
                    surplus += piece
                else:
                    surplus = follower.feed(piece)[1]
        except BadResponse:
            return follower.ended, None
        return follower.ended, surplus

    def decode(pieces: list[bytes]) -> bytes | None:
        decoder = ChunkedDecoder()
        after: bytes | None = None
        try:
            for piece in pieces:
                if after is None:
                    after = decoder.feed(piece)
        except errors.BadBodyFramingError:
            return b"refused"
        return None if after is None else decoder.body()

    assert follow([wire]) == follow(cut_at(wire, cuts)) == follow(octet_by_octet(wire))
    assert decode([wire]) == decode(cut_at(wire, cuts)) == decode(octet_by_octet(wire))
