"""The law of the pool: one exchange a connection, and none after doubt, whatever happens when.

Clients ask, pipeline and leave; engines answer, in pieces and with surplus, lie, break off and
speak unasked; time passes. In any order, each client gets its own answers in its own order, or is
told that there is none; no engine meets a second request before its first is over, nor any over a
connection on which something was wrong; and in the end nothing is held.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from tests.conformance.vector import POISON, head
from tests.fakes.plane import AnswerReader, Bench, Client, Engine, records

_OK = b"HTTP/1.1 200 OK\r\n"


def _counted(token: bytes, fields: bytes = b"") -> bytes:
    return _OK + fields + b"content-length: %d\r\n\r\n" % len(token) + token


def _chunked(token: bytes) -> bytes:
    pieces = (token[:3], token[3:])
    body = b"".join(b"%x;a\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    return _OK + b"transfer-encoding: chunked\r\n\r\n" + body + b"0\r\n\r\n"


# What comes later than the end of an answer may come when the next request is out already, and
# nobody can tell it from an answer to that: surplus comes with the end, or to an idle connection.
_IN_ONE_PIECE = frozenset(("surplus", "second answer"))
# How an engine answers: the octets, whether it closes then, whether they are in order.
_ANSWERS: dict[str, Callable[[bytes], tuple[bytes, bool, bool]]] = {
    "counted": lambda token: (_counted(token), False, True),
    "chunked": lambda token: (_chunked(token), False, True),
    "closing": lambda token: (_counted(token, b"connection: close\r\n"), True, True),
    "until close": lambda token: (_OK + b"\r\n" + token, True, True),
    "continue": lambda token: (b"HTTP/1.1 100 C\r\n\r\n" + _counted(token), False, True),
    "surplus": lambda token: (_counted(token) + POISON, False, False),
    "second answer": lambda token: (_chunked(token) + _counted(POISON), False, False),
    "cut": lambda token: (_counted(token)[:-2], True, False),
    "cut chunks": lambda token: (_chunked(token)[:-3], True, False),
    "bad head": lambda _: (b"HTTP/1.1 2000 OK\r\n\r\n" + POISON, False, False),
    "both framings": lambda token: (
        _counted(token, b"transfer-encoding: chunked\r\n"), False, False,
    ),
    "nothing": lambda _: (b"", True, False),
}  # fmt: skip


class Wire:
    """The engine's end of one connection."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.token: bytes | None = None  # of the request that waits for its answer
        self.in_doubt = False
        self._due = b""  # octets of the answer still to send
        self._closes = False
        self._seen_bytes = 0

    def look(self) -> None:
        """Take the request that has come, if one has."""
        octets = self.engine.received[self._seen_bytes :]
        if not octets:
            return
        self._seen_bytes += len(octets)
        assert self.token is None, "a second request before the first was answered"
        assert not self.in_doubt, "a request over a connection in doubt"
        block, _, body = octets.partition(b"\r\n\r\n")
        length = re.search(rb"\r\ncontent-length: ([0-9]+)", block)
        assert length is not None
        assert len(body) == int(length[1])
        self.token = body

    def answer(self, kind: str, part: int) -> None:
        """Send an answer, or the first part of one; go on with one that was begun."""
        if self.token is None:
            return
        if not self._due:
            self._due, self._closes, in_order = _ANSWERS[kind](self.token)
            self.in_doubt = not in_order
            part = 10 if kind in _IN_ONE_PIECE else part
        now = self._due if part > 9 else self._due[: len(self._due) * part // 10]
        self._due = self._due[len(now) :]
        if now and not self.engine.transport.lost:
            self.engine.send(now)
        if not self._due:
            self.token = None
            if self._closes:
                self.engine.transport.hang_up()

    def speak_unasked(self) -> None:
        if self.token is None and not self.engine.transport.lost:
            self.in_doubt = True
            self.engine.send(POISON)


class World:
    """A bench in the hand of chance."""

    def __init__(self) -> None:
        self.bench = Bench(records("ab"))
        self.clients: list[tuple[Client, list[bytes]]] = []
        self.wires: list[Wire] = []
        self._serial = 0

    async def ask(self, number: int, count: int) -> None:
        """Ask over one of four connections, a new one where the old has ended."""
        open_ones = [c for c in self.clients if not (c[0].transport.closed or _ended(c[0]))]
        if number >= len(open_ones):
            open_ones = [*self.clients, (self.bench.client(), [])]
            self.clients.append(open_ones[-1])
            number = -1
        client, tokens = open_ones[number]
        octets = b""
        for _ in range(count):
            self._serial += 1
            tokens.append(b"token %d." % self._serial)
            octets += head(b"Content-Length: %d" % len(tokens[-1])) + tokens[-1]
        client.send(octets)

    async def settle(self) -> None:
        await self.bench.settle()
        for engine in self.bench.upstreams.engines[len(self.wires) :]:
            self.wires.append(Wire(engine))
        for wire in self.wires:
            wire.look()
        for replica_id in ("a", "b"):
            self.bench.plane.clear(replica_id)

    async def step(self, kind: str, which: int, amount: int) -> None:
        busy = [wire for wire in self.wires if wire.token is not None]
        live = [wire for wire in self.wires if not wire.engine.transport.lost]
        if kind == "ask":
            await self.ask(which, 1 + amount % 2)
        elif kind == "leave" and self.clients:
            self.clients[which % len(self.clients)][0].transport.hang_up()
        elif kind == "unasked" and live:
            live[which % len(live)].speak_unasked()
        elif kind == "close" and live:
            live[which % len(live)].engine.transport.hang_up()
        elif kind == "wait":
            self.bench.sweep(amount / 2)
        elif kind in _ANSWERS and busy:
            busy[which % len(busy)].answer(kind, amount)
        await self.settle()

    def check(self) -> None:
        for client, tokens in self.clients:
            _check_client(client, tokens)


def _ended(client: Client) -> bool:
    return client.transport.eof_written or client.transport.lost


def _check_client(client: Client, tokens: list[bytes]) -> None:
    """Each answer is the token's own, or an error; one that is not whole is the last."""
    rest = client.received
    assert POISON not in rest
    for token in tokens:
        if not rest:
            return
        reader = AnswerReader("POST")
        reader.feed(rest)
        if client.transport.closed or client.transport.eof_written:
            reader.feed(b"")
        answer = reader.answer
        if answer is None:  # its head has not come, or never will
            return
        if answer.status == 200:
            assert answer.body == token if answer.complete else token.startswith(answer.body)
        else:
            assert answer.status in (502, 503, 504)
        if not answer.complete:
            return
        rest = reader.rest
    assert not rest


_STEPS = st.tuples(
    st.sampled_from(["ask"] * 12 + ["leave", "unasked", "close", "wait", *_ANSWERS, *_ANSWERS]),
    st.integers(0, 3),
    st.integers(0, 19),
)


async def _play(steps: list[tuple[str, int, int]]) -> World:
    world = World()
    for kind, which, amount in steps:
        await world.step(kind, which, amount)
        world.check()
    await world.bench.close()
    return world


@given(st.lists(_STEPS, min_size=8, max_size=30))
def test_every_client_gets_its_own_answers(steps: list[tuple[str, int, int]]) -> None:
    asyncio.run(_play(steps))


def test_a_whole_answer_leaves_a_connection_for_the_next() -> None:
    """The other side of the law: connections are reused where nothing was wrong."""
    steps = [("ask", 0, 0), ("counted", 0, 19)] * 5
    world = asyncio.run(_play(steps))
    assert len(world.wires) <= 2
    assert sum(client.received.count(b"token") for client, _ in world.clients) == 5
