"""The view of a real proxy: what is in it is what happened, over all workers."""

from __future__ import annotations

import asyncio
import json
import time

import pytest

from proxy.contract.view import ARCS_MAX, View, decode_view
from proxy.core.ring import Ring
from proxy.core.ring_view import arcs, shares
from proxy.io.telemetry import SECONDS_BUCKETS
from tests.fakes.engine import Connection, Received, Script, ScriptedEngine
from tests.fakes.plane import chat_request
from tests.fakes.proxy_process import ProxyProcess
from tests.fakes.talk import Talk, ask

SLOW_S = 0.5


def delayed(script: Script, seconds: float) -> Script:
    async def wait(connection: Connection, request: Received) -> None:
        await asyncio.sleep(seconds)
        await script(connection, request)

    return wait


async def view_of(proxy: ProxyProcess, key: str | None = None) -> View:
    got = await proxy.admin("/view", key)
    assert got.status == 200, got.body
    return decode_view(got.body)


async def test_a_view_is_of_what_all_workers_have_done_and_goes_on_a_second_later() -> None:
    async with (
        ScriptedEngine() as engine,
        ProxyProcess("--workers", "2", "--worker-urls", engine.url) as proxy,
        Talk(proxy.admin_port) as watcher,
    ):
        before = await view_of(proxy)
        assert before.proxy.workers == 2
        assert (before.proxy.not_ready, before.proxy.can_drain) == (None, None)
        assert before.classes[0].first_token.p50_s is None
        await watcher.send(b"GET /view/watch HTTP/1.1\r\nhost: localhost\r\n\r\n")

        async def ask_s() -> float:
            begun_s = time.monotonic()
            assert (await ask(proxy.port, chat_request())).status == 200
            return time.monotonic() - begun_s

        took_s = [await ask_s() for _ in range(15)]
        engine.script = delayed(engine.script, SLOW_S)
        took_s += await asyncio.gather(*(ask_s() for _ in range(5)))  # at once: all are young
        while await proxy.metric("doherty_requests_total") < 20:
            await asyncio.sleep(0.05)
        view = await view_of(proxy)
        seen = view.classes[0].first_token.count  # on a machine that is busy some may be too old
        assert 5 < seen <= 20
        (replica,) = view.replicas
        assert replica.replica_id == engine.url.removeprefix("http://")
        assert (replica.state, replica.models, replica.held) == ("ready", ("m",), False)
        per_s = seen / view.window_s
        for told in (
            *(view.proxy.requests_per_s, replica.requests_per_s, view.codes["200"]),
            *(view.models[0].requests_per_s, view.classes[0].requests_per_s),
            sum(view.decisions.values()),
        ):
            assert abs(told - per_s) < 0.02 * per_s
        for first in (view.classes[0].first_token, view.models[0].first_token):
            assert first.count == seen
            assert first.p50_s is not None
            assert first.p95_s is not None
            assert first.p99_s is not None
            assert SLOW_S <= first.p95_s <= first.p99_s  # SLOW_S is an edge
            assert first.p50_s <= first.p95_s
            assert first.p99_s <= min(edge for edge in SECONDS_BUCKETS if edge >= max(took_s))
        while watcher.received.count(b"event: view\ndata: ") < 3:
            assert await watcher.read()
        events = watcher.received.split(b"event: view\ndata: ")[1:]
        views = [decode_view(event.partition(b"\n\n")[0]) for event in events[:2]]
        assert views[1].at_s > views[0].at_s


def shared_head_request(number: int) -> bytes:
    """A request of which the first two kilobytes are everybody's."""
    head, own = "be brief. " * 250, f"question {number} " * 60
    body = json.dumps(
        {
            "model": "m",
            "messages": [{"role": "system", "content": head}, {"role": "user", "content": own}],
        }
    )
    return chat_request(body.encode())


async def test_rings_and_hot_prefixes_are_those_of_the_workers() -> None:
    async with (
        ScriptedEngine() as one,
        ScriptedEngine() as two,
        ProxyProcess("--workers", "2", "--worker-urls", one.url, two.url) as proxy,
    ):
        ids = [engine.url.removeprefix("http://") for engine in (one, two)]
        for number in range(60):
            assert (await ask(proxy.port, shared_head_request(number))).status == 200
        view = await view_of(proxy)
        (told,) = view.rings
        assert (told.model, told.models) == ("m", ("m",))
        ring, servers = Ring(ids), dict(zip(ids, ids, strict=True))
        assert told.arcs == arcs(ring, servers, ARCS_MAX)
        expected = shares(ring, servers)
        for replica in view.replicas:
            assert replica.ring_ratio == pytest.approx(expected[replica.replica_id], abs=1e-5)
        hottest = told.prefixes[0]
        assert hottest.octets >= 2000
        assert 8 <= hottest.heat <= 60
        assert hottest.holders
        assert hottest.held_by == len(hottest.holders)
        assert set(hottest.holders) <= set(ids)
        assert hottest.home == next(ring.walk(int(hottest.name, 16)))
