"""Workers are killed under traffic, and proxies relieved: nothing that the dead held is kept."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
from collections.abc import AsyncIterator

from tests.fakes.engine import Connection, Received, Script, ScriptedEngine, streaming
from tests.fakes.plane import until
from tests.fakes.proxy_process import ProxyProcess, alive
from tests.fakes.talk import Talk
from tests.io.test_sharing import engines, flags, prompt

WORKERS = 3
CLIENTS = 24
KILLS = 4
HELD = ("leases", "leases_of_others", "replica_inflight", "replica_queued_tokens")


class Traffic:
    """Clients that ask again and again, whatever happens to what they ask."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.asked = self.cut = 0
        self._over = False

    async def client(self) -> None:
        while not self._over:
            self.asked += 1
            try:
                async with Talk(self.port) as talk:
                    await talk.send(prompt(self.asked))
                    await talk.answer()
            except (OSError, AssertionError, EOFError):
                self.cut += 1

    async def more(self, count: int) -> None:
        enough = self.asked + count
        await until(lambda: self.asked >= enough)

    @contextlib.asynccontextmanager
    async def going(self) -> AsyncIterator[None]:
        clients = [asyncio.ensure_future(self.client()) for _ in range(CLIENTS)]
        try:
            await self.more(CLIENTS)
            yield
        finally:
            self._over = True
            await asyncio.gather(*clients)


def slow(draw: random.Random) -> Script:
    """Return a script whose answers take some time, and are under way whenever somebody dies."""

    async def script(connection: Connection, request: Received) -> None:
        await asyncio.sleep(draw.random() * 0.05)

        async def rest(connection: Connection) -> None:
            await asyncio.sleep(draw.random() * 0.2)
            await connection.send(b"0\r\n\r\n")

        with contextlib.suppress(OSError):
            await streaming(b"data: 1\n\n", then=rest)(connection, request)

    return script


async def kill_one(proxy: ProxyProcess, draw: random.Random) -> None:
    """Kill a worker, and wait until another serves in its place."""
    said = len(proxy.lines)
    os.kill(draw.choice(proxy.workers()), signal.SIGKILL)
    await proxy.until_said("listening on", said)


async def assert_nothing_is_held(proxy: ProxyProcess) -> None:
    async with asyncio.timeout(20):  # only keeps a broken test from hanging
        while await proxy.metric("doherty_leases"):
            await asyncio.sleep(0.01)
    held = {name: await proxy.metric(f"doherty_{name}") for name in HELD}
    assert held == dict.fromkeys(HELD, 0), "at once, and not when all is told again"
    assert await proxy.metric("doherty_internal_errors_total") == 0


def load(replicas: list[ScriptedEngine], draw: random.Random) -> None:
    for engine in replicas:
        engine.script = slow(draw)


async def test_whatever_a_killed_worker_held_is_let_go_once_by_each_of_the_others() -> None:
    draw = random.Random(5)
    async with engines(4) as replicas:
        load(replicas, draw)
        async with ProxyProcess(*flags(replicas, "--workers", str(WORKERS))) as proxy:
            traffic = Traffic(proxy.port)
            async with traffic.going():
                for _ in range(KILLS):
                    await traffic.more(draw.randrange(10, 80))
                    await kill_one(proxy, draw)
                await traffic.more(CLIENTS)
            assert 0 < traffic.cut < traffic.asked / 2
            assert await proxy.metric("doherty_worker_restarts_total") == KILLS
            await assert_nothing_is_held(proxy)
            assert await proxy.metric("doherty_notes_heard_total") > traffic.asked


async def test_neither_is_what_workers_held_that_died_while_another_proxy_took_over() -> None:
    draw = random.Random(6)
    async with engines(4) as replicas:
        load(replicas, draw)
        more = flags(replicas, "--workers", str(WORKERS))
        async with ProxyProcess(*more) as proxy:
            traffic = Traffic(proxy.port)
            async with traffic.going():
                for _ in range(2):
                    await kill_one(proxy, draw)
                    left = await proxy.upgrade()
                    await traffic.more(CLIENTS)
                    await kill_one(proxy, draw)
                await until(lambda: not alive(left))
            await assert_nothing_is_held(proxy)
