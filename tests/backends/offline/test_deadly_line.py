"""A line that kills every engine that computes it: found by worker and desk together."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from backends.clock import SystemClock
from backends.log import Log
from backends.offline.desk_client import RemoteDesk
from backends.offline.line_engine import EngineError, Gauges
from backends.offline.work import Line, Result
from backends.offline.worker_loop import Worker
from tests.fakes.offline_stage import CHAT, answer, jsonl, offline_stage, request, until_state

LINES, DEADLY, HOLD_S = 200, 77, 2.0


class Mortal:
    """An engine that answers by rule, four at a time, and dies of one line."""

    models, urls, gpus, sequences_max = ("demo",), (CHAT,), 1, 4

    def __init__(self) -> None:
        self.dead: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._room = asyncio.Semaphore(4)

    async def start(self) -> None: ...

    async def do(self, line: Line) -> Result:
        async with self._room:
            await asyncio.sleep(0)
            if b"deadly" in bytes(line.body) and not self.dead.done():
                self.dead.set_result("CUDA error: an illegal memory access was encountered")
            if self.dead.done():
                raise EngineError(self.dead.result())
            return answer(line)

    def gauges(self) -> Gauges:
        return Gauges(0, 0)

    async def close(self) -> None: ...


@pytest.mark.faults
async def test_a_deadly_line_alone_ends_as_an_error(tmp_path: Path) -> None:
    lines = [request(n, "deadly" if n == DEADLY else None) for n in range(LINES)]
    async with offline_stage(tmp_path, {"hold_secs": HOLD_S}) as stage, stage.client() as client:
        file = await client.files.create(file=("in.jsonl", jsonl(lines)), purpose="batch")
        batch = await client.batches.create(
            input_file_id=file.id, endpoint=CHAT, completion_window="24h"
        )
        stop = asyncio.Event()

        async def stop_at_the_end() -> None:
            await until_state(client, batch.id, "completed")
            stop.set()

        watching = asyncio.ensure_future(stop_at_the_end())
        deaths, code = 0, 1
        while code and deaths < 12:
            desk = RemoteDesk(stage.url)
            worker = Worker(Mortal(), desk, f"w{deaths}", 2000, SystemClock(), Log())
            code = await worker.run(stop)
            await desk.close()
            deaths += code
            stage.clock.ahead_s += HOLD_S + 1  # its silence is noticed
        await watching
        # In chunks of 200, 25 and 4, then three times alone.
        assert (code, deaths) == (0, 6)
        ended = await client.batches.retrieve(batch.id)
        done = (await client.files.content(ended.output_file_id or "")).text.splitlines()
        failed = (await client.files.content(ended.error_file_id or "")).text.splitlines()
    assert [json.loads(row)["custom_id"] for row in failed] == [f"id-{DEADLY}"]
    assert [json.loads(row)["custom_id"] for row in done] == [
        f"id-{n}" for n in range(LINES) if n != DEADLY
    ]
