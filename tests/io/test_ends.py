"""Requests that do not end well: clients that go, replicas that fail. Nothing stays held."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

import pytest

from proxy.core import limits
from tests.fakes.plane import (
    EVENTS,
    STREAM_HEAD,
    Bench,
    answer,
    chat_request,
    chunk,
    inflight,
    read_answers,
    records,
)

MakeBench = Callable[..., Bench]


# --- cancellation ---------------------------------------------------------------------------------

CANCELLED_STATES = ["connecting", "sent", "head begun", "streaming", "not streaming", "paused"]


@pytest.mark.parametrize("state", CANCELLED_STATES)
async def test_a_client_that_goes_takes_its_work_with_it(make_bench: MakeBench, state: str) -> None:

    bench = make_bench()
    client = bench.client()
    if state == "connecting":
        bench.upstreams.gate = asyncio.Event()
    client.send(chat_request())
    await bench.settle()
    assert inflight(bench.plane, "a") == 1
    engine = bench.upstreams.engines[-1] if bench.upstreams.engines else None
    if engine is not None:
        if state == "head begun":
            engine.send(STREAM_HEAD[:20])
        elif state == "streaming":
            engine.send(STREAM_HEAD + chunk(EVENTS[0]))
        elif state == "not streaming":
            engine.send(answer()[:-2])
        elif state == "paused":
            client.transport.taking = False
            engine.send(STREAM_HEAD + chunk(b"x" * 2 * limits.WRITE_HIGH_WATER_BYTES))
            assert not engine.transport.reading
    client.transport.hang_up()
    await bench.settle()
    assert inflight(bench.plane, "a") == 0
    assert bench.plane.exchanges_open == 0
    assert bench.upstreams.open_count == 0
    assert len(bench.tasks) == 0
    assert engine is None or engine.cut_off
    assert bench.outcomes() == {("499", "client_gone"): 1}
    states = dict(bench.plane.telemetry.cancellations)
    due = {"connecting": "connecting", "sent": "request_sent", "head begun": "request_sent"}
    assert states == {due.get(state, "response_started"): 1}
    if bench.upstreams.gate is not None:
        bench.upstreams.gate.set()
        await bench.settle()
        assert not bench.upstreams.engines


@pytest.mark.parametrize("sent", [30, len(chat_request()) - 5])
async def test_a_client_that_goes_before_its_request_is_whole(bench: Bench, sent: int) -> None:
    client = bench.client()
    client.send(chat_request()[:sent])
    client.transport.hang_up()
    await bench.settle()
    assert bench.plane.exchanges_open == 0
    assert not bench.upstreams.dialled


async def test_a_retry_under_way_is_cancelled_too(make_bench: MakeBench) -> None:

    bench = make_bench(records("ab"))
    bench.upstreams.refusing = {"a", "b"}
    bench.upstreams.gate = asyncio.Event()
    client = bench.client()
    client.send(chat_request())
    await bench.settle()
    bench.upstreams.gate.set()
    bench.upstreams.gate = asyncio.Event()
    await bench.settle()
    assert len(bench.upstreams.dialled) == 2
    client.transport.hang_up()
    await bench.settle()
    assert len(bench.tasks) == 0
    assert len(bench.plane.leases) == 0


# --- replicas that fail ---------------------------------------------------------------------------


async def test_refused_connections_are_tried_elsewhere(make_bench: MakeBench) -> None:
    bench = make_bench(records("abc"))
    bench.upstreams.refusing = {"a", "b"}
    for _ in range(2):
        client, engine = await bench.begun()
        assert engine.replica_id == "c"
        engine.send(answer())
        assert client.answer().status == 200
    assert {name for name, _ in bench.suspects} <= {"a", "b"}
    # Suspects are no candidates any more: each was dialled once at most.
    assert bench.upstreams.dialled.count("a") <= 1
    assert bench.upstreams.dialled.count("b") <= 1
    assert bench.plane.telemetry.retries["connect"] == len(bench.suspects)


async def test_when_every_replica_refuses_the_answer_names_them(make_bench: MakeBench) -> None:
    bench = make_bench(records("ab"))
    bench.upstreams.refusing = {"a", "b"}
    client = bench.client()
    client.send(chat_request() + chat_request())
    await bench.settle()
    first, second = client.answers("POST", "POST")
    assert first.status == 502
    assert b"tried a, b" in first.body
    assert first.fields["x-should-retry"] == "true"
    assert second.status == 503
    assert b"2 unreachable" in second.body
    assert sorted(bench.upstreams.dialled) == ["a", "b"]


@pytest.mark.parametrize(
    ("config", "dials"),
    [({"retry_max_retries": 1}, 2), ({"retry_max_retries": 0}, 1), ({"disable_retries": True}, 1)],
)
async def test_retries_have_a_budget(
    make_bench: MakeBench, config: dict[str, object], dials: int
) -> None:
    bench = make_bench(records("abcde"), **config)
    bench.upstreams.refusing = set("abcde")
    client = bench.client()
    client.send(chat_request())
    await bench.settle()
    assert client.answer().status == 502
    assert len(bench.upstreams.dialled) == dials


async def test_a_connection_that_is_closed_as_soon_as_it_is_made_is_a_failed_one(
    make_bench: MakeBench,
) -> None:
    bench = make_bench(records("ab"))
    bench.upstreams.closing_at_once = {"a", "b"}
    client = bench.client()
    client.send(chat_request())
    await bench.settle()
    assert client.answer().status == 502
    assert sorted(bench.upstreams.dialled) == ["a", "b"]
    assert bench.upstreams.open_count == 0


LOST = [
    pytest.param(b"", None, "replica_lost", id="close without a word"),
    pytest.param(b"HTTP/1.1 200", None, "replica_lost", id="close in the head"),
    pytest.param(b"", ConnectionResetError(), "replica_lost", id="reset"),
    pytest.param(b"", BrokenPipeError(), "replica_lost", id="broken pipe"),
]


@pytest.mark.parametrize(("octets", "error", "code"), LOST)
async def test_a_request_that_may_have_begun_is_never_repeated(
    make_bench: MakeBench, octets: bytes, error: Exception | None, code: str
) -> None:
    bench = make_bench(records("abc"))
    client, engine = await bench.begun()
    if octets:
        engine.send(octets)
    engine.transport.hang_up(error)
    await bench.settle()
    got = client.answer()
    assert got.status == 502
    assert json.loads(got.body)["error"]["code"] == code
    assert len(bench.upstreams.dialled) == 1
    assert [name for name, _ in bench.suspects] == [engine.replica_id]
    assert not client.transport.is_closing()


BAD_ANSWERS = [
    pytest.param(b"SSH-2.0-OpenSSH\r\n\r\n", id="not HTTP"),
    pytest.param(b"HTTP/1.1 200 OK\r\nx y: 1\r\n\r\n", id="space in a name"),
    pytest.param(b"HTTP/1.1 200 OK\r\nx: a\0b\r\n\r\n", id="NUL"),
    pytest.param(
        b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n", id="lengths"
    ),
    pytest.param(b"HTTP/1.1 200 OK\r\ncontent-length: +1\r\n\r\n", id="signed length"),
    pytest.param(b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\n", id="coding"),
    pytest.param(b"HTTP/1.1 101 Switching\r\nupgrade: x\r\n\r\n", id="101"),
    pytest.param(b"HTTP/1.1 100 Continue\r\n\r\n" * 9, id="endless 1xx"),
    pytest.param(b"HTTP/1.1 200 OK\r\nx: " + b"y" * limits.RESPONSE_HEAD_BYTES_MAX, id="no end"),
    pytest.param(
        b"HTTP/1.1 200 OK\r\nx: " + b"y" * limits.RESPONSE_HEAD_BYTES_MAX + b"\r\n\r\n", id="large"
    ),
]


@pytest.mark.parametrize("octets", BAD_ANSWERS)
@pytest.mark.parametrize("step", [None, 997])
async def test_a_bad_head_of_an_engine_is_502(
    bench: Bench, octets: bytes, step: int | None
) -> None:
    client, engine = await bench.begun()
    for at in range(0, len(octets), step or len(octets)):
        if not engine.cut_off:
            engine.send(octets[at : at + (step or len(octets))])
    await bench.settle()
    got = client.answer()
    assert got.status == 502
    assert json.loads(got.body)["error"]["code"] == "bad_replica_answer"
    assert engine.cut_off
    assert not client.transport.is_closing()


async def test_interim_answers_are_passed_over(bench: Bench) -> None:
    client, engine = await bench.begun()
    interim = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n"
    for octet in interim:
        engine.send(bytes([octet]))
    engine.send(interim + answer(b"[1]"))
    got = client.answer()
    assert (got.status, got.body) == (200, b"[1]")
    assert client.received.count(b"HTTP/1.1") == 1


async def test_silence_is_504_before_the_answer_and_a_cut_within_it(bench: Bench) -> None:
    mute, mute_engine = await bench.begun()
    cut, cut_engine = await bench.begun()
    cut_engine.send(STREAM_HEAD + chunk(EVENTS[0]))
    bench.sweep(599)
    assert not mute.received
    bench.sweep(2)
    await bench.settle()
    got = mute.answer()
    assert (got.status, json.loads(got.body)["error"]["code"]) == (504, "replica_timeout")
    (half,) = read_answers(cut.received, closed=True)
    assert not half.complete
    assert b"replica_timeout" in half.body
    assert mute_engine.cut_off
    assert cut_engine.cut_off


async def test_server_errors_in_a_row_make_a_suspect(make_bench: MakeBench) -> None:
    bench = make_bench(records("ab"), policy="round_robin")
    row = [500, 503, 404, 502, 500, 500, 504, 500]
    for status in [s for s in row for _ in "ab"]:
        if bench.suspects:
            break
        client, engine = await bench.begun()
        engine.send(answer(status=status if engine.replica_id == "a" else 200))
        assert client.answer().status == (status if engine.replica_id == "a" else 200)
    assert bench.suspects == [("a", "5 server errors in a row")]
    client, engine = await bench.begun()
    assert engine.replica_id == "b"
    engine.send(answer())
