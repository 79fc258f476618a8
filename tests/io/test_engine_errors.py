"""An engine's error on its way: kept until it is whole, told in the client's words, or let pass."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from typing import Any

import pytest

from proxy.core import limits
from tests.fakes.plane import (
    EVENTS,
    LAST_CHUNK,
    STREAM_HEAD,
    Answer,
    Bench,
    Client,
    Engine,
    answer,
    chat_request,
    chunk,
    records,
)

MakeBench = Callable[..., Bench]
FLAT = b'{"object":"error","message":"no","type":"BadRequestError","param":null,"code":400}'
OURS = {"message": "no", "type": "invalid_request_error", "param": None, "code": "400"}
KEPT = b'{ "error":{"message":"no","type":"x","param":null,"code":null} }'
CHUNKED = b"HTTP/1.1 400 Bad Request\r\ntransfer-encoding: chunked\r\n"


def error_of(got: Answer) -> Any:
    assert got.complete
    assert got.fields["content-type"] == "application/json"
    assert int(got.fields["content-length"]) == len(got.body)
    assert "transfer-encoding" not in got.fields
    return json.loads(got.body)["error"]


def messages(request: bytes) -> bytes:
    return request.replace(b"/v1/chat/completions", b"/v1/messages")


async def test_a_counted_error_is_told_in_openais_words(bench: Bench) -> None:
    client, engine = await bench.begun()
    engine.send(answer(FLAT, 400, ["server: uvicorn"]))
    got = client.answer()
    assert got.status == 400
    assert error_of(got) == OURS
    assert got.fields["server"] == "uvicorn"
    assert got.fields["x-request-id"] == "req-test-00000001"
    assert bench.outcomes() == {("400", "ok"): 1}
    assert bench.upstreams.idle_count == 1


@pytest.mark.parametrize("cut", [1, 7, 1000])
async def test_a_chunked_error_comes_in_any_pieces(bench: Bench, cut: int) -> None:
    client, engine = await bench.begun()
    octets = CHUNKED + b"\r\n" + chunk(FLAT[:9]) + chunk(FLAT[9:]) + b"0\r\nx-sum: 1\r\n\r\n"
    for at in range(0, len(octets), cut):
        assert client.received == b""
        engine.send(octets[at : at + cut])
    assert error_of(client.answer()) == OURS
    assert bench.upstreams.idle_count == 1


async def test_what_is_right_already_goes_out_octet_for_octet(bench: Bench) -> None:
    client, engine = await bench.begun()
    fields = ["etag: 1", "x-should-retry: false", "retry-after: 300"]
    engine.send(answer(KEPT, 429, fields))
    got = client.answer()
    assert got.body == KEPT
    assert got.fields["etag"] == "1"
    assert got.fields["x-should-retry"] == "false"
    assert got.fields["retry-after"] == "120"


async def test_an_error_without_a_body_gets_words(bench: Bench) -> None:
    client, engine = await bench.begun()
    engine.send(b"HTTP/1.1 503 Down\r\ncontent-length: 0\r\n\r\n")
    got = client.answer()
    assert got.status == 503
    assert error_of(got)["message"].startswith("the engine answered 503")
    assert (got.fields["x-should-retry"], got.fields["retry-after"]) == ("true", "1")


async def test_anthropics_clients_get_their_shape(bench: Bench) -> None:
    client, engine = await bench.begun(messages(chat_request()))
    engine.send(answer(FLAT, 400))
    got = client.answer()
    assert json.loads(got.body) == {
        "type": "error",
        "error": {"type": "invalid_request_error", "message": "no"},
    }


async def test_the_connection_goes_on_after_an_error(bench: Bench) -> None:
    client, engine = await bench.begun(chat_request() + chat_request())
    engine.send(answer(FLAT, 400))
    assert await bench.engine() is engine
    engine.send(answer(b'{"second":2}'))
    first, second = client.answers("POST", "POST")
    assert error_of(first) == OURS
    assert second.body == b'{"second":2}'
    assert len(bench.upstreams.engines) == 1


@pytest.mark.parametrize("keeps", [True, False])
async def test_a_client_of_http_1_0_gets_a_counted_error(bench: Bench, keeps: bool) -> None:
    fields = ["connection: keep-alive"] if keeps else []
    client, engine = await bench.begun(chat_request(fields=fields, minor=0))
    engine.send(CHUNKED + b"\r\n" + chunk(FLAT) + LAST_CHUNK)
    got = client.answer()
    assert error_of(got) == OURS
    assert got.fields["connection"] == ("keep-alive" if keeps else "close")
    assert client.transport.is_closing() is not keeps


async def test_an_engine_that_closes_after_its_error_is_not_used_again(bench: Bench) -> None:
    client, engine = await bench.begun()
    engine.send(answer(FLAT, 500, ["connection: close"]))
    got = client.answer()
    assert error_of(got)["type"] == "server_error"
    assert "connection" not in got.fields
    assert bench.upstreams.idle_count == 0


async def test_surplus_after_an_error_condemns_the_connection(bench: Bench) -> None:
    client, engine = await bench.begun()
    engine.send(answer(FLAT, 400) + answer(b'{"poison":1}'))
    assert error_of(client.answer()) == OURS
    assert engine.cut_off


async def test_the_choice_is_shown_with_an_error(make_bench: MakeBench) -> None:
    bench = make_bench(expose_routing=True)
    client, engine = await bench.begun()
    engine.send(answer(FLAT, 400))
    assert client.answer().fields["x-doherty-replica"] == "a"


# --- an error that does not end -------------------------------------------------------------------


async def begin_error(bench: Bench, *, counted: bool) -> tuple[Client, Engine]:
    client, engine = await bench.begun()
    octets = answer(FLAT, 400) if counted else CHUNKED + b"\r\n" + chunk(FLAT)
    engine.send(octets[:-2])
    assert client.received == b""
    return client, engine


@pytest.mark.parametrize("counted", [True, False])
async def test_an_engine_lost_within_its_error_is_a_502(bench: Bench, counted: bool) -> None:
    client, engine = await begin_error(bench, counted=counted)
    engine.transport.hang_up()
    await bench.settle()
    got = client.answer()
    assert (got.status, error_of(got)["code"]) == (502, "replica_lost")
    assert len(bench.suspects) == 1
    assert not client.transport.is_closing()


async def test_an_error_with_bad_chunks_is_a_502(bench: Bench) -> None:
    client, engine = await begin_error(bench, counted=False)
    engine.send(b"\r\nzz\r\n")
    got = client.answer()
    assert (got.status, error_of(got)["code"]) == (502, "bad_replica_answer")


async def test_an_error_that_stops_coming_is_a_504(bench: Bench) -> None:
    client, engine = await begin_error(bench, counted=True)
    bench.sweep(601)
    got = client.answer()
    assert (got.status, error_of(got)["code"]) == (504, "replica_timeout")
    assert engine.cut_off


async def test_a_client_that_leaves_meanwhile_ends_it(bench: Bench) -> None:
    client, engine = await begin_error(bench, counted=True)
    client.transport.hang_up()
    assert engine.cut_off
    assert bench.outcomes() == {("499", "client_gone"): 1}


# --- what passes as it comes ----------------------------------------------------------------------

BIG = b'"' + b"x" * limits.ENGINE_ERROR_BYTES_MAX + b'"'


async def test_a_body_too_large_to_be_an_error_passes(bench: Bench) -> None:
    client, engine = await bench.begun()
    octets = answer(BIG, 503)
    engine.send(octets[:200])
    assert client.received
    engine.send(octets[200:])
    got = client.answer()
    assert (got.status, got.body) == (503, BIG)
    assert (got.fields["x-should-retry"], got.fields["retry-after"]) == ("true", "1")


@pytest.mark.parametrize("minor", [0, 1])
async def test_a_body_that_becomes_too_large_passes_from_its_first_octet(
    bench: Bench, minor: int
) -> None:
    client, engine = await bench.begun(chat_request(minor=minor))
    engine.send(CHUNKED + b"retry-after: 500\r\n\r\n")
    half = len(BIG) // 2
    engine.send(chunk(BIG[:half]))
    assert client.received == b""
    engine.send(chunk(BIG[half:]))
    assert client.received
    engine.send(LAST_CHUNK)
    got = client.answer()
    assert (got.status, got.body) == (400, BIG)
    assert got.fields["retry-after"] == "120"


async def test_a_large_error_that_is_cut_looks_cut(bench: Bench) -> None:
    client, engine = await bench.begun()
    engine.send(CHUNKED + b"\r\n" + chunk(BIG))
    engine.transport.hang_up()
    await bench.settle()
    (got,) = client.answers()
    assert not got.complete
    assert client.transport.is_closing()


async def test_what_only_the_close_ends_passes(bench: Bench) -> None:
    # It could be a cut; telling it as a whole answer would hide that.
    client, engine = await bench.begun()
    engine.send(b"HTTP/1.1 400 Bad Request\r\n\r\n" + FLAT)
    assert client.received.endswith(FLAT)
    engine.transport.hang_up()
    await bench.settle()
    assert client.answer().body == FLAT


async def test_an_event_stream_passes(bench: Bench) -> None:
    client, engine = await bench.begun()
    engine.send(STREAM_HEAD.replace(b"200", b"500") + chunk(EVENTS[0]))
    assert client.received.endswith(chunk(EVENTS[0]))
    engine.send(LAST_CHUNK)
    assert client.answer().body == EVENTS[0]


async def test_a_compressed_error_passes(bench: Bench) -> None:
    client, engine = await bench.begun()
    body = gzip.compress(FLAT)
    engine.send(answer(body, 400, ["content-encoding: gzip"]))
    got = client.answer()
    assert got.body == body
    assert got.fields["content-encoding"] == "gzip"


async def test_an_error_within_a_stream_passes(bench: Bench) -> None:
    client, engine = await bench.begun()
    event = b"data: " + FLAT + b"\n\n"
    engine.send(STREAM_HEAD + chunk(event) + LAST_CHUNK)
    assert client.answer().body == event


# --- what one replica holds -----------------------------------------------------------------------


async def test_a_stored_answer_that_nobody_knows_is_told_too(make_bench: MakeBench) -> None:
    bench = make_bench(records("ab"))
    client = bench.client()
    client.send(b"GET /v1/responses/resp_1 HTTP/1.1\r\nhost: x\r\n\r\n")
    for _ in range(2):
        engine = await bench.engine()
        engine.send(answer(b'{"detail":"Not Found"}', 404))
    got = client.answer("GET")
    assert error_of(got) == {
        "message": "Not Found",
        "type": "not_found_error",
        "param": None,
        "code": None,
    }


# --- our own errors, for the same clients ---------------------------------------------------------


async def test_our_own_errors_speak_the_paths_dialect_too(bench: Bench) -> None:
    for request in (
        messages(chat_request(b"{")),
        b"GET /v1/messages/batches HTTP/1.1\r\nhost: x\r\n\r\n",
    ):
        client = bench.client()
        client.send(request)
        told = json.loads(client.answer().body)
        assert told["type"] == "error"
        assert told["error"]["type"] in ("invalid_request_error", "not_found_error")
        assert told["error"]["code"] in ("invalid_json", "unknown_path")


@pytest.mark.parametrize("named", [True, False])
async def test_a_cut_stream_ends_with_an_event_that_its_client_reads(
    bench: Bench, named: bool
) -> None:
    request = chat_request()
    client, engine = await bench.begun(messages(request) if named else request)
    engine.send(STREAM_HEAD + chunk(EVENTS[0]))
    engine.transport.hang_up()
    await bench.settle()
    (got,) = client.answers()
    last = got.body.removeprefix(EVENTS[0])
    assert last.startswith(b'event: error\ndata: {"type":"error"' if named else b'data: {"error"')
    assert b"replica_lost" in last
