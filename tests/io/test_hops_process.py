"""Two regions of real processes: what crosses is lost with no region, and taken by one worker."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

from tests.fakes.engine import Connection, Received, ScriptedEngine, reply
from tests.fakes.plane import chat_request
from tests.fakes.talk import ask
from tests.fakes.two_regions import LEFT_S, WORKERS, counted, regions


async def test_a_hop_is_taken_once_by_all_workers_and_a_stopped_region_loses_no_request(
    tmp_path: Path,
) -> None:
    stays = asyncio.Event()

    async def silent(_: Connection, __: Received) -> None:
        await stays.wait()

    async with ScriptedEngine() as theirs, ScriptedEngine() as ours:
        url = ours.url
        async with regions(tmp_path, url, theirs.url) as (eu, us, wire):
            await ours.stop()  # eu has nothing, and finds that out
            answered = await ask(eu.port, chat_request())
            assert answered.status == 200, answered.body
            assert answered.fields["x-doherty-region"] == "us"

            sent = next(octets for octets in wire.carried if b"x-doherty-hop" in octets)
            before = len(theirs.requests)
            for _ in range(8 * WORKERS):  # the kernel deals them out among the workers
                assert (await ask(us.port, sent)).status == 403
            assert len(theirs.requests) == before
            assert await us.metric("doherty_hops_refused_total", reason="replayed") == 8 * WORKERS

            theirs.script = silent
            asked = [asyncio.ensure_future(ask(eu.port, chat_request())) for _ in range(6)]
            await counted(eu, "doherty_hops_waiting", 1, direction="out")
            async with ours:  # and serves again
                ours.script = reply
                await counted(eu, "doherty_replica_suspect", 0)
                while await eu.metric("doherty_replica_suspect"):
                    await asyncio.sleep(0.05)
                stopped = [us.pid, *us.workers()]
                for pid in stopped:
                    os.kill(pid, signal.SIGSTOP)
                async with asyncio.timeout(LEFT_S):
                    statuses = [(await each).status for each in asked]
                for pid in stopped:
                    os.kill(pid, signal.SIGCONT)
                assert statuses == [200] * 6
                assert await eu.metric("doherty_hops_waiting", direction="out") == 0
                await eu.until_said(r"us#0 is linked", after=len(eu.lines) - 1)
            stays.set()
