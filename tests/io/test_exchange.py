"""One request and its response: what each side gets, and who waits for whom."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

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
    inflight,
    queued_tokens,
    records,
)

MakeBench = Callable[..., Bench]


# --- answers of every kind ------------------------------------------------------------------------


@pytest.mark.parametrize("status", [204, 304])
async def test_an_answer_without_a_body(bench: Bench, status: int) -> None:
    client, engine = await bench.begun()
    engine.send(b"HTTP/1.1 %d Fine\r\netag: x\r\n\r\n" % status)
    got = client.answer()
    assert (got.status, got.body) == (status, b"")
    assert "content-length" not in got.fields
    assert not client.transport.is_closing()
    assert bench.upstreams.idle_count == 1


async def test_an_empty_answer(bench: Bench) -> None:
    client, engine = await bench.begun()
    engine.send(answer(b""))
    assert client.answer().fields["content-length"] == "0"
    assert bench.upstreams.idle_count == 1


async def test_chunked_octets_are_relayed_at_once_and_as_they_are(bench: Bench) -> None:
    client, engine = await bench.begun()
    engine.send(STREAM_HEAD)
    seen = client.received
    assert seen.endswith(b"\r\n\r\n")
    for event in EVENTS:
        engine.send(chunk(event))
        assert client.received == seen + chunk(event)
        seen = client.received
    engine.send(LAST_CHUNK)
    assert client.received == seen + LAST_CHUNK
    assert client.answer().complete


async def test_fields_of_one_connection_stay_there(bench: Bench) -> None:
    fields = ["connection: x-hop", "x-hop: 1", "keep-alive: timeout=5", "te: trailers", "x-end: 1"]
    client, engine = await bench.begun(chat_request(fields=[*fields, "upgrade: h2c"]))
    head = engine.received.split(b"\r\n\r\n")[0].lower()
    assert b"x-end: 1" in head
    for name in (b"connection", b"x-hop", b"keep-alive", b"te:", b"upgrade", b"host: proxy"):
        assert name not in head
    back = ["connection: x-back", "x-back: 1", "keep-alive: timeout=5", "upgrade: h2c", "x-end: 2"]
    engine.send(answer(fields=[*back, "x-request-id: theirs"]))
    got = client.answer()
    assert got.fields["x-end"] == "2"
    assert not {"connection", "x-back", "keep-alive", "upgrade"} & set(got.fields)
    assert got.fields["x-request-id"] == "req-test-00000001"


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("abc-123", True),
        ("x" * limits.REQUEST_ID_BYTES_MAX, True),
        ("x" * (limits.REQUEST_ID_BYTES_MAX + 1), False),
        ("two words", False),
        ("", False),
        (None, False),
    ],
)
async def test_a_request_id_is_the_clients_when_it_is_good(
    bench: Bench, given: str | None, kept: bool
) -> None:
    fields = [] if given is None else [f"x-request-id: {given}"]
    client, engine = await bench.begun(chat_request(fields=fields))
    due = str(given) if kept else "req-test-00000001"
    assert engine.received.count(b"x-request-id") == 1
    assert f"x-request-id: {due}\r\n".encode() in engine.received
    engine.send(answer())
    assert client.answer().fields["x-request-id"] == due


@pytest.mark.parametrize(
    ("fields", "due", "absent"),
    [
        (["x-api-key: k1"], b"authorization: Bearer k1\r\n", b"x-api-key"),
        (["authorization: Bearer k2"], b"authorization: Bearer k2\r\n", b"x-api-key"),
        (["x-api-key: k1", "authorization: Bearer k2"], b"authorization: Bearer k2\r\n", b"r k1"),
        ([], b"host:", b"authorization"),
        (["x-api-key: "], b"host:", b"authorization"),
    ],
)
async def test_engines_get_the_key_as_a_bearer_token(
    bench: Bench, fields: list[str], due: bytes, absent: bytes
) -> None:
    request = chat_request(fields=fields).replace(b"/v1/chat/completions", b"/v1/messages")
    _, engine = await bench.begun(request)
    head = engine.received.lower()
    assert due.lower() in head
    assert absent not in head
    assert head.count(b"authorization") <= 1


async def test_the_choice_is_shown_when_asked_for(make_bench: MakeBench) -> None:
    bench = make_bench(expose_routing=True)
    client, engine = await bench.begun()
    engine.send(answer())
    fields = client.answer().fields
    assert fields["x-doherty-replica"] == "a"
    assert fields["x-doherty-decision"] == "new"
    assert fields["x-doherty-region"] == "local"
    assert fields["x-doherty-overhead-us"] == "0"


async def test_tokens_are_counted_as_the_engine_reports_them(bench: Bench) -> None:
    client, engine = await bench.begun()
    usage = b'{"usage":{"prompt_tokens":7,"completion_tokens":3,"prompt_tokens_details":'
    engine.send(answer(usage + b'{"cached_tokens":5}}}'))
    client.answer()
    counts = {s.name: s.value for s in bench.plane.telemetry.samples()}
    assert counts["prompt_tokens_total"] == 7
    assert counts["generation_tokens_total"] == 3
    assert counts["prefix_cached_tokens_total"] == 5


async def test_the_first_octet_ends_the_prefill(bench: Bench) -> None:
    body = CHAT_BODY.replace(b"hello", b"word " * 400)
    client, engine = await bench.begun(chat_request(body))
    assert queued_tokens(bench.plane, "a") > 400
    engine.send(STREAM_HEAD)
    assert queued_tokens(bench.plane, "a") > 400
    engine.send(chunk(EVENTS[0]))
    assert queued_tokens(bench.plane, "a") == 0
    assert inflight(bench.plane, "a") == 1
    client.transport.hang_up()


def _post(path: str, body: bytes) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nhost: p\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


@pytest.mark.parametrize(
    ("path", "opening", "token"),
    [
        ("/v1/responses", (b"response.created", b"response.in_progress"), b"response.output_item"),
        ("/v1/messages", (b"message_start", b"ping"), b"content_block_start"),
    ],
)
async def test_what_opens_a_stream_does_not_end_the_prefill(
    bench: Bench, path: str, opening: tuple[bytes, ...], token: bytes
) -> None:
    text = b"word " * 400
    body = b'{"model":"m","stream":true,"input":"%b","messages":[{"role":"user","content":"%b"}]}'
    client, engine = await bench.begun(_post(path, body % (text, text)))
    engine.send(STREAM_HEAD)
    for name in opening:
        engine.send(chunk(b"event: %b\ndata: {}\n\n" % name))
        assert name in client.received
        assert queued_tokens(bench.plane, "a") > 400
    bench.clock.advance(2.0)
    engine.send(chunk(b"event: %b\ndata: {}\n\n" % token))
    assert queued_tokens(bench.plane, "a") == 0
    engine.send(LAST_CHUNK)
    assert client.answer().status == 200
    (first,) = (s for s in bench.plane.counters() if s.name == "time_to_first_token_seconds")
    assert first.value == pytest.approx(2.0)


_SHORT = b'{"model":"m","stream":true,"messages":[{"role":"user","content":"hi"}]}'


@pytest.mark.parametrize(
    ("octets", "due"),
    [
        (answer(), "served"),
        (STREAM_HEAD + chunk(EVENTS[0]) + LAST_CHUNK, "served"),
        (STREAM_HEAD + chunk(EVENTS[0]), "served"),  # and then the client goes
        (STREAM_HEAD, "not served"),
        (answer(status=400), "not served"),
        (answer(status=429), "refused"),
        (answer(status=500), "refused"),
        (answer(status=501), "not served"),
        (STREAM_HEAD.replace(b"200 OK", b"503 No") + chunk(EVENTS[0]) + LAST_CHUNK, "refused"),
    ],
)
async def test_only_what_was_computed_counts_as_served(
    bench: Bench, octets: bytes, due: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    picture = bench.plane.picture
    ended, release = picture.prefill_ended, picture.release

    def prefill_ended(*args: Any) -> None:
        told.append("ended")
        ended(*args)

    def released(*args: Any, served: bool, refused: bool) -> None:
        told.append("served" if served else "refused" if refused else "not served")
        release(*args, served=served, refused=refused)

    monkeypatch.setattr(picture, "prefill_ended", prefill_ended)
    monkeypatch.setattr(picture, "release", released)
    client, engine = await bench.begun(chat_request(_SHORT))
    engine.send(octets)
    client.transport.hang_up()
    assert told == (["ended", "served"] if due == "served" else [due])


async def test_a_request_that_is_refused_tries_the_replicas_of_today(make_bench: MakeBench) -> None:
    bench = make_bench(records("a"))
    bench.upstreams.refusing = {"a"}
    bench.upstreams.gate = asyncio.Event()
    client = bench.client()
    client.send(chat_request())
    await bench.settle()
    bench.publish(*records("b"))
    bench.upstreams.gate.set()
    (await bench.engine()).send(answer())
    assert client.answer().status == 200
    assert bench.upstreams.dialled == ["a", "b"]


async def test_a_look_up_asks_the_replicas_of_today(make_bench: MakeBench) -> None:
    bench = make_bench(records("a"))
    client = bench.client()
    client.send(b"GET /v1/responses/resp_1 HTTP/1.1\r\nhost: p\r\n\r\n")
    engine = await bench.engine()
    bench.publish(*records("ab"))
    engine.send(answer(b"{}", status=404))
    (await bench.engine()).send(answer())
    assert client.answer("GET").status == 200


# --- who waits for whom ---------------------------------------------------------------------------


async def test_a_slow_client_pauses_its_replica_and_nobody_elses(bench: Bench) -> None:
    slow, slow_engine = await bench.begun()
    fast, fast_engine = await bench.begun()
    slow.transport.taking = False
    slow_engine.send(STREAM_HEAD)
    piece = chunk(b"x" * 65536)
    pieces = 0
    while slow_engine.transport.is_reading():
        slow_engine.send(piece)
        fast_engine.send(STREAM_HEAD + piece if not pieces else piece)
        pieces += 1
    assert pieces * 65536 <= limits.WRITE_HIGH_WATER_BYTES + 2 * 65536
    assert fast_engine.transport.reading
    bench.sweep(601)  # the replica is not silent: it is not listened to
    assert not slow_engine.cut_off
    slow.transport.take()
    assert slow_engine.transport.is_reading()
    slow.transport.taking = True
    slow_engine.send(LAST_CHUNK)
    assert len(slow.answer().body) == pieces * 65536
    fast.transport.hang_up()


async def test_a_connection_paused_for_a_slow_client_is_read_by_the_next_one(bench: Bench) -> None:
    slow, engine = await bench.begun()
    slow.transport.taking = False
    engine.send(answer(b'"' + b"x" * (2 * limits.WRITE_HIGH_WATER_BYTES) + b'"'))
    next_client, same_engine = await bench.begun()
    assert same_engine is engine
    engine.send(answer(b"[2]"))
    assert next_client.answer().body == b"[2]"
