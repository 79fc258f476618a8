"""Heads that we write: what is passed on, what is ours, and one well-formed message each time."""

from __future__ import annotations

import json

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy import errors
from proxy.core import limits
from proxy.core.head import (
    client_head,
    error_answer,
    error_fields,
    local_answer,
    read_answer_head,
    valid_request_id,
)
from proxy.core.http1 import parse_request_head
from proxy.core.preamble import read_preamble

_HOST = b"host: 127.0.0.1:30000\r\n"
_NAMES = st.sampled_from(
    [b"Authorization", b"X-Api-Key", b"Accept", b"X-Request-Id", b"Connection", b"TE", b"X-Odd"]
)
_VALUES = st.binary(max_size=12).map(lambda v: bytes(c for c in v if c >= 0x20 and c != 0x7F))


def _request(*lines: bytes, line: bytes = b"POST /v1/completions?x=1 HTTP/1.1") -> bytes:
    preamble = read_preamble(b"\r\n".join((line, b"Host: client.example", *lines)))
    return preamble.upstream_head(_HOST, b"id-1", 5)


def test_the_head_for_a_replica() -> None:
    head = _request(
        b"User-Agent: a", b"Content-Length: 5", b"X-Request-Id: theirs", b"Expect: 100-continue",
        b"Connection: x-hop", b"X-Hop: 1", b"TE: trailers", b"Cookie: a", b"Cookie: b",
    )  # fmt: skip
    assert head == (
        b"POST /v1/completions?x=1 HTTP/1.1\r\nhost: 127.0.0.1:30000\r\nuser-agent: a\r\n"
        b"cookie: a\r\ncookie: b\r\ncontent-length: 5\r\nx-request-id: id-1\r\n\r\n"
    )


def test_what_overrides_a_body_never_passes() -> None:
    plain = _request(b"Accept: a", b"X-Over: 1")
    names = (
        *(b"X-Override-Rid", b"x-override-priority", b"X-OVERRIDE-Routed-Dp-Rank"),
        *(b"X-Vllm-Priority", b"x-vllm-priority"),
    )
    assert _request(*(name + b": 1" for name in names), b"Accept: a", b"X-Over: 1") == plain


def test_a_rank_that_the_proxy_chose_stands_and_a_clients_goes_on_where_it_chose_none() -> None:
    line = b"POST /v1/completions HTTP/1.1\r\nHost: h\r\nX-Data-Parallel-Rank: 1\r\nAccept: a"
    preamble = read_preamble(line)
    chosen = preamble.upstream_head(_HOST + b"x-data-parallel-rank: 3\r\n", b"id", 5)
    assert chosen == (
        b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1:30000\r\nx-data-parallel-rank: 3\r\n"
        b"accept: a\r\ncontent-length: 5\r\nx-request-id: id\r\n\r\n"
    )
    for _ in range(2):  # nothing adds up: others have the same preamble
        assert preamble.upstream_head(_HOST, b"id", 5) == chosen.replace(b": 3", b": 1")


@pytest.mark.parametrize(
    ("fields", "sent"),
    [
        ((b"X-Api-Key: k",), [b"authorization: Bearer k"]),
        ((b"X-Api-Key: k", b"Authorization: Bearer t"),
         [b"x-api-key: k", b"authorization: Bearer t"]),
        ((b"Authorization: Basic t",), [b"authorization: Basic t"]),
        ((b"Api-Key: k",), [b"api-key: k"]),
        ((), []),
    ],
)  # fmt: skip
def test_an_engine_gets_the_key_as_a_bearer_token_or_the_proxys_own_or_none(
    fields: tuple[bytes, ...], sent: list[bytes]
) -> None:
    preamble = read_preamble(b"\r\n".join((b"POST /v1/completions HTTP/1.1", b"Host: a", *fields)))
    for credential, shown in (
        (None, sent),
        (b"", []),
        (b"authorization: o\r\n", [b"authorization: o"]),
    ):
        for head in (
            preamble.upstream_head(_HOST, b"id", 5, credential),
            preamble.upstream_head(_HOST, b"id", 0, credential),
            preamble.passed_head(_HOST, b"id", 5, credential),
        ):
            lines = head.split(b"\r\n")
            secret = (b"x-api", b"auth", b"api-key")
            assert [line for line in lines if line.startswith(secret)] == shown


def test_an_error_may_say_more_beside_its_body() -> None:
    answer = error_answer(
        errors.NoReplicaError("x"), b"id", keep_alive=True, extra=[(b"x-doherty-region", b"eu")]
    )
    assert b"\r\nretry-after: 1\r\nx-doherty-region: eu\r\n" in answer


@pytest.mark.parametrize(
    ("line", "body_bytes", "length"),
    [
        (b"GET /x HTTP/1.1", 0, None),
        (b"GET /x HTTP/1.1", 3, b"3"),
        (b"POST /x HTTP/1.0", 0, b"0"),
        (b"POST /x HTTP/1.1", 12, b"12"),
    ],
)
def test_a_length_is_said_where_a_body_is_expected(
    line: bytes, body_bytes: int, length: bytes | None
) -> None:
    coding = b"\r\nHost: a\r\nTransfer-Encoding: chunked" * line.endswith(b"1.1")
    head = read_preamble(line + coding).upstream_head(_HOST, b"id", body_bytes)
    assert parse_request_head(head[:-4]).special.get(b"content-length") == length
    assert b"transfer-encoding" not in head


@given(st.lists(st.tuples(_NAMES, _VALUES), max_size=6))
def test_what_we_write_reads_as_one_request(fields: list[tuple[bytes, bytes]]) -> None:
    lines = [name + b": " + value for name, value in fields]
    try:
        head = _request(*lines)
    except errors.BadHeadError:
        return
    server = h11.Connection(h11.SERVER)
    server.receive_data(head + b"hello")
    request = server.next_event()
    assert isinstance(request, h11.Request)
    names = [name for name, _ in request.headers]
    assert names.count(b"host") == names.count(b"x-request-id") == 1
    assert names.count(b"content-length") == 1
    assert not {b"connection", b"te", b"transfer-encoding"} & set(names)
    data = server.next_event()
    assert isinstance(data, h11.Data)
    assert data.data == b"hello"
    assert isinstance(server.next_event(), h11.EndOfMessage)
    # What is written once more from what was read is the same.
    again = read_preamble(head[:-4]).upstream_head(_HOST, b"id-1", 5)
    assert again == head


def test_the_head_for_a_client() -> None:
    response = read_answer_head(
        b"HTTP/1.1 200 Fine\r\nContent-Type: a/b\r\nX-Request-Id: engine\r\nContent-Length: 5\r\n"
        b"Keep-Alive: timeout=5"
    )
    framing = b"content-length: 5\r\n"
    head = client_head(
        response, b"id-1", framing=framing, keep_alive=True, extra=[(b"x-doherty-replica", b"a")]
    )
    assert head == (
        b"HTTP/1.1 200 Fine\r\ncontent-type: a/b\r\nx-doherty-replica: a\r\nx-request-id: id-1\r\n"
        b"content-length: 5\r\n\r\n"
    )
    closing = client_head(response, b"id-1", framing=b"", keep_alive=False)
    assert closing.endswith(b"x-request-id: id-1\r\nconnection: close\r\n\r\n")


@pytest.mark.parametrize("keep_alive", [False, True])
@pytest.mark.parametrize("head_only", [False, True])
def test_an_answer_of_our_own(keep_alive: bool, head_only: bool) -> None:
    answer = local_answer(
        200, b"{}", b"id", keep_alive=keep_alive, head_only=head_only, extra=[(b"x-a", b"b")]
    )
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n")
    assert b"content-length: 2\r\nx-request-id: id\r\nx-a: b" in head
    assert (b"\r\nconnection: close" in head) is not keep_alive
    assert body == (b"" if head_only else b"{}")


def test_an_answer_may_be_of_another_kind_and_status() -> None:
    answer = local_answer(499, b"a", b"id", keep_alive=True, content_type=b"text/plain")
    assert answer.startswith(b"HTTP/1.1 499 \r\ncontent-type: text/plain\r\n")


@pytest.mark.parametrize("kind", errors.ALL_ERRORS, ids=lambda kind: kind.code)
@pytest.mark.parametrize("keep_alive", [False, True])
def test_every_error_is_answered_in_full(kind: type[errors.ProxyError], keep_alive: bool) -> None:
    answer = error_answer(kind("what to do", "model"), b"id-1", keep_alive=keep_alive)
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method="GET", target="/", headers=[("Host", "a")]))
    client.send(h11.EndOfMessage())
    client.receive_data(answer)
    response = client.next_event()
    assert isinstance(response, h11.Response)
    assert response.status_code == kind.status
    fields = dict(response.headers)
    assert fields[b"x-request-id"] == b"id-1"
    assert (fields.get(b"connection") == b"close") is (kind.closes or not keep_alive)
    data = client.next_event()
    assert isinstance(data, h11.Data)
    assert json.loads(data.data) == {
        "error": {
            "message": "what to do", "type": kind.kind, "param": "model", "code": kind.code,
        }
    }  # fmt: skip
    assert isinstance(client.next_event(), h11.EndOfMessage)


class _Patient(errors.OverloadedError):
    retry_after_s = 4000


@pytest.mark.parametrize(
    ("error", "fields"),
    [
        (errors.OverloadedError("x"), [(b"x-should-retry", b"true"), (b"retry-after", b"1")]),
        (_Patient("x"), [(b"x-should-retry", b"true"), (b"retry-after", b"120")]),
        (errors.InternalError("x"), [(b"x-should-retry", b"false")]),
        (errors.ReplicaLostError("x"), [(b"x-should-retry", b"true")]),
        (errors.UnauthorizedError("x"), [(b"www-authenticate", b"Bearer")]),
        (errors.BodyTooLargeError("x"), []),
        (errors.BadHeadError("x"), []),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_an_error_says_beside_its_body(
    error: errors.ProxyError, fields: list[tuple[bytes, bytes]]
) -> None:
    assert error_fields(error) == fields


@pytest.mark.parametrize(
    ("value", "valid"),
    [
        (b"a", True),
        (b"~!" * (limits.REQUEST_ID_BYTES_MAX // 2), True),
        (b"a" * (limits.REQUEST_ID_BYTES_MAX + 1), False),
        (None, False),
        (b"", False),
        (b"a b", False),
        (b"a\n", False),
        (b"a\x00", False),
        (b"\xc3\xa9", False),
    ],
)
def test_which_request_ids_are_kept(value: bytes | None, valid: bool) -> None:
    assert valid_request_id(value) is valid
