"""Connections to replicas: reused only when provably clean, and never by two exchanges."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from proxy.core import limits
from tests.fakes.plane import CHAT_BODY, Bench, answer, chat_request, records

MakeBench = Callable[..., Bench]


async def test_a_clean_connection_is_used_again(bench: Bench) -> None:
    for n in range(3):
        client, engine = await bench.begun()
        engine.send(answer(b"[%d]" % n))
        assert client.answer().body == b"[%d]" % n
    assert len(bench.upstreams.engines) == 1


async def test_a_busy_connection_is_nobody_elses(bench: Bench) -> None:
    one, first = await bench.begun()
    other, second = await bench.begun()
    assert first is not second
    second.send(answer(b"[2]"))
    first.send(answer(b"[1]"))
    assert (one.answer().body, other.answer().body) == (b"[1]", b"[2]")
    assert bench.upstreams.idle_count == 2


CONDEMNED = [
    pytest.param([answer() + b"HTTP/1.1 200 OK\r\n\r\npoison"], id="surplus after a length"),
    pytest.param(
        [b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\nX"], id="after the chunks"
    ),
    pytest.param([answer(), b"HTTP/1.1 200 OK\r\n\r\npoison"], id="unsolicited, later"),
    pytest.param([answer(), b"\r\n"], id="even an empty line"),
    pytest.param([b"HTTP/1.1 204 No\r\n\r\nbody"], id="body of a 204"),
]


@pytest.mark.parametrize("pieces", CONDEMNED)
async def test_octets_that_nobody_asked_for_condemn_the_connection(
    bench: Bench, pieces: list[bytes]
) -> None:
    client, engine = await bench.begun()
    for piece in pieces:
        engine.send(piece)
    await bench.settle()
    assert engine.cut_off
    assert client.answers()[0].complete
    assert bench.plane.telemetry.unsolicited_total == 1
    again, fresh = await bench.begun()
    assert fresh is not engine
    fresh.send(answer(b"[2]"))
    assert again.answer().body == b"[2]"
    assert b"poison" not in client.received + again.received


NOT_REUSABLE = [
    pytest.param(answer(fields=["connection: close"]), id="close"),
    pytest.param(answer().replace(b"HTTP/1.1", b"HTTP/1.0"), id="HTTP/1.0"),
]


@pytest.mark.parametrize("octets", NOT_REUSABLE)
async def test_a_connection_that_the_engine_will_close_is_not_kept(
    bench: Bench, octets: bytes
) -> None:
    client, engine = await bench.begun()
    engine.send(octets)
    assert client.answer().status == 200
    assert "connection" not in client.answer().fields
    assert engine.cut_off
    assert bench.upstreams.idle_count == 0


async def test_an_answer_before_the_request_was_taken_ends_the_connection(bench: Bench) -> None:
    """What is left of the request would be read as the next one's beginning."""
    _warm, engine = await bench.begun()
    engine.send(answer())
    engine.transport.taking = False
    client, same = await bench.begun()
    assert same is engine
    engine.send(answer(b'{"error":"too long"}', status=413))
    got = client.answer()
    assert (got.status, json.loads(got.body)["error"]["message"]) == (413, "too long")
    assert engine.cut_off
    assert not client.transport.is_closing()


async def test_idle_connections_are_closed_before_the_engine_closes_them(bench: Bench) -> None:
    _client, engine = await bench.begun()
    engine.send(answer())
    bench.sweep(limits.UPSTREAM_IDLE_S_MAX - 0.5)
    assert bench.upstreams.idle_count == 1
    bench.sweep(0.6)
    assert bench.upstreams.idle_count == 0
    assert engine.cut_off


async def test_an_idle_connection_that_the_engine_closed_is_forgotten(bench: Bench) -> None:
    _client, engine = await bench.begun()
    engine.send(answer())
    engine.transport.hang_up()
    await bench.settle()
    assert bench.upstreams.idle_count == bench.upstreams.open_count == 0
    again, fresh = await bench.begun()
    assert fresh is not engine
    fresh.send(answer())
    assert again.answer().status == 200


async def test_a_connection_about_to_be_lost_is_not_taken(bench: Bench) -> None:
    """Closed, but the loop has not said so yet."""
    _client, engine = await bench.begun()
    engine.send(answer())
    engine.transport.close()
    again = bench.client()
    again.send(chat_request())
    fresh = await bench.engine()
    assert fresh is not engine
    fresh.send(answer())
    assert again.answer().status == 200


async def test_the_most_recently_used_connection_comes_first(bench: Bench) -> None:
    """So that the others can grow old and be closed."""
    begun_both = [await bench.begun() for _ in range(2)]
    for _, engine in begun_both:
        engine.send(answer())
        bench.clock.advance(1)
    (_, old), (_, new) = begun_both
    again = bench.client()
    again.send(chat_request())
    await bench.settle()
    assert (old.received.count(b"POST "), new.received.count(b"POST ")) == (1, 2)
    new.send(answer())


async def test_idle_connections_are_bounded(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "UPSTREAM_IDLE_CONNECTIONS_MAX", 2)
    pairs = [await bench.begun() for _ in range(4)]
    for _, engine in pairs:
        engine.send(answer())
    assert bench.upstreams.idle_count == 2
    await bench.settle()
    assert bench.upstreams.open_count == 2


async def test_connections_of_replicas_that_left_are_closed(bench: Bench) -> None:
    _client, engine = await bench.begun()
    engine.send(answer())
    bench.publish()
    assert engine.cut_off
    await bench.settle()
    assert bench.upstreams.open_count == 0


@pytest.mark.parametrize("size", [1, 17, 65536, 1_000_000])
async def test_the_body_goes_out_as_it_came(bench: Bench, size: int) -> None:
    body = CHAT_BODY[:-1] + b" " * size + b"}"
    client = bench.client()
    octets = chat_request(body)
    for at in range(0, len(octets), 50_000):
        client.send(octets[at : at + 50_000])
    engine = await bench.engine()
    head, _, sent = engine.received.partition(b"\r\n\r\n")
    assert sent == body
    assert b"content-length: %d\r\n" % len(body) in head + b"\r\n"
    engine.send(answer())
    assert client.answer().status == 200


async def closed_after(bench: Bench, idle_s: float) -> None:
    """Let the engine close a connection that has been idle for so long."""
    _client, engine = await bench.begun()
    engine.send(answer())
    bench.clock.advance(idle_s)
    engine.transport.hang_up()
    await bench.settle()


@pytest.mark.parametrize(("closed_s", "idle_s", "reused"), [(1.0, 0.4, True), (1.0, 0.6, False)])
async def test_an_engine_that_closes_early_is_met_with_younger_connections(
    bench: Bench, closed_s: float, idle_s: float, *, reused: bool
) -> None:
    await closed_after(bench, closed_s)
    _client, engine = await bench.begun()
    engine.send(answer())
    bench.clock.advance(idle_s)
    again, other = await bench.begun()
    assert (other is engine) == reused
    other.send(answer())
    assert again.answer().status == 200


async def test_an_engine_that_closes_at_once_gets_a_connection_for_each_request(
    bench: Bench,
) -> None:
    """All but one of them are closed; that one shows when the engine keeps them again."""
    await closed_after(bench, 0.05)
    for count in range(1, 4):
        client, engine = await bench.begun()
        engine.send(answer())
        assert client.answer().status == 200
        assert len(bench.upstreams.dialled) == 1 + count
        assert bench.upstreams.idle_count == 1
    bench.sweep(limits.UPSTREAM_IDLE_S_MAX + 0.1)
    assert bench.upstreams.idle_count == 0
    dialled = len(bench.upstreams.dialled)
    for _ in range(3):
        _client, engine = await bench.begun()
        engine.send(answer())
    assert len(bench.upstreams.dialled) == dialled + 1


async def test_a_reused_connection_that_breaks_before_an_answer_teaches_too(bench: Bench) -> None:
    """Perhaps it met the close of an idle one, as a reset. This request is lost; not the next."""
    _client, engine = await bench.begun()
    engine.send(answer())
    bench.clock.advance(1.0)
    client, same = await bench.begun()
    same.transport.hang_up(ConnectionResetError())
    await bench.settle()
    assert client.answer().status == 502
    bench.plane.clear("a")
    _client, engine = await bench.begun()
    engine.send(answer())
    bench.clock.advance(0.6)
    _client, other = await bench.begun()
    assert other is not engine


async def test_what_a_replica_taught_goes_with_it(make_bench: MakeBench) -> None:
    bench = make_bench(records("a"))
    await closed_after(bench, 0.05)
    bench.publish()
    bench.publish(*records("a"))
    for _ in range(2):
        _client, engine = await bench.begun()
        engine.send(answer())
    assert len(bench.upstreams.dialled) == 2
