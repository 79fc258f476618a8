"""One load, one start time, one law: what it came to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import msgspec

from backends.observation import ScalingPolicy
from loadtest.scaling.laws import Doherty, Instant, Knative, Planned, Static, Tracking
from loadtest.scaling.loads import LOADS, carried_by, jobs_of
from loadtest.scaling.oracle import needs, schedule
from loadtest.scaling.replicas import Job, Speeds
from loadtest.scaling.world import AFTER_S, Law, Pool, World, govern

LAWS = ("instant", "oracle", "doherty", "knative", "tracking", "static")
FIRST_S = 60  # whose mean need is there at the beginning
SPARE = 0.1  # of a replica above the target: what nobody starts one for


class Cell(msgspec.Struct, frozen=True):
    """What is the same for all laws."""

    load: str
    start_s: float
    target_inputs: float = 8.4  # 70 % of `max_inputs`, which is Knative's target of it
    max_inputs: int = 12
    replicas_max: int = 30
    seed: int = 7

    def seeded(self, seed: int) -> Cell:
        return msgspec.structs.replace(self, seed=seed)


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """What one law came to in one cell."""

    law: str
    requests: int
    ttft_p50_s: float
    ttft_p99_s: float
    lost: int
    peak: float
    turns: float
    paid_s: float


def mean_of(runs: Sequence[Figures]) -> Figures:
    """Return the means over runs of one law, of which only the seed differs; what was lost, summed
    as the requests are."""
    count = len(runs)
    return Figures(
        law=runs[0].law,
        requests=sum(run.requests for run in runs),
        ttft_p50_s=sum(run.ttft_p50_s for run in runs) / count,
        ttft_p99_s=sum(run.ttft_p99_s for run in runs) / count,
        lost=sum(run.lost for run in runs),
        peak=sum(run.peak for run in runs) / count,
        turns=sum(run.turns for run in runs) / count,
        paid_s=sum(run.paid_s for run in runs) / count,
    )


def run_cell(cell: Cell, law: str) -> Figures:
    """Run a law. The same arguments give the same figures."""
    if law == "instant":
        return _instant(cell)[0]
    needed = _instant(cell)[1]
    plan: list[tuple[float, int]] = []
    if law == "oracle":
        plan = schedule(needed, cell.start_s)
    return _run(cell, law, _law(cell, law, needed, plan), _first(law, needed, plan))


def _first(law: str, needed: Sequence[int], plan: Sequence[tuple[float, int]]) -> int:
    """Return how many are there at the beginning, where everybody knows the base load."""
    if law == "static":
        return max(needed)
    if law == "oracle":
        return next((size for at_s, size in reversed(plan) if at_s <= 0.0), 1)
    return math.ceil(sum(needed[:FIRST_S]) / FIRST_S - SPARE)


def _law(cell: Cell, law: str, needed: Sequence[int], plan: list[tuple[float, int]]) -> Law:
    target, bounds = cell.target_inputs, (1, cell.replicas_max)
    if law == "oracle":
        return Planned(plan)
    if law == "knative":
        return Knative(target, *bounds)
    if law == "tracking":
        return Tracking(target, *bounds)
    if law == "static":
        return Static(max(needed))
    return Doherty(policy_of(cell))


def policy_of(cell: Cell) -> ScalingPolicy:
    return ScalingPolicy(
        min=1,
        max=cell.replicas_max,
        target_inputs=cell.target_inputs,
        max_inputs=cell.max_inputs,
    )


@lru_cache(maxsize=64)
def _instant(cell: Cell) -> tuple[Figures, tuple[int, ...]]:
    """Run with replicas that are there at once. Returns also what each second needs."""
    samples: list[float] = []
    carried = carried_by(LOADS[cell.load], cell.target_inputs, Speeds())
    figures = _run(
        msgspec.structs.replace(cell, start_s=0.0),
        "instant",
        Instant(carried),
        1,
        samples,
    )
    share = carried / cell.target_inputs
    return figures, tuple(needs(samples, carried, math.floor(cell.max_inputs * share), SPARE))


def _run(
    cell: Cell, name: str, law: Law, first: int, samples: list[float] | None = None
) -> Figures:
    speeds = Speeds()
    jobs = jobs_of(LOADS[cell.load], cell.target_inputs, speeds, cell.seed)
    until_s = LOADS[cell.load].span_s + AFTER_S
    world = World()
    pool = Pool(world, start_s=cell.start_s, max_inputs=cell.max_inputs, speeds=speeds)
    for _ in range(first):
        pool.open(0.0)
    govern(world, pool, law, until_s)
    if samples is not None:
        _sample(world, pool, samples, until_s)
    world.run([(job, pool) for job in jobs], until_s)
    pool.pay(max(until_s, world.now_s))
    return _figures(name, jobs, pool)


def _sample(world: World, pool: Pool, samples: list[float], until_s: float) -> None:
    """Write down each second's mean of what is there, looked at twenty times."""
    seen: list[int] = []

    def look(now_s: float) -> None:
        seen.append(sum(one.in_flight for one in (*pool.ready, *pool.leaving)) + len(pool.queue))
        if len(seen) == 20:
            samples.append(sum(seen) / 20)
            seen.clear()
        if now_s < until_s:
            world.at(now_s + 0.05, look)

    world.at(0.0, look)


def _figures(law: str, jobs: Sequence[Job], pool: Pool) -> Figures:
    waits = sorted(job.first_s - job.at_s for job in jobs if job.first_s < math.inf)
    return Figures(
        law=law,
        requests=len(jobs),
        ttft_p50_s=_quantile(waits, 0.50),
        ttft_p99_s=_quantile(waits, 0.99),
        lost=len(jobs) - len(waits),
        peak=pool.peak,
        turns=pool.turns,
        paid_s=pool.paid_s,
    )


def _quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0
