"""Random lives of a store beside a model of it: each line counts exactly once, whatever happens.

The model knows nothing of tables: lines wait, are held under a fence, or have an outcome. It does
not say which lines a worker gets, only which it must not get; everything else it says exactly.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import TypeAlias

import pytest

from backends.offline.records import Limits
from backends.offline.store import Store
from backends.offline.work import Chunk, Line, Result
from tests.fakes.provider import ManualClock
from tests.fakes.stored_jobs import ANN, BOB, ask, bad, begun_job, good, outcome, report

Key: TypeAlias = tuple[str, int]  # of a line: its job and number
HOLD_S = 60.0
ATTEMPTS = 2
STEPS = 120


@dataclass
class ModelJob:
    owner: str
    expires_s: float
    lines: dict[int, str]  # what became of each: "" as long as it is open
    state: str = "in_progress"


@dataclass
class ModelChunk:
    chunk: Chunk
    worker_id: str
    until_s: float
    open: set[Key]  # lines that it holds


@dataclass
class Model:
    """What must be true of the store."""

    jobs: dict[str, ModelJob] = field(default_factory=dict)
    held: dict[int, ModelChunk] = field(default_factory=dict)  # by fence
    past: list[ModelChunk] = field(default_factory=list)  # whose workers may still come back
    deaths: Counter[Key] = field(default_factory=Counter)

    def waiting(self, now_s: float) -> set[Key]:
        busy = {line for chunk in self.held.values() for line in chunk.open}
        return {
            (job_id, number)
            for job_id, job in self.jobs.items()
            if job.state == "in_progress" and job.expires_s > now_s
            for number, became in job.lines.items()
            if not became and (job_id, number) not in busy
        }

    def end(self, job_id: str, number: int, became: str) -> None:
        job = self.jobs[job_id]
        assert not job.lines[number]
        job.lines[number] = became
        if all(job.lines.values()) and job.state == "in_progress":
            job.state = "completed"

    def bury(self, now_s: float) -> None:
        for fence, chunk in list(self.held.items()):
            if chunk.until_s >= now_s:
                continue
            del self.held[fence]
            self.past.append(chunk)
            if len(chunk.open) == 1:
                (line,) = chunk.open
                if self.jobs[line[0]].state == "in_progress":
                    self.deaths[line] += 1
                    if self.deaths[line] >= ATTEMPTS:
                        self.end(*line, "worker_died")

    def finish(self, now_s: float) -> None:
        for job_id, job in self.jobs.items():
            due = job.state == "in_progress" and job.expires_s <= now_s
            if not due and job.state != "cancelling":
                continue
            error = "batch_expired" if due else "batch_cancelled"
            job.lines = {number: was or error for number, was in job.lines.items()}
            job.state = "expired" if due else "cancelled"
            for chunk in self.held.values():
                chunk.open = {line for line in chunk.open if line[0] != job_id}


class Life:
    """One store, its workers, and what happens to them."""

    def __init__(self, seed: int, store: Store, clock: ManualClock) -> None:
        self.random = random.Random(seed)
        self.store, self.clock, self.model = store, clock, Model()

    async def new_job(self) -> None:
        if len(self.model.jobs) < 12:
            owner = self.random.choice((ANN, BOB))
            lines, window_s = self.random.randint(1, 30), self.random.choice((150.0, 1e6))
            job = await begun_job(self.store, lines, owner=owner, window_s=window_s)
            became = dict.fromkeys(range(lines), "")
            self.model.jobs[job.id] = ModelJob(owner, job.expires_s, became)

    async def give(self) -> None:
        now_s = self.clock.unix_s()
        self.model.bury(now_s)
        worker_id = self.random.choice("abc")
        chunk = await ask(self.store, worker_id, lines_max=self.random.choice((1, 5, 40)))
        may = self.model.waiting(now_s)
        if chunk is None:
            assert may == set()
            return
        lines = [(line.job_id, line.number) for line in chunk.lines]
        assert len(set(lines)) == len(lines) > 0
        assert set(lines) <= may
        assert chunk.fence > max(self.model.held, default=0)
        self.model.held[chunk.fence] = ModelChunk(chunk, worker_id, now_s + HOLD_S, set(lines))

    async def bring(self) -> None:
        """Somebody reports: of what it holds, has brought before, or lost long ago."""
        chunks = [*self.model.held.values(), *self.model.past[-5:]]
        if not chunks:
            return
        chunk = self.random.choice(chunks)
        held = self.model.held.get(chunk.chunk.fence) is chunk
        mine = chunk.chunk.lines
        lines = self.random.sample(mine, self.random.randint(0, len(mine)))
        keys = [(line.job_id, line.number) for line in lines]
        others = [line for line in mine if (line.job_id, line.number) not in keys]
        back, done = others[: self.random.randint(0, 2)], self.random.random() < 0.2
        results = {
            key: self.random.choice((good, bad))(line)
            for key, line in zip(keys, lines, strict=True)
        }
        receipt = await report(
            self.store,
            chunk.chunk,
            lines,
            worker_id=chunk.worker_id,
            result=lambda line: results[line.job_id, line.number],
            back=back,
            done=done,
        )
        accepted = self._reported(chunk, results, back, done=done) if held else 0
        assert (receipt.held, receipt.accepted) == (held, accepted)

    def _reported(
        self, chunk: ModelChunk, results: dict[Key, Result], back: list[Line], *, done: bool
    ) -> int:
        running = {j for j, job in self.model.jobs.items() if job.state == "in_progress"}
        counted = [key for key in results if key in chunk.open and key[0] in running]
        for key in counted:
            self.model.end(*key, str(results[key].status))
        chunk.open -= {*counted, *((r.job_id, r.number) for r in back if r.job_id in running)}
        chunk.until_s = self.clock.unix_s() + HOLD_S
        if done:
            self.model.past.append(self.model.held.pop(chunk.chunk.fence))
        return len(counted)

    async def time_passes(self) -> None:
        await self.clock.advance(self.random.choice((1.0, 10.0, HOLD_S + 1)))

    async def cancel(self) -> None:
        if self.random.random() < 0.2 and self.model.jobs:
            job_id, job = self.random.choice(list(self.model.jobs.items()))
            if job.state == "in_progress":
                job.state = "cancelling"
                await self.store.cancel_job(job.owner, job_id)

    async def finish(self) -> None:
        self.model.finish(self.clock.unix_s())
        await self.store.finish_due()

    async def check(self) -> None:
        for job_id, model in self.model.jobs.items():
            job = await self.store.job(model.owner, job_id)
            became = Counter(model.lines.values())
            assert (job.state, job.total) == (model.state, len(model.lines))
            assert job.completed == became["200"]
            assert job.completed + job.failed == len(model.lines) - became[""]

    async def end(self) -> None:
        """Do what is left, and compare every line of every file."""
        await self.finish()
        for _ in range(500):
            await self.clock.advance(HOLD_S + 1)
            await self.give()
            if not self.model.held:
                break
            for chunk in list(self.model.held.values()):
                lines = [c for c in chunk.chunk.lines if (c.job_id, c.number) in chunk.open]
                await report(self.store, chunk.chunk, lines, worker_id=chunk.worker_id, done=True)
                results = {(line.job_id, line.number): good(line) for line in lines}
                self._reported(chunk, results, [], done=True)
            await self.finish()
        await self.finish()
        await self.check()
        for job_id, model in self.model.jobs.items():
            job = await self.store.job(model.owner, job_id)
            found = await outcome(self.store, job)
            assert found == {f"c{number}": became for number, became in model.lines.items()}


@pytest.mark.parametrize("seed", range(int(os.environ.get("STORE_LIVES", "2"))))
async def test_each_line_counts_once_in_a_random_life(store_url: str, seed: int) -> None:
    clock = ManualClock()
    limits = Limits(hold_s=HOLD_S, attempts_max=ATTEMPTS)
    store = await Store.open(store_url, clock=clock, limits=limits)
    await clock.advance(HOLD_S)
    life = Life(seed, store, clock)
    steps = (life.new_job, life.give, life.bring, life.time_passes, life.cancel, life.finish)
    over_sockets = store_url.startswith("postgresql")
    for number in range(STEPS // 2 if over_sockets else STEPS):
        (step,) = life.random.choices(steps, weights=(2, 5, 6, 2, 1, 1))
        await step()
        if number % 5 == 0:
            await life.check()
    await life.end()
    became = Counter(was for job in life.model.jobs.values() for was in job.lines.values())
    assert became["200"] > 0
    await store.close()
