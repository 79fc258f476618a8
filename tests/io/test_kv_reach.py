"""Who says where KV events are is asked there again, and by nothing that he has not."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import aiohttp
import pytest
from aiohttp import web

from proxy.core.kv_source import KvSource
from proxy.io.kv_reach import Followed, Reach

SOURCES = '{"0": {"endpoint": "tcp://*:7"}}'
INFO = '{"kv_events": {"endpoint_port_base": 7}}'
SOURCE = KvSource("tcp://127.0.0.1:7", "", "")


@contextlib.asynccontextmanager
async def engine(pages: dict[str, str]) -> AsyncIterator[tuple[Followed, Reach, list[str]]]:
    asked: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        asked.append(request.path)
        page = pages.get(request.path)
        return web.Response(status=404) if page is None else web.Response(text=page)

    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        async with aiohttp.ClientSession() as session:
            yield Followed("r", url), Reach(session, None, None), asked
    finally:
        await runner.cleanup()


async def test_one_that_lists_them_is_asked_for_its_list() -> None:
    async with engine({"/kv_event_sources": SOURCES}) as (replica, reach, asked):
        assert await reach.find(replica) == SOURCE
        assert await reach.still(replica, SOURCE)
    assert asked == ["/kv_event_sources"] * 2


async def test_one_that_names_them_among_others_is_asked_for_nothing_else_again() -> None:
    pages = {"/server_info": INFO}
    async with engine(pages) as (replica, reach, asked):
        assert await reach.find(replica) == SOURCE
        assert asked == ["/kv_event_sources", "/server_info"]
        asked.clear()
        assert await reach.still(replica, SOURCE)
        pages["/server_info"] = INFO.replace("7", "8")
        assert not await reach.still(replica, SOURCE)
        assert asked == ["/server_info"] * 2
        # Another engine has its place, which lists them.
        del pages["/server_info"]
        pages["/kv_event_sources"] = SOURCES
        assert not await reach.still(replica, SOURCE)
        assert await reach.find(replica) == SOURCE
        assert await reach.still(replica, SOURCE)
        assert asked == [*["/server_info"] * 3, *["/kv_event_sources"] * 2]


@pytest.mark.parametrize("pages", [{}, {"/server_info": "{}"}])
async def test_one_that_says_nothing_is_where_it_was_said_to_be(pages: dict[str, str]) -> None:
    async with engine(pages) as (replica, reach, asked), aiohttp.ClientSession() as session:
        assert await reach.find(replica) is None
        reach.ask_by(session, None, KvSource("tcp://*:7", "", ""))
        assert await reach.find(replica) == SOURCE
        assert await reach.still(replica, SOURCE)
    assert asked == ["/kv_event_sources", "/server_info"] * 3
