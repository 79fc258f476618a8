"""/v1/batches on the wire: refusals, what is made once, results as they come, an ordered end."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from yarl import URL

from backends.offline import batches_api
from tests.fakes.offline_stage import (
    CHAT,
    PATIENCE_S,
    HttpWorker,
    Stage,
    answer,
    jsonl,
    offline_stage,
    request,
    until_state,
)

_KEY = {"authorization": "Bearer key"}


async def _input(stage: Stage, lines: int = 1) -> str:
    async with stage.client() as client:
        content = jsonl([request(n) for n in range(lines)])
        return (await client.files.create(file=("a", content), purpose="batch")).id


async def _create(
    stage: Stage, wish: object, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, Any]]:
    body = wish if isinstance(wish, bytes) else json.dumps(wish).encode()
    async with (
        aiohttp.ClientSession(headers=_KEY | (headers or {})) as session,
        session.post(stage.url + "/v1/batches", data=body) as response,
    ):
        return response.status, await response.json()


_WRONG: list[tuple[dict[str, Any], str]] = [
    ({"endpoint": "/v1/images/generations"}, "endpoint"),
    ({"endpoint": 7}, "endpoint"),
    ({"endpoint": None}, "endpoint"),
    ({"completion_window": "soon"}, "completion_window"),
    ({"completion_window": "31d"}, "completion_window"),
    ({"completion_window": "0h"}, "completion_window"),
    ({"metadata": {str(n): "x" for n in range(17)}}, "metadata"),
    ({"metadata": {"k" * 65: "x"}}, "metadata"),
    ({"metadata": {"k": "x" * 513}}, "metadata"),
    ({"metadata": {"k": 1}}, "metadata"),
    ({"metadata": {"k": "a\0b"}}, "metadata"),
    ({"output_expires_after": {"anchor": "now", "seconds": 7200}}, "output_expires_after"),
    ({"output_expires_after": {"anchor": "created_at"}}, "output_expires_after.seconds"),
    (
        {"output_expires_after": {"anchor": "created_at", "seconds": 5}},
        "output_expires_after.seconds",
    ),
    ({"input_file_id": ""}, "input_file_id"),
]


async def test_a_wish_that_cannot_be_granted(tmp_path: Path) -> None:
    async with offline_stage(tmp_path) as stage:
        good = {
            "input_file_id": await _input(stage),
            "endpoint": CHAT,
            "completion_window": "24h",
        }
        for changes, param in _WRONG:
            status, told = await _create(stage, good | changes)
            assert (status, told["error"]["param"]) == (400, param), changes
        for name in good:
            status, told = await _create(stage, {k: v for k, v in good.items() if k != name})
            assert (status, told["error"]["param"]) == (400, name)
            assert name in told["error"]["message"]
        for body in (b"", b"{", b"[]", b"\xff", b"[" * 5_000):
            assert (await _create(stage, body))[0] == 400
        assert (await _create(stage, b" " * 70_000))[0] == 413
        status, told = await _create(stage, good | {"input_file_id": "file-unknown"})
        assert (status, told["error"]["code"]) == (404, "not_found")
        assert (await _create(stage, good, {"Idempotency-Key": "k" * 256}))[0] == 400
        async with stage.client() as client:
            assert (await client.batches.list()).data == []


async def test_a_batch_whose_answer_was_lost_is_not_made_twice(tmp_path: Path) -> None:
    async with offline_stage(tmp_path) as stage:
        wish = {
            "input_file_id": await _input(stage),
            "endpoint": CHAT,
            "completion_window": "24h",
            "metadata": {"a": "b"},
        }
        first = (await _create(stage, wish, {"Idempotency-Key": "k"}))[1]["id"]
        assert (await _create(stage, wish, {"Idempotency-Key": "k"}))[1]["id"] == first
        other = (await _create(stage, wish, {"Idempotency-Key": "l"}))[1]["id"]
        assert other != first
        again = {"x-stainless-retry-count": "1"}
        assert (await _create(stage, wish, again))[1]["id"] == other
        plain = (await _create(stage, wish, {"x-stainless-retry-count": "0"}))[1]["id"]
        changed = (await _create(stage, wish | {"metadata": {}}, again))[1]["id"]
        assert len({first, other, plain, changed}) == 4
        stage.clock.ahead_s = 3_600  # no attempt is under way that long
        assert (await _create(stage, wish, again))[1]["id"] not in {first, other, plain}


async def test_outputs_go_when_the_batch_says(tmp_path: Path) -> None:
    async with offline_stage(tmp_path) as stage, stage.client() as client:
        batch = await client.batches.create(
            input_file_id=await _input(stage),
            endpoint=CHAT,
            completion_window="24h",
            output_expires_after={"anchor": "created_at", "seconds": 7_200},
        )
        await until_state(client, batch.id, "in_progress")
        await HttpWorker(stage.url).work()
        batch = await until_state(client, batch.id, "completed")
        assert batch.output_file_id is not None
        output = await client.files.retrieve(batch.output_file_id)
        assert output.expires_at is not None
        assert output.expires_at - output.created_at == 7_200


async def test_who_waits_for_results_has_them_when_they_come(tmp_path: Path) -> None:
    async with offline_stage(tmp_path) as stage, stage.client() as client:
        batch = await client.batches.create(
            input_file_id=await _input(stage, 3), endpoint=CHAT, completion_window="24h"
        )
        await until_state(client, batch.id, "in_progress")
        url = f"{stage.url}/v1/batches/{batch.id}/results"
        worker = HttpWorker(stage.url)
        async with aiohttp.ClientSession(headers=_KEY) as session:

            async def read(query: str) -> tuple[str, list[dict[str, Any]]]:
                async with session.get(url + query) as response:
                    assert response.status == 200
                    lines = (await response.text()).splitlines()
                    state = response.headers["doherty-batch-status"]
                    return state, [json.loads(line) for line in lines]

            assert await read("?wait=0") == ("in_progress", [])
            waiting = asyncio.ensure_future(read("?wait=30"))
            chunk = await worker.ask(session)
            assert chunk is not None
            assert not waiting.done()
            await worker.report(session, chunk, [answer(chunk.lines[0])])
            _, found = await asyncio.wait_for(waiting, PATIENCE_S)
            assert [line["sequence"] for line in found] == [1]
            await worker.report(session, chunk, [answer(line) for line in chunk.lines[1:]])
            await until_state(client, batch.id, "completed")
            _, found = await read("?after=1")
            assert [line["sequence"] for line in found] == [2, 3]
            assert await read("?after=3&wait=30") == ("completed", [])  # it does not wait in vain
            for wrong in ("?after=-1", "?after=x", "?limit=0", "?limit=1001", "?wait=31"):
                async with session.get(url + wrong) as response:
                    assert response.status == 400


async def test_large_results_make_short_pages_and_all_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches_api, "RESULTS_AT_ONCE", 4)
    monkeypatch.setattr(batches_api, "PAGE_BYTES_MAX", 1_500)
    async with offline_stage(tmp_path) as stage, stage.client() as client:
        batch = await client.batches.create(
            input_file_id=await _input(stage, 40), endpoint=CHAT, completion_window="24h"
        )
        await until_state(client, batch.id, "in_progress")
        await HttpWorker(stage.url).work()
        await until_state(client, batch.id, "completed")
        url = f"{stage.url}/v1/batches/{batch.id}/results"
        pages: list[list[int]] = []
        async with aiohttp.ClientSession(headers=_KEY) as session:
            while not pages or pages[-1]:
                after = pages[-1][-1] if pages else 0
                async with session.get(f"{url}?after={after}&limit=30") as response:
                    lines = (await response.text()).splitlines()
                pages.append([json.loads(line)["sequence"] for line in lines])
        assert [n for page in pages for n in page] == list(range(1, 41))
        assert 4 <= max(map(len, pages)) < 30
        async with (
            aiohttp.ClientSession(headers=_KEY) as session,
            session.get(f"{url}?limit=3") as response,
        ):
            assert len((await response.text()).splitlines()) == 3


async def test_results_come_in_the_order_of_the_lines_as_far_as_all_are_there(
    tmp_path: Path,
) -> None:
    async with offline_stage(tmp_path) as stage, stage.client() as client:
        batch = await client.batches.create(
            input_file_id=await _input(stage, 5), endpoint=CHAT, completion_window="24h"
        )
        await until_state(client, batch.id, "in_progress")
        url = f"{stage.url}/v1/batches/{batch.id}/results"
        worker = HttpWorker(stage.url)
        async with aiohttp.ClientSession(headers=_KEY) as session:

            async def numbers(query: str) -> list[int]:
                async with session.get(f"{url}?order=line&{query}") as response:
                    lines = (await response.text()).splitlines()
                    return [json.loads(line)["number"] for line in lines]

            chunk = await worker.ask(session)
            assert chunk is not None
            lines = {line.number: line for line in chunk.lines}

            async def report(*done: int) -> None:
                await worker.report(session, chunk, [answer(lines[number]) for number in done])

            await report(4, 1, 0)
            assert await numbers("") == [0, 1], "2 is missing, so 4 has to wait"
            assert await numbers("limit=1") == [0]
            assert await numbers("after=1") == []
            waiting = asyncio.ensure_future(numbers("after=1&wait=30"))
            await report(2)
            assert await asyncio.wait_for(waiting, PATIENCE_S) == [2]
            await client.batches.cancel(batch.id)
            await until_state(client, batch.id, "cancelled")
            assert await numbers("after=0") == [1, 2, 3, 4], "3 has its error now"
            async with session.get(f"{url}?order=size") as response:
                assert response.status == 400


async def test_who_waits_for_one_line_has_it_when_it_comes(tmp_path: Path) -> None:
    async with offline_stage(tmp_path) as stage, stage.client() as client:
        batch = await client.batches.create(
            input_file_id=await _input(stage, 2), endpoint=CHAT, completion_window="24h"
        )
        await until_state(client, batch.id, "in_progress")
        url = f"{stage.url}/v1/batches/{batch.id}/results/"
        worker = HttpWorker(stage.url)
        async with aiohttp.ClientSession(headers=_KEY) as session:

            async def read(line: str) -> tuple[int, dict[str, Any]]:
                async with session.get(url + line) as response:
                    return response.status, await response.json()

            assert (await read("id-1"))[0] == 404
            waiting = asyncio.ensure_future(read("id-1?wait=30"))
            chunk = await worker.ask(session)
            assert chunk is not None
            assert not waiting.done()
            await worker.report(session, chunk, [answer(line) for line in chunk.lines])
            status, line = await asyncio.wait_for(waiting, PATIENCE_S)
            assert (status, line["custom_id"]) == (200, "id-1")
            await until_state(client, batch.id, "completed")
            assert (await read("id-9?wait=30"))[0] == 404  # it does not wait in vain


async def test_the_end_of_the_service_ends_what_waits(tmp_path: Path) -> None:
    async with offline_stage(tmp_path) as stage, stage.client() as client:
        batch = await client.batches.create(
            input_file_id=await _input(stage), endpoint=CHAT, completion_window="24h"
        )
        await until_state(client, batch.id, "in_progress")
        async with aiohttp.ClientSession(headers=_KEY) as session:
            worker = HttpWorker(stage.url)
            assert await worker.ask(session) is not None
            ask = asyncio.ensure_future(worker.ask(session, wait_s=30.0))
            url = f"{stage.url}/v1/batches/{batch.id}/results?wait=30"
            results = asyncio.ensure_future(session.get(url))
            async with asyncio.timeout(PATIENCE_S):
                while "doherty_offline_asks_total 1.0" not in await _page(stage, session):
                    await asyncio.sleep(0.01)
                stage.orders.stop.set()
                assert await ask is None
                async with await results as response:
                    assert (response.status, await response.text()) == (200, "")


async def _page(stage: Stage, session: aiohttp.ClientSession) -> str:
    async with session.get(stage.url + "/metrics") as response:
        return await response.text()


async def test_what_was_held_and_done_outlives_the_service(tmp_path: Path) -> None:
    async with aiohttp.ClientSession() as session:
        async with offline_stage(tmp_path) as stage, stage.client() as client:
            batch = await client.batches.create(
                input_file_id=await _input(stage, 4), endpoint=CHAT, completion_window="24h"
            )
            await until_state(client, batch.id, "in_progress")
            chunk = await HttpWorker(stage.url).ask(session)
            assert chunk is not None
            await HttpWorker(stage.url).report(session, chunk, [answer(chunk.lines[0])])
        async with offline_stage(tmp_path) as stage, stage.client() as client:
            worker = HttpWorker(stage.url)
            assert await worker.ask(session) is None  # the chunk is still held
            rest = [answer(line) for line in chunk.lines[1:]]
            receipt = await worker.report(session, chunk, rest, done=True)
            assert (receipt.held, receipt.accepted) == (True, 3)
            ended = await until_state(client, batch.id, "completed")
            assert ended.request_counts.completed == 4


async def test_metrics_tell_what_is_there_and_what_passed(tmp_path: Path) -> None:
    async with offline_stage(tmp_path) as stage, stage.client() as client:
        batch = await client.batches.create(
            input_file_id=await _input(stage, 10), endpoint=CHAT, completion_window="24h"
        )
        await until_state(client, batch.id, "in_progress")
        async with aiohttp.ClientSession() as session:
            worker = HttpWorker(stage.url)
            chunk = await worker.ask(session, lines_max=4)
            assert chunk is not None
            await worker.report(session, chunk, [answer(chunk.lines[0])])
            page = await _page(stage, session)
            async with session.get(stage.url + "/health") as response:
                assert response.status == 200
        for figure in (
            'jobs{state="in_progress"} 1.0',
            'lines{state="waiting"} 6.0',
            'lines{state="held"} 3.0',
            'lines{state="completed"} 1.0',
            "files 1.0",
            "chunks_total 1.0",
            "lines_given_total 4.0",
            "results_total 1.0",
            "prompt_tokens_total 10.0",
            "completion_tokens_total 3.0",
        ):
            assert f"\ndoherty_offline_{figure}\n" in page, figure


async def test_unknown_paths_and_methods_are_answered_as_openai_does(tmp_path: Path) -> None:
    async with offline_stage(tmp_path) as stage, aiohttp.ClientSession() as session:
        for method, path, status in (
            ("GET", "/v1/nothing", 404),
            ("DELETE", "/v1/batches", 405),
            ("GET", "/v1/batches/batch_x", 404),
        ):
            async with session.request(method, stage.url + path) as response:
                assert response.status == status
                assert (await response.json())["error"]["type"] == "invalid_request_error"


async def test_the_official_client_tries_again_without_harm(tmp_path: Path) -> None:
    async with offline_stage(tmp_path) as stage, stage.client() as client:
        file_id = await _input(stage)
        for retries in ("0", "1", "2"):
            batch = await client.batches.create(
                input_file_id=file_id,
                endpoint=CHAT,
                completion_window="24h",
                extra_headers={"x-stainless-retry-count": retries},
            )
        assert [b.id for b in (await client.batches.list()).data] == [batch.id]
        with pytest.raises(openai.NotFoundError):
            await client.batches.retrieve("batch_unknown")


async def test_an_id_with_a_nul_is_refused_before_the_store_sees_it(
    tmp_path: Path, store_url: str
) -> None:
    batch = {"input_file_id": "a\0", "endpoint": CHAT, "completion_window": "24h"}
    async with (
        offline_stage(tmp_path, store=store_url) as stage,
        aiohttp.ClientSession(stage.url) as session,
    ):
        for path in ("files/a%00", "files?after=%00", "batches/%00", "batches/b/results/%00"):
            async with session.get(URL(f"/v1/{path}", encoded=True)) as response:
                assert response.status == 400, path
        async with session.post("/v1/batches", json=batch) as response:
            assert response.status == 400
