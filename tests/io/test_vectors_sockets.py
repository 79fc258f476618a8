"""Every vector over real sockets, on the loop that the proxy runs on, with canaries after each.

One plane and one engine serve a whole run: what a vector left behind in either would be met by the
next one's canaries.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager

import pytest

from proxy.io.plane import Plane
from tests.conformance import engine_bodies, engine_heads
from tests.conformance.judge import (
    check_answers,
    check_delivered,
    check_outcome,
    for_engines,
    methods,
    statuses,
)
from tests.conformance.reader import Taken, cut_at
from tests.conformance.vector import EngineVector, Outcome, Vector, posted
from tests.conformance.vectors import REQUESTS
from tests.fakes.plane import Answer, AnswerReader, RealPlane
from tests.fakes.proxy_process import ProxyProcess
from tests.fakes.stage import canary
from tests.fakes.strict_engine import Odd, StrictEngine, echo
from tests.fakes.talk import Talk, on_uvloop


class Run:
    """A proxy before one strict engine, and what that engine must have been sent so far."""

    def __init__(self, port: int, engine: StrictEngine, plane: Plane | None = None) -> None:
        self.port = port
        self.engine = engine
        self._plane = plane  # of a proxy in this process
        self.due: list[Taken] = []
        self._serial = 0

    async def ask(self, talk: Talk) -> None:
        """Send one canary and get just its answer."""
        self._serial += 1
        token = b"canary %d" % self._serial
        self.due.append(posted(token))
        await talk.send(canary(token))
        answer = await talk.answer()
        assert (answer.status, answer.body) == (200, echo(token))
        assert talk.received == b""

    def find_well(self) -> None:
        """The probe of a replica that failed finds it well."""
        assert self._plane is not None
        self._plane.clear("a")

    async def check(self, used: Talk | None) -> None:
        """A new client, and the used connection if it is open, get their own answers."""
        async with Talk(self.port) as fresh:
            await self.ask(fresh)
        if used is not None:
            await self.ask(used)
        assert self.engine.faults == []
        check_delivered(self.engine.delivered, self.due)


@asynccontextmanager
async def running() -> AsyncIterator[Run]:
    async with StrictEngine() as engine, RealPlane([engine.record("a")]) as proxy:
        yield Run(proxy.port, engine, proxy.plane)


@asynccontextmanager
async def running_process() -> AsyncIterator[Run]:
    """As people run it: in processes of its own, translated to machine code where that was done."""
    async with AsyncExitStack() as stack:
        engine = await stack.enter_async_context(StrictEngine())
        url = f"http://127.0.0.1:{engine.port}"
        proxy = await stack.enter_async_context(ProxyProcess("--worker-urls", url))
        while (await proxy.admin("/readyz")).status != 200:
            await asyncio.sleep(0.02)
        yield Run(proxy.port, engine)


async def _send(talk: Talk, pieces: Iterable[bytes]) -> None:
    """Send what the other side still takes: it may have refused, and closed, before the end."""
    try:
        for piece in pieces:
            await talk.send(piece)
            await asyncio.sleep(0)
    except ConnectionError:
        pass


async def _answers(talk: Talk, vector: Vector) -> list[Answer]:
    return [await talk.answer(method) for method in methods(vector)] if statuses(vector) else []


async def _client_vector(run: Run, vector: Vector, pieces: Sequence[bytes]) -> None:
    async with Talk(run.port) as talk:
        await _send(talk, pieces)
        answers = await _answers(talk, vector)
        check_answers(vector, answers)
        ended = bool(answers) and answers[-1].fields.get("connection") == "close"
        if ended:
            assert await talk.read_to_end() == b""
            assert talk.ended == "eof"  # and no reset, which can take the answer with it
        if not vector.answered:
            run.due += for_engines(vector.taken)
        await run.check(None if ended or vector.waiting else talk)


async def _octets(talk: Talk) -> tuple[bytes, bool]:
    """Return all octets of one answer, and whether the connection has ended with them."""
    reader, octets = AnswerReader("POST"), b""
    while not reader.complete and not reader.broken:
        talk.received = b""
        if not await talk.read():
            return octets, True
        octets += talk.received
        reader.feed(talk.received)
    talk.received = b""
    assert reader.answer is not None
    if reader.answer.fields.get("connection") != "close":
        return octets, False
    return octets + await talk.read_to_end(), True


async def _engine_vector(run: Run, vector: EngineVector) -> None:
    body = b"odd " + vector.name.encode()
    run.engine.odd[body] = Odd(vector.octets, vector.closes)
    run.due.append(posted(body))
    async with Talk(run.port) as talk:
        await talk.send(canary(body))
        octets, ended = await _octets(talk)
        check_outcome(vector, octets, ended=ended)
        if vector.outcome is not Outcome.WHOLE:
            run.find_well()
        await run.check(None if ended else talk)


@contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        error.add_note(f"vector {name}")
        raise


@pytest.mark.parametrize("prefix", sorted({v.name.partition("_")[0] for v in REQUESTS}))
@on_uvloop
async def test_client_vectors(prefix: str) -> None:
    vectors = [v for v in REQUESTS if v.name.partition("_")[0] == prefix]
    chosen = random.Random(prefix)
    async with running() as run:
        for vector in vectors:
            cuts = [chosen.randrange(1, 200) for _ in range(3)]
            for pieces in ([vector.octets], cut_at(vector.octets, cuts)):
                with _named(vector.name):
                    await _client_vector(run, vector, pieces)


_ENGINES = {
    "right": engine_bodies.RIGHT,
    "surplus": engine_bodies.SURPLUS,
    "cuts": engine_bodies.CUTS,
    "chunks": engine_bodies.BAD,
    "framing": engine_heads.FRAMING,
    "lines": engine_heads.LINES,
    "fields": engine_heads.FIELDS,
    "hops": engine_heads.HOPS,
}


@pytest.mark.parametrize("group", sorted(_ENGINES))
@on_uvloop
async def test_engine_vectors(group: str) -> None:
    async with running() as run:
        for vector in _ENGINES[group]:
            with _named(vector.name):
                await _engine_vector(run, vector)


@on_uvloop
async def test_vectors_before_a_proxy_of_its_own() -> None:
    """All client vectors, and the engine vectors after which the replica stays well."""
    async with running_process() as run:
        for client_vector in REQUESTS:
            with _named(client_vector.name):
                await _client_vector(run, client_vector, [client_vector.octets])
        for vector in (v for group in _ENGINES.values() for v in group):
            if vector.outcome is Outcome.WHOLE:
                with _named(vector.name):
                    await _engine_vector(run, vector)
