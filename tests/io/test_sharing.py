"""Workers and proxies have one picture: of the load, and of what is cached where."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

from tests.fakes.engine import ScriptedEngine, free_port
from tests.fakes.plane import chat_request
from tests.fakes.proxy_process import ProxyProcess
from tests.fakes.talk import ask
from tests.io.test_reload import File
from tests.io.test_supervisor import HeldStreams, opened

LINKED = "linked with the proxy at"


async def until_metric(proxy: ProxyProcess, name: str, value: float, **labels: str) -> None:
    """Wait until a series has a value. The limit only keeps a broken test from hanging."""
    async with asyncio.timeout(20):
        while await proxy.metric(f"doherty_{name}", **labels) != value:
            await asyncio.sleep(0.01)


def prompt(number: int) -> bytes:
    """Return a request whose prompt begins as no other's."""
    text = f"{number} " + f"conversation {number} goes on. " * 150
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": text}]})
    return chat_request(body.encode(), fields=["connection: close"])


async def where(proxy: ProxyProcess, number: int) -> tuple[str, str]:
    """Send a prompt; return the replica and the reason of the choice."""
    answer = await ask(proxy.port, prompt(number))
    assert answer.status == 200
    return answer.fields["x-doherty-replica"], answer.fields["x-doherty-decision"]


@contextlib.asynccontextmanager
async def engines(count: int) -> AsyncIterator[list[ScriptedEngine]]:
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(ScriptedEngine()) for _ in range(count)]


def flags(replicas: list[ScriptedEngine], *more: str) -> list[str]:
    return ["--worker-urls", *(engine.url for engine in replicas), "--expose-routing", *more]


async def test_workers_know_of_each_others_requests_and_forget_those_of_the_dead() -> None:
    async with (
        ScriptedEngine() as engine,
        ProxyProcess("--workers", "2", "--worker-urls", engine.url) as proxy,
    ):
        held = HeldStreams()
        engine.script = held.script
        async with opened(proxy.port, 16) as talks:
            await until_metric(proxy, "leases_of_others", 16)
            assert await proxy.metric("doherty_replica_inflight") == 16
            victim, survivor = proxy.workers()
            left = len(proxy.client_ports_of(survivor))
            said = len(proxy.lines)
            os.kill(victim, signal.SIGKILL)
            await proxy.until_said("listening on", said)
            await until_metric(proxy, "leases_of_others", left)  # the successor knows of them
            assert await proxy.metric("doherty_replica_inflight") == left
            held.release.set()
            for talk in talks:
                await talk.read_to_end()
            await until_metric(proxy, "leases_of_others", 0)
            await until_metric(proxy, "replica_inflight", 0)
            assert await proxy.metric("doherty_notes_lost_total") == 0
            assert await proxy.metric("doherty_note_lag_seconds_count") > 0


async def test_a_conversation_is_continued_by_whatever_proxy_where_another_began_it() -> None:
    place = f"127.0.0.1:{await free_port()}"
    async with engines(4) as replicas:
        more = flags(replicas, "--peer-key", "k")
        async with (
            ProxyProcess(*more, "--peer-listen", place) as one,
            ProxyProcess(*more, "--peers", place) as other,
        ):
            await asyncio.gather(one.until_said(LINKED), other.until_said(LINKED))
            began = [await where(one, number) for number in range(8)]
            assert len({replica for replica, _ in began}) > 1
            await until_metric(other, "prefix_index_entries", await entries(one))
            continued = [await where(other, number) for number in range(8)]
            assert continued == [(replica, "prefix") for replica, _ in began]

            held = HeldStreams()
            for replica in replicas:
                replica.script = held.script
            async with opened(other.port, 4):
                await until_metric(one, "leases_of_others", 4)
                other.process.kill()
                await until_metric(one, "leases_of_others", 0)
                await one.until_said("the link with the proxy at .* has ended")
                assert await one.metric("doherty_peers") == 0
                held.release.set()


async def test_one_who_has_just_started_is_told_what_is_cached_where(tmp_path: Path) -> None:
    async with engines(4) as replicas:
        more = flags(replicas)
        place = f"unix:{tmp_path / 'peers'}"
        file = File(tmp_path)
        async with ProxyProcess(*more, *file.flags) as one:
            began = [await where(one, number) for number in range(8)]
            told = [(replica, "prefix") for replica, _ in began]
            file.write(peer_listen=place)
            await one.until_said("listening for peers")
            async with ProxyProcess(*more, "--peers", place) as newcomer:
                await until_metric(newcomer, "prefix_index_entries", await entries(one))
                assert [await where(newcomer, number) for number in range(8)] == told
                said = len(newcomer.lines)
                os.kill(newcomer.workers()[0], signal.SIGKILL)
                await newcomer.until_said("listening on", said)
                await until_metric(newcomer, "prefix_index_entries", await entries(one))
                assert [await where(newcomer, number) for number in range(8)] == told
            held = HeldStreams()
            for replica in replicas:
                replica.script = held.script
            async with opened(one.port, 2) as talks:
                before = await entries(one)
                await one.upgrade()
                await until_metric(one, "leases_of_others", 2)  # they run on beside it
                await until_metric(one, "prefix_index_entries", before)
                held.release.set()
                for talk in talks:
                    await talk.read_to_end()
                await until_metric(one, "leases_of_others", 0)
            assert [await where(one, number) for number in range(8)] == told


async def entries(proxy: ProxyProcess) -> float:
    return await proxy.metric("doherty_prefix_index_entries")
