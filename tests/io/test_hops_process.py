"""Two regions of real processes: what crosses is lost with no region, and taken by one worker."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import orjson

from tests.fakes.engine import Connection, Received, ScriptedEngine, free_port, reply
from tests.fakes.plane import chat_request
from tests.fakes.proxy_process import ProxyProcess
from tests.fakes.regions import Wire
from tests.fakes.talk import ask

WORKERS = 2
LEFT_S = 10.0  # a broken test must end


@contextlib.asynccontextmanager
async def regions(
    folder: Path, eu_engine: str, us_engine: str
) -> AsyncIterator[tuple[ProxyProcess, ProxyProcess, Wire]]:
    """Run a proxy in each of two regions, with a wire for what eu sends to us."""
    ports = [await free_port() for _ in range(4)]
    eu_port, us_port, eu_peer, us_peer = ports
    async with Wire(us_port) as wire:
        urls = {"eu": f"http://127.0.0.1:{eu_port}", "us": f"http://127.0.0.1:{wire.port}"}
        peers = {"eu": f"127.0.0.1:{eu_peer}", "us": f"127.0.0.1:{us_peer}"}
        paths = {}
        for region, other in (("eu", "us"), ("us", "eu")):
            remote = {"region": other, "url": urls[other], "peer": peers[other]}
            proxy = {"peer_listen": peers[region], "peer_key": "key-of-all", "workers": WORKERS}
            config = {"region": region, "proxy": proxy, "remote_regions": [remote]}
            paths[region] = folder / f"{region}.yaml"
            paths[region].write_bytes(orjson.dumps(config))
        us = ProxyProcess(
            *("--config", str(paths["us"]), "--port", str(us_port), "--worker-urls", us_engine)
        )
        eu = ProxyProcess(
            *("--config", str(paths["eu"]), "--port", str(eu_port), "--worker-urls", eu_engine)
        )
        async with us, eu:
            for proxy in (us, eu):
                await proxy.until_said(r"#0 is linked")
            yield eu, us, wire


async def counted(proxy: ProxyProcess, name: str, at_least: float, **labels: str) -> None:
    async with asyncio.timeout(LEFT_S):
        while await proxy.metric(name, **labels) < at_least:
            await asyncio.sleep(0.05)


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
