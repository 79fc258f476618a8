"""kill -9 of a process that writes to the store: nothing is lost that was acknowledged."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from backends.offline.records import COMPLETED, ENDED, ConflictError
from backends.offline.store import Store
from tests.fakes.store_writer import LIMITS, LINES, validate
from tests.fakes.stored_jobs import ANN, ask, outcome, report

KILLS = 8


def _killed(url: str, count: int, after_s: float) -> list[str]:
    """Let a writer live until it has said `count` lines and a moment longer; return them all."""
    writer = subprocess.Popen(
        [sys.executable, "-m", "tests.fakes.store_writer", url],
        cwd=Path(__file__).parents[3],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == "open\n"
    before = [writer.stdout.readline() for _ in range(count)]
    time.sleep(after_s)
    writer.kill()
    said, _ = writer.communicate()
    return before + said.splitlines(keepends=True)


@pytest.mark.faults
async def test_what_was_acknowledged_is_there_after_a_kill(store_url: str) -> None:
    moments = random.Random(7)
    jobs: list[str] = []
    done: set[str] = set()
    for _ in range(KILLS):
        count, after_s = moments.randrange(12), moments.uniform(0.0, 0.1)
        for line in await asyncio.to_thread(_killed, store_url, count, after_s):
            kind, *words = line.split()
            if not line.endswith("\n"):
                continue  # it died while it said this
            if kind == "job":
                jobs += words
            elif kind == "done":
                done |= set(words)
        store = await Store.open(store_url, limits=LIMITS)
        for job_id in jobs:
            job = await store.job(ANN, job_id)
            results = await store.results(ANN, job_id, limit=LINES + 1)
            assert job.total == (LINES if job.in_progress_s else 0)
            assert len(results) == job.completed + job.failed
            good = {f"{job_id}/{r.number}" for r in results if not r.failed}
            assert {line for line in done if line.startswith(job_id)} <= good
        await store.close()
    assert done  # it did get somewhere
    await _finished(store_url, jobs)


async def _finished(url: str, jobs: list[str]) -> None:
    """Do what is left: each line has one outcome, whoever died over it."""
    store = await Store.open(url, limits=LIMITS)
    until_s = time.monotonic() + 60.0
    while open_jobs := [j for j in jobs if (await store.job(ANN, j)).state not in ENDED]:
        assert time.monotonic() < until_s, open_jobs
        await validate(store)
        await store.finish_due()
        while (chunk := await ask(store)) is not None:
            await report(store, chunk, chunk.lines, done=True)
        await asyncio.sleep(0.05)
    for job_id in jobs:
        job = await store.job(ANN, job_id)
        found = await outcome(store, job)
        # One that was cancelled before it began has no lines.
        begun = job.in_progress_s is not None
        assert set(found) == {f"c{number}" for number in range(LINES if begun else 0)}
        if job.state == COMPLETED:
            assert set(found.values()) == {"200"}
            with pytest.raises(ConflictError):
                await store.cancel_job(ANN, job_id)
    await store.close()
