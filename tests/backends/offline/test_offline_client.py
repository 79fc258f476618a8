"""The official client at the service: whole batches, and everything that can end one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from tests.fakes.offline_stage import (
    CHAT,
    LONG,
    HttpWorker,
    Stage,
    jsonl,
    offline_stage,
    request,
    until_state,
)


async def _submit(client: AsyncOpenAI, content: bytes, **wish: Any) -> Any:
    file = await client.files.create(file=("lines.jsonl", content), purpose="batch")
    wish = {"endpoint": CHAT, "completion_window": "24h"} | wish
    return await client.batches.create(input_file_id=file.id, **wish)


async def _lines(client: AsyncOpenAI, file_id: str | None) -> list[dict[str, Any]]:
    assert file_id is not None
    content = await client.files.content(file_id)
    return [json.loads(line) for line in content.text.splitlines()]


async def test_a_batch_of_5000_lines(tmp_path: Path) -> None:
    long = set(range(7, 5_000, 251))
    lines = [request(n, f"{LONG} {n}" if n in long else None) for n in range(5_000)]
    async with offline_stage(tmp_path) as stage, stage.client() as client:
        batch = await _submit(client, jsonl(lines), metadata={"run": "7"})
        assert (batch.status, batch.object, batch.endpoint) == ("validating", "batch", CHAT)
        batch = await until_state(client, batch.id, "in_progress", "failed")
        assert (batch.status, batch.request_counts.total) == ("in_progress", 5_000)
        worker = HttpWorker(stage.url)
        await worker.work()
        batch = await until_state(client, batch.id, "completed")
        counts = batch.request_counts
        assert (counts.total, counts.completed, counts.failed) == (5_000, 5_000 - 20, 20)
        assert batch.errors is None
        assert batch.model == "demo"
        assert batch.metadata == {"run": "7"}
        assert batch.expires_at - batch.created_at == 86_400
        assert batch.created_at <= batch.in_progress_at <= batch.finalizing_at <= batch.completed_at
        assert batch.usage.input_tokens == 10 * 4_980
        assert batch.usage.input_tokens_details.cached_tokens == 4 * 4_980
        assert batch.usage.total_tokens == 13 * 4_980
        assert batch.doherty["gpu_s"] == len(worker.done) / 1000
        assert batch.doherty["cost"] == pytest.approx(batch.doherty["gpu_s"] * 3.6 / 3600)
        answers = await _lines(client, batch.output_file_id)
        refused = await _lines(client, batch.error_file_id)
        good = [n for n in range(5_000) if n not in long]
        assert [line["custom_id"] for line in answers] == [f"id-{n}" for n in good]
        assert [line["custom_id"] for line in refused] == [f"id-{n}" for n in sorted(long)]
        for n, line in zip(good, answers, strict=True):
            body = line["response"]["body"]
            assert body["choices"][0]["message"]["content"] == str(n)
            assert line["response"]["status_code"] == 200
            assert line["response"]["request_id"] == f"req-{n}"
            assert line["error"] is None
        assert {line["response"]["status_code"] for line in refused} == {400}
        assert len({line["id"] for line in answers + refused}) == 5_000
        output = await client.files.retrieve(batch.output_file_id)
        assert output.purpose == "batch_output"
        assert output.bytes == len((await client.files.content(output.id)).content)


_BAD = b'{"custom_id": "broken", \n'


_NO_BATCHES: list[tuple[bytes, list[tuple[str, int | None, str | None]]]] = [
    (jsonl([request(0)]) + _BAD + jsonl([request(2)]), [("invalid_json_line", 2, None)]),
    (
        jsonl([request(0), request(1, body={"model": "other", "messages": []})]),
        [("mismatched_model", 2, "body.model")],
    ),
    (
        jsonl([request(0, body={"model": "nobody's", "messages": []})]),
        [("model_not_found", None, "body.model")],
    ),
    (
        jsonl([request(0), request(1), request(0), request(1)]),
        [("duplicate_custom_id", 3, "custom_id"), ("duplicate_custom_id", 4, "custom_id")],
    ),
    (b"\n\n", [("empty_file", None, None)]),
    (b"", [("empty_file", None, None)]),
    (jsonl([request(n) for n in range(51)]), [("too_many_requests", None, None)]),
    (
        jsonl([request(0, url="/v1/embeddings"), request(1, method="GET")]),
        [("invalid_url", 1, "url"), ("invalid_method", 2, "method")],
    ),
    (
        jsonl([request(0, body={"model": "demo", "stream": True})]),
        [("invalid_request", 1, "body.stream")],
    ),
]


async def test_a_file_that_cannot_be_a_batch(tmp_path: Path) -> None:
    async with offline_stage(tmp_path, {"lines_max": 50}) as stage, stage.client() as client:
        for content, problems in _NO_BATCHES:
            batch = await _submit(client, content)
            batch = await until_state(client, batch.id, "failed", "in_progress")
            assert batch.status == "failed", content
            assert [(e.code, e.line, e.param) for e in batch.errors.data] == problems
            assert batch.errors.object == "list"
            assert all(error.message for error in batch.errors.data)
            assert batch.failed_at >= batch.created_at
            assert batch.output_file_id is None
            assert batch.error_file_id is None
            assert batch.request_counts.total == 0


async def _begun(stage: Stage, client: AsyncOpenAI, lines: int, **wish: Any) -> Any:
    batch = await _submit(client, jsonl([request(n) for n in range(lines)]), **wish)
    return await until_state(client, batch.id, "in_progress")


async def test_a_batch_cancelled_half_way(tmp_path: Path) -> None:
    async with offline_stage(tmp_path) as stage, stage.client() as client:
        batch = await _begun(stage, client, 100)
        await HttpWorker(stage.url).work(lines=40)
        cancelled = await client.batches.cancel(batch.id)
        assert cancelled.status in {"cancelling", "cancelled"}
        batch = await until_state(client, batch.id, "cancelled")
        await _check_halves(client, batch, 40, 100, "batch_cancelled")
        assert batch.cancelled_at >= batch.cancelling_at
        again = await client.batches.cancel(batch.id)
        assert again.status == "cancelled"


async def test_a_batch_that_is_not_done_in_time(tmp_path: Path) -> None:
    async with offline_stage(tmp_path) as stage, stage.client() as client:
        batch = await _begun(stage, client, 50, completion_window="2h")
        assert batch.completion_window == "2h"
        await HttpWorker(stage.url).work(lines=20)
        stage.clock.ahead_s = 7_300
        batch = await until_state(client, batch.id, "expired")
        await _check_halves(client, batch, 20, 50, "batch_expired")
        with pytest.raises(openai.ConflictError, match="expired"):
            await client.batches.cancel(batch.id)


async def _check_halves(client: AsyncOpenAI, batch: Any, done: int, total: int, code: str) -> None:
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (total, done, total - done)
    answers = await _lines(client, batch.output_file_id)
    errors = await _lines(client, batch.error_file_id)
    assert {line["error"]["code"] for line in errors} == {code}
    assert {line["response"] for line in errors} == {None}
    ids = [line["custom_id"] for line in answers + errors]
    assert len(answers) == done
    assert sorted(ids) == sorted(f"id-{n}" for n in range(total))


async def test_a_line_that_nobody_could_do(tmp_path: Path) -> None:
    async with offline_stage(tmp_path) as stage, stage.client() as client:
        batch = await _submit(client, jsonl([request(0, "nobody")]))
        await until_state(client, batch.id, "in_progress")
        await HttpWorker(stage.url).work()
        batch = await until_state(client, batch.id, "completed")
        assert batch.output_file_id is None
        (line,) = await _lines(client, batch.error_file_id)
        assert line["error"]["code"] == "worker_died"


async def test_an_adapter_or_a_model_that_is_told_may_be_asked_for(tmp_path: Path) -> None:
    async with offline_stage(tmp_path) as stage, stage.client() as client:
        for model in ("tuned", "demo:tuned"):
            line = request(0, body={"model": model, "messages": []})
            batch = await _submit(client, jsonl([line]))
            batch = await until_state(client, batch.id, "in_progress", "failed")
            assert batch.status == "in_progress"
            assert batch.model == model


async def test_what_was_done_can_be_read_before_the_end(tmp_path: Path) -> None:
    async with offline_stage(tmp_path) as stage, stage.client() as client:
        batch = await _begun(stage, client, 30)
        await HttpWorker(stage.url).work(lines=10)
        path = f"/batches/{batch.id}/results"
        found = await _page(client, path + "?limit=4")
        more = await _page(client, path + f"?after={found[-1]['sequence']}")
        assert [line["sequence"] for line in found + more] == list(range(1, 11))
        assert {line["custom_id"] for line in found + more} == {
            f"id-{line['number']}" for line in found + more
        }
        one = await client.get(path + "/" + found[0]["custom_id"], cast_to=object)
        assert one == found[0]
        done = {line["custom_id"] for line in found + more}
        missing = next(f"id-{n}" for n in range(30) if f"id-{n}" not in done)
        with pytest.raises(openai.NotFoundError):
            await client.get(path + "/" + missing, cast_to=object)


async def _page(client: AsyncOpenAI, path: str) -> list[dict[str, Any]]:
    response = await client.get(path, cast_to=openai._legacy_response.HttpxBinaryResponseContent)
    return [json.loads(line) for line in response.text.splitlines()]
