"""What is refused, when, and what becomes of the connection."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from proxy.contract import ReplicaRecord, ReplicaState
from proxy.core import limits
from tests.fakes.plane import (
    CHAT_BODY,
    EVENTS,
    LAST_CHUNK,
    STREAM_HEAD,
    Bench,
    answer,
    chat_request,
    chunk,
)

MakeBench = Callable[..., Bench]
GET_HEALTH = b"GET /health HTTP/1.1\r\nhost: p\r\n\r\n"


CHUNKED = (
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: p\r\ntransfer-encoding: chunked\r\n\r\n"
    + b"%x\r\n%b\r\n0\r\n\r\n" % (len(CHAT_BODY), CHAT_BODY)
)


# --- refusals -------------------------------------------------------------------------------------

REFUSED_HEADS = [
    pytest.param(b"GET /nope HTTP/1.1\r\nhost: p\r\n\r\n", 404, "unknown_path", id="path"),
    pytest.param(
        b"GET /v1/completions HTTP/1.1\r\nhost: p\r\n\r\n", 405, "method_not_allowed", id="method"
    ),
    pytest.param(b"GET /v1/models/x HTTP/1.1\r\nhost: p\r\n\r\n", 404, "model_not_found", id="m"),
]


@pytest.mark.parametrize(("octets", "status", "code"), REFUSED_HEADS)
async def test_a_refusal_without_a_body_keeps_the_connection(
    bench: Bench, octets: bytes, status: int, code: str
) -> None:
    client = bench.client()
    client.send(octets + GET_HEALTH)
    await bench.settle()
    refused, healthy = client.answers("GET", "GET")
    assert refused.status == status
    assert b'"code":"%b"' % code.encode() in refused.body
    assert "connection" not in refused.fields
    assert healthy.status == 200
    assert bench.outcomes()[str(status), code] == 1


LONG = b"x" * 2 * limits.HEAD_BYTES_MAX
TOO_MUCH = [
    pytest.param(b"GET /" + LONG + b" HTTP/1.1\r\nhost: p\r\n\r\n", 414, id="target"),
    pytest.param(b"GET / HTTP/1.1\r\nhost: p\r\nx: " + LONG + b"\r\n\r\n", 431, id="value"),
    pytest.param(b"GET / HTTP/1.1\r\nhost: p\r\nx: " + LONG, 431, id="no end"),
    pytest.param(b"GET / HTTP/1.1\nx: " + LONG + b"\r\n\r\n", 400, id="bare line end"),
    pytest.param(b"GET / HTTP/1.1\r\nx: " + LONG + b"\n\r\n\r\n", 431, id="one beyond the limit"),
    pytest.param(LONG, 400, id="no request"),
    pytest.param(LONG + b"\r\n\r\n", 400, id="no request, with an end"),
]


@pytest.mark.parametrize(("octets", "status"), TOO_MUCH)
@pytest.mark.parametrize("size", [100, 9000, limits.HEAD_BYTES_MAX - 1, 1 << 20])
async def test_what_is_too_much_is_refused_alike_however_it_is_cut(
    bench: Bench, octets: bytes, status: int, size: int
) -> None:
    client = bench.client()
    for begin in range(0, len(octets), size):
        if not client.received:
            client.send(octets[begin : begin + size])
    assert client.answer("GET").status == status


async def test_a_refused_head_request_has_no_body(bench: Bench) -> None:
    client = bench.client()
    client.send(b"HEAD /nope HTTP/1.1\r\nhost: p\r\n\r\nHEAD /health HTTP/1.1\r\nhost: p\r\n\r\n")
    await bench.settle()
    refused, healthy = client.answers("HEAD", "HEAD")
    assert (refused.status, healthy.status) == (404, 200)
    assert int(refused.fields["content-length"]) > 0
    assert refused.body == healthy.body == b""


REFUSED_BEFORE_BODY = [
    pytest.param({"api_key": "right"}, (), 401, "invalid_api_key", id="no key"),
    pytest.param(
        {"api_key": "right"}, ("authorization: Bearer wrong",), 401, "invalid_api_key", id="wrong"
    ),
    pytest.param(
        {"api_key": "right"}, ("authorization: Basic right",), 401, "invalid_api_key", id="basic"
    ),
    pytest.param({}, ("content-encoding: gzip",), 415, "unsupported_content_encoding", id="gzip"),
    pytest.param({"max_payload_size": 10}, (), 413, "request_too_large", id="too large"),
]


@pytest.mark.parametrize(("config", "fields", "status", "code"), REFUSED_BEFORE_BODY)
async def test_a_refusal_before_the_body_closes_gently(
    make_bench: MakeBench,
    config: dict[str, object],
    fields: tuple[str, ...],
    status: int,
    code: str,
) -> None:
    bench = make_bench(**config)
    client = bench.client()
    octets = chat_request(fields=fields)
    client.send(octets[:-20])
    refused = client.answer()
    assert refused.status == status
    assert b'"code":"%b"' % code.encode() in refused.body
    assert refused.fields["connection"] == "close"
    assert client.transport.eof_written
    assert not client.transport.is_closing()
    client.send(octets[-20:])  # it is read, so that the answer is not lost to a reset
    bench.sweep(limits.LINGER_S - 0.1)
    assert not client.transport.is_closing()
    bench.sweep(0.2)
    assert client.transport.is_closing()
    assert not bench.upstreams.dialled


async def test_lingering_is_bounded_in_octets(make_bench: MakeBench) -> None:
    bench = make_bench(max_payload_size=10)
    client = bench.client()
    client.send(chat_request(b"x" * 100)[:-100])
    for _ in range(limits.LINGER_BYTES_MAX // 65536):
        client.send(b"x" * 65536)
    assert client.transport.reading
    client.send(b"x")
    assert not client.transport.reading
    assert not client.transport.is_closing()  # by a reset, the client might lose the answer
    bench.sweep(limits.LINGER_S + 0.1)
    assert client.transport.is_closing()


async def test_a_flood_of_small_pieces_after_a_refusal_is_read_in_gulps(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "LINGER_PAUSE_S", 0.0)
    bench = make_bench(max_payload_size=10)
    client = bench.client()
    client.send(chat_request(b"x" * 100)[:-100])
    for _ in range(3):
        client.send(b"x")
        assert not client.transport.reading
        await bench.settle()
        assert client.transport.reading
    client.send(b"x")
    client.transport.close()
    await bench.settle()
    assert not client.transport.reading


@pytest.mark.parametrize("field", ["authorization: Bearer right", "x-api-key: right"])
async def test_the_right_key_is_let_in(make_bench: MakeBench, field: str) -> None:
    bench = make_bench(api_key="right")
    client = bench.client()
    client.send(chat_request(fields=[field]))
    (await bench.engine()).send(answer())
    assert client.answer().status == 200


async def test_health_needs_no_key_and_the_models_do(make_bench: MakeBench) -> None:
    bench = make_bench(api_key="right")
    client = bench.client()
    client.send(GET_HEALTH + b"GET /v1/models HTTP/1.1\r\nhost: p\r\n\r\n")
    await bench.settle()
    healthy, refused = client.answers("GET", "GET")
    assert (healthy.status, refused.status) == (200, 401)
    assert refused.fields["www-authenticate"] == "Bearer"


async def test_a_chunked_body_may_not_grow_too_large(make_bench: MakeBench) -> None:
    bench = make_bench(max_payload_size=100)
    client = bench.client()
    client.send(CHUNKED.split(b"\r\n\r\n")[0] + b"\r\n\r\n")
    client.send(b"64\r\n" + b"x" * 100 + b"\r\n")
    assert not client.received
    client.send(b"1\r\nx\r\n")
    assert client.answer().status == 413
    assert client.transport.eof_written


async def test_bad_framing_of_a_body_is_answered_and_closes(bench: Bench) -> None:
    client = bench.client()
    client.send(CHUNKED.split(b"\r\n\r\n")[0] + b"\r\n\r\nzz\r\n")
    assert client.answer().status == 400
    assert client.transport.eof_written


async def test_garbage_is_answered_and_closes(bench: Bench) -> None:
    client = bench.client()
    client.send(b"\x16\x03\x01\x02\x00\x01\x00")
    got = client.answer()
    assert (got.status, got.fields["connection"]) == (400, "close")
    assert bench.outcomes() == {("400", "bad_request_head"): 1}


@pytest.mark.parametrize("size", [1000, 2 * limits.HEAD_BYTES_MAX])
async def test_a_head_that_is_too_large_is_431(bench: Bench, size: int) -> None:
    """In pieces or in one, ended or not."""
    client = bench.client()
    octets = (
        b"GET /health HTTP/1.1\r\nhost: p\r\nx: "
        + b"y" * (limits.HEAD_BYTES_MAX + 3000)
        + b"\r\n\r\n"
    )
    for at in range(0, len(octets), size):
        client.send(octets[at : at + size])
        if client.received:
            break
    assert client.answer("GET").status == 431


async def test_requests_beyond_the_limit_are_429_and_health_is_not(make_bench: MakeBench) -> None:
    bench = make_bench(max_concurrent_requests=1)
    first, second, third = bench.client(), bench.client(), bench.client()
    first.send(chat_request())
    engine = await bench.engine()
    second.send(chat_request())
    third.send(GET_HEALTH)
    refused = second.answer()
    assert (refused.status, refused.fields["retry-after"]) == (429, "1")
    assert third.answer("GET").status == 200
    engine.send(answer())
    assert first.answer().status == 200


async def test_replicas_that_are_full_are_429_where_nobody_waits(make_bench: MakeBench) -> None:
    full = ReplicaRecord(replica_id="a", url="http://127.0.0.1:1", models=("m",), max_inputs=1)
    bench = make_bench((full,), queue_size=0)
    first, second = bench.client(), bench.client()
    first.send(chat_request())
    engine = await bench.engine()
    second.send(chat_request())
    await bench.settle()
    assert second.answer().status == 429
    engine.send(answer())


# --- draining -------------------------------------------------------------------------------------


async def test_while_draining_what_comes_is_served_and_is_the_last(bench: Bench) -> None:
    """A client cannot know; its request may have been on the way already."""
    busy, late, idle = bench.client(), bench.client(), bench.client()
    busy.send(chat_request())
    engine = await bench.engine()
    bench.plane.draining = True
    for client in (busy, late, idle):
        if client is not late:
            client.protocol.drain()
    assert idle.transport.closed
    assert not busy.transport.closed
    late.send(chat_request())
    other = await bench.engine()
    assert other is not engine
    other.send(answer())
    last = late.answer()
    assert (last.status, last.fields["connection"]) == (200, "close")
    assert late.transport.closed
    engine.send(answer())
    got = busy.answer()
    assert (got.status, got.fields["connection"]) == (200, "close")
    assert busy.transport.closed


async def test_an_answer_that_promised_to_go_on_keeps_its_word_while_draining(bench: Bench) -> None:
    """Its client may send the next request as it reads the end; a close would lose that."""
    client, engine = await bench.begun()
    engine.send(STREAM_HEAD + chunk(EVENTS[0]))
    bench.plane.draining = True
    engine.send(LAST_CHUNK)
    (got,) = client.answers()
    assert got.complete
    assert "connection" not in got.fields
    assert not client.transport.closed
    client.send(chat_request())
    (await bench.engine()).send(answer())
    _, last = client.answers("POST", "POST")
    assert (last.status, last.fields["connection"]) == (200, "close")
    assert client.transport.closed


@pytest.mark.parametrize(
    ("draining", "path", "status"),
    [
        (False, b"/readyz", 200),
        (True, b"/readyz", 503),
        (True, b"/livez", 200),
        (True, b"/health", 200),
    ],
)
async def test_health_paths(bench: Bench, draining: bool, path: bytes, status: int) -> None:
    bench.plane.draining = draining
    client = bench.client()
    client.send(b"GET %b HTTP/1.1\r\nhost: p\r\n\r\n" % path)
    assert client.answer("GET").status == status


async def test_who_cannot_take_it_are_the_replicas_of_the_model_that_was_asked_for(
    make_bench: MakeBench,
) -> None:
    def record(name: str, model: str, state: ReplicaState) -> ReplicaRecord:
        return ReplicaRecord(
            replica_id=name, url="http://127.0.0.1:20001", models=(model,), state=state
        )

    backoff = ReplicaState.BACKOFF
    replicas = (
        record("m-0", "m", ReplicaState.READY),
        record("v-0", "v", backoff),
        record("v-1", "v", backoff),
        record("w-0", "w", backoff),
    )
    client = make_bench(replicas=replicas).client()
    client.send(chat_request(CHAT_BODY.replace(b'"m"', b'"v"')))
    refused = client.answer()
    assert refused.status == 503
    assert b'"no replica of v can take the request now: 2 backoff"' in refused.body
