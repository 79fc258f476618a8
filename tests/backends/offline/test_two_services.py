"""Two services on one queue, on either database: clients and workers may ask either one."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import aiohttp
import openai
import pytest

from tests.fakes.offline_stage import (
    CHAT,
    HttpWorker,
    jsonl,
    offline_stage,
    request,
    until_state,
)


async def test_clients_and_workers_of_one_queue_may_ask_either_service(
    store_url: str, tmp_path: Path
) -> None:
    once = {"Idempotency-Key": "once"}
    async with (
        offline_stage(tmp_path, store=store_url) as one,
        offline_stage(tmp_path, store=store_url) as other,
        one.client() as client,
        other.client() as same,
    ):
        content = jsonl([request(n) for n in range(500)])
        ids = set()
        for asked in (client, same):
            file = await asked.files.create(
                file=("ä.jsonl", content), purpose="batch", extra_headers=once
            )
            batch = await asked.batches.create(
                input_file_id=file.id,
                endpoint=CHAT,
                completion_window="24h",
                extra_headers=once,
                metadata={"of": asked.base_url.host},
            )
            ids.add((file.id, batch.id))
        assert len(ids) == 1
        assert (await same.files.content(file.id)).content == content
        await until_state(same, batch.id, "in_progress")
        workers = [HttpWorker(stage.url, worker_id=stage.url) for stage in (one, other)]
        for worker in workers:  # else one may find the file locked until the other has done all
            await worker.work(40, lines_max=40)
        await asyncio.gather(*(worker.work(lines_max=40) for worker in workers))
        assert sum(len(worker.done) for worker in workers) >= 500
        done = await until_state(client, batch.id, "completed")
        assert done.request_counts.completed == 500
        answers = (await same.files.content(done.output_file_id)).text.splitlines()
        assert [json.loads(line)["custom_id"] for line in answers] == [
            f"id-{n}" for n in range(500)
        ]
        async with aiohttp.ClientSession() as session:
            for stage in (one, other):
                async with session.get(stage.url + "/metrics") as response:
                    page = await response.text()
                assert 'doherty_offline_jobs{state="completed"} 1.0' in page
                assert "doherty_offline_files 1.0" in page
        # The other's cancel and delete are this one's, too.
        batch = await client.batches.create(
            input_file_id=file.id, endpoint=CHAT, completion_window="24h"
        )
        await until_state(same, batch.id, "in_progress")
        await same.batches.cancel(batch.id)
        await until_state(client, batch.id, "cancelled")
        await same.files.delete(file.id)
        with pytest.raises(openai.NotFoundError):
            await client.files.retrieve(file.id)
