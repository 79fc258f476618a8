"""Every vector through the whole shell on fake connections, whole and octet by octet.

After each a new client, and the same connection if it is still open, get just their own answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from tests.conformance.engine_vectors import ENGINE
from tests.conformance.judge import (
    check_answers,
    check_delivered,
    check_outcome,
    for_engines,
    methods,
    statuses,
)
from tests.conformance.reader import Taken, cut_at, octet_by_octet
from tests.conformance.vector import (
    POISON,
    EngineVector,
    Outcome,
    Vector,
    head,
    posted,
)
from tests.conformance.vectors import REQUESTS
from tests.fakes.plane import Bench, Client, read_answers
from tests.fakes.strict_engine import Conversation, Odd, echo

_SMALL_BYTES = 2048
MakeBench = Callable[..., Bench]


def _whole(octets: bytes) -> list[bytes]:
    return [octets] if octets else []


def _in_octets(octets: bytes) -> list[bytes]:
    """Octet by octet; what is long in larger pieces, its ends still by octets."""
    if len(octets) <= _SMALL_BYTES:
        return octet_by_octet(octets)
    ends = range(len(octets) - 64, len(octets))
    return cut_at(octets, [*range(64), *range(64, len(octets), 1009), *ends])


Cut = Callable[[bytes], list[bytes]]
_CUTS = pytest.mark.parametrize("cut", [_whole, _in_octets], ids=["whole", "octets"])


def canary(token: bytes) -> bytes:
    return head(b"Content-Length: %d" % len(token)) + token


class Stage:
    """A bench whose replicas answer by themselves, and are strict about what they are sent."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.odd: dict[bytes, Odd] = {}
        self.cut: Cut = _whole  # how the engines' octets come
        self.conversations: list[Conversation] = []
        self._read_bytes: list[int] = []

    async def settle(self) -> None:
        """Let engines and clients talk until nobody has anything to say."""
        engines = self.bench.upstreams.engines
        moved = True
        while moved:
            await self.bench.settle()
            moved = False
            for index, engine in enumerate(engines):
                if index == len(self.conversations):
                    self.conversations.append(Conversation(self.odd))
                    self._read_bytes.append(0)
                unread = engine.received[self._read_bytes[index] :]
                if not unread:
                    continue
                moved = True
                self._read_bytes[index] += len(unread)
                conversation = self.conversations[index]
                for answer in conversation.feed(unread):
                    for piece in self.cut(answer):
                        if not engine.transport.lost:
                            engine.send(piece)
                if conversation.closing:
                    engine.transport.hang_up()

    def check_engines(self, expected: Sequence[Taken]) -> None:
        delivered = [request for talk in self.conversations for request in talk.delivered]
        assert [talk.fault for talk in self.conversations if talk.fault] == []
        assert all(talk.at_rest for talk in self.conversations if not talk.closing)
        check_delivered(delivered, expected)

    async def send(self, client: Client, pieces: Sequence[bytes]) -> None:
        for piece in pieces:
            while not client.transport.reading:
                await self.settle()
            if client.transport.lost:
                return
            client.send(piece)
        await self.settle()

    async def check_canaries(self, used: Client | None) -> list[Taken]:
        """Ask over a new connection, and over `used` if it is open. Return what was asked."""
        fresh, asked = self.bench.client(), [posted(b"fresh")]
        await self.send(fresh, [canary(b"fresh")])
        assert fresh.answer().body == echo(b"fresh")
        if used is not None and not used.transport.closed and not used.transport.eof_written:
            before = len(used.received)
            await self.send(used, [canary(b"again")])
            (answer,) = read_answers(used.received[before:])
            assert answer.body == echo(b"again")
            asked.append(posted(b"again"))
        return asked


@_CUTS
@pytest.mark.parametrize("vector", REQUESTS, ids=lambda vector: vector.name)
async def test_client_vector(make_bench: MakeBench, vector: Vector, cut: Cut) -> None:
    stage = Stage(make_bench())
    client = stage.bench.client()
    await stage.send(client, cut(vector.octets))
    check_answers(vector, client.answers(*methods(vector)) if statuses(vector) else [])
    if vector.refused:
        assert client.transport.closed or client.transport.eof_written
    if vector.waiting and not vector.answered:
        assert client.received in (b"", b"HTTP/1.1 100 Continue\r\n\r\n") or vector.taken
        assert not client.transport.closed
    expected = [] if vector.answered else for_engines(vector.taken)
    asked = await stage.check_canaries(None if vector.waiting else client)
    stage.check_engines([*expected, *asked])


@_CUTS
@pytest.mark.parametrize("vector", ENGINE, ids=lambda vector: vector.name)
async def test_engine_vector(make_bench: MakeBench, vector: EngineVector, cut: Cut) -> None:
    stage = Stage(make_bench())
    stage.cut = cut
    stage.odd[b"odd"] = Odd(vector.octets, vector.closes)
    client = stage.bench.client()
    await stage.send(client, [canary(b"odd")])
    check_outcome(vector, client.received, ended=client.transport.closed)
    if vector.surplus or vector.failed:
        assert stage.bench.upstreams.engines[0].cut_off
    stage.bench.plane.clear("a")  # the probe of a replica that failed finds it well
    asked = await stage.check_canaries(client)
    stage.check_engines([posted(b"odd"), *asked])
    if vector.outcome is not Outcome.WHOLE:
        assert len(stage.conversations) > 1  # nobody else met that connection
    assert POISON not in client.received.replace(vector.payload or b"\n", b"")
