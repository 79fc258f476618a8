"""Engines' own control paths cannot be reached, however the path is spelled."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from proxy.core.routes import OFFLINE_ROOTS, ROUTES
from tests.conformance.control_paths import CONTROL_PATHS, spellings, ways_out
from tests.fakes.plane import Bench, answer

MakeBench = Callable[..., Bench]
_BODY = b'{"model":"m"}'


def _request(method: bytes, target: bytes, body: bytes = b"", *fields: bytes) -> bytes:
    lines = b"".join(field + b"\r\n" for field in (b"Host: a", *fields))
    counted = b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    return method + b" " + target + b" HTTP/1.1\r\n" + lines + counted


class _Stranger:
    """A client that asks again over the same connection as long as it is open."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._client = bench.client()
        self.met: set[int] = set()
        self.asked = 0

    def ask(self, method: bytes, target: bytes) -> None:
        """Ask, and get an answer at once: nothing was waited for."""
        if self._client.transport.closed or self._client.transport.eof_written:
            self._client.protocol.kill()
            self._client = self._bench.client()
        before = len(self._client.received)
        self._client.send(_request(method, target))
        head = self._client.received[before:].partition(b"\r\n")[0]
        assert head.startswith(b"HTTP/1.1 "), (method, target)
        self.met.add(int(head[9:12]))
        self.asked += 1


# One stored response, by whatever name, in either form of a target.
_ONE_RESPONSE = re.compile(
    rb"(?:https?://[^/?]*)?/v1/responses/[A-Za-z0-9_-]+(?:\?.*)?", re.IGNORECASE
)


def test_the_control_paths_are_many_and_none_is_served() -> None:
    assert len(CONTROL_PATHS) >= 90
    assert not set(CONTROL_PATHS) & set(ROUTES)
    assert sum(1 for _ in spellings(b"/sleep")) + sum(1 for _ in ways_out(b"/sleep")) >= 250


@pytest.mark.parametrize("path", CONTROL_PATHS, ids=lambda path: path.decode())
async def test_no_spelling_reaches_an_engine(make_bench: MakeBench, path: bytes) -> None:
    bench = make_bench()
    stranger = _Stranger(bench)
    for target in spellings(path):
        stranger.ask(b"POST", target)
        if not _ONE_RESPONSE.fullmatch(target):
            stranger.ask(b"GET", target)
    for target in ways_out(path):
        stranger.ask(b"POST", target)
    for method in (b"PUT", b"DELETE", b"OPTIONS", b"PATCH", b"HEAD", b"PRI"):
        stranger.ask(method, path)
    await bench.settle()
    assert bench.upstreams.dialled == []
    assert {400, 404} <= stranger.met <= {400, 404, 405}
    assert stranger.asked >= 300


@pytest.mark.parametrize("name", [b"sleep", b"render", b"collective_rpc"])
async def test_a_stored_response_may_have_any_name(make_bench: MakeBench, name: bytes) -> None:
    """It is asked for under its own path, where an engine has nothing else."""
    bench = make_bench()
    client = bench.client()
    client.send(_request(b"GET", b"/v1/responses/" + name))
    engine = await bench.engine()
    assert engine.received.startswith(b"GET /v1/responses/" + name + b" HTTP/1.1\r\n")
    engine.send(answer())
    assert client.answer().status == 200


async def test_fields_choose_no_path(make_bench: MakeBench) -> None:
    """What some servers read for another target or method goes on as what it is: a field."""
    bench = make_bench()
    client = bench.client()
    fields = (b"X-Original-URL: /sleep", b"X-Rewrite-URL: /sleep", b"X-HTTP-Method-Override: PUT")
    client.send(_request(b"POST", b"/v1/completions", _BODY, *fields))
    engine = await bench.engine()
    assert engine.received.startswith(b"POST /v1/completions HTTP/1.1\r\n")
    engine.send(answer())
    assert client.answer().status == 200


@pytest.mark.parametrize("path", sorted(ROUTES), ids=lambda path: path.decode())
async def test_what_is_served_arrives_as_it_was_asked(make_bench: MakeBench, path: bytes) -> None:
    """The other side of the law: if nothing reached an engine, the tests above could not fail."""
    bench = make_bench()
    client = bench.client()
    method = b"GET" if b"GET" in ROUTES[path].methods else b"POST"
    client.send(_request(method, path + b"?a=/sleep&b=%2e%2e", _BODY))
    await bench.settle()
    if ROUTES[path].local or path.startswith(OFFLINE_ROOTS):
        assert bench.upstreams.dialled == []
        return
    engine = await bench.engine()
    assert engine.received.startswith(method + b" " + path + b"?a=/sleep&b=%2e%2e HTTP/1.1\r\n")
    engine.send(answer())
    assert client.answer().status == 200
