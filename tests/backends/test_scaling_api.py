"""Demand, scaling and sizes over a real socket; `doherty scale` and `doherty status` against it."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from backends.cli import main
from backends.offline.work import NEEDS_PATH, JobNeed, JobNeeds
from backends.scaling_api import NEEDS_BYTES_MAX
from backends.scaling_report import DemandReport, decode_report
from proxy.contract.demand import DEMAND_BYTES_MAX, DEMAND_PATH, Demand, ModelDemand, encode_demand
from tests.backends.test_manager_api import Client, running

SCALED = "{engine: simulator, name: s, target_inputs: 4, autoscale: {min: 0, max: 3}}"
FIXED = "{engine: simulator, name: f, target_inputs: 2, replicas: 1}"


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[Client]:
    async with running(tmp_path, f"[{FIXED}, {SCALED}]") as client:
        yield client


def report(queued: int, sequence: int = 1) -> bytes:
    told = {"m": ModelDemand(queued=queued, arrivals_total=queued)}
    return encode_demand(Demand(proxy_id="p", sequence=sequence, models=told))


async def test_a_report_is_taken_and_told_of(client: Client) -> None:
    async with client.session.post(DEMAND_PATH, data=report(9)) as response:
        assert (response.status, await response.read()) == (204, b"")
    await asyncio.sleep(0)
    told = decode_report((await client.get("/v1/scaling"))[1])
    assert told.proxies == 1
    fixed, scaled = told.pools
    assert (fixed.pool, fixed.scaled, fixed.desired, fixed.decision) == ("f", False, 1, None)
    assert (scaled.pool, scaled.scaled, scaled.max, scaled.target_inputs) == ("s", True, 3, 4)
    assert scaled.observation.queued == 7, "the fixed pool is meant to carry two"
    assert scaled.desired > 0
    assert scaled.notes[-1].moves
    assert scaled.decision is not None
    assert scaled.decision.terms


async def test_what_each_model_is_asked_for_now_is_told_without_a_look(client: Client) -> None:
    told = {"m": ModelDemand(in_flight=3, spare=5), "nobody's": ModelDemand(queued=1)}
    async with client.session.post(
        DEMAND_PATH, data=encode_demand(Demand(proxy_id="p", sequence=1, models=told))
    ) as response:
        assert response.status == 204
    found = msgspec.json.decode((await client.get(DEMAND_PATH))[1], type=DemandReport)
    assert found.proxies == 1
    assert found.models.keys() == {"m"}
    assert found.models["m"].demand == told["m"]
    assert found.models["m"].kv_target == 0.85, "of the pool that is scaled"


@pytest.mark.parametrize(
    ("path", "options", "status", "text"),
    [
        (DEMAND_PATH, {"data": b"[]"}, 400, "no report of a proxy"),
        (DEMAND_PATH, {"data": io.BytesIO(b"x" * (DEMAND_BYTES_MAX + 1))}, 413, ""),
        (DEMAND_PATH, {"data": b"{}", "headers": {"origin": "http://x"}}, 403, "web pages"),
        (NEEDS_PATH, {"data": b"[]"}, 400, "no report of what is left"),
        (NEEDS_PATH, {"data": b"[" * 9999}, 400, "no report of what is left"),
        (NEEDS_PATH, {"data": io.BytesIO(b"x" * (NEEDS_BYTES_MAX + 1))}, 413, ""),
        (NEEDS_PATH, {"data": b"{}", "headers": {"origin": "http://x"}}, 403, "web pages"),
        ("/v1/pools/s/scale?replicas=2", {}, 409, "pool s is scaled by demand"),
        ("/v1/pools/x/scale?replicas=2", {}, 404, "no pool 'x'; there are: f, s"),
        ("/v1/pools/f/scale?replicas=-1", {}, 400, "from 0 to 4096, not '-1'"),
        ("/v1/pools/f/scale", {}, 400, "not ''"),
        ("/v1/pools/f/scale?replicas=" + "9" * 5_000, {}, 400, "from 0 to 4096"),
        ("/v1/pools/f/scale?replicas=9", {"headers": {"origin": "http://x"}}, 403, "web pages"),
    ],
)
async def test_refusals_say_what_to_do(
    client: Client, path: str, options: dict[str, object], status: int, text: str
) -> None:
    answered, body = await client.post(path, **options)
    assert answered == status
    assert text in body["error"]["message"]


async def test_what_jobs_need_is_taken_and_counts_until_it_is_old(client: Client) -> None:
    need = JobNeed(due_in_s=60.0, lines=5, tokens=700)
    told = JobNeeds(service_id="s", sequence=1, models={"m": (need,)})
    async with client.session.post(NEEDS_PATH, data=msgspec.json.encode(told)) as response:
        assert (response.status, await response.read()) == (204, b"")
    assert client.manager.scaler.jobs.book.of("m") == (need,)


async def test_the_metrics_of_scaling(client: Client) -> None:
    async with client.session.post(DEMAND_PATH, data=report(9)):
        pass
    text = (await client.get("/metrics"))[1].decode()
    lines = text.splitlines()
    for line in (
        'doherty_manager_scale_desired{pool="f"} 1.0',
        'doherty_manager_scale_max{pool="s"} 3.0',
        'doherty_manager_scale_panicking{pool="s"} 0.0',
        'doherty_manager_scale_resting{pool="s",rung="asleep"} 0.0',
        'doherty_manager_gpus{state="free"} 0.0',
        "doherty_manager_demand_proxies 1.0",
        'doherty_manager_decisions_total{direction="up",pool="s"} 1.0',
    ):
        assert line in lines, line
    assert 'doherty_manager_wake_seconds_bucket{from="cold",le="+Inf"}' in text


def run(client: Client, *words: str) -> asyncio.Task[int]:
    url = str(client.session._base_url)
    return asyncio.ensure_future(asyncio.to_thread(main, [*words, "--manager-url", url]))


async def test_the_command_tells_of_all_of_one_and_sets_a_size(
    client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await run(client, "scale") == 0
    head, fixed, scaled = capsys.readouterr().out.splitlines()
    assert head.split()[:5] == ["POOL", "CLASS", "MIN", "MAX", "DESIRED"]
    assert fixed.split()[:7] == ["f", "online", "1", "1", "1", "1", "0"]
    assert fixed.endswith("of a fixed size")
    assert scaled.split()[:4] == ["s", "online", "0", "3"]
    async with client.session.post(DEMAND_PATH, data=report(9)):
        pass
    assert await run(client, "scale", "s") == 0
    assert "s-0 up, from cold" in capsys.readouterr().out
    assert await run(client, "scale", "f", "2") == 0
    assert "pool f is to have 2 replicas" in capsys.readouterr().out
    assert "f-1" in client.manager.keepers
    assert await run(client, "scale", "s", "2") == 1
    assert "min and max of its autoscale" in capsys.readouterr().err
    assert await run(client, "scale", "x") == 1
    assert "no pool 'x'; there are: f, s" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        main(["scale", "f", "many"])
    assert end.value.code == 2
    assert "'many' is no number of replicas" in capsys.readouterr().err


async def test_status_shows_who_waits_and_how_deep_others_rest(
    client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    client.manager.scaler.pools["s"].waiting = "f-0 makes room for it"
    assert await run(client, "status") == 0
    out = capsys.readouterr().out
    assert out.splitlines()[1].split()[:2] == ["f-0", "ready"]
    assert out.endswith("s waits: f-0 makes room for it\n")


async def test_the_report_is_json_for_tools(client: Client) -> None:
    status, body = await client.get("/v1/scaling")
    told = json.loads(body)
    assert status == 200
    assert {pool["pool"] for pool in told["pools"]} == {"f", "s"}
    assert set(told["gpus"]) == {"total", "free", "holders"}
