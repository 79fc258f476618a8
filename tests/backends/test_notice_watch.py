"""Clouds that say that a machine will go, asked over real sockets; and the manager's own API."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from backends.api import Api
from backends.clock import SystemClock
from backends.log import Log
from backends.notice_watch import watch_notice
from backends.tasks import cancel_all, spawn
from proxy.config import ReclaimNoticeConfig
from tests.fakes.world import World, configuration

POLL_S = 0.1


class Cloud:
    """Answers with `body`; None is not found. Remembers what it was asked with."""

    def __init__(self) -> None:
        self.body: str | None = None
        self.headers: list[dict[str, str]] = []

    async def answer(self, request: web.Request) -> web.Response:
        if request.method == "PUT":
            return web.Response(text="t0ken")
        self.headers.append(dict(request.headers))
        if self.body is None:
            raise web.HTTPNotFound
        return web.Response(text=self.body)


@asynccontextmanager
async def serving(application: web.Application) -> AsyncIterator[str]:
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    try:
        yield f"http://{host}:{port}"
    finally:
        await runner.cleanup()


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = World(tmp_path)
    await world.start(configuration(tmp_path))
    yield world
    await world.close()


@asynccontextmanager
async def watched(world: World, config: ReclaimNoticeConfig) -> AsyncIterator[io.StringIO]:
    assert world.manager is not None
    stream = io.StringIO()
    log = Log(stream)
    watch = watch_notice(config, world.manager.reclaims, SystemClock(), log)
    task = spawn(watch, "watch", log)
    try:
        yield stream
    finally:
        await cancel_all([task])


async def noticed(world: World) -> list[Any]:
    assert world.manager is not None
    while not (notices := world.manager.reclaims.report().notices):
        await asyncio.sleep(0.01)
    return list(notices)


async def test_a_file_that_appears_is_a_notice(world: World, tmp_path: Path) -> None:
    path = tmp_path / "notice"
    config = ReclaimNoticeConfig(kind="file", source=str(path), poll_secs=POLL_S)
    async with watched(world, config) as stream:
        path.write_text("soon")
        while "reclaim_notice_unread" not in stream.getvalue():
            await asyncio.sleep(0.01)
        path.write_text('{"in_s": 50}')
        (notice,) = await noticed(world)
    assert notice.gpus is None
    assert 40.0 < notice.ends_in_s <= 50.0
    assert stream.getvalue().count("reclaim_notice_unread") == 1


async def test_a_cloud_is_asked_with_its_token_until_it_says_so(world: World) -> None:
    cloud = Cloud()
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", cloud.answer)
    async with serving(application) as url:
        config = ReclaimNoticeConfig(kind="gcp", source=f"{url}/preempted", poll_secs=POLL_S)
        async with watched(world, config):
            while not cloud.headers:
                await asyncio.sleep(0.01)
            cloud.body = "TRUE"
            await noticed(world)
    assert cloud.headers[0]["Metadata-Flavor"] == "Google"


async def test_the_api_takes_a_notice_tells_of_it_and_takes_it_back(world: World) -> None:
    assert world.manager is not None
    application = Api(world.manager).application()
    async with serving(application) as url, aiohttp.ClientSession(url) as session:
        async with session.post("/v1/reclaim?in_s=60") as response:
            assert response.status == 200
            told = await response.json()
        assert told["notices"] == [{"ends_in_s": 60.0, "gpus": None}]
        async with session.get("/v1/reclaim") as response:
            told = await response.json()
        assert told["fates"] == {"m-0": "serves on", "m-1": "serves on"}
        async with session.delete("/v1/reclaim") as response:
            assert (await response.json())["notices"] == []
        async with session.get("/v1/reclaim") as response:
            assert (await response.json())["notices"] == []


@pytest.mark.parametrize(
    ("query", "headers", "status", "says"),
    [
        ("", {}, 400, "in_s"),
        ("in_s=-1", {}, 400, "in_s"),
        ("in_s=1e9", {}, 400, "in_s"),
        ("in_s=90000", {}, 400, "at most 86400"),
        ("in_s=5&gpus=0", {}, 400, "leases no GPUs"),
        ("in_s=5", {"origin": "http://page"}, 403, "web pages"),
    ],
)
async def test_what_is_no_notice_is_refused(
    world: World, query: str, headers: dict[str, str], status: int, says: str
) -> None:
    assert world.manager is not None
    application = Api(world.manager).application()
    async with (
        serving(application) as url,
        aiohttp.ClientSession(url) as session,
        session.post(f"/v1/reclaim?{query}", headers=headers) as response,
    ):
        assert response.status == status
        assert says in (await response.json())["error"]["message"]
    assert world.manager.reclaims.report().notices == ()
