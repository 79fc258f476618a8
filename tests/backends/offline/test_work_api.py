"""The desk on the wire, what the manager is told, and which models are known."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import msgspec
import pytest
from aiohttp import web

from backends.failure import StartError
from backends.offline.abilities import MODELS_MAX, REMEMBERED_S, URLS_MAX, Abilities
from backends.offline.fleet_models import KnownModels, configured_names
from backends.offline.service import listen
from backends.offline.setting import exposed, prices_of
from backends.offline.work import NEEDS_PATH, Ask, JobNeeds
from proxy.config import OfflineConfig, parse_config
from proxy.contract import (
    FLEET_WATCH_PATH,
    FleetSnapshot,
    PoolRecord,
    ReplicaRecord,
    encode_snapshot,
)
from tests.fakes.offline_stage import (
    CHAT,
    CONFIG,
    PATIENCE_S,
    HttpWorker,
    answer,
    jsonl,
    offline_stage,
    request,
    until_state,
)


async def test_only_who_has_the_key_is_a_worker(tmp_path: Path) -> None:
    async with (
        offline_stage(tmp_path, {"work_key": "work-key"}) as stage,
        aiohttp.ClientSession() as session,
    ):
        assert await HttpWorker(stage.url, "work-key").ask(session) is None
        for headers, status in (
            ({}, 401),
            ({"authorization": "Bearer other"}, 401),
            ({"authorization": "Bearer work-key", "origin": "http://page"}, 403),
        ):
            for path in ("/desk/ask", "/desk/report"):
                async with session.post(stage.url + path, data=b"{}", headers=headers) as response:
                    assert response.status == status
                    assert (await response.json())["error"]["message"]


async def test_what_is_no_word_of_a_worker(tmp_path: Path) -> None:
    async with offline_stage(tmp_path) as stage, aiohttp.ClientSession() as session:
        ask = {"worker_id": "w", "models": ["m"], "urls": ["u"], "lines_max": 1}
        report = {"worker_id": "w", "chunk_id": "c", "fence": 1}
        result = {"job_id": "j", "number": 1, "prompt_tokens": 2**53}
        for path, body in (
            ("/desk/ask", b""),
            ("/desk/ask", b"{}"),
            ("/desk/ask", b"[" * 5_000),
            ("/desk/ask", json.dumps(ask | {"lines_max": 0}).encode()),
            ("/desk/ask", json.dumps(ask | {"wait_s": 31}).encode()),
            ("/desk/ask", json.dumps(ask | {"worker_id": "w" * 200}).encode()),
            ("/desk/ask", json.dumps(ask | {"worker_id": "w\n\0"}).encode()),
            ("/desk/ask", json.dumps(ask | {"models": ["m\0"]}).encode()),
            ("/desk/ask", json.dumps(ask | {"models": ["m"] * 1_001}).encode()),
            ("/desk/report", json.dumps(report | {"fence": -1}).encode()),
            ("/desk/report", json.dumps(report | {"back": [["j", 2**70]]}).encode()),
            ("/desk/report", json.dumps(report | {"busy_s": -1}).encode()),
            ("/desk/report", json.dumps(report | {"busy_s": 1e300}).encode()),
            ("/desk/report", json.dumps(report | {"results": [result]}).encode()),
        ):
            async with session.post(stage.url + path, data=body) as response:
                assert response.status == 400, body
        large = {"content-length": str(65 * 1024 * 1024)}
        async with session.post(stage.url + "/desk/report", headers=large) as response:
            assert response.status == 413


async def test_a_batch_that_nobody_understands_says_so(tmp_path: Path) -> None:
    """Told are the manager, by what workers can, and the client, in words."""
    async with (
        _manager(FleetSnapshot(epoch="e", version=1)) as (url, told),
        offline_stage(tmp_path, manager_url=url) as stage,
        stage.client() as client,
        aiohttp.ClientSession() as session,
        asyncio.timeout(PATIENCE_S),
    ):
        line = request(0) | {"url": "/v1/embeddings", "body": {"model": "demo", "input": "a"}}
        file = await client.files.create(file=("a", jsonl([line])), purpose="batch")
        batch = await client.batches.create(
            input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h"
        )
        batch = await until_state(client, batch.id, "in_progress")
        assert batch.doherty["problem"] is None, "no worker has said what it can do"
        worker = HttpWorker(stage.url)
        worker.urls = (CHAT,)
        assert await worker.ask(session) is None
        batch = await client.batches.retrieve(batch.id)
        assert batch.doherty["problem"].startswith(
            "no engine worker of demo understands /v1/embeddings, and no replica"
        )
        while not (needs := await told.get()).urls:
            pass
        assert needs.urls == {"demo": (CHAT,)}
        assert [need.url for need in needs.models["demo"]] == ["/v1/embeddings"]
        other = HttpWorker(stage.url, worker_id="other")
        chunk = await other.ask(session)
        assert chunk is not None
        batch = await client.batches.retrieve(batch.id)
        assert batch.doherty["problem"] is None


def test_what_workers_said_is_believed_for_a_time() -> None:
    abilities = Abilities()
    ask = Ask(worker_id="w", models=("m",), urls=(CHAT,), lines_max=1)
    assert not abilities.lacks("m", "/v1/embeddings", 0.0), "nobody has said anything"
    abilities.note(msgspec.structs.replace(ask, spare=True), 0.0)
    assert abilities.urls(0.0) == {}
    abilities.note(ask, 0.0)
    assert abilities.lacks("m", "/v1/embeddings", REMEMBERED_S)
    assert not abilities.lacks("m", CHAT, 0.0)
    assert not abilities.lacks("m", "/v1/embeddings", REMEMBERED_S + 1)
    many = tuple(f"m{n}" for n in range(MODELS_MAX + 5))
    abilities.note(msgspec.structs.replace(ask, models=many, urls=tuple("abcdefghijklmnopqr")), 0.0)
    urls = abilities.urls(0.0)
    assert (len(urls), len(urls["m0"])) == (MODELS_MAX, URLS_MAX)
    abilities.forget()
    assert abilities.urls(0.0) == {}


async def test_a_report_of_a_chunk_that_nobody_holds_is_told_so(tmp_path: Path) -> None:
    async with offline_stage(tmp_path) as stage, stage.client() as client:
        content = jsonl([request(n) for n in range(4)])
        file = await client.files.create(file=("a", content), purpose="batch")
        batch = await client.batches.create(
            input_file_id=file.id, endpoint=CHAT, completion_window="24h"
        )
        await until_state(client, batch.id, "in_progress")
        async with aiohttp.ClientSession() as session:
            one, other = HttpWorker(stage.url, worker_id="one"), HttpWorker(stage.url)
            chunk = await one.ask(session)
            assert chunk is not None
            stage.clock.ahead_s = 1_000.0  # it is silent for too long
            again = await other.ask(session)
            assert again is not None
            assert again.fence > chunk.fence
            lines = [answer(line) for line in chunk.lines]
            assert not (await one.report(session, chunk, lines)).held
            first = [answer(line) for line in again.lines]
            assert (await other.report(session, again, first)).accepted == len(again.lines)


async def test_a_chunk_for_a_worker_that_has_gone_is_not_held(tmp_path: Path) -> None:
    async with offline_stage(tmp_path, {"hold_secs": 3600.0}) as stage, stage.client() as client:
        async with aiohttp.ClientSession() as session:
            waiting = asyncio.ensure_future(HttpWorker(stage.url).ask(session, wait_s=30.0))
            await asyncio.sleep(0.3)
            waiting.cancel()
        file = await client.files.create(file=("a", jsonl([request(0)])), purpose="batch")
        await client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
        async with aiohttp.ClientSession() as session, asyncio.timeout(PATIENCE_S):
            while await HttpWorker(stage.url).ask(session, wait_s=1.0) is None:
                pass


@asynccontextmanager
async def _manager(snapshot: FleetSnapshot) -> AsyncIterator[tuple[str, asyncio.Queue[JobNeeds]]]:
    told: asyncio.Queue[JobNeeds] = asyncio.Queue()

    async def needs(request: web.Request) -> web.Response:
        told.put_nowait(msgspec.json.decode(await request.read(), type=JobNeeds))
        return web.Response()

    async def watch(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(encode_snapshot(snapshot) + b"\n\n")
        await ended.wait()
        return response

    ended = asyncio.Event()
    app = web.Application()
    app.add_routes([web.post(NEEDS_PATH, needs), web.get(FLEET_WATCH_PATH, watch)])
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}", told
    finally:
        ended.set()
        await runner.cleanup()


async def test_the_manager_hears_what_is_left_and_says_which_models_there_are(
    tmp_path: Path,
) -> None:
    snapshot = FleetSnapshot(
        epoch="e",
        version=1,
        replicas=(ReplicaRecord(replica_id="r", url="http://x", models=("told",)),),
        pools=(PoolRecord(model="at-zero", pool="p"),),
    )
    async with (
        _manager(snapshot) as (url, told),
        offline_stage(tmp_path, manager_url=url) as stage,
        stage.client() as client,
        asyncio.timeout(PATIENCE_S),
    ):
        first = await told.get()
        assert first.models == {}
        for model, state in (("told", "in_progress"), ("at-zero", "in_progress"), ("no", "failed")):
            lines = [
                request(n, body={"model": model, "max_tokens": 10, "messages": []})
                for n in range(6)
            ]
            file = await client.files.create(file=("a", jsonl(lines)), purpose="batch")
            batch = await client.batches.create(
                input_file_id=file.id, endpoint=CHAT, completion_window="1h"
            )
            batch = await until_state(client, batch.id, "in_progress", "failed")
            assert batch.status == state, model
        needs = await told.get()
        while set(needs.models) != {"told", "at-zero"}:
            needs = await told.get()
        assert needs.service_id == first.service_id
        assert needs.sequence > first.sequence
        (need,) = needs.models["told"]
        assert need.lines == 6
        assert 60 <= need.tokens <= 70
        assert 3_500 < need.due_in_s <= 3_600


def test_which_models_may_be_asked_for() -> None:
    def snapshot(*models: tuple[str, ...]) -> FleetSnapshot:
        replicas = tuple(ReplicaRecord(replica_id="r", url="u", models=m) for m in models)
        return FleetSnapshot(epoch="e", version=1, replicas=replicas)

    known = KnownModels(configured_names(parse_config(CONFIG, "t").models))
    assert [known.knows(name) for name in ("demo", "tuned", "demo:x", "other", "x:demo")] == [
        *(True, True, True, False, False),
    ]
    known.take(snapshot(("other",)))
    assert known.knows("other")
    assert known.knows("demo")
    known.take(snapshot())
    assert not known.knows("other")
    known.take(snapshot(()))  # a replica that tells no names may have any
    assert known.knows("whatever")
    assert KnownModels(frozenset()).knows("whatever")  # nobody knows anything
    known = KnownModels(frozenset())
    known.take(snapshot(("m",)))
    assert not known.knows("whatever")
    known.configure(frozenset({"whatever"}))
    assert known.knows("whatever")


@pytest.mark.parametrize(
    ("host", "key", "open_to_all"),
    [
        ("127.0.0.1", None, False),
        ("localhost", None, False),
        ("::1", None, False),
        ("0.0.0.0", None, True),
        ("::", None, True),
        ("jobs.example", None, True),
        ("0.0.0.0", "secret", False),
    ],
)
def test_a_desk_that_others_can_reach_needs_a_key(
    host: str, key: str | None, open_to_all: bool
) -> None:
    assert (exposed(OfflineConfig(host=host, work_key=key)) is not None) == open_to_all


def test_prices_are_those_of_the_pools_that_do_jobs() -> None:
    assert prices_of(parse_config(CONFIG, "t").models) == {"demo": 3.6}
    free = CONFIG.replace(", gpu_price_per_hour: 3.6", "")
    assert prices_of(parse_config(free, "t").models) == {}


def test_a_port_in_use_is_told_with_what_to_do() -> None:
    with listen("127.0.0.1", 0) as taken, pytest.raises(StartError, match=r"offline\.port"):
        listen("127.0.0.1", taken.getsockname()[1]).close()


async def test_a_compressed_body_is_refused_not_unfolded(tmp_path: Path) -> None:
    async with offline_stage(tmp_path) as stage, aiohttp.ClientSession() as session:
        for path, body in (("/v1/files", b"no gzip"), ("/v1/batches", gzip.compress(bytes(10**6)))):
            headers = {"content-encoding": "gzip", "content-type": "multipart/form-data"}
            async with session.post(stage.url + path, data=body, headers=headers) as response:
                assert response.status == 415
                assert (await response.json())["error"]["code"] == "unsupported_content_encoding"
