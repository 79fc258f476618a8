"""The view of a real proxy: what is in it is what happened, over all workers."""

from __future__ import annotations

import asyncio

from proxy.contract.view import View, decode_view
from tests.fakes.engine import ScriptedEngine
from tests.fakes.plane import chat_request
from tests.fakes.proxy_process import ProxyProcess
from tests.fakes.talk import Talk, ask


async def view_of(proxy: ProxyProcess, key: str | None = None) -> View:
    got = await proxy.admin("/view", key)
    assert got.status == 200, got.body
    return decode_view(got.body)


async def test_a_view_sums_what_all_workers_have_done() -> None:
    async with (
        ScriptedEngine() as engine,
        ProxyProcess("--workers", "2", "--worker-urls", engine.url) as proxy,
    ):
        before = await view_of(proxy)
        assert before.proxy.workers == 2
        assert before.proxy.not_ready is None
        assert before.proxy.can_drain is None
        assert before.classes[0].first_token.p50_s is None
        for _ in range(20):
            assert (await ask(proxy.port, chat_request())).status == 200
        while (view := await view_of(proxy)).classes[0].first_token.count < 20:
            await asyncio.sleep(0.05)
        (replica,) = view.replicas
        assert replica.replica_id == engine.url.removeprefix("http://")
        assert (replica.state, replica.models, replica.held) == ("ready", ("m",), False)
        per_s = 20 / view.window_s
        for told in (
            *(view.proxy.requests_per_s, replica.requests_per_s, view.codes["200"]),
            *(view.models[0].requests_per_s, view.classes[0].requests_per_s),
            sum(view.decisions.values()),
        ):
            assert abs(told - per_s) < 0.02 * per_s


async def test_a_watcher_is_told_a_view_a_second() -> None:
    async with (
        ScriptedEngine() as engine,
        ProxyProcess("--worker-urls", engine.url) as proxy,
        Talk(proxy.admin_port) as talk,
    ):
        await talk.send(b"GET /view/watch HTTP/1.1\r\nhost: localhost\r\n\r\n")
        while talk.received.count(b"event: view\ndata: ") < 3:
            assert await talk.read()
        events = talk.received.split(b"event: view\ndata: ")[1:]
        views = [decode_view(event.partition(b"\n\n")[0]) for event in events[:2]]
        assert views[1].at_s > views[0].at_s
