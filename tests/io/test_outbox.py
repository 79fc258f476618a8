"""What is written in one turn of the loop goes out at its end: together, in order, and whole."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from typing_extensions import override

from proxy.core import limits
from proxy.io.outbox import Outbox, Outlet
from tests.fakes.plane import (
    EVENTS,
    STREAM_HEAD,
    Bench,
    Client,
    Engine,
    answer,
    chat_request,
    chunk,
    read_answers,
)


async def served(bench: Bench, count: int = 1) -> list[Client]:
    """Return clients of which each has had an answer, with so many idle connections behind them."""
    clients = [bench.client() for _ in range(count)]
    for client in clients:
        client.send(chat_request())
    await bench.settle()
    for engine in bench.upstreams.engines:
        engine.send(answer())
    await bench.settle()
    assert bench.upstreams.idle_count == count
    for client in clients:
        client.answer()
        client.transport.written.clear()
    for engine in bench.upstreams.engines:
        engine.transport.written.clear()
    bench.plane.outbox.on = True
    return clients


def written_to(bench: Bench) -> list[Engine]:
    return [engine for engine in bench.upstreams.engines if engine.received]


async def test_requests_of_one_turn_go_out_at_its_end(bench: Bench) -> None:
    clients = await served(bench, 2)
    for client in clients:
        client.send(chat_request())
        assert not written_to(bench)
    await asyncio.sleep(0)
    assert len(written_to(bench)) == 2
    for engine in bench.upstreams.engines:
        engine.send(answer())
        assert not any(client.received for client in clients)
    await asyncio.sleep(0)
    assert all(client.answer().status == 200 for client in clients)


async def test_so_many_requests_go_out_at_once(bench: Bench) -> None:
    count = limits.WRITES_HELD_MAX
    clients = await served(bench, count + 1)
    for number, client in enumerate(clients, 1):
        client.send(chat_request())
        assert len(written_to(bench)) == (count if number >= count else 0)
    await asyncio.sleep(0)
    assert len(written_to(bench)) == count + 1
    for engine in written_to(bench):
        engine.send(answer())
    await bench.settle()


async def test_nobody_waits_while_a_large_body_is_read(bench: Bench) -> None:
    small, large = await served(bench, 2)
    small.send(chat_request())
    large.send(chat_request(b'{"model":"m","messages":[],"x":"%b"}' % (b"y" * 20_000)))
    assert len(written_to(bench)) == 1
    await asyncio.sleep(0)
    assert len(written_to(bench)) == 2


async def test_pieces_of_a_stream_in_one_turn_are_one_write(bench: Bench) -> None:
    client, engine = await bench.begun()
    bench.plane.outbox.on = True
    engine.send(STREAM_HEAD)
    for event in EVENTS:
        engine.send(chunk(event))
    assert not client.received
    await asyncio.sleep(0)
    assert client.received.endswith(b"".join(map(chunk, EVENTS)))


async def test_what_is_much_goes_at_once_and_in_its_place(bench: Bench) -> None:
    client, engine = await bench.begun()
    bench.plane.outbox.on = True
    engine.send(STREAM_HEAD)
    engine.send(chunk(EVENTS[0]))
    assert not client.received
    engine.send(chunk(b"y" * 20_000))
    assert client.received.endswith(chunk(EVENTS[0]) + chunk(b"y" * 20_000))


@pytest.mark.parametrize("keeps", [b"close", b"keep-alive"])
async def test_what_is_due_goes_before_the_close(bench: Bench, keeps: bytes) -> None:
    (client,) = await served(bench)
    client.send(chat_request().replace(b"\r\n", b"\r\nconnection: %b\r\n" % keeps, 1))
    await asyncio.sleep(0)
    (engine,) = written_to(bench)
    if keeps == b"keep-alive":
        engine.send(answer())
        client.transport.hang_up()  # it has closed its sending side at the same moment
    else:
        engine.send(answer())
    assert client.answer().body
    await bench.settle()
    assert client.transport.closed


async def test_answers_and_refusals_keep_their_order(bench: Bench) -> None:
    (client,) = await served(bench)
    client.send(chat_request() + b"GET / HTTP/1.0 and nonsense\r\n\r\n")
    await asyncio.sleep(0)
    (engine,) = written_to(bench)
    engine.send(answer())
    await bench.settle()
    first, second = read_answers(client.received, ("POST", "GET"), closed=True)
    assert (first.status, second.status) == (200, 400)


async def test_a_client_that_leaves_in_the_turn_has_nothing_computed(bench: Bench) -> None:
    (client,) = await served(bench)
    client.send(chat_request())
    client.transport.hang_up()
    await bench.settle()
    (engine,) = bench.upstreams.engines
    assert engine.cut_off
    assert not engine.received


async def test_a_close_in_the_turn_has_the_request_sent_elsewhere(bench: Bench) -> None:
    """Nothing can have been delivered, whatever the kernel counts: it had not been written."""
    (client,) = await served(bench)
    (first,) = bench.upstreams.engines
    client.send(chat_request())
    first.transport.hang_up()
    await bench.settle()
    assert not first.received
    assert len(bench.upstreams.engines) == 2
    (second,) = written_to(bench)
    second.send(answer())
    await bench.settle()
    assert client.answer().status == 200
    assert bench.plane.telemetry.retries["closed_idle"] == 1


async def test_octets_before_the_request_are_nobodys_answer(bench: Bench) -> None:
    (client,) = await served(bench)
    (first,) = bench.upstreams.engines
    client.send(chat_request())
    first.send(answer(b'{"whose":"?"}'))
    await bench.settle()
    assert first.cut_off
    assert bench.plane.telemetry.unsolicited_total == 1
    (second,) = written_to(bench)
    second.send(answer(b'{"mine":1}'))
    await bench.settle()
    assert client.answer().body == b'{"mine":1}'


async def test_an_engine_that_always_speaks_first_is_given_up(bench: Bench) -> None:
    (client,) = await served(bench)
    client.send(chat_request())
    for _ in range(20):
        for engine in bench.upstreams.engines:
            if not engine.cut_off:
                assert not engine.received, "a turn too late: nothing is tested"
                engine.send(b"220 smtp.example ESMTP\r\n")
        await asyncio.sleep(0)
    assert client.answer().status == 502
    assert len(bench.upstreams.engines) == 2
    assert bench.suspects


async def test_a_write_that_fails_holds_nobody_up(bench: Bench) -> None:
    class Broken(Outlet):
        @override
        def write_due(self) -> None:
            raise RuntimeError("of this connection")

    class Whole(Outlet):
        written = 0

        @override
        def write_due(self) -> None:
            self.written += 1

    faults: list[Any] = []
    outbox = Outbox(bench.clock, lambda: faults.append(1))
    outbox.on = True
    whole = Whole()
    for outlet in (Broken(), whole):
        outbox.hold(outlet)
    assert not whole.written
    await asyncio.sleep(0)
    assert (whole.written, len(faults)) == (1, 1)


async def test_the_time_until_a_request_is_written_is_the_proxys(bench: Bench) -> None:
    (client,) = await served(bench)
    before_s = bench.plane.telemetry.overhead_s.total
    client.send(chat_request())
    bench.clock.advance(0.004)  # what others of the same turn took
    await asyncio.sleep(0)
    (engine,) = written_to(bench)
    engine.send(answer())
    await bench.settle()
    assert client.answer().status == 200
    assert bench.plane.telemetry.overhead_s.total - before_s == pytest.approx(0.004)
