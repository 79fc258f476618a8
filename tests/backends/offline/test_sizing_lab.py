"""A day of jobs in virtual time: deadlines are kept, for little more than the work itself costs."""

from __future__ import annotations

import random

import msgspec
import pytest

from backends.offline.sizing import Crew, Hand, Work, size
from backends.offline.work import JobNeed

STEP_S = 10.0
START_S = 60.0
RATE = 10_000.0
MOST = 8
DAY_S = 86_400.0
TOKENS_A_LINE = 500


class Job(msgspec.Struct):
    """Work that came at a time and is due at another."""

    came_s: float
    due_s: float
    tokens: float
    done_s: float = 0.0


class Day(msgspec.Struct, frozen=True):
    """What came of a day."""

    late: int
    worker_s: float
    work_s: float  # that a worker needs for all of it
    starts: int
    most: int


def jobs_of(seed: int, count: int = 60) -> list[Job]:
    """Return jobs of a minute to an hour of one worker, due in half an hour to a day."""
    rng = random.Random(seed)
    jobs = []
    for _ in range(count):
        came_s, work_s = rng.uniform(0, DAY_S), rng.choice([60.0, 300.0, 1200.0, 3600.0])
        # One alone could be done by half of all workers.
        window_s = max(rng.choice([1800.0, 3600.0, 4 * 3600.0, DAY_S]), 2 * work_s / MOST + 600)
        jobs.append(Job(came_s, came_s + window_s, work_s * RATE))
    return sorted(jobs, key=lambda job: job.came_s)


class Lab:
    """Workers that take a minute to start and do what is due first."""

    def __init__(self, jobs: list[Job], always: int | None = None) -> None:
        self.jobs = jobs
        self.always = always
        self.now_s = 0.0
        self.ready_s: list[float] = []
        self.idle_s = 0.0
        self.worker_s = 0.0
        self.starts = 0
        self.most = 0

    @property
    def left(self) -> list[Job]:
        open_now = (job for job in self.jobs if job.came_s <= self.now_s and job.tokens > 0)
        return sorted(open_now, key=lambda job: job.due_s)

    def wanted(self) -> int:
        """Return how many workers sizing asks for now; they linger for as long as a start takes."""
        if self.always is not None:
            return self.always
        needs = tuple(
            JobNeed(
                due_in_s=max(0.0, job.due_s - self.now_s),
                lines=int(job.tokens // TOKENS_A_LINE) + 1,
                tokens=int(job.tokens) + 1,
            )
            for job in self.left
        )
        there = tuple(
            Hand(max(0.0, s - self.now_s), busy=bool(needs) and s <= self.now_s)
            for s in self.ready_s
        )
        crew = Crew(pool="p", rate=RATE, start_s=START_S, most=MOST, there=there)
        found = size(Work(needs=needs, crews=(crew,)))["p"].workers
        self.idle_s = 0.0 if needs else self.idle_s + STEP_S
        lingers = not needs and self.idle_s < START_S
        return max(found, len(self.ready_s)) if lingers else found

    def step(self) -> None:
        wanted = self.wanted()
        more = wanted - len(self.ready_s)
        self.starts += max(0, more)
        self.ready_s += [self.now_s + START_S] * max(0, more)
        self.ready_s = sorted(self.ready_s)[:wanted]
        self.most = max(self.most, wanted)
        self.worker_s += STEP_S * len(self.ready_s)
        able = RATE * sum(max(0.0, min(STEP_S, self.now_s + STEP_S - s)) for s in self.ready_s)
        for job in self.left:
            done = min(able, job.tokens)
            job.tokens, able = job.tokens - done, able - done
            job.done_s = self.now_s + STEP_S
        self.now_s += STEP_S


def day(seed: int, always: int | None = None) -> Day:
    jobs = jobs_of(seed)
    work_s = sum(job.tokens for job in jobs) / RATE
    lab = Lab(jobs, always)
    while lab.now_s < 2 * DAY_S and (lab.left or lab.now_s < DAY_S):
        lab.step()
    late = sum(job.done_s > job.due_s or job.tokens > 0 for job in jobs)
    return Day(late, lab.worker_s, work_s, lab.starts, lab.most)


@pytest.mark.parametrize("seed", range(2))
def test_deadlines_are_kept_for_little_more_than_the_work_costs(seed: int) -> None:
    sized, alone = day(seed), day(seed, always=1)
    assert sized.late == 0
    assert sized.worker_s <= 1.15 * sized.work_s
    assert 1 < sized.most <= MOST
    assert alone.late > 0, "one worker all day would have been too slow"
