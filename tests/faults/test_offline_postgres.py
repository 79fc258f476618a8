"""PostgreSQL recovers from a crash under a service: 503 meanwhile, and then it goes on."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path

import openai
import pytest

from tests.fakes import postgres_server
from tests.fakes.offline_stage import (
    CHAT,
    PATIENCE_S,
    HttpWorker,
    jsonl,
    offline_stage,
    request,
    until_state,
)

pytestmark = pytest.mark.faults


def _backends(url: str) -> list[int]:
    """Return the processes that serve the connections of the cluster at `url`."""
    folder = url.rpartition("host=")[2]
    server = int(Path(folder, "data", "postmaster.pid").read_text().split()[0])
    children = Path(f"/proc/{server}/task/{server}/children").read_text().split()
    names = {int(pid): Path(f"/proc/{pid}/cmdline").read_text() for pid in children}
    return [pid for pid, name in names.items() if "doherty" in name]


async def _state(client: openai.AsyncOpenAI, batch_id: str) -> str:
    try:
        return (await client.batches.retrieve(batch_id)).status
    except openai.InternalServerError as error:
        return str(error.status_code)


async def test_connections_that_are_killed_come_back(tmp_path: Path) -> None:
    pytest.importorskip("asyncpg")
    programs = postgres_server.programs()
    if programs is None:
        pytest.skip("needs a PostgreSQL server (Debian: postgresql)")
    with postgres_server.running(programs) as server:
        url = server.url
        async with offline_stage(tmp_path, store=url) as stage, stage.client() as client:
            content = jsonl([request(n) for n in range(100)])
            file = await client.files.create(file=("a", content), purpose="batch")
            batch = await client.batches.create(
                input_file_id=file.id, endpoint=CHAT, completion_window="24h"
            )
            await until_state(client, batch.id, "in_progress")
            await HttpWorker(stage.url).work(lines=30)
            killed = _backends(url)
            assert killed
            for pid in killed:
                with contextlib.suppress(ProcessLookupError):
                    # The first one's death has the server end all the others, and recover.
                    os.kill(pid, signal.SIGKILL)
            async with asyncio.timeout(PATIENCE_S):
                while (state := await _state(client, batch.id)) == "503":
                    await asyncio.sleep(0.05)
            assert state == "in_progress"
            await HttpWorker(stage.url).work()
            ended = await until_state(client, batch.id, "completed")
            assert ended.request_counts.completed == 100
