"""The client's side of a connection: where requests end, what is refused, who waits for whom."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from proxy.core import limits
from proxy.io import server
from tests.fakes.plane import CHAT_BODY, Bench, answer, chat_request, inflight

MakeBench = Callable[..., Bench]
GET_HEALTH = b"GET /health HTTP/1.1\r\nhost: p\r\n\r\n"


async def test_a_request_goes_there_and_back(bench: Bench) -> None:
    client = bench.client()
    client.send(chat_request())
    engine = await bench.engine()
    assert engine.received.startswith(b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:")
    assert engine.received.endswith(b"\r\n\r\n" + CHAT_BODY)
    assert inflight(bench.plane, "a") == 1
    engine.send(answer(b"[1]"))
    got = client.answer()
    assert (got.status, got.body) == (200, b"[1]")
    assert inflight(bench.plane, "a") == 0
    assert not client.transport.is_closing()


# --- where a request ends -------------------------------------------------------------------------

CHUNKED = (
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: p\r\ntransfer-encoding: chunked\r\n\r\n"
    + b"%x\r\n%b\r\n0\r\n\r\n" % (len(CHAT_BODY), CHAT_BODY)
)


@pytest.mark.parametrize(
    "octets",
    [
        pytest.param(chat_request(), id="counted"),
        pytest.param(CHUNKED, id="chunked"),
        pytest.param(b"\r\n" + chat_request(), id="after an empty line"),
    ],
)
async def test_any_cut_of_a_request_gives_the_same_request(
    make_bench: MakeBench, octets: bytes
) -> None:
    bench = make_bench()
    for size in (len(octets), 1, 2, 3, 7, 50):
        client = bench.client()
        for at in range(0, len(octets), size):
            client.send(octets[at : at + size])
        engine = await bench.engine()
        sent = engine.received
        engine.send(answer())
        assert client.answer().status == 200
        assert sent.split(b"\r\n\r\n", 1)[1].endswith(CHAT_BODY)
        engine.transport.written.clear()


async def test_only_one_empty_line_before_a_request_is_forgiven(make_bench: MakeBench) -> None:
    bench = make_bench()
    for pieces in ((b"\r\n\r\n",), (b"\r\n", b"\r\n"), (b"\r", b"\n", b"\r", b"\n")):
        client = bench.client()
        for piece in pieces:
            client.send(piece)
        client.send(b"GET /health HTTP/1.1\r\n") if not client.transport.eof_written else None
        assert client.answer("GET").status == 400


@pytest.mark.parametrize("count", [2, 3])
async def test_requests_in_one_segment_are_answered_in_order(bench: Bench, count: int) -> None:
    client = bench.client()
    bodies = [CHAT_BODY.replace(b"hello", b"%d" % n) for n in range(count)]
    client.send(b"".join(chat_request(body) for body in bodies))
    for n, body in enumerate(bodies):
        engine = await bench.engine()
        assert engine.received.endswith(body)
        assert engine.received.count(b"POST ") == n + 1
        engine.send(answer(b"[%d]" % n))
    assert [got.body for got in client.answers(*["POST"] * count)] == [b"[0]", b"[1]", b"[2]"][
        :count
    ]
    assert len(bench.upstreams.engines) == 1


async def test_what_arrives_between_two_requests_does_not_overtake(bench: Bench) -> None:
    """The end of an answer and more octets of the client can come in one turn of the loop."""
    client = bench.client()
    second = chat_request(CHAT_BODY.replace(b"hello", b"second"))
    client.send(chat_request() + second[:40])
    engine = await bench.engine()
    engine.send(answer())
    client.send(second[40:] + GET_HEALTH)
    engine = await bench.engine()
    assert engine.received.endswith(b'"second"}]}')
    engine.send(answer(b"[2]"))
    await bench.settle()
    got = client.answers("POST", "POST", "GET")
    assert [a.body for a in got] == [b'{"ok":true}', b"[2]", b'{"status":"alive"}']


async def test_what_is_sent_ahead_is_bounded(bench: Bench) -> None:
    client = bench.client()
    client.send(chat_request())
    engine = await bench.engine()
    ahead = chat_request(CHAT_BODY[:-1] + b" " * limits.PIPELINED_BYTES_MAX + b"}")
    client.send(ahead[:1000])
    assert client.transport.is_reading()
    client.send(ahead[1000:])
    assert not client.transport.is_reading()
    engine.send(answer())
    await bench.settle()
    assert client.transport.is_reading()
    engine.send(answer(b"[2]"))
    assert client.answers("POST", "POST")[1].body == b"[2]"


async def test_a_client_that_reads_nothing_is_served_no_further_request(bench: Bench) -> None:
    """Else its unread answers would pile up without bound, however slowly it is written to."""
    client = bench.client()
    client.transport.taking = False
    big = b'"' + b"x" * (2 * limits.WRITE_HIGH_WATER_BYTES) + b'"'
    client.send(chat_request())
    engine = await bench.engine()
    client.send(chat_request())
    engine.send(answer(big))
    await bench.settle()
    client.send(chat_request())
    await bench.settle()
    assert engine.received.count(b"POST ") == 1
    client.transport.take()
    await bench.settle()
    assert engine.received.count(b"POST ") == 2
    client.transport.taking = True
    engine.send(answer(b"[2]"))
    await bench.settle()
    engine.send(answer(b"[3]"))
    assert [len(a.body) for a in client.answers("POST", "POST", "POST")] == [len(big), 3, 3]


# --- time -----------------------------------------------------------------------------------------


async def test_the_time_for_a_head_does_not_grow_with_its_octets(bench: Bench) -> None:
    client = bench.client()
    client.send(b"GET /health HTTP/1.1\r\n")
    bench.sweep(limits.HEAD_TIMEOUT_S - 1)
    client.send(b"host: p\r\n")
    assert not client.received
    bench.sweep(1.1)
    assert client.answer("GET").status == 408
    assert client.transport.eof_written


async def test_the_time_for_a_body_is_between_its_pieces(bench: Bench) -> None:
    client = bench.client()
    octets = chat_request(CHAT_BODY + b" " * 100 * limits.BODY_PACE_BYTES)
    client.send(octets[:-10])
    bench.sweep(limits.BODY_IDLE_TIMEOUT_S - 1)
    client.send(octets[-10:-5])
    bench.sweep(limits.BODY_IDLE_TIMEOUT_S - 1)
    assert not client.received
    bench.sweep(2)
    assert client.answer().status == 408
    assert bench.outcomes() == {("408", "request_timeout"): 1}


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_that_crawls_is_not_waited_for(bench: Bench, *, chunked: bool) -> None:
    begin = b"POST /v1/chat/completions HTTP/1.1\r\nhost: p\r\n"
    framing = b"transfer-encoding: chunked" if chunked else b"content-length: 99999"
    paces = {"slow": limits.BODY_PACE_BYTES - 50, "steady": limits.BODY_PACE_BYTES + 50}
    clients = {name: bench.client() for name in paces}
    for client in clients.values():
        client.send(begin + framing + b"\r\n\r\n")
    bench.sweep(limits.BODY_PATIENCE_S - 0.1)  # nothing at all is still forgiven
    for _ in range(10):
        for name, client in clients.items():
            if client.received:
                continue
            piece = b"x" * paces[name]
            client.send(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
        bench.sweep(0.99)
    assert clients["slow"].answer().status == 408
    assert not clients["steady"].received


async def test_an_idle_connection_is_closed_without_a_word(bench: Bench) -> None:
    fresh, used = bench.client(), bench.client()
    used.send(GET_HEALTH)
    bench.sweep(limits.CLIENT_KEEP_ALIVE_S - 1)
    assert not fresh.transport.is_closing()
    bench.sweep(1.1)
    assert fresh.transport.is_closing()
    assert used.transport.is_closing()
    assert fresh.received == b""
    assert len(used.answers("GET")) == 1


async def test_a_client_that_takes_nothing_is_cut_and_one_that_is_slow_is_not(bench: Bench) -> None:
    slow, stuck = bench.client(), bench.client()
    big = answer(b'"' + b"x" * (2 * limits.WRITE_HIGH_WATER_BYTES) + b'"')
    for client in (slow, stuck):
        client.transport.taking = False
        client.send(chat_request())
        (await bench.engine()).send(big)
    bench.sweep()
    for _ in range(10):
        slow.transport.take(1000)
        bench.sweep(limits.WRITE_STALL_TIMEOUT_S / 5)
    assert stuck.transport.aborted
    assert not slow.transport.closed


async def test_an_answer_is_taken_to_its_end_after_the_connection_was_closed(bench: Bench) -> None:
    """The sweep must not take a closing connection with octets in it for a forgotten one."""
    client = bench.client()
    client.transport.taking = False
    bench.clock.advance(limits.HEAD_TIMEOUT_S * 20)
    client.send(chat_request(fields=["connection: close"]))
    (await bench.engine()).send(answer(b'"' + b"x" * 1000 + b'"'))
    assert client.transport.is_closing()
    for _ in range(5):
        client.transport.take(100)
        bench.sweep(limits.BODY_IDLE_TIMEOUT_S)
    assert not client.transport.aborted
    client.transport.take()
    await bench.settle()
    assert client.transport.lost


async def test_an_answer_before_pipelined_octets_is_not_lost_to_a_reset(bench: Bench) -> None:
    client = bench.client()
    client.send(chat_request(fields=["connection: close"]) + chat_request())
    engine = await bench.engine()
    engine.send(answer())
    await bench.settle()
    assert client.answer().status == 200
    assert client.transport.eof_written
    assert not client.transport.is_closing()
    assert engine.received.count(b"POST ") == 1


# --- expectations and old clients -----------------------------------------------------------------


async def test_a_client_that_asks_is_told_to_continue(bench: Bench) -> None:
    client = bench.client()
    octets = chat_request(fields=["expect: 100-continue"])
    client.send(octets[: -len(CHAT_BODY)])
    assert client.received == b"HTTP/1.1 100 Continue\r\n\r\n"
    client.send(CHAT_BODY)
    engine = await bench.engine()
    assert b"expect" not in engine.received
    engine.send(answer())
    assert client.answer().status == 200


async def test_a_refused_client_is_not_told_to_continue(make_bench: MakeBench) -> None:
    bench = make_bench(api_key="k")
    client = bench.client()
    client.send(chat_request(fields=["expect: 100-continue"])[: -len(CHAT_BODY)])
    assert b"100 Continue" not in client.received
    assert client.answer().status == 401


@pytest.mark.parametrize("keep_alive", [False, True])
async def test_http_1_0_keeps_the_connection_only_when_both_say_so(
    bench: Bench, keep_alive: bool
) -> None:
    fields = ["connection: keep-alive"] if keep_alive else []
    client = bench.client()
    client.send(chat_request(fields=fields, minor=0))
    (await bench.engine()).send(answer(b"[1]"))
    got = client.answer()
    assert got.body == b"[1]"
    assert got.fields["connection"] == ("keep-alive" if keep_alive else "close")
    assert client.transport.closed == (not keep_alive)


async def test_a_local_answer_to_http_1_0_names_its_persistence(bench: Bench) -> None:
    client = bench.client()
    client.send(b"GET /health HTTP/1.0\r\nconnection: keep-alive\r\n\r\n")
    assert client.answer("GET").fields["connection"] == "keep-alive"
    assert not client.transport.is_closing()


async def test_an_error_to_http_1_0_closes(bench: Bench) -> None:
    client = bench.client()
    client.send(b"GET /nope HTTP/1.0\r\nconnection: keep-alive\r\n\r\n")
    assert client.answer("GET").fields["connection"] == "close"
    assert client.transport.is_closing()


async def test_http_1_0_gets_a_chunked_answer_decoded(bench: Bench) -> None:
    client = bench.client()
    client.send(chat_request(fields=["connection: keep-alive"], minor=0))
    engine = await bench.engine()
    octets = (
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n2;x\r\nde\r\n0\r\n\r\n"
    )
    for octet in octets:
        engine.send(bytes([octet]))
    got = client.answer()
    assert got.body == b"abcde"
    assert got.fields["connection"] == "close"
    assert "transfer-encoding" not in got.fields
    assert client.transport.is_closing()
    assert not client.transport.socket.options


# --- faults of our own ----------------------------------------------------------------------------


async def test_a_fault_of_ours_is_a_500_and_counted(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a fault")

    monkeypatch.setattr(bench.plane, "policy", broken)
    client = bench.client()
    client.send(chat_request())
    got = client.answer()
    assert (got.status, got.fields["connection"]) == (500, "close")
    assert b"a fault" not in got.body
    assert bench.plane.telemetry.internal_errors_total == 1
    assert "ZeroDivisionError" in caplog.text
    bench.plane.telemetry.internal_errors_total = 0  # this one was meant


async def test_the_loop_is_never_blocked_by_a_turn(bench: Bench) -> None:
    """Many local requests in one segment yield to the loop between two of them."""
    client = bench.client()
    client.send(GET_HEALTH * 50)
    turns = 0
    while client.received.count(b"HTTP/1.1 200") < 50:
        turns += 1
        await asyncio.sleep(0)
    assert turns >= 40


async def test_a_fault_while_reading_costs_one_connection(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a fault")

    monkeypatch.setattr(server, "Exchange", broken)
    client = bench.client()
    client.send(GET_HEALTH)
    assert client.answer("GET").status == 500
    assert bench.plane.telemetry.internal_errors_total == 1
    assert "ZeroDivisionError" in caplog.text
    bench.plane.telemetry.internal_errors_total = 0  # this one was meant
