"""The manager's API over a real socket, its replicas fake."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from backends import watches
from backends.api import BODY_BYTES_MAX, Api
from backends.clock import SystemClock
from backends.journal import Journal
from backends.log import Log
from backends.manager import Manager
from proxy.config import parse_config
from proxy.contract import FLEET_PATH, FLEET_WATCH_PATH, FleetSnapshot, decode_snapshot
from tests.fakes.provider import FakeFetch, FakeProvider


class Client:
    """A manager with two ready replicas, its API, and a session to it."""

    def __init__(self, manager: Manager, api: Api, session: aiohttp.ClientSession) -> None:
        self.manager = manager
        self.api = api
        self.session = session

    async def get(self, path: str) -> tuple[int, bytes]:
        async with self.session.get(path) as response:
            return response.status, await response.read()

    async def post(self, path: str, **options: Any) -> tuple[int, dict[str, Any]]:
        async with self.session.post(path, **options) as response:
            return response.status, await response.json()

    async def fleet(self) -> FleetSnapshot:
        return decode_snapshot((await self.get(FLEET_PATH))[1])


@asynccontextmanager
async def running(
    folder: Path, pools: str = "[{engine: simulator, replicas: 2}]"
) -> AsyncIterator[Client]:
    config = parse_config(
        f"manager: {{run_dir: '{folder}'}}\nmodels: [{{name: m, pools: {pools}}}]", "test"
    )
    journal = Journal(folder / "journal")
    manager = Manager(
        config,
        provider=FakeProvider(),
        fetch=FakeFetch(),
        journal=journal,
        log=Log(io.StringIO()),
        clock=SystemClock(),
    )
    await manager.start()
    api = Api(manager)
    runner = web.AppRunner(api.application(), access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    async with aiohttp.ClientSession(f"http://{host}:{port}") as session:
        client = Client(manager, api, session)
        while {r.state.value for r in (await client.fleet()).replicas} != {"ready"}:
            await asyncio.sleep(0.01)
        yield client
    api.end_watches()
    await runner.cleanup()
    await manager.close()
    journal.close()


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[Client]:
    async with running(tmp_path) as client:
        yield client


async def read_snapshot(response: aiohttp.ClientResponse) -> FleetSnapshot:
    """Return the next snapshot of a watch, over heartbeats."""
    while True:
        line = await response.content.readline()
        assert line.endswith(b"\n"), "the watch ended"
        if line.strip():
            return decode_snapshot(line)


async def test_the_fleet_is_one_json_snapshot(client: Client) -> None:
    fleet = await client.fleet()
    assert [replica.replica_id for replica in fleet.replicas] == ["m-0", "m-1"]
    assert fleet.epoch
    assert fleet.version > 0


async def test_health_pages(client: Client) -> None:
    assert (await client.get("/livez"))[0] == 200
    assert (await client.get("/readyz"))[0] == 200
    client.manager.serving = False
    assert (await client.get("/readyz"))[0] == 503
    assert (await client.get("/livez"))[0] == 200


async def test_a_watch_begins_with_the_snapshot_and_tells_each_change(client: Client) -> None:
    async with client.session.get(FLEET_WATCH_PATH) as response:
        first = await read_snapshot(response)
        assert len(first.replicas) == 2
        await client.post("/v1/replicas/m-0/drain")
        snapshot, versions = first, [first.version]
        while snapshot.replicas[0].state.value != "draining":
            snapshot = await read_snapshot(response)
            versions.append(snapshot.version)
        assert versions == sorted(set(versions)), "versions only grow"
        assert snapshot.epoch == first.epoch


async def test_a_quiet_watch_beats(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watches, "HEARTBEAT_INTERVAL_S", 0.02)
    async with client.session.get(FLEET_WATCH_PATH) as response:
        await response.content.readline()
        lines = [await response.content.readline() for _ in range(5)]
    assert b"\n" in lines


async def test_watchers_are_bounded(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watches, "WATCHERS_MAX", 1)
    async with client.session.get(FLEET_WATCH_PATH) as first:
        await read_snapshot(first)
        status, body = await client.get(FLEET_WATCH_PATH)
        error = json.loads(body)["error"]
        assert (status, error["type"]) == (503, "server_error")
        assert error["code"] == "service_unavailable"
    while True:
        async with client.session.get(FLEET_WATCH_PATH) as again:
            if again.status == 200:
                break  # the first one's place is free again
        await asyncio.sleep(0.01)


async def test_operators_wishes(client: Client) -> None:
    assert await client.post("/v1/replicas/m-0/drain") == (
        200,
        {"replica_id": "m-0", "state": "draining"},
    )
    assert (await client.post("/v1/replicas/m-0/undrain"))[1]["state"] == "ready"
    assert (await client.post("/v1/replicas/m-0/restart"))[1]["state"] == "draining"


async def test_one_replica_is_told_as_it_is_now(client: Client) -> None:
    await client.post("/v1/replicas/m-1/drain")
    status, body = await client.get("/v1/replicas/m-1")
    told = json.loads(body)
    assert (status, told["phase"], told["state"], told["url"][:17]) == (
        200, "held", "draining", "http://127.0.0.1:"
    )  # fmt: skip
    assert (await client.get("/v1/replicas/m-9"))[0] == 404


REFUSALS = [
    ("a sleep it cannot have", "/v1/replicas/m-0/sleep", {}, 409, "set `sleep: true` in its pool"),
    ("a rung there is not", "/v1/replicas/m-0/sleep?rung=cold", {}, 400, "use asleep or suspended"),
    ("a level there is not", "/v1/replicas/m-0/sleep?level=3", {}, 400, "no sleep level '3'"),
    ("an unknown replica", "/v1/replicas/m-9/drain", {}, 404, "`doherty status`"),
    ("an unknown wish", "/v1/replicas/m-0/explode", {}, 404, "drain, undrain, restart"),
    ("an unknown path", "/v2/anything", {}, 404, "Not Found"),
    ("a method that does not fit", "/livez", {}, 405, "Method Not Allowed"),
    ("a body too long", "/v1/replicas/m-0/drain", {"data": b"x" * (BODY_BYTES_MAX + 1)}, 413, ""),
    ("a web page", "/v1/replicas/m-0/restart", {"headers": {"origin": "http://x"}}, 403, "pages"),
]


@pytest.mark.parametrize(
    ("path", "options", "status", "text"), [c[1:] for c in REFUSALS], ids=[c[0] for c in REFUSALS]
)
async def test_refusals_have_the_shape_of_openai_errors(
    client: Client, path: str, options: dict[str, Any], status: int, text: str
) -> None:
    answered, body = await client.post(path, **options)
    assert answered == status
    assert text in body["error"]["message"]
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert {r.state.value for r in (await client.fleet()).replicas} == {"ready"}


async def test_metrics(client: Client) -> None:
    client.manager.keepers["m-1"].questions.failures = 7
    text = (await client.get("/metrics"))[1].decode()
    for line in (
        'doherty_manager_replicas{state="ready"} 2.0',
        'doherty_manager_replicas{state="backoff"} 0.0',
        'doherty_manager_restarts_total{replica="m-0"} 0.0',
        'doherty_manager_scrape_failures_total{replica="m-1"} 7.0',
        "doherty_manager_watchers 0.0",
    ):
        assert line in text.splitlines()
