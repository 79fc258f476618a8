"""What keeps one bad part from spoiling the rest: silence, want of means, bodies, connections."""

from __future__ import annotations

import errno
from collections.abc import Callable

import msgspec
import orjson
import pytest

from proxy.contract import ReplicaState
from proxy.core import limits
from tests.fakes.plane import (
    EVENTS,
    STREAM_HEAD,
    Answer,
    Bench,
    answer,
    assert_nothing_held,
    chat_request,
    chunk,
    records,
)

MakeBench = Callable[..., Bench]


def code(got: Answer) -> str:
    return str(orjson.loads(got.body)["error"]["code"])


async def test_a_replica_silent_for_long_is_asked_now_and_then(make_bench: MakeBench) -> None:
    bench = make_bench(records("a"))
    client, engine = await bench.begun()
    bench.sweep(limits.SILENCE_DOUBT_S)
    assert bench.doubts == []  # not yet: prefill may take this long
    bench.sweep(0.5)
    bench.sweep(0.5)
    assert bench.doubts == ["a"]
    bench.sweep(limits.SILENCE_DOUBT_S)
    assert bench.doubts == ["a", "a"]
    engine.send(answer())  # it was only busy
    assert client.answer().status == 200
    assert bench.suspects == []


async def test_an_accused_replica_takes_no_further_requests(make_bench: MakeBench) -> None:
    bench = make_bench(records("ab"))
    bench.plane.accuse("a")
    for _ in range(6):
        client, engine = await bench.begun()
        assert engine.replica_id == "b"
        engine.send(answer())
        assert client.answer().status == 200
    bench.plane.clear("a")
    assert {r.replica_id for r in bench.plane.fleet.pools["m"].available} == {"a", "b"}


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL])
async def test_our_own_want_condemns_no_replica(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    bench = make_bench(records("ab"))

    async def dial(*_: object) -> None:
        raise OSError(number, "none left")

    monkeypatch.setattr(bench.upstreams, "_dial", dial)
    client = bench.client()
    client.send(chat_request())
    await bench.settle()
    got = client.answer()
    assert (got.status, code(got)) == (429, "too_many_requests")
    assert bench.suspects == []
    assert not bench.plane.telemetry.retries


async def test_a_replica_not_asked_yet_hides_no_unknown_model(make_bench: MakeBench) -> None:
    ready, starting = records("ab")
    starting = msgspec.structs.replace(starting, models=(), state=ReplicaState.STARTING)
    bench = make_bench((ready, starting))
    client = bench.client()
    client.send(chat_request(b'{"model":"nope","messages":[]}'))
    assert (client.answer().status, code(client.answer())) == (404, "model_not_found")


async def test_who_asks_is_told_where_the_request_went(make_bench: MakeBench) -> None:
    bench = make_bench(records("a"))
    for fields, told in (((), None), (("x-doherty-explain: 1",), "a")):
        client, engine = await bench.begun(chat_request(fields=fields))
        assert b"x-doherty" not in engine.received  # between the client and us
        engine.send(answer())
        assert client.answer().fields.get("x-doherty-replica") == told


async def test_bodies_in_memory_are_bounded(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "BODIES_BYTES_MAX", 100)
    bench = make_bench(records("a"))
    body = b'{"model":"m","messages":[]' + b" " * 40 + b"}"
    first, engine = await bench.begun(chat_request(body))
    assert bench.plane.bodies_bytes == len(body)
    second = bench.client()
    second.send(chat_request(body))
    assert second.answer().status == 429
    engine.send(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\no")  # begun: the body is dropped
    assert bench.plane.bodies_bytes == 0
    third, again = await bench.begun(chat_request(body))
    engine.send(b"k")
    again.send(answer())
    assert (first.answer().status, third.answer().status) == (200, 200)
    assert bench.plane.bodies_bytes == 0


async def test_connections_are_bounded(make_bench: MakeBench) -> None:
    bench = make_bench(records("a"))
    bench.plane.connections_max = 2
    clients = [bench.client() for _ in range(3)]
    assert bench.plane.telemetry.connections_refused_total == 1
    clients[2].send(chat_request())
    assert clients[2].received == b""
    assert_nothing_held(bench.plane)


async def test_a_body_that_is_only_announced_holds_nothing(make_bench: MakeBench) -> None:
    """Or a few heads without a body would keep everybody else's bodies out."""
    bench = make_bench()
    bench.plane.bodies_bytes_max = 1000
    for _ in range(3):
        client = bench.client()
        client.send(chat_request().replace(b"content-length: 59", b"content-length: 990")[:200])
    assert bench.plane.bodies_bytes < 1000
    other, engine = await bench.begun()
    engine.send(answer())
    assert other.answer().status == 200


async def test_a_client_slow_before_its_answer_holds_the_replica_back(bench: Bench) -> None:
    client, engine = await bench.begun()
    client.transport.taking = False
    client.protocol.pause_writing()  # as when what came before fills what it may leave waiting
    engine.send(STREAM_HEAD + chunk(EVENTS[0]))
    assert not engine.transport.reading
    client.protocol.resume_writing()
    assert engine.transport.reading


async def test_silence_counts_for_a_client_that_reads_nothing_yet(make_bench: MakeBench) -> None:
    bench = make_bench(request_timeout_secs=30.0)
    client, engine = await bench.begun()
    client.protocol.pause_writing()
    bench.clock.advance(31)
    for connection in list(bench.connections):
        connection.check_deadline(bench.clock.now_s())
    assert engine.cut_off
