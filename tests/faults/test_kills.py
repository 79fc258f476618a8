"""SIGKILL for each part under load: who may notice, who may not, and that it comes back.

The load's records say what the clients saw. Nothing may be cut silently, nothing that began after
a death may fail, and nobody may fail who had nothing to do with the dead.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.fakes.load import Load, Outcome
from tests.fakes.programs import kill_for_certain, mark
from tests.fakes.whole import POLL_S, REPLICAS, WORKERS, Whole, client_ports_of

pytestmark = pytest.mark.faults

CLIENTS = 12


def assert_sound(load: Load) -> None:
    """Whatever happened, these never do."""
    assert not load.having(Outcome.CUT_SILENTLY), load.summary()
    assert not load.having(Outcome.REFUSED), load.summary()
    short = [r for r in load.having(Outcome.COMPLETE) if r.tokens != 30]
    assert not short, short


async def test_killing_a_replica(up: Whole) -> None:
    victim, pid = sorted(up.replica_pids().items())[1]
    others = {k: v for k, v in up.replica_pids().items() if k != victim}
    restarts = up.restarts()
    async with Load(up.url, clients=CLIENTS) as load:
        await load.until_more(2 * CLIENTS)
        await load.until(
            lambda: len([r for r in load.streaming() if r.replica == victim]) >= 2,
            f"streams of {victim}",
        )
        in_flight = {r.client_port for r in load.records if r.outcome is None}
        dead_s = await asyncio.to_thread(kill_for_certain, pid)
        await load.until_more(3 * CLIENTS)
        await asyncio.to_thread(up.until_whole)
        # It serves again: requests of the ring's share for it complete.
        await load.until(
            lambda: any(r.replica == victim for r in load.having(Outcome.COMPLETE, since_s=dead_s)),
            f"{victim} serves again",
        )
        await load.stop()
    assert_sound(load)
    failed = load.failed()
    assert failed, "it died with streams under way"
    assert in_flight & {r.client_port for r in failed}
    for record in failed:
        assert record.begun_s < dead_s, record
        assert record.outcome is Outcome.CUT_VISIBLY or record.status == 502, record
        assert record.code == "replica_lost", record
        assert victim in record.message, record
        assert record.replica in (victim, ""), record
    after = up.replica_pids()
    assert after[victim] != pid
    assert {k: v for k, v in after.items() if k != victim} == others
    assert up.restarts()[victim] == restarts[victim] + 1
    await asyncio.to_thread(up.until_at_rest)


@asynccontextmanager
async def watching(up: Whole) -> AsyncIterator[list[int]]:
    """Note again and again how many replicas the proxy holds for ready."""
    seen: list[int] = []

    async def watch() -> None:
        while True:
            seen.append(await asyncio.to_thread(up.ready_in, up.admin_url + "/replicas"))
            await asyncio.sleep(POLL_S)

    async with asyncio.TaskGroup() as group:
        task = group.create_task(watch())
        yield seen
        task.cancel()


async def test_killing_the_manager(up: Whole) -> None:
    before = up.replica_pids()
    restarts = up.restarts()
    epoch, pid = up.fleet()["epoch"], up.manager_pid()
    async with Load(up.url, clients=CLIENTS) as load, watching(up) as seen:
        await load.until_more(2 * CLIENTS)
        await asyncio.to_thread(kill_for_certain, pid)
        await load.until_more(2 * CLIENTS)
        await asyncio.to_thread(up.until_whole)
        await load.until_more(2 * CLIENTS)
        await load.stop()
    assert not load.failed(), load.summary()
    assert_sound(load)
    assert min(seen) == REPLICAS, seen
    assert up.manager_pid() != pid
    assert up.fleet()["epoch"] != epoch
    assert up.replica_pids() == before
    assert up.restarts() == restarts
    await asyncio.to_thread(up.until_at_rest)


async def test_killing_a_worker(up: Whole) -> None:
    victim, other = up.worker_pids()
    port = int(up.url.rpartition(":")[2])
    restarts = up.metric("doherty_worker_restarts_total")
    async with Load(up.url, clients=CLIENTS) as load:
        await load.until_more(2 * CLIENTS)

        def stopped_with_streams() -> bool:
            """Hold the worker still to see whose connections it has."""
            os.kill(victim, signal.SIGSTOP)
            if len(client_ports_of(victim, port) & {r.client_port for r in load.streaming()}) >= 2:
                return True
            os.kill(victim, signal.SIGCONT)
            return False

        await load.until(stopped_with_streams, "streams of one worker")
        held = client_ports_of(victim, port)
        dead_s = await asyncio.to_thread(kill_for_certain, victim)
        await load.until_more(3 * CLIENTS)
        await asyncio.to_thread(up.until_whole)
        await load.until_more(3 * CLIENTS)
        await load.stop()
    assert_sound(load)
    failed = load.failed()
    assert failed, "it died with streams under way"
    for record in failed:
        assert record.begun_s < dead_s, record
        assert record.client_port in held, record
        assert record.outcome in (Outcome.CUT_VISIBLY, Outcome.UNANSWERED), record
    workers = up.worker_pids()
    assert len(workers) == WORKERS
    assert victim not in workers
    assert other in workers
    assert up.metric("doherty_worker_restarts_total") == restarts + 1
    await asyncio.to_thread(up.until_at_rest)
    assert mark(other).alive
