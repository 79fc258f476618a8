"""A request that meets the engine's close of an idle connection is lost, or sent once more.

It is sent once more only where the kernel proves that the engine had closed before anything of the
request reached it. Everything else may have been read, and is delivered once.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import struct
from typing import Any

import pytest

from proxy.contract import ReplicaRecord
from proxy.io.acknowledged import Acknowledged
from proxy.io.upstream import Upstream
from proxy.io.upstreams import Upstreams
from tests.fakes.engine import RESET
from tests.fakes.plane import CHAT_BODY, Bench, Client, answer, chat_request, inflight, until
from tests.fakes.talk import on_uvloop

LARGE_BODY = CHAT_BODY[:-1] + b',"x":"' + b"y" * 3_000_000 + b'"}'


# --- with a kernel between ------------------------------------------------------------------------


class Engine:
    """An engine made of plain sockets: what its kernel does is what the test says, and when."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.setblocking(False)
        url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.record = ReplicaRecord(replica_id="a", url=url, models=("m",))

    async def accept(self) -> socket.socket:
        connection, _ = await asyncio.get_running_loop().sock_accept(self.listener)
        connection.setblocking(False)
        return connection

    async def take(self, connection: socket.socket) -> bytes:
        """Read one whole request."""
        loop, got = asyncio.get_running_loop(), b""
        while (head := got.partition(b"\r\n\r\n"))[1] == b"" or len(head[2]) < length_of(head[0]):
            data = await loop.sock_recv(connection, 1 << 20)
            assert data, "the proxy ended the connection"
            got += data
        return got

    async def serve(self, connection: socket.socket) -> bytes:
        got = await self.take(connection)
        await asyncio.get_running_loop().sock_sendall(connection, answer())
        return got


def length_of(head: bytes) -> int:
    found = re.search(rb"content-length: (\d+)", head)
    return int(found[1]) if found else 0


class Race:
    """A plane whose client is fake, so that a request is sent at the test's moment, not later."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.bench = Bench((engine.record,), request_timeout_secs=60)
        plane = self.bench.plane
        plane.upstreams = Upstreams(plane.clock, self.bench.tasks, 5.0, lambda: None)

    async def warm(self) -> socket.socket:
        """Return the engine's end of a connection that has served and is idle."""
        client = self.bench.client()
        client.send(chat_request())
        connection = await self.engine.accept()
        await self.engine.serve(connection)
        await until(lambda: self.bench.plane.upstreams.idle_count == 1)
        assert client.answer().status == 200
        return connection

    async def close(self) -> None:
        plane = self.bench.plane
        plane.upstreams.close()
        await until(lambda: not plane.upstreams.open_count)
        await self.bench.close()
        self.engine.listener.close()


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The look before use comes too early: the engine's close is still on its way."""
    monkeypatch.setattr(Upstream, "clean", lambda self: True)


@pytest.mark.usefixtures("blind")
@pytest.mark.parametrize("body", [CHAT_BODY, LARGE_BODY], ids=["small", "large"])
@on_uvloop
async def test_a_request_that_meets_the_close_goes_out_again(body: bytes) -> None:
    race = Race(Engine())
    idle = await race.warm()
    idle.close()
    client = race.bench.client()
    client.send(chat_request(body))
    fresh = await race.engine.accept()
    assert (await race.engine.serve(fresh)).endswith(body)
    await until(lambda: client.received)
    assert client.answer().status == 200
    assert not race.bench.suspects
    assert race.bench.plane.telemetry.retries == {"closed_idle": 1}
    fresh.close()
    await race.close()


async def read_and_reset(connection: socket.socket) -> None:
    """With the acknowledgement delayed, the proxy's kernel knows no more than if it were unread."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    connection.close()


async def read_and_close(connection: socket.socket) -> None:
    connection.close()


async def read_and_half_close(connection: socket.socket) -> None:
    connection.shutdown(socket.SHUT_WR)


@pytest.mark.usefixtures("blind")
@pytest.mark.parametrize("end", [read_and_reset, read_and_close, read_and_half_close])
@pytest.mark.parametrize("body", [CHAT_BODY, LARGE_BODY], ids=["small", "large"])
@on_uvloop
async def test_a_request_that_was_read_is_delivered_once(end: Any, body: bytes) -> None:
    race = Race(Engine())
    idle = await race.warm()
    client = race.bench.client()
    client.send(chat_request(body))
    await race.engine.take(idle)
    await end(idle)
    await until(lambda: client.received)
    assert json.loads(client.answer().body)["error"]["code"] == "replica_lost"
    await nobody_knocks(race)
    idle.close()
    await race.close()


@pytest.mark.usefixtures("blind")
@on_uvloop
async def test_a_request_that_reached_a_closing_kernel_is_delivered_once() -> None:
    """It was not read; but a reset cannot say so."""
    race = Race(Engine())
    idle = await race.warm()
    client = race.bench.client()
    client.send(chat_request())
    await until(lambda: readable(idle))
    idle.close()
    await until(lambda: client.received)
    assert client.answer().status == 502
    await nobody_knocks(race)
    await race.close()


def readable(connection: socket.socket) -> bool:
    try:
        return bool(connection.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False


async def nobody_knocks(race: Race) -> None:
    for _ in range(20):
        await asyncio.sleep(0)
    with pytest.raises(BlockingIOError):
        race.engine.listener.accept()
    assert not race.bench.plane.telemetry.retries


@pytest.mark.usefixtures("blind")
@on_uvloop
async def test_a_new_connection_that_is_closed_at_once_is_as_good_as_refused() -> None:
    race = Race(Engine())
    client = race.bench.client()
    client.send(chat_request())
    (await race.engine.accept()).close()
    await until(lambda: client.received)
    assert json.loads(client.answer().body)["error"]["code"] == "replica_unreachable"
    assert len(race.bench.suspects) == 1
    await race.close()


@on_uvloop
async def test_the_kernel_counts_what_the_peer_has_acknowledged() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    acknowledged = Acknowledged(ours)
    assert acknowledged.octets() == 0
    ours.sendall(b"x" * 100)
    theirs.recv(100)
    theirs.sendall(b"y")
    ours.recv(1)
    assert acknowledged.octets() == 100
    theirs.close()
    ours.sendall(b"x" * 50)
    assert acknowledged.octets() == 100
    ours.close()


class OldKernel:
    def getsockopt(self, level: int, name: int, size: int, /) -> bytes:
        return struct.pack("104x")


def test_a_kernel_that_does_not_count_proves_nothing() -> None:
    with pytest.raises(OSError, match="count"):
        Acknowledged(OldKernel())


# --- the rule, on fake connections ----------------------------------------------------------------


class Kernel:
    """Answers for `TCP_INFO`."""

    def __init__(self) -> None:
        self.acknowledged_bytes = 1

    def getsockopt(self, level: int, name: int, size: int, /) -> bytes:
        return struct.pack("=120xQ", self.acknowledged_bytes)


class DeadKernel(Kernel):
    def getsockopt(self, level: int, name: int, size: int, /) -> bytes:
        raise OSError("gone")


@pytest.fixture
async def warm(bench: Bench) -> tuple[Bench, Client, Any, Kernel]:
    """A request sent over a connection that has served one before, and that one's kernel."""
    _first, engine = await bench.begun()
    kernel = Kernel()
    upstream = engine.transport._protocol_here
    upstream._acknowledged = Acknowledged(kernel)
    kernel.acknowledged_bytes += len(engine.received)
    engine.send(answer())
    client, same = await bench.begun()
    assert same is engine
    return bench, client, engine, kernel


@pytest.mark.parametrize(
    ("error", "acknowledged", "said", "again"),
    [
        (None, 0, b"", True),
        (BrokenPipeError(), 0, b"", True),
        (ConnectionResetError(), 0, b"", False),
        (None, 1, b"", False),
        (BrokenPipeError(), 1, b"", False),
        (None, 0, b"HTTP/1.1 2", False),
        (None, 0, b"HTTP/1.1 102 Processing\r\n\r\n", False),
        (TimeoutError(), 0, b"", False),
    ],
)
async def test_again_only_when_it_closed_first_and_nothing_was_acknowledged(
    warm: tuple[Bench, Client, Any, Kernel],
    error: Exception | None,
    acknowledged: int,
    said: bytes,
    *,
    again: bool,
) -> None:
    bench, client, engine, kernel = warm
    kernel.acknowledged_bytes += acknowledged
    if said:
        engine.send(said)
    engine.transport.hang_up(error)
    await bench.settle()
    assert len(bench.upstreams.engines) == 1 + again
    if again:
        bench.upstreams.engines[-1].send(answer(b"[7]"))
        assert client.answer().body == b"[7]"
    else:
        assert client.answer().status == 502


async def test_a_kernel_that_fails_proves_nothing(
    warm: tuple[Bench, Client, Any, Kernel],
) -> None:
    bench, client, engine, _ = warm
    engine.transport._protocol_here._acknowledged._socket = DeadKernel()
    engine.transport.hang_up()
    await bench.settle()
    assert client.answer().status == 502


async def test_with_tls_nothing_can_be_proved(bench: Bench) -> None:
    """Its records are not the octets that we count; these fakes speak as if with TLS."""
    _first, engine = await bench.begun()
    engine.send(answer())
    client, same = await bench.begun()
    same.transport.hang_up()
    await bench.settle()
    assert client.answer().status == 502


async def test_a_client_that_goes_meanwhile_ends_it(
    warm: tuple[Bench, Client, Any, Kernel],
) -> None:
    bench, client, engine, _ = warm
    bench.upstreams.gate = asyncio.Event()
    engine.transport.hang_up()
    await bench.settle()
    assert inflight(bench.plane, "a") == 1
    client.transport.hang_up()
    await bench.settle()
    assert inflight(bench.plane, "a") == 0
    assert len(bench.tasks) == 0
    assert len(bench.upstreams.dialled) == 2
