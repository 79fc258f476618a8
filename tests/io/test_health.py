"""Probes of suspects: one task for each, until it answers or is no more."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import aiohttp

from proxy.io.health import Prober
from proxy.io.tasks import Tasks
from tests.fakes.engine import ScriptedEngine, free_port
from tests.fakes.plane import until


@contextlib.asynccontextmanager
async def probing(
    endpoint: str = "/health", timeout_s: float = 1.0
) -> AsyncIterator[tuple[Prober, list[str]]]:
    cleared: list[str] = []
    tasks = Tasks()
    async with aiohttp.ClientSession() as session:
        prober = Prober(
            tasks,
            on_cleared=cleared.append,
            on_silent=lambda replica_id: cleared.append(f"{replica_id} is silent"),
        )
        prober.ask_by(session, endpoint=endpoint, interval_s=0.05, timeout_s=timeout_s)
        yield prober, cleared
        await tasks.close()


async def test_a_suspect_that_answers_is_cleared_at_once() -> None:
    async with ScriptedEngine() as engine, probing() as (prober, cleared):
        prober.know({"a": engine.url})
        for _ in range(3):  # several workers find the same
            prober.suspect("a", "refused")
        assert prober.suspects == {"a"}
        await until(lambda: cleared == ["a"])
        assert engine.probes == 1
        assert not prober.suspects


async def test_a_suspect_is_asked_until_it_answers() -> None:
    port = await free_port()
    async with probing() as (prober, cleared):
        prober.know({"a": f"http://127.0.0.1:{port}"})
        prober.suspect("a", "refused")
        engine = ScriptedEngine()
        engine.port = port
        async with engine:
            await until(lambda: cleared == ["a"])
            prober.suspect("a", "again")
            await until(lambda: cleared == ["a", "a"])


async def test_only_200_on_the_right_path_is_an_answer() -> None:
    async with ScriptedEngine() as engine, probing("/not-served") as (prober, cleared):

        async def unwell(connection: object, request: object) -> None:
            raise ConnectionResetError

        engine.script = unwell
        prober.know({"a": engine.url})
        prober.suspect("a", "refused")
        await until(lambda: len(engine.requests) >= 3)
        assert not cleared
        assert {request.target for request in engine.requests} == {"/not-served"}


async def test_an_engine_that_hangs_is_not_well() -> None:
    async with ScriptedEngine() as engine, probing("/hang", timeout_s=0.05) as (prober, cleared):

        async def hang(connection: object, request: object) -> None:
            await asyncio.Event().wait()

        engine.script = hang
        prober.know({"a": engine.url})
        prober.suspect("a", "silent")
        await until(lambda: len(engine.requests) >= 2)
        assert not cleared


async def test_a_replica_that_is_gone_is_probed_no_more() -> None:
    async with probing() as (prober, cleared):
        prober.suspect("never heard of", "refused")
        assert not prober.suspects
        prober.know({"a": f"http://127.0.0.1:{await free_port()}"})
        prober.suspect("a", "refused")
        prober.know({})
        await until(lambda: not prober.suspects)
        assert cleared == ["a"]


async def test_a_doubted_replica_that_answers_stays_in() -> None:
    async with ScriptedEngine() as engine, probing() as (prober, told):
        prober.know({"a": engine.url})
        for _ in range(3):
            prober.doubt("a")
        await until(lambda: engine.probes == 1)
        await until(lambda: not prober.busy)
        assert told == []
        assert not prober.suspects


async def test_a_doubted_replica_that_is_silent_becomes_a_suspect() -> None:
    port = await free_port()
    async with probing(timeout_s=0.2) as (prober, told):
        prober.know({"a": f"http://127.0.0.1:{port}"})
        prober.doubt("a")
        await until(lambda: told == ["a is silent"])
        assert prober.suspects == {"a"}
        engine = ScriptedEngine()
        engine.port = port
        async with engine:
            await until(lambda: told == ["a is silent", "a"])
