"""TLS on both sides, on real sockets: who is let in, what is told, and how things end."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import ssl
import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from proxy.contract import ReplicaRecord
from proxy.core import limits
from tests.fakes.certificates import Authority
from tests.fakes.clock import FakeClock
from tests.fakes.engine import Connection, Received, ScriptedEngine, answer_json, streaming
from tests.fakes.plane import RealPlane, chat_request, until
from tests.fakes.talk import Talk, ask, on_uvloop

EVENT = b"data: 1\n\n"


class Site:
    """An authority and what a proxy in its care is configured with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = Authority(folder)
        self.cert, self.key = self.authority.issue("proxy")
        self.settings = {"tls_cert_path": self.cert, "tls_key_path": self.key}
        self.context = self.authority.client_context()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(tmp_path_factory.mktemp("tls"))


@asynccontextmanager
async def served(
    engine: ScriptedEngine, clock: FakeClock | None = None, **config: object
) -> AsyncIterator[RealPlane]:
    async with engine, RealPlane([engine.record("a")], clock, **config) as proxy:
        yield proxy


def failures(proxy: RealPlane) -> dict[str, int]:
    return dict(proxy.plane.telemetry.tls_failures)


def hang_up(writer: asyncio.StreamWriter) -> None:
    """Send FIN without the goodbye of TLS, as the kernel does for a process that is killed."""
    below = writer.get_extra_info("socket")
    with socket.socket(fileno=os.dup(below.fileno())) as again:
        again.shutdown(socket.SHUT_RDWR)


# --- the listener ---------------------------------------------------------------------------------


@on_uvloop
async def test_requests_are_served_over_tls_one_after_another(site: Site) -> None:
    async with (
        served(ScriptedEngine(), **site.settings) as proxy,
        Talk(proxy.port, site.context) as talk,
    ):
        for size in (1, 100, 300_000):
            body = json.dumps({"model": "m", "prompt": "x" * size}).encode()
            await talk.send(chat_request(body))
            got = await talk.answer()
            assert (got.status, json.loads(got.body)) == (200, {"received": len(body)})
        assert len(proxy.connections) == 1
        assert not proxy.entrance.handshakes
        assert failures(proxy) == {}


@on_uvloop
async def test_a_hello_and_a_request_in_one_packet_are_not_lost(site: Site) -> None:
    """What came before TLS was in place belongs to it: many connections at once show it."""
    async with served(ScriptedEngine(), **site.settings) as proxy:
        asked = [ask(proxy.port, chat_request(), context=site.context) for _ in range(30)]
        assert {got.status for got in await asyncio.gather(*asked)} == {200}


@on_uvloop
async def test_tls_1_2_is_the_least_and_http_1_1_the_only_protocol(site: Site) -> None:
    async with served(ScriptedEngine(), **site.settings) as proxy:
        modern = site.authority.client_context()
        modern.set_alpn_protocols(["h2", "http/1.1"])
        async with Talk(proxy.port, modern) as talk:
            session = talk.writer.get_extra_info("ssl_object")
            assert session.selected_alpn_protocol() == "http/1.1"
            assert session.version() == "TLSv1.3"
            await talk.send(chat_request())
            assert (await talk.answer()).status == 200
        older = site.authority.client_context()
        older.maximum_version = ssl.TLSVersion.TLSv1_2
        assert (await ask(proxy.port, chat_request(), context=older)).status == 200
        oldest = site.authority.client_context()
        oldest.set_ciphers("ALL:@SECLEVEL=0")
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
            oldest.minimum_version = oldest.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await Talk(proxy.port, oldest).__aenter__()
        await until(lambda: failures(proxy) == {"protocol": 1})


@pytest.mark.parametrize("mode", ["optional", "required"])
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_certificates_of_clients(site: Site, mode: str, version: ssl.TLSVersion) -> None:
    ours = site.authority.issue("client", "someone@example.org")
    stranger = Authority(site.folder, "stranger").issue("stranger", "someone@example.org")
    settings = site.settings | {
        "tls_client_auth": mode,
        "tls_client_ca_path": site.authority.path,
    }

    async def status(proxy: RealPlane, *pair: str) -> int:
        context = site.authority.client_context(*pair)
        context.minimum_version = context.maximum_version = version
        try:
            return (await ask(proxy.port, chat_request(), context=context)).status
        except (ssl.SSLError, ConnectionError, AssertionError):
            return 0  # before or after the client's half of the handshake, by version

    @on_uvloop
    async def test() -> None:
        async with served(ScriptedEngine(), **settings) as proxy:
            assert await status(proxy, *ours) == 200
            assert await status(proxy) == (200 if mode == "optional" else 0)
            assert await status(proxy, *stranger) == 0
            refused = 1 if mode == "optional" else 2
            await until(lambda: sum(failures(proxy).values()) == refused)
            assert failures(proxy) == {"certificate": refused}

    test()


@on_uvloop
async def test_plain_http_on_the_tls_port_is_closed_at_once(site: Site) -> None:
    async with (
        served(ScriptedEngine(), **site.settings) as proxy,
        Talk(proxy.port) as talk,
    ):
        await talk.send(chat_request())
        assert await talk.read_to_end() == b""
        await until(lambda: failures(proxy) == {"plain_http": 1})
        assert not len(proxy.entrance)


@on_uvloop
async def test_garbage_and_a_close_in_the_handshake_are_counted(site: Site) -> None:
    async with served(ScriptedEngine(), **site.settings) as proxy:
        async with Talk(proxy.port) as talk:
            await talk.send(os.urandom(64).replace(b"\x16", b"\x00"))
            await talk.read_to_end()
        await until(lambda: failures(proxy) == {"protocol": 1})
        async with Talk(proxy.port) as talk:
            await talk.send(b"\x16\x03\x01\x02\x00\x01")
            await until(lambda: len(proxy.entrance.handshakes) == 1)
        await until(lambda: failures(proxy).get("closed") == 1)
        async with Talk(proxy.port) as talk:
            await until(lambda: len(proxy.entrance.handshakes) == 1)
            talk.writer.write_eof()
            assert await talk.read_to_end() == b""
        await until(lambda: failures(proxy) == {"protocol": 1, "closed": 2})
        assert (await ask(proxy.port, chat_request(), context=site.context)).status == 200


@on_uvloop
async def test_half_a_handshake_has_a_deadline_and_counts_as_a_connection(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "TLS_HANDSHAKE_TIMEOUT_S", 0.2)
    async with served(ScriptedEngine(), **site.settings) as proxy:
        proxy.plane.connections_max = 2
        async with Talk(proxy.port, site.context), Talk(proxy.port) as half:
            await until(lambda: len(proxy.entrance) == 2)
            async with Talk(proxy.port) as third:
                await third.read_to_end()
            assert proxy.plane.telemetry.connections_refused_total == 1
            await half.read_to_end()
            assert failures(proxy) == {"timeout": 1}
            assert len(proxy.connections) == 1
            assert (await ask(proxy.port, chat_request(), context=site.context)).status == 200


@on_uvloop
async def test_another_certificate_without_a_gap(site: Site) -> None:
    """Connections stay, new ones see the new certificate, and none is turned away meanwhile."""
    other = Authority(site.folder, "other")
    cert, key = other.issue("next")
    async with (
        served(ScriptedEngine(), **site.settings) as proxy,
        Talk(proxy.port, site.context) as before,
    ):
        await before.send(chat_request())
        assert (await before.answer()).status == 200
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(cert, key)
        either = site.authority.client_context()
        either.load_verify_locations(other.path)
        for _ in range(10):
            asked = [ask(proxy.port, chat_request(), context=either) for _ in range(10)]
            answers = asyncio.gather(*asked)
            await asyncio.sleep(0)
            await proxy.entrance.open(context)
            assert {got.status for got in await answers} == {200}
        trusting = other.client_context()
        assert (await ask(proxy.port, chat_request(), context=trusting)).status == 200
        with pytest.raises(ssl.SSLCertVerificationError):
            await Talk(proxy.port, site.context).__aenter__()
        await before.send(chat_request())
        assert (await before.answer()).status == 200


# --- bodies, ends, cuts ---------------------------------------------------------------------------


@on_uvloop
async def test_large_bodies_stream_both_ways(site: Site) -> None:
    piece = os.urandom(64 * 1024)

    async def flood(connection: Connection, request: Received) -> None:
        assert len(request.body) > 8_000_000
        await streaming(*[piece] * 200)(connection, request)

    engine = ScriptedEngine(flood, context=site.authority.server_context())
    settings = site.settings | {"ca_cert_path": site.authority.path}
    async with (
        served(engine, **settings) as proxy,
        Talk(proxy.port, site.context) as talk,
    ):
        body = json.dumps({"model": "m", "prompt": "x" * 8_000_000}).encode()
        await talk.send(chat_request(body))
        got = await talk.answer()
        assert got.complete
        assert got.body == piece * 200


@on_uvloop
async def test_a_slow_reader_gets_all_of_an_answer_that_ends_the_connection(site: Site) -> None:
    """The goodbye waits for the octets, those in the transport below TLS included."""
    clock = FakeClock()
    body = b"x" * 300_000  # more than the kernel takes, less than pauses the engine

    engine_done = asyncio.Event()

    async def whole(connection: Connection, _: Received) -> None:
        await answer_json(connection, body)
        engine_done.set()

    async with (
        served(ScriptedEngine(whole), clock, **site.settings) as proxy,
        Talk(proxy.port, site.context) as talk,
    ):
        await until(lambda: bool(proxy.connections))
        (connection,) = proxy.connections
        below = connection._transport.get_extra_info("socket")
        below.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16_384)
        talk.writer.transport.pause_reading()
        await talk.send(chat_request(fields=["connection: close"]))
        await until(lambda: engine_done.is_set() and proxy.plane.exchanges_open == 0)
        for _ in range(5):
            clock.advance(limits.WRITE_STALL_TIMEOUT_S / 6)
            for connection in list(proxy.connections):
                connection.check_deadline(clock.now_s())
        talk.writer.transport.resume_reading()
        got = await talk.answer()
        assert got.complete
        assert got.body == body


@on_uvloop
async def test_a_client_that_says_no_goodbye_is_not_waited_for(site: Site) -> None:
    clock = FakeClock()
    async with (
        served(ScriptedEngine(), clock, **site.settings) as proxy,
        Talk(proxy.port, site.context) as talk,
    ):
        await talk.send(chat_request())
        assert (await talk.answer()).status == 200
        talk.writer.transport.pause_reading()
        (connection,) = proxy.connections
        connection.drain()
        connection.check_deadline(clock.now_s())
        await asyncio.sleep(0.02)
        assert proxy.connections  # a goodbye is due
        clock.advance(limits.LINGER_S)
        connection.check_deadline(clock.now_s())
        await until(lambda: not proxy.connections)


@on_uvloop
async def test_a_refusal_is_read_before_the_rest_of_the_body(site: Site) -> None:
    async with (
        served(ScriptedEngine(), max_payload_size=1000, **site.settings) as proxy,
        Talk(proxy.port, site.context) as talk,
    ):
        talk.writer.write(chat_request(b'{"model":"m","prompt":"' + b"x" * 500_000 + b'"}'))
        got = await talk.answer()
        assert got.status == 413
        assert not await talk.read_to_end()


CUT_HEADS = {
    "chunked": b"transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n",
    "counted": b"content-length: 10\r\n\r\nhello",
    "until the close": b"\r\nhello",
}


@pytest.mark.parametrize("framing", list(CUT_HEADS))
@pytest.mark.parametrize("secured_engine", [False, True])
def test_a_cut_looks_cut(site: Site, framing: str, *, secured_engine: bool) -> None:
    """An engine that goes away without the goodbye of TLS has not ended its answer."""

    async def cut(connection: Connection, _: Received) -> None:
        await connection.send(b"HTTP/1.1 200 OK\r\n" + CUT_HEADS[framing])
        await asyncio.sleep(0.02)  # a reset overtakes what was sent
        if secured_engine:
            hang_up(connection.writer)
        else:
            connection.reset()

    context = site.authority.server_context() if secured_engine else None
    settings = site.settings | {"ca_cert_path": site.authority.path}

    @on_uvloop
    async def test() -> None:
        async with (
            served(ScriptedEngine(cut, context=context), **settings) as proxy,
            Talk(proxy.port, site.context) as talk,
        ):
            await talk.send(chat_request())
            await talk.read_until(b"hello")
            await talk.read_to_end()
            if framing == "until the close":
                assert talk.ended == "reset"
            assert not talk.received.endswith(b"0\r\n\r\n")
            outcomes = proxy.plane.telemetry.series("chat", "m").outcomes
            assert dict(outcomes) == {(200, "stream_cut"): 1}

    test()


@on_uvloop
async def test_an_answer_that_a_goodbye_ends_is_whole(site: Site) -> None:
    async def until_close(connection: Connection, _: Received) -> None:
        await connection.send(b"HTTP/1.1 200 OK\r\n\r\nhello")
        connection.close()

    engine = ScriptedEngine(until_close, context=site.authority.server_context())
    settings = site.settings | {"ca_cert_path": site.authority.path}
    async with (
        served(engine, **settings) as proxy,
        Talk(proxy.port, site.context) as talk,
    ):
        await talk.send(chat_request())
        await talk.read_to_end()
        assert talk.received.endswith(b"hello")
        assert talk.ended == "eof"
        assert dict(proxy.plane.telemetry.series("chat", "m").outcomes) == {(200, "ok"): 1}


@pytest.mark.parametrize("how", ["goodbye", "abort"])
def test_a_client_that_goes_away_stops_the_engine(site: Site, how: str) -> None:
    # The answer never ends; the engine goes on reading, and so sees the cut.
    script = streaming(EVENT, then=lambda connection: connection.send(b""))

    @on_uvloop
    async def test() -> None:
        engine = ScriptedEngine(script, context=site.authority.server_context())
        settings = site.settings | {"ca_cert_path": site.authority.path}
        async with served(engine, **settings) as proxy:
            async with Talk(proxy.port, site.context) as talk:
                await talk.send(chat_request())
                await talk.read_until(EVENT)
                if how == "goodbye":
                    talk.writer.close()
                else:
                    talk.writer.transport.abort()
            await until(lambda: not engine.connections_open)
            await until(lambda: not len(proxy.entrance))
            outcomes = proxy.plane.telemetry.series("chat", "m").outcomes
            assert dict(outcomes) == {(499, "client_gone"): 1}

    test()


# --- replicas -------------------------------------------------------------------------------------


@on_uvloop
async def test_a_replica_of_another_authority_is_unreachable_and_the_client_is_told_why(
    site: Site,
) -> None:
    stranger = Authority(site.folder, "stranger-2")
    engine = ScriptedEngine(context=stranger.server_context("stranger-engine"))
    async with served(engine, ca_cert_path=site.authority.path) as proxy:
        got = await ask(proxy.port, chat_request())
        assert got.status == 502
        error = json.loads(got.body)["error"]
        assert error["code"] == "replica_unreachable"
        assert "certificate is not accepted: unable to get local issuer" in error["message"]
        assert not engine.requests
        ((_, reason),) = proxy.suspects
        assert "certificate is not accepted" in reason
    async with served(
        ScriptedEngine(context=stranger.server_context("stranger-engine")),
        verify_replica_tls=False,
    ) as proxy:
        assert (await ask(proxy.port, chat_request())).status == 200


@on_uvloop
async def test_a_replica_must_be_who_its_url_says(site: Site) -> None:
    engine = ScriptedEngine(context=site.authority.server_context("elsewhere", "example.org"))
    async with served(engine, ca_cert_path=site.authority.path) as proxy:
        got = await ask(proxy.port, chat_request())
        assert got.status == 502
        assert "not valid for '127.0.0.1'" in json.loads(got.body)["error"]["message"]
        assert not engine.requests


@on_uvloop
async def test_a_replica_that_speaks_no_tls_or_nothing_at_all() -> None:
    async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\n\r\n")
        writer.close()

    async def told(port: int, **config: float) -> str:
        records = [ReplicaRecord(replica_id="a", url=f"https://127.0.0.1:{port}", models=("m",))]
        async with RealPlane(records, **config) as proxy:
            got = await ask(proxy.port, chat_request())
            assert got.status == 502
            assert not proxy.plane.upstreams.open_count
            return str(json.loads(got.body)["error"]["message"])

    server = await asyncio.start_server(plain, "127.0.0.1", 0)
    assert "does not speak TLS" in await told(server.sockets[0].getsockname()[1])
    server.close()
    await server.wait_closed()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        before = len(os.listdir("/proc/self/fd"))
        assert "timed out" in await told(silent.getsockname()[1], connect_timeout_secs=0.2)
        await until(lambda: len(os.listdir("/proc/self/fd")) <= before)


@on_uvloop
async def test_a_replica_sees_our_certificate(site: Site) -> None:
    context = site.authority.server_context()
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(site.authority.path)
    cert, key = site.authority.issue("proxy-to-engine", "proxy@example.org")
    engine = ScriptedEngine(context=context)
    ca = {"ca_cert_path": site.authority.path}
    pair = {"client_cert_path": cert, "client_key_path": key}
    async with served(engine, **ca, **pair) as proxy:
        assert (await ask(proxy.port, chat_request())).status == 200
    async with served(ScriptedEngine(context=context), **ca) as proxy:
        # By TLS 1.3 it says so only after our half of the handshake.
        assert (await ask(proxy.port, chat_request())).status == 502


@on_uvloop
async def test_a_connection_to_a_replica_is_reused_but_not_once_the_replica_has_closed_it(
    site: Site,
) -> None:
    engine = ScriptedEngine(context=site.authority.server_context())
    async with served(engine, ca_cert_path=site.authority.path) as proxy:
        for _ in range(3):
            assert (await ask(proxy.port, chat_request())).status == 200
        assert engine.connections_total == 1
        (upstream,) = proxy.plane.upstreams._open
        assert upstream.clean()
        # The kernel has its end; the loop has not turned.
        for writer in engine._writers:
            hang_up(writer)
        assert not upstream.clean()
        assert (await ask(proxy.port, chat_request())).status == 200
        assert engine.connections_total == 2
