"""Heads: every vector three ways, agreement with a second reader, and what is dropped."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy import errors
from proxy.core import limits
from proxy.core.http1 import (
    HOP_BY_HOP,
    BadResponse,
    RequestHead,
    check_partial_head,
    parse_request_head,
    parse_response_head,
)
from tests.conformance import differential
from tests.conformance.differential import EXCEPTIONS, compare_answers, compare_requests
from tests.conformance.engine_vectors import ENGINE
from tests.conformance.mutate import MUTATIONS, SPLINTERS
from tests.conformance.reader import (
    Answer,
    Verdict,
    cut_at,
    octet_by_octet,
    read_requests,
    read_response,
)
from tests.conformance.vector import EngineVector, Vector
from tests.conformance.vectors import REQUESTS

# The few vectors of tens of kilobytes are dealt out in larger pieces than one octet.
_SMALL_BYTES = 4096


def _expected(vector: Vector) -> Verdict:
    return Verdict(vector.taken, vector.refused, vector.waiting)


def _bit_by_bit(octets: bytes) -> list[bytes]:
    if len(octets) <= _SMALL_BYTES:
        return octet_by_octet(octets)
    ends = range(len(octets) - 64, len(octets))
    return cut_at(octets, [*range(64), *range(64, len(octets), 251), *ends])


@pytest.mark.parametrize("vector", REQUESTS, ids=lambda vector: vector.name)
def test_request_vector(vector: Vector) -> None:
    assert read_requests([vector.octets]) == _expected(vector), vector.rule
    assert read_requests(_bit_by_bit(vector.octets)) == _expected(vector), vector.rule


_SHORT_BYTES = 160  # all pairs of cuts, and longer vectors: `python -m tests.fuzz cuts`


@pytest.mark.sweep
def test_request_vectors_at_every_single_cut() -> None:
    for vector in (v for v in REQUESTS if len(v.octets) <= _SHORT_BYTES):
        for cut in range(1, len(vector.octets)):
            got = read_requests(cut_at(vector.octets, [cut]))
            assert got == _expected(vector), (vector.name, cut)


def test_engine_vectors_at_every_single_cut() -> None:
    for vector in (v for v in ENGINE if len(v.octets) <= _SHORT_BYTES):
        for cut in range(1, len(vector.octets)):
            _check_engine_vector(vector, read_response(cut_at(vector.octets, [cut])))


@given(st.sampled_from(REQUESTS), st.lists(st.integers(0, 300), max_size=8))
def test_request_vector_at_random_cuts(vector: Vector, cuts: list[int]) -> None:
    assert read_requests(cut_at(vector.octets, cuts)) == _expected(vector)


def _check_engine_vector(vector: EngineVector, answer: Answer) -> None:
    understood = (answer.status, answer.ended, answer.surplus, answer.failed)
    assert understood == (vector.status, vector.ended, vector.surplus, vector.failed), vector.rule
    assert answer.chunked == vector.chunked
    if vector.failed:  # how much came out before depends on the pieces
        assert vector.payload.startswith(answer.payload)
    else:
        assert answer.payload == vector.payload


@pytest.mark.parametrize("vector", ENGINE, ids=lambda vector: vector.name)
def test_engine_vector(vector: EngineVector) -> None:
    _check_engine_vector(vector, read_response([vector.octets]))
    _check_engine_vector(vector, read_response(_bit_by_bit(vector.octets)))


@given(st.sampled_from(ENGINE), st.lists(st.integers(0, 120), max_size=8))
def test_engine_vector_at_random_cuts(vector: EngineVector, cuts: list[int]) -> None:
    _check_engine_vector(vector, read_response(cut_at(vector.octets, cuts)))


def test_the_vectors_are_many_and_named_once() -> None:
    names = [vector.name for vector in REQUESTS] + [vector.name for vector in ENGINE]
    assert len(set(names)) == len(names)
    assert len(REQUESTS) >= 400
    assert len(ENGINE) >= 170


@pytest.mark.parametrize(
    ("prefix", "least"),
    [("clte_", 15), ("te_", 45), ("cl_", 40), ("ch_", 80), ("f_", 40), ("host_", 30), ("hop_", 18),
     ("exp_", 6), ("rl_", 60), ("path_", 14), ("ssrf_", 15), ("foreign_", 10), ("lim_", 10)],
)  # fmt: skip
def test_every_class_has_its_vectors(prefix: str, least: int) -> None:
    of_class = [v for v in REQUESTS if v.name.startswith((prefix, "rl_" + prefix))]
    assert len(of_class) >= least


# --- a second reader ------------------------------------------------------------------------


@pytest.mark.parametrize("vector", REQUESTS, ids=lambda vector: vector.name)
def test_h11_agrees_on_what_is_accepted(vector: Vector) -> None:
    got = compare_requests(vector.octets)
    assert got.difference == ""
    assert got.taken == len(vector.taken)


@pytest.mark.parametrize("vector", ENGINE, ids=lambda vector: vector.name)
def test_h11_agrees_on_answers(vector: EngineVector) -> None:
    got = compare_answers(vector.octets)
    assert got.difference == ""
    assert got.taken == vector.ended


def test_each_exception_is_met() -> None:
    """An exception that no vector needs would hide a difference."""
    met = {name for vector in REQUESTS for name in compare_requests(vector.octets).exceptions}
    assert met == EXCEPTIONS


def test_a_difference_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that believes a length beside a coding, as some do, would be found."""

    def lax(block: bytes) -> RequestHead:
        head = parse_request_head(block.replace(b"\r\nTransfer-Encoding: chunked", b""))
        head.content_length = 3
        return head

    octets = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    assert compare_requests(octets).difference == ""
    monkeypatch.setattr(differential, "parse_request_head", lax)
    assert "against" in compare_requests(octets).difference


_SEEDS = [vector.octets for vector in REQUESTS if len(vector.octets) < 400]
_ENGINE_SEEDS = [vector.octets for vector in ENGINE if len(vector.octets) < 400]


@st.composite
def _mutated(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    octets = draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(0, 4))):
        kind = draw(st.sampled_from(MUTATIONS))
        places = draw(st.tuples(*[st.integers(0, 400)] * 3))
        splinter = draw(st.sampled_from(SPLINTERS) | st.binary(max_size=3))
        octets = kind(octets, places, splinter, draw(st.sampled_from(seeds)))
    return octets


@given(_mutated(_SEEDS))
def test_h11_agrees_on_mutations(octets: bytes) -> None:
    assert compare_requests(octets).difference == ""


@given(_mutated(_ENGINE_SEEDS))
def test_h11_agrees_on_mutated_answers(octets: bytes) -> None:
    assert compare_answers(octets).difference == ""


@given(_mutated(_SEEDS), st.lists(st.integers(0, 400), max_size=8))
def test_a_verdict_does_not_depend_on_the_pieces(octets: bytes, cuts: list[int]) -> None:
    whole = read_requests([octets])
    for pieces in (octet_by_octet(octets), cut_at(octets, cuts)):
        got = read_requests(pieces)
        assert got.taken == whole.taken
        # Two faults in one head may be met in another order; refused it is, and sooner or as soon.
        assert bool(got.refused) >= bool(whole.refused)
        if got.refused and not whole.refused:
            assert whole.waiting


@given(st.binary(max_size=200))
def test_arbitrary_octets_are_judged_and_nothing_else(octets: bytes) -> None:
    read_requests([octets])
    read_response([octets])


# --- what a head becomes --------------------------------------------------------------------


def _fields(*lines: bytes) -> bytes:
    return b"\r\n".join((b"POST /x HTTP/1.1", b"host: a", *lines))


def test_hop_by_hop_fields_and_what_connection_names_are_dropped() -> None:
    lines = [name + b": v" for name in HOP_BY_HOP - {b"connection", b"transfer-encoding"}]
    head = parse_request_head(
        _fields(
            *lines,
            b"Connection: X-Mine, keep-alive",
            b"x-mine: 1",
            b"X-MINE: 2",
            b"X-Other: 3",
            b"Transfer-Encoding: chunked",
        )
    )
    assert head.fields == [(b"host", b"a"), (b"x-other", b"3")]
    assert head.get(b"x-other") == b"3"
    assert head.get(b"x-mine") is None


@pytest.mark.parametrize(
    ("version", "connection", "keep_alive"),
    [
        (b"1.1", b"", True),
        (b"1.1", b"close", False),
        (b"1.1", b"Close , x", False),
        (b"1.1", b"keep-alive", True),
        (b"1.1", b"keep-alive, close", False),
        (b"1.0", b"", False),
        (b"1.0", b"Keep-Alive", True),
        (b"1.0", b"x", False),
    ],
)
def test_keep_alive_of_a_request(version: bytes, connection: bytes, keep_alive: bool) -> None:
    lines = [b"GET / HTTP/" + version, b"Host: a"]
    if connection:
        lines.append(b"Connection: " + connection)
    assert parse_request_head(b"\r\n".join(lines)).keep_alive is keep_alive


@pytest.mark.parametrize(
    ("version", "expect", "waits"),
    [
        (b"1.1", b"100-Continue", True),
        (b"1.1", b"100-continued", False),
        (b"1.0", b"100-continue", False),
    ],
)
def test_expectation(version: bytes, expect: bytes, waits: bool) -> None:
    block = b"POST / HTTP/" + version + b"\r\nHost: a\r\nExpect: " + expect
    assert parse_request_head(block).expects_continue is waits


@pytest.mark.parametrize(
    ("buffer", "error"),
    [
        (b"get ", errors.BadHeadError),
        (b"\x16\x03\x01", errors.BadHeadError),
        (b"GET / HTTP/1.1\n", errors.BadHeadError),
        (b"\nGET", errors.BadHeadError),
        (b"GET / HTTP/3.0\r\n", errors.VersionNotSupportedError),
        (b"GET /" + b"x" * 9000, errors.TargetTooLongError),
        (b"GET / HTTP/1.1\r\nX: y\n", errors.BadHeadError),
    ],
)
def test_a_lost_head_is_refused_before_it_is_whole(
    buffer: bytes, error: type[errors.ProxyError]
) -> None:
    with pytest.raises(error):
        check_partial_head(bytearray(buffer), 0)


@pytest.mark.parametrize("buffer", [b"P", b"POST", b"POST ", b"POST /x HT", b"\r", b"A" * 20])
def test_a_young_head_is_waited_for(buffer: bytes) -> None:
    check_partial_head(bytearray(buffer), 0)


def test_a_long_malformed_line_is_too_long_before_it_is_malformed() -> None:
    with pytest.raises(errors.TargetTooLongError):
        parse_request_head(b"GET " + b" x" * limits.TARGET_BYTES_MAX + b" HTTP/1.1\r\nHost: a")


@pytest.mark.parametrize(
    ("lines", "keep_alive"),
    [
        ((b"HTTP/1.1 200 OK", b"Content-Length: 1"), True),
        ((b"HTTP/1.1 200 OK", b"Transfer-Encoding: Chunked"), True),
        ((b"HTTP/1.1 200 OK",), False),  # its end is the close
        ((b"HTTP/1.1 204 OK",), True),
        ((b"HTTP/1.0 200 OK", b"Content-Length: 1"), False),
        ((b"HTTP/1.1 200 OK", b"Content-Length: 1", b"Connection: x, CLOSE"), False),
        ((b"HTTP/1.1 200 OK", b"Content-Length: 1", b"Connection: keep-alive"), True),
    ],
)
def test_keep_alive_of_a_response(lines: tuple[bytes, ...], keep_alive: bool) -> None:
    assert parse_response_head(b"\r\n".join(lines)).keep_alive is keep_alive


def test_a_response_keeps_its_own_fields_only() -> None:
    head = parse_response_head(
        b"HTTP/1.1 200 Fine\r\nContent-Type: Text/Event-Stream; charset=utf-8\r\nKeep-Alive: 5\r\n"
        b"Connection: X-Hop\r\nX-Hop: 1\r\nX-End: 2\r\nSet-Cookie: a\r\nSet-Cookie: b\r\n"
        b"TE: a\r\nTE: b\r\nContent-Length: 7\r\nContent-Length: 7"
    )
    assert head.event_stream
    assert (head.status, head.reason, head.content_length) == (200, b"Fine", 7)
    assert [name for name, _ in head.fields] == [
        b"content-type", b"x-end", b"set-cookie", b"set-cookie",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", [b"text/plain", b"application/json", b"text/event-strea"])
def test_what_is_no_event_stream(kind: bytes) -> None:
    assert not parse_response_head(b"HTTP/1.1 200 OK\r\nContent-Type: " + kind).event_stream


def test_a_refused_response_says_why() -> None:
    with pytest.raises(BadResponse, match="more than one content-type"):
        parse_response_head(b"HTTP/1.1 200 OK\r\nContent-Type: a\r\nContent-Type: a")
