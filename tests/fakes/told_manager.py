"""A manager that publishes what a test says, and keeps what proxies report of their demand."""

from __future__ import annotations

import asyncio
from typing import Self

from aiohttp import web

from backends.scaling_report import DemandReport, encode_report
from proxy.contract import (
    FLEET_WATCH_PATH,
    FleetSnapshot,
    PoolRecord,
    ReplicaRecord,
    encode_snapshot,
)
from proxy.contract.demand import DEMAND_BYTES_MAX, DEMAND_PATH, Demand, decode_demand


class ToldManager:
    """Use as `async with ToldManager() as manager`; it has a port of its own."""

    def __init__(self) -> None:
        self.reports: list[Demand] = []
        self.arrived_s: list[float] = []  # when each of these came
        self.status = 204  # what a report is answered
        self.url = ""
        self.asked = DemandReport(proxies=1, models={})  # what GET tells
        self.asked_times = 0
        self._snapshot = FleetSnapshot(epoch="e", version=0)
        self._changed = asyncio.Condition()
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> Self:
        app = web.Application(client_max_size=DEMAND_BYTES_MAX)
        app.router.add_get(FLEET_WATCH_PATH, self._watch)
        app.router.add_post(DEMAND_PATH, self._demand)
        app.router.add_get(DEMAND_PATH, self._asked)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    @property
    def version(self) -> int:
        return self._snapshot.version

    async def publish(self, *replicas: ReplicaRecord, pools: tuple[PoolRecord, ...] = ()) -> None:
        version = self._snapshot.version + 1
        self._snapshot = FleetSnapshot(epoch="e", version=version, replicas=replicas, pools=pools)
        async with self._changed:
            self._changed.notify_all()

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse()
        await answer.prepare(request)
        sent = 0
        while True:
            async with self._changed:
                while self._snapshot.version <= sent:
                    await self._changed.wait()
            sent = self._snapshot.version
            await answer.write(encode_snapshot(self._snapshot) + b"\n")

    async def _asked(self, _: web.Request) -> web.Response:
        self.asked_times += 1
        return web.Response(body=encode_report(self.asked))

    async def _demand(self, request: web.Request) -> web.Response:
        demand = decode_demand(await request.read())
        if self.status < 300:
            self.reports.append(demand)
            self.arrived_s.append(asyncio.get_running_loop().time())
        return web.Response(status=self.status)
