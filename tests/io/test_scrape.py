"""A static list asks its engines how busy they are; requests reach the rank chosen for them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Self

import aiohttp
import pytest
from aiohttp import web

from proxy.contract import FleetSnapshot, LoadSample, ReplicaRecord, ReplicaState
from proxy.contract.engines import read_any
from proxy.io import registry, scrape
from proxy.io.registry import StaticList
from proxy.io.scrape import Scraper
from tests.fakes.engine import free_port
from tests.fakes.plane import until
from tests.fakes.proxy_process import ProxyProcess
from tests.fakes.simulator import simulator
from tests.fakes.talk import ask

INTERVAL_S = 0.02


class Pages:
    """An engine that has pages: `pages` by path, each a body or a status."""

    def __init__(self) -> None:
        self.pages: dict[str, bytes | int] = {"/v1/models": b'{"data":[{"id":"m"}]}'}
        self.asked: list[str] = []
        self.keys: set[str | None] = set()
        self.codings: set[str | None] = set()  # in which it may answer
        self.url = ""
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> Self:
        app = web.Application()
        app.router.add_get("/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    def tell(self, running: int, prompt_tokens: int = 0) -> None:
        page = f"vllm:num_requests_running {running}\nvllm:prompt_tokens_total {prompt_tokens}\n"
        self.pages["/metrics"] = page.encode()

    async def _answer(self, request: web.Request) -> web.Response:
        self.asked.append(request.path)
        self.keys.add(request.headers.get("Authorization"))
        self.codings.add(request.headers.get("Accept-Encoding"))
        page = self.pages.get(request.path, 404)
        if isinstance(page, int):
            return web.Response(status=page)
        return web.Response(body=page)


@contextlib.asynccontextmanager
async def listing(*urls: str, key: str | None = None) -> AsyncIterator[list[FleetSnapshot]]:
    seen: list[FleetSnapshot] = []
    async with aiohttp.ClientSession() as session:
        static = StaticList(urls, session, key, scrape_interval_s=INTERVAL_S)
        task = asyncio.get_running_loop().create_task(static.run(seen.append))
        try:
            yield seen
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


def ready(seen: list[FleetSnapshot]) -> list[ReplicaRecord]:
    """Return what was ever published of the only replica while it was ready."""
    records = [snapshot.replicas[0] for snapshot in seen]
    return [record for record in records if record.state is ReplicaState.READY]


def load_of(seen: list[FleetSnapshot]) -> LoadSample:
    load = ready(seen)[-1].load
    assert load is not None
    return load


@pytest.mark.parametrize("dialect", ["vllm", "sglang"])
async def test_an_engine_enters_the_fleet_with_what_it_tells(dialect: str) -> None:
    async with (
        simulator(dialect=dialect, dp_size=2, adapters=("sql",), api_keys=("k",)) as engine,
        listing(engine.url, key="k") as seen,
    ):
        await until(lambda: bool(ready(seen)))
        record = ready(seen)[0]
        loaded = () if dialect == "vllm" else ("sql",)  # which does not tell what it uses
        assert (record.engine, record.dp_size, record.adapters) == (dialect, 2, loaded)
        assert record.models == ("demo", "sql")
        load = load_of(seen)
        assert (load.running, len(load.ranks), load.block_tokens) == (0, 2, 16)
        assert load.kv_capacity_tokens == 2 * load.ranks[0].kv_capacity_tokens > 0
        body = {"model": "sql", "prompt": "x" * 400, "max_tokens": 1}
        headers = {"X-Data-Parallel-Rank": "1", "Authorization": "Bearer k"}
        assert (await engine.post("/v1/completions", body, headers))[0] == 200
        await until(lambda: load_of(seen).prompt_tokens_total == 100)
        await until(lambda: load_of(seen).prefill_busy_s_total > 0)
        zero, one = load_of(seen).ranks
        assert (zero.prefill_tokens_total, one.prefill_tokens_total) == (0, 100)


async def test_loads_are_published_when_they_tell_something_new() -> None:
    async with Pages() as engine:
        engine.tell(1)
        async with listing(engine.url) as seen:
            await until(lambda: bool(ready(seen)))
            asked = len(engine.asked)
            await until(lambda: len(engine.asked) > asked + 5)
            assert len(ready(seen)) == 1, "the same figures again are no news"
            engine.tell(2)
            await until(lambda: load_of(seen).running == 2)
            assert len(ready(seen)) == 2


async def test_a_reading_is_published_anew_before_it_is_old(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(registry, "LOAD_REFRESH_S", 3 * INTERVAL_S)
    async with Pages() as engine:
        engine.tell(1)
        async with listing(engine.url) as seen:
            await until(lambda: len(ready(seen)) >= 3)
    first, second, third = (record.load for record in ready(seen)[:3])
    assert first is not None
    assert second is not None
    assert third is not None
    assert second.at_s - first.at_s >= 3 * INTERVAL_S
    assert third.at_s - second.at_s >= 3 * INTERVAL_S


async def test_many_engines_that_change_make_one_snapshot_in_an_interval() -> None:
    async with Pages() as one, Pages() as two, Pages() as three:
        engines = (one, two, three)
        for engine in engines:
            engine.tell(0)
        async with listing(*(engine.url for engine in engines)) as seen:
            await until(lambda: bool(seen) and all(r.load for r in seen[-1].replicas))
            begun_s, begun = asyncio.get_running_loop().time(), len(seen)
            asked = sum(len(engine.asked) for engine in engines)
            while len(one.asked) < 25:
                for engine in engines:
                    engine.tell(len(one.asked))
                await asyncio.sleep(INTERVAL_S / 10)
            published = len(seen) - begun
            intervals = (asyncio.get_running_loop().time() - begun_s) / INTERVAL_S
            # Each reading had something new to tell.
            assert 5 <= published <= intervals + 2
            assert published < sum(len(engine.asked) for engine in engines) - asked


async def test_an_engine_that_tells_nothing_is_served_all_the_same(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with Pages() as engine:
        engine.pages["/metrics"] = b"some_other_servers_total 5\n"
        async with listing(engine.url) as seen:
            await until(lambda: bool(ready(seen)))
            record = ready(seen)[0]
            assert (record.load, record.dp_size, record.adapters) == (None, 1, None)
            await asyncio.sleep(5 * INTERVAL_S)
        assert engine.asked == ["/v1/models", "/metrics", "/v1/loads"], "and left in peace"
    assert caplog.text.count("does not tell its load") == 1


async def test_the_key_goes_along() -> None:
    async with Pages() as engine:
        async with listing(engine.url, key="k") as seen:
            await until(lambda: bool(ready(seen)))
        assert engine.keys == {"Bearer k"}


async def test_an_engine_that_began_anew_has_an_empty_cache() -> None:
    async with Pages() as engine:
        engine.tell(1, prompt_tokens=500)
        async with listing(engine.url) as seen:
            await until(lambda: bool(ready(seen)))
            engine.tell(0, prompt_tokens=600)
            await until(lambda: load_of(seen).prompt_tokens_total == 600)
            assert ready(seen)[-1].restarts == 0
            engine.tell(0, prompt_tokens=20)
            await until(lambda: load_of(seen).prompt_tokens_total == 20)
            assert ready(seen)[-1].restarts == 1


async def test_an_engine_that_sleeps_is_asleep_until_it_wakes() -> None:
    async with simulator(sleep_mode=True) as engine, listing(engine.url) as seen:
        await until(lambda: bool(ready(seen)))
        assert not ready(seen)[-1].asleep
        await engine.post("/sleep")
        await until(lambda: ready(seen)[-1].asleep)
        await engine.post("/wake_up")
        await until(lambda: not ready(seen)[-1].asleep)


@contextlib.asynccontextmanager
async def scraper(url: str) -> AsyncIterator[Scraper]:
    async with aiohttp.ClientSession() as session:
        yield Scraper("r", url, session, {}, lambda: 7.0)


async def test_half_of_the_pages_are_no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scrape, "ANSWER_BYTES_MAX", 1000)
    page = b"sglang:num_running_reqs 1\n"
    async with Pages() as engine, scraper(engine.url) as reader:
        engine.pages |= {"/metrics": page, "/v1/loads": b'{"loads":[{"num_running_reqs":5}]}'}
        found = await reader.read("unknown")
        assert found is not None
        assert (found[0], found[1].running, found[1].at_s) == ("sglang", 5, 7.0)
        engine.pages["/metrics"] = page + b"#" * 1000  # without end, as it seems
        assert await reader.read("sglang") is None
        assert (reader.silent, reader.was_down) == (False, False)


async def test_where_nobody_listens_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    async with scraper(f"http://127.0.0.1:{await free_port()}") as reader:
        assert await reader.read("vllm") is None
        assert (reader.silent, reader.was_down) == (False, True)
    assert not caplog.records


async def test_a_vllm_is_asked_for_its_metrics_alone() -> None:
    async with Pages() as engine, scraper(engine.url) as reader:
        engine.tell(3)
        for kind in ("vllm", "unknown"):
            found = await reader.read(kind)
            assert found is not None
            assert (found[0], found[1].running) == ("vllm", 3)
        assert engine.asked == ["/metrics", "/metrics"]
        assert engine.codings == {"identity"}  # or it would compress 50 KB each time


async def test_one_that_is_another_kind_than_believed_is_read_all_the_same() -> None:
    page = b"sglang:num_running_reqs 1\n"
    async with Pages() as engine, scraper(engine.url) as reader:
        engine.tell(3)
        found = await reader.read("sglang")
        assert found is not None
        assert (found[0], found[1].running) == ("vllm", 3)
        engine.pages["/metrics"] = page
        found = await reader.read("vllm")
        assert found is not None
        assert (found[0], found[1].running) == ("sglang", 1)


# --- end to end ----------------------------------------------------------------------------------

REQUEST = b'{"model":"demo","prompt":"hello","max_tokens":1}'
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: p\r\n%bcontent-length: %d\r\n\r\n%b"


async def test_a_request_reaches_the_rank_that_was_chosen_for_it() -> None:
    """By itself an idle vLLM takes rank 0 each time, so that what the others get was sent there."""
    async with (
        simulator(dp_size=3) as engine,
        ProxyProcess("--worker-urls", engine.url, "--policy", "round_robin") as proxy,
    ):
        await until_ready(proxy)
        for _ in range(6):
            wish = b"x-data-parallel-rank: 1\r\n"  # a client's, and the proxy chooses itself
            got = await ask(proxy.port, HEAD % (wish, len(REQUEST), REQUEST))
            assert got.status == 200
        _, page = await engine.get("/metrics")
        found = read_any([page.encode()], 1.0)
        assert found is not None
        assert [rank.generation_tokens_total for rank in found[1].ranks] == [2, 2, 2]


async def test_without_scraping_a_client_may_name_the_rank() -> None:
    flags = ("--policy", "round_robin", "--scrape-interval-secs", "0")
    async with (
        simulator(dp_size=2) as engine,
        ProxyProcess("--worker-urls", engine.url, *flags) as proxy,
    ):
        await until_ready(proxy)
        for wish, status in ((b"1", 200), (b"1", 200), (b"2", 400)):
            field = b"x-data-parallel-rank: %b\r\n" % wish
            got = await ask(proxy.port, HEAD % (field, len(REQUEST), REQUEST))
            assert got.status == status
        _, page = await engine.get("/metrics")
        found = read_any([page.encode()], 1.0)
        assert found is not None
        assert [rank.generation_tokens_total for rank in found[1].ranks] == [0, 2]


async def until_ready(proxy: ProxyProcess) -> None:
    async with asyncio.timeout(20):
        while (await proxy.admin("/readyz")).status != 200:
            await asyncio.sleep(0.005)
