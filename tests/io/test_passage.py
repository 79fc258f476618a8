"""Files and jobs pass to the offline service: octets as they come, judged as on every path."""

from __future__ import annotations

import re
from collections.abc import Callable

import msgspec
import pytest

from proxy.contract import PoolRecord
from proxy.core import limits
from tests.fakes.plane import Bench, Client, Engine, answer

URL = "http://127.0.0.1:8003"
MakeBench = Callable[..., Bench]


@pytest.fixture
def bench(make_bench: MakeBench) -> Bench:
    """A plane with a replica, and with a service for files and batches that the test plays."""
    return make_bench(offline_url=URL)


def request(
    target: str = "/v1/files", *fields: str, method: str = "POST", body: bytes = b"", minor: int = 1
) -> bytes:
    lines = [f"{method} {target} HTTP/1.{minor}", "Host: a", *fields]
    if body:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


async def passed(bench: Bench, octets: bytes) -> tuple[Client, Engine]:
    """Send octets over a new connection; return the client and the service's end."""
    client = bench.client()
    client.send(octets)
    await bench.settle()
    return client, bench.service.engines[-1]


async def test_a_request_goes_on_under_a_head_of_our_own(bench: Bench) -> None:
    fields = (
        "Authorization: Bearer k1", "Content-Type: multipart/form-data; boundary=b",
        "Connection: x-hop", "X-Hop: 1", "X-Override-Rid: r", "X-Request-Id: mine",
        "X-Data-Parallel-Rank: 1",
    )  # fmt: skip
    client, service = await passed(bench, request("/v1/files?a=b", *fields, body=b"part"))
    assert service.received == (
        b"POST /v1/files?a=b HTTP/1.1\r\nhost: 127.0.0.1:8003\r\nconnection: close\r\n"
        b"authorization: Bearer k1\r\ncontent-type: multipart/form-data; boundary=b\r\n"
        b"content-length: 4\r\nx-request-id: mine\r\n\r\npart"
    )
    service.send(answer(b'{"id":"file-1"}', fields=("Connection: close",)))
    got = client.answer()
    assert (got.status, got.body) == (200, b'{"id":"file-1"}')
    assert not client.transport.closed
    assert bench.upstreams.dialled == []
    assert bench.service.dialled == ["offline"]


async def test_a_chunked_body_is_chunked_anew(bench: Bench) -> None:
    head = request("/v1/files", "Transfer-Encoding: chunked")
    client, service = await passed(bench, head + b"3;ext=1\r\nabc\r\n")
    client.send(b"2\r\nde\r\n0\r\nTrailer: x\r\n\r\n")
    sent = service.received.partition(b"\r\n\r\n")
    assert b"transfer-encoding: chunked" in sent[0]
    assert b"content-length" not in sent[0]
    assert sent[2] == b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
    service.send(answer())
    assert client.answer().status == 200


async def test_the_next_request_of_a_connection_goes_its_own_way(bench: Bench) -> None:
    following = request("/v1/batches/batch_1", method="GET") + request("/health", method="GET")
    client, service = await passed(bench, request(body=b"abc") + following)
    service.send(answer(b"1"))
    await bench.settle()
    assert len(bench.service.engines) == 2
    assert bench.service.engines[1].received.startswith(b"GET /v1/batches/batch_1 HTTP/1.1\r\n")
    assert b"content-length" not in bench.service.engines[1].received
    bench.service.engines[1].send(answer(b"2"))
    await bench.settle()
    answers = client.answers("POST", "GET", "GET")
    assert [each.body for each in answers] == [b"1", b"2", b'{"status":"alive"}']


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "PUT"])
@pytest.mark.parametrize("path", ["/v1/files", "/v1/files/file-1", "/v1/batches/batch_1"])
async def test_without_a_service_the_paths_are_unknown(
    make_bench: MakeBench, path: str, method: str
) -> None:
    bench = make_bench()
    client = bench.client()
    client.send(request(path, method=method))
    got = client.answer(method)
    assert got.status == 404
    assert b'"unknown_path"' in got.body
    assert bench.service.dialled == bench.upstreams.dialled == []


async def test_what_is_refused_without_a_body_holds_up_nobody_behind_it(bench: Bench) -> None:
    client = bench.client()
    refused, whole = request("/v1/files", method="DELETE"), request("/health", method="GET")
    client.send(refused + whole)
    await bench.settle()
    assert [each.status for each in client.answers("DELETE", "GET")] == [405, 200]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("DELETE", "/v1/files", 405),
        ("POST", "/v1/files/file-1", 405),
        ("DELETE", "/v1/batches/batch_1", 405),
        ("GET", "/v1/filesystem", 404),
        ("GET", "/v1/files/file-1/content/more", 404),
    ],
)
async def test_what_the_service_does_not_have_is_refused_here(
    bench: Bench, method: str, path: str, status: int
) -> None:
    client = bench.client()
    client.send(request(path, method=method))
    assert client.answer(method).status == status
    assert bench.service.dialled == bench.upstreams.dialled == []


async def test_a_wrong_key_is_refused_before_anybody_is_asked(make_bench: MakeBench) -> None:
    bench = make_bench(offline_url=URL, api_key="right")
    client = bench.client()
    client.send(request(body=b"x" * 10))
    assert client.answer().status == 401
    await bench.settle()
    assert bench.service.dialled == []


async def test_a_file_may_be_larger_than_any_prompt(make_bench: MakeBench) -> None:
    bench = make_bench(offline_url=URL, max_payload_size=10)
    client, service = await passed(bench, request(body=b"x" * 1000))
    assert service.received.endswith(b"x" * 1000)
    assert bench.plane.bodies_bytes == 0
    service.send(answer())
    assert client.answer().status == 200


async def test_nothing_more_is_read_before_there_is_a_connection(bench: Bench) -> None:
    client = bench.client()
    client.send(request("/v1/files", "Content-Length: 9") + b"abc")
    assert not client.transport.is_reading()
    await bench.settle()
    assert client.transport.is_reading()
    client.send(b"defghi")
    service = bench.service.engines[-1]
    assert service.received.endswith(b"\r\n\r\nabcdefghi")
    service.send(answer())
    assert client.answer().status == 200


async def test_who_waits_to_be_told_is_told_when_somebody_will_read(bench: Bench) -> None:
    head = request("/v1/files", "Content-Length: 3", "Expect: 100-continue")
    client = bench.client()
    client.send(head)
    assert client.received == b""
    await bench.settle()
    assert client.received == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert b"expect" not in bench.service.engines[-1].received.lower()
    client.send(b"abc")
    bench.service.engines[-1].send(answer())
    assert re.search(rb"HTTP/1\.1 200 ", client.received)


async def test_a_refusal_comes_at_once_and_ends_the_connection(bench: Bench) -> None:
    client, service = await passed(bench, request("/v1/files", "Content-Length: 1000") + b"abc")
    service.send(answer(b"too large", status=413, fields=("Connection: close",)))
    assert b"HTTP/1.1 413 " in client.received
    client.send(b"d" * 900)  # is read, and goes nowhere
    assert b"ddd" not in service.received
    assert not client.transport.eof_written
    client.send(b"d" * 97)
    got = client.answer()
    assert (got.status, got.body) == (413, b"too large")
    assert got.fields["connection"] == "close"
    assert client.transport.eof_written


@pytest.mark.parametrize("ended", [limits.LINGER_S + 0.1, limits.UNWANTED_BODY_S + 0.1])
async def test_what_is_refused_is_not_read_for_ever(bench: Bench, ended: float) -> None:
    client, service = await passed(bench, request("/v1/files", "Content-Length: 1000") + b"abc")
    service.send(answer(b"too large", status=413, fields=("Connection: close",)))
    await bench.settle()
    steps = int(ended / limits.LINGER_S)
    for _ in range(steps - 1):
        bench.sweep(limits.LINGER_S - 0.1)
        client.send(b"d")
        assert not client.transport.eof_written
    bench.sweep(ended - (steps - 1) * (limits.LINGER_S - 0.1))
    assert client.transport.eof_written
    assert client.answer().status == 413


async def test_a_refused_body_that_is_none_ends_the_connection(bench: Bench) -> None:
    head = request("/v1/files", "Transfer-Encoding: chunked")
    client, service = await passed(bench, head + b"3\r\nabc\r\n")
    service.send(answer(b"too large", status=413))
    client.send(b"zz\r\n")
    assert client.transport.eof_written
    assert client.answer().status == 413


async def test_who_was_not_told_to_send_is_not_waited_for(bench: Bench) -> None:
    bench.service.refusing.add("offline")
    client = bench.client()
    client.send(request("/v1/files", "Content-Length: 3", "Expect: 100-continue"))
    await bench.settle()
    assert client.answer().status == 503
    assert client.transport.eof_written


@pytest.mark.parametrize(
    ("method", "code"), [("GET", b"offline_read_lost"), ("POST", b"offline_lost")]
)
async def test_a_service_that_dies_before_it_answers(
    bench: Bench, method: str, code: bytes
) -> None:
    client, service = await passed(bench, request("/v1/files", method=method))
    service.transport.hang_up()
    await bench.settle()
    got = client.answer(method)
    assert got.status == 502
    assert code in got.body
    assert got.fields["x-should-retry"] == ("true" if method == "GET" else "false")
    assert bench.service.dialled == ["offline"]  # once: it may have done what it was asked


async def test_a_service_that_dies_in_an_answer_leaves_it_visibly_cut(bench: Bench) -> None:
    client, service = await passed(bench, request("/v1/files/file-1/content", method="GET"))
    service.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nabc")
    service.transport.hang_up()
    await bench.settle()
    assert client.received.endswith(b"\r\n\r\nabc")
    assert client.transport.closed


async def test_nobody_there_is_told_in_words(bench: Bench) -> None:
    bench.service.refusing.add("offline")
    client = bench.client()
    client.send(request(body=b"abc"))
    await bench.settle()
    got = client.answer()
    assert got.status == 503
    assert b"offline_unreachable" in got.body
    assert b"files and batches cannot be reached: Connection refused" in got.body
    assert got.fields["retry-after"] == "1"


async def test_who_leaves_ends_the_work(bench: Bench) -> None:
    client, service = await passed(bench, request("/v1/files", "Content-Length: 1000") + b"abc")
    client.transport.hang_up()
    await bench.settle()
    assert service.cut_off
    assert bench.outcomes() == {("499", "client_gone"): 1}


@pytest.mark.parametrize("step_s", [limits.BODY_IDLE_TIMEOUT_S + 1.0, 4.0])
async def test_a_client_that_does_not_go_on_is_answered(bench: Bench, step_s: float) -> None:
    client, service = await passed(bench, request("/v1/files", "Content-Length: 1000") + b"abc")
    for _ in range(3):
        if service.cut_off:
            break
        client.send(b"d")
        bench.sweep(step_s)
    assert client.answer().status == 408
    assert service.cut_off


async def test_a_service_that_is_silent_is_given_up(make_bench: MakeBench) -> None:
    bench = make_bench(offline_url=URL, request_timeout_secs=100)
    client, service = await passed(bench, request(body=b"abc"))
    bench.sweep(99.0)
    assert client.received == b""
    bench.sweep(2.0)
    got = client.answer()
    assert (got.status, b"offline_timeout" in got.body) == (504, True)
    assert service.cut_off


async def test_a_body_that_the_service_does_not_take_is_not_the_clients_fault(
    make_bench: MakeBench,
) -> None:
    bench = make_bench(offline_url=URL, request_timeout_secs=100)
    client, service = await passed(bench, request("/v1/files", "Content-Length: 200000"))
    service.transport.taking = False
    client.send(b"x" * 100_000)
    assert not client.transport.is_reading()
    bench.sweep(60.0)
    assert client.received == b""
    service.transport.taking = True
    service.transport.take()
    assert client.transport.is_reading()
    client.send(b"x" * 100_000)
    assert service.received.count(b"x") == 200_000 + 1  # one in `x-request-id`
    service.send(answer())
    assert client.answer().status == 200


async def test_a_framing_error_within_a_body_is_answered(bench: Bench) -> None:
    head = request("/v1/files", "Transfer-Encoding: chunked")
    client, service = await passed(bench, head + b"3\r\nabc\r\n")
    client.send(b"zz\r\n")
    got = client.answer()
    assert (got.status, b"bad_body_framing" in got.body) == (400, True)
    assert service.cut_off


async def test_a_client_of_http_1_0_gets_what_was_in_the_chunks(bench: Bench) -> None:
    client, service = await passed(bench, request("/v1/files", method="GET", minor=0))
    service.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n")
    assert client.received.endswith(b"\r\n\r\nabc")
    assert client.transport.closed


async def test_a_reload_says_where_the_service_is(bench: Bench) -> None:
    plane = bench.plane
    client, service = await passed(bench, request(body=b"abc"))
    config = msgspec.structs.replace(plane.config, offline_url="http://127.0.0.2:9000")
    plane.reconfigure(config, plane.access_log)
    service.send(answer())  # what is under way goes on
    assert client.answer().status == 200
    _, service = await passed(bench, request(body=b"abc"))
    assert b"\r\nhost: 127.0.0.2:9000\r\n" in service.received
    plane.reconfigure(msgspec.structs.replace(config, offline_url=None), plane.access_log)
    nobody = bench.client()
    nobody.send(request(method="GET"))
    assert nobody.answer("GET").status == 404


async def test_a_region_that_has_only_jobs_is_ready(bench: Bench) -> None:
    def readiness() -> int:
        client = bench.client()
        client.send(b"GET /readyz HTTP/1.1\r\nhost: p\r\n\r\n")
        return client.answer("GET").status

    bench.publish()
    assert readiness() == 200
    bench.publish(pools=(PoolRecord(model="m", pool="m"),))
    assert readiness() == 503, "there is a pool that takes requests, and nobody of it is up"
    bench.publish()
    plane = bench.plane
    plane.reconfigure(msgspec.structs.replace(plane.config, offline_url=None), plane.access_log)
    assert readiness() == 503, "there are no jobs either"
