"""A region's proxy is replaced, drained or killed while another region has only that to go to."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.fakes.engine import ScriptedEngine
from tests.fakes.plane import chat_request
from tests.fakes.proxy_process import ProxyProcess
from tests.fakes.regions import Wire
from tests.fakes.talk import ask
from tests.fakes.two_regions import LEFT_S, regions

pytestmark = pytest.mark.faults

CLIENTS = 3


@contextlib.asynccontextmanager
async def only_us_has_it(
    folder: Path,
) -> AsyncIterator[tuple[ProxyProcess, ProxyProcess, Wire]]:
    async with (
        ScriptedEngine() as theirs,
        ScriptedEngine(models=("other",)) as ours,
        regions(folder, ours.url, theirs.url) as both,
    ):
        yield both


class Clients:
    """Clients of one proxy that ask one request after another."""

    def __init__(self, proxy: ProxyProcess) -> None:
        self.proxy = proxy
        self.statuses: list[int] = []
        self._on = True
        self._asking = [asyncio.ensure_future(self._ask()) for _ in range(CLIENTS)]

    async def _ask(self) -> None:
        while self._on:
            self.statuses.append((await ask(self.proxy.port, chat_request())).status)
            await asyncio.sleep(0.01)

    async def more(self, count: int) -> None:
        """Wait until so many more are answered."""
        wanted = len(self.statuses) + count
        while len(self.statuses) < wanted:
            await asyncio.sleep(0.01)

    async def stop(self) -> list[int]:
        self._on = False
        await asyncio.gather(*self._asking)
        return self.statuses


async def test_an_upgrade_of_the_only_proxy_that_has_a_model_loses_nothing_elsewhere(
    tmp_path: Path,
) -> None:
    async with only_us_has_it(tmp_path) as (eu, us, _):
        clients = Clients(eu)
        await clients.more(10)
        await us.upgrade()
        await clients.more(20)
        statuses = await clients.stop()
        assert set(statuses) == {200}
        assert await us.metric("doherty_hops_arrived_total", region="eu") > 0


async def test_a_region_that_is_killed_is_refused_for_and_served_again_when_it_is_back(
    tmp_path: Path,
) -> None:
    async with only_us_has_it(tmp_path) as (eu, us, wire):
        assert (await ask(eu.port, chat_request())).status == 200
        for pid in (us.pid, *us.workers()):
            os.kill(pid, signal.SIGKILL)
        refused = await ask(eu.port, chat_request())
        assert refused.status == 503
        assert b"us: not linked" in refused.body or b"us: unreachable" in refused.body
        us_again = ProxyProcess(*us.flags, "--port", str(wire.to_port))
        async with us_again:
            async with asyncio.timeout(LEFT_S):
                while (await ask(eu.port, chat_request())).status != 200:
                    await asyncio.sleep(0.05)
