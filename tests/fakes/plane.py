"""A data plane for tests: on fake connections and a fake clock, or on real sockets.

`Bench` has no sockets at all: clients and replicas are ends of fake transports that the test holds.
`RealPlane` listens on a free port of 127.0.0.1 and dials real ones.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterable, Sequence
from typing import Any, Self

import h11
from typing_extensions import override

from proxy import tls
from proxy.config import ProxyConfig
from proxy.contract import FleetSnapshot, PoolRecord, ReplicaRecord
from proxy.core.replica import Replica
from proxy.io.access_log import AccessLog
from proxy.io.clock import Clock
from proxy.io.entrance import Entrance
from proxy.io.plane import Plane
from proxy.io.server import ServerProtocol
from proxy.io.tasks import Tasks
from proxy.io.upstream import Upstream
from proxy.io.upstreams import Upstreams
from tests.fakes.clock import FakeClock
from tests.fakes.transport import FakeTransport

CHAT_BODY = b'{"model":"m","messages":[{"role":"user","content":"hello"}]}'


STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
)
EVENTS = [
    b'data: {"choices":[{"delta":{"content":"%b"}}]}\n\n' % text
    for text in (b"a", b"bb", b"a \\n\\n word", b"d" * 300)
] + [b"data: [DONE]\n\n"]
LAST_CHUNK = b"0\r\n\r\n"


def chat_request(body: bytes = CHAT_BODY, fields: Iterable[str] = (), minor: int = 1) -> bytes:
    """Return a whole chat request."""
    lines = [f"POST /v1/chat/completions HTTP/1.{minor}", "host: proxy", *fields]
    return "\r\n".join([*lines, f"content-length: {len(body)}", "", ""]).encode() + body


def answer(body: bytes = b'{"ok":true}', status: int = 200, fields: Iterable[str] = ()) -> bytes:
    """Return a whole counted answer of an engine."""
    lines = [f"HTTP/1.1 {status} Fine", "content-type: application/json", *fields]
    return "\r\n".join([*lines, f"content-length: {len(body)}", "", ""]).encode() + body


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class Answer:
    """What a strict reader makes of one answer. `complete` is False when its end never came."""

    def __init__(self, head: h11.Response) -> None:
        self.status = head.status_code
        self.fields = {name.decode(): value.decode() for name, value in head.headers}
        self.parts: list[bytes] = []
        self.complete = False

    @property
    def body(self) -> bytes:
        return b"".join(self.parts)


class AnswerReader:
    """Reads one answer with h11, which is strict, as its octets come."""

    def __init__(self, method: str) -> None:
        self.answer: Answer | None = None
        self.broken = False  # the octets are no more HTTP, or ended too early
        self._reader = h11.Connection(h11.CLIENT)
        self._reader.send(h11.Request(method=method, target="/", headers=[("host", "x")]))
        self._reader.send(h11.EndOfMessage())

    @property
    def complete(self) -> bool:
        return self.answer is not None and self.answer.complete

    @property
    def rest(self) -> bytes:
        """Octets after the end of the answer."""
        return self._reader.trailing_data[0]

    def feed(self, data: bytes) -> None:
        """Take octets; empty means that the connection has ended."""
        if self.complete or self.broken:
            return
        self._reader.receive_data(data)
        try:
            while not self.complete:
                event = self._reader.next_event()
                if isinstance(event, h11.Response):
                    self.answer = Answer(event)
                elif isinstance(event, h11.Data):
                    assert self.answer is not None
                    self.answer.parts.append(bytes(event.data))
                elif isinstance(event, h11.EndOfMessage):
                    assert self.answer is not None
                    self.answer.complete = True
                elif not isinstance(event, h11.InformationalResponse):
                    break
        except h11.RemoteProtocolError:
            self.broken = True


def read_answers(
    octets: bytes, methods: Sequence[str] = ("POST",), *, closed: bool = False
) -> list[Answer]:
    """Read the answers to `methods`, as far as they came; all octets must belong to one."""
    answers: list[Answer] = []
    rest = octets
    for method in methods:
        reader = AnswerReader(method)
        if rest:
            reader.feed(rest)
        if closed:
            reader.feed(b"")
        if reader.answer is not None:
            answers.append(reader.answer)
        if not reader.complete:
            return answers
        rest = reader.rest
    assert not rest, f"octets that answer nothing: {rest[:80]!r}"
    return answers


class Client:
    """A client on a fake transport."""

    def __init__(self, plane: Plane, connections: set[ServerProtocol]) -> None:
        self.protocol = ServerProtocol(plane, connections)
        self.transport = FakeTransport(self.protocol)
        self.protocol.connection_made(self.transport)

    def send(self, data: bytes) -> None:
        self.transport.feed(data)

    @property
    def received(self) -> bytes:
        return bytes(self.transport.written)

    def answers(self, *methods: str) -> list[Answer]:
        ended = self.transport.closed or self.transport.eof_written
        return read_answers(self.received, methods or ("POST",), closed=ended)

    def answer(self, method: str = "POST") -> Answer:
        """Return the only answer, which must be complete."""
        (only,) = self.answers(method)
        assert only.complete
        return only


class Engine:
    """The replica's end of one connection."""

    def __init__(self, replica_id: str, transport: FakeTransport) -> None:
        self.replica_id = replica_id
        self.transport = transport

    @property
    def received(self) -> bytes:
        return bytes(self.transport.written)

    def send(self, data: bytes) -> None:
        self.transport.feed(data)

    @property
    def cut_off(self) -> bool:
        """The proxy ended the connection from its side."""
        return self.transport.aborted


class FakeUpstreams(Upstreams):
    """Connections to replicas that the test plays."""

    def __init__(self, plane: Plane, clock: Clock, tasks: Tasks) -> None:
        super().__init__(clock, tasks, 5.0, plane._unsolicited, outbox=plane.outbox)
        self.engines: list[Engine] = []
        self.dialled: list[str] = []  # by replica, refused ones too
        self.refusing: set[str] = set()
        self.closing_at_once: set[str] = set()
        self.gate: asyncio.Event | None = None  # connections are made when it is set

    @override
    async def _dial(self, replica: Replica, upstream: Upstream) -> None:
        self.dialled.append(replica.replica_id)
        if self.gate is not None:
            await self.gate.wait()
        if replica.replica_id in self.refusing:
            raise ConnectionRefusedError(111, "Connection refused")
        transport = FakeTransport(upstream)
        upstream.connection_made(transport)
        if replica.replica_id in self.closing_at_once:
            transport.hang_up()
            await asyncio.sleep(0)
        else:
            self.engines.append(Engine(replica.replica_id, transport))


def records(ids: Iterable[str], models: Iterable[str] = ("m",)) -> tuple[ReplicaRecord, ...]:
    named = tuple(models)
    return tuple(
        ReplicaRecord(replica_id=name, url=f"http://127.0.0.1:{20001 + index}", models=named)
        for index, name in enumerate(ids)
    )


class Bench:
    """One worker's plane, its clients and its replicas, all in the test's hand."""

    def __init__(self, replicas: Sequence[ReplicaRecord] = records("a"), **config: Any) -> None:
        self.clock = FakeClock()
        self.tasks = Tasks()
        self.suspects: list[tuple[str, str]] = []
        self.doubts: list[str] = []
        self.plane = Plane(
            ProxyConfig(**{"access_log": "off", **config}),
            self.clock,
            self.tasks,
            AccessLog("off"),
            lambda replica_id, reason: self.suspects.append((replica_id, reason)),
            self.doubts.append,
        )
        self.upstreams = FakeUpstreams(self.plane, self.clock, self.tasks)
        self.plane.upstreams = self.upstreams
        self.service = FakeUpstreams(self.plane, self.clock, self.tasks)  # of files and batches
        self.plane.offline_links = self.service
        self.connections: set[ServerProtocol] = set()
        self.version = 0
        self.publish(*replicas)

    def publish(self, *replicas: ReplicaRecord, pools: tuple[PoolRecord, ...] = ()) -> None:
        self.version += 1
        self.plane.take_snapshot(
            FleetSnapshot(epoch="test", version=self.version, replicas=replicas, pools=pools)
        )

    def client(self) -> Client:
        return Client(self.plane, self.connections)

    async def settle(self) -> None:
        """Let everything that can happen happen: nothing here waits for time or sockets."""
        for _ in range(20):
            await asyncio.sleep(0)

    async def engine(self) -> Engine:
        """Return the connection to a replica on which something was sent last."""
        await self.settle()
        return max(self.upstreams.engines, key=lambda engine: engine.transport.written_at)

    async def begun(self, request: bytes | None = None) -> tuple[Client, Engine]:
        """Send a request over a new connection; return both ends of its way."""
        client = self.client()
        client.send(request or chat_request())
        return client, await self.engine()

    def sweep(self, seconds: float = 0.0) -> None:
        """Time passes; then the worker's sweep comes."""
        self.clock.advance(seconds)
        for connection in list(self.connections):
            connection.check_deadline(self.clock.now_s())
        self.upstreams.sweep(self.clock.now_s())

    def outcomes(self) -> dict[tuple[str, str], int]:
        """Return how many requests ended, by status and outcome."""
        out: dict[tuple[str, str], int] = {}
        for sample in self.plane.telemetry.samples():
            if sample.name == "requests_total":
                labels = dict(sample.labels)
                key = (labels["code"], labels["outcome"])
                out[key] = out.get(key, 0) + int(sample.value)
        return out

    async def close(self) -> None:
        """End everything and check that nothing is held any more."""
        for connection in list(self.connections):
            connection.kill()
        await self.settle()
        await self.tasks.close()
        self.upstreams.close()
        self.service.close()
        await self.settle()
        assert_nothing_held(self.plane)
        assert not self.upstreams.open_count + self.service.open_count
        assert not self.connections


def inflight(plane: Plane, replica_id: str) -> int:
    return plane.picture.loads.inflight[plane.picture.slots[replica_id]]


def queued_tokens(plane: Plane, replica_id: str) -> int:
    return plane.picture.loads.prefilling.queued_tokens(plane.picture.slots[replica_id])


def assert_nothing_held(plane: Plane) -> None:
    """Every lease is back, every exchange is over, and nobody waits."""
    assert plane.exchanges_open == 0
    assert len(plane.crowd) == 0
    assert not any(account.waiting or account.open for account in plane.waiting.shares.accounts)
    assert plane.waiting.count == 0
    assert not any(queue.waiters or queue.tokens for queue in plane.waiting.queues.values())
    assert (plane.waiting.room.count, plane.waiting.room.bytes) == (0, 0)
    assert plane.waiting._holding._lines == {}
    assert plane.waiting._timer is None
    assert plane.bodies_bytes == 0
    assert len(plane.leases) == 0
    assert plane.metering.in_flight() == 0
    for replica_id in plane.fleet.replicas:
        assert inflight(plane, replica_id) == 0
        assert queued_tokens(plane, replica_id) == 0
    assert plane.telemetry.internal_errors_total == 0


class RealPlane:
    """A plane that listens on 127.0.0.1. Use as `async with RealPlane(urls) as proxy`."""

    def __init__(
        self, replicas: Sequence[ReplicaRecord], clock: Clock | None = None, **config: Any
    ) -> None:
        self.tasks = Tasks()
        self.suspects: list[tuple[str, str]] = []
        self.log = AccessLog(config.get("access_log", "off"))
        self.doubts: list[str] = []
        self.plane = Plane(
            ProxyConfig(**{"access_log": "off", **config}),
            clock or Clock(),
            self.tasks,
            self.log,
            lambda replica_id, reason: self.suspects.append((replica_id, reason)),
            self.doubts.append,
        )
        self.plane.outbox.on = True
        self.plane.take_snapshot(FleetSnapshot(epoch="test", version=1, replicas=tuple(replicas)))
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        self.port = listener.getsockname()[1]
        self.entrance = Entrance(self.plane, [listener])
        self.connections = self.entrance.connections

    async def __aenter__(self) -> Self:
        await self.entrance.open(tls.server_context(self.plane.config))
        return self

    async def __aexit__(self, *failure: object) -> None:
        self.entrance.close()
        self.entrance.kill()
        await self.tasks.close()
        plane = self.plane
        plane.upstreams.close()
        plane.offline_links.close()
        links = (plane.upstreams, plane.offline_links)
        await until(lambda: not len(self.entrance) and not any(each.open_count for each in links))
        self.log.close()
        if failure[0] is None:
            assert_nothing_held(self.plane)


async def until(claim: Any, limit_s: float = 20.0) -> None:
    """Wait until `claim()` is true. The limit only keeps a broken test from hanging."""
    async with asyncio.timeout(limit_s):
        while not claim():
            await asyncio.sleep(0.002)
