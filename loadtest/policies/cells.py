"""One cell of an experiment: a workload, a fleet, a load; and the figures of one policy in it.

*Load* is the utilisation that round robin would have, reached by compressing time. In the serial
model that is its uncached tokens over the fleet's prefill rate. In the mixed one there is more that
takes time, so what the fleet can do under round robin is measured: the rate at which it works off
everything at once. Agents come in a closed loop, where the number of users is the load.

Figures leave the first tenth out. *Excess* is the time to first token beyond what an idle replica
with one endless cache would have taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import msgspec

from loadtest.formats import read_trace
from loadtest.measure import quantile
from loadtest.policies import ours, rivals
from loadtest.policies.caches import Caches
from loadtest.policies.engines import Flight, Timing
from loadtest.policies.router import Rival
from loadtest.policies.synthetic import SYNTHETIC
from loadtest.policies.workload import BLOCK_TOKENS, Job, Picked, Workload, from_trace
from loadtest.policies.world import Chooser, Drive, Fleet, Stage

GOODPUT_STEPS = 7
GOODPUT_MOST = 2.5  # times the load of the cell
BURST_SHARES = (0.4, 0.7)  # which requests come faster
_USUAL = Timing()


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """Where the requests come from: a trace, or a name in `SYNTHETIC`."""

    name: str = "conversation"
    picked: Picked = Picked()


class Burst(msgspec.Struct, frozen=True, kw_only=True):
    """Arrivals come `factor` times faster for a while; the other replicas are `cold_s` away."""

    factor: float
    cold_s: float
    before: int  # replicas until then; the load is theirs


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    source: Source = Source()
    replicas: int = 8
    cache_tokens: int = 1_000_000
    load: float = 0.75
    model: str = "mixed"
    proxies: int = 1
    sharing: str = "all"
    note_delay_s: float = 0.005
    scrape_s: float = 1.0  # between two readings of the engines' gauges; 0: never
    believed: float = 1.0
    slow: float = 1.0
    burst: Burst | None = None
    after: int = 0  # requests left out; 0: a tenth
    points: str = "chain"
    seed: int = 7


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """What one policy did in one cell."""

    policy: str
    requests: int
    hit: float
    hit_bound: float  # of one endless cache
    later_hit: float  # of requests that have an earlier one in their session
    ttft_mean_s: float
    ttft_p50_s: float
    ttft_p95_s: float
    ttft_p99_s: float
    excess_p95_s: float
    excess_p99_s: float
    tpot_p50_s: float
    tpot_p99_s: float
    work_max_over_mean: float
    utilisation: float  # prefill seconds over all seconds
    rate: float  # requests a second
    scale: float  # time was compressed by so much
    decision_us: float
    held_max: int


@lru_cache(maxsize=8)
def workload_of(source: Source) -> Workload:
    """Return the workload. Raises `TraceError`."""
    made = SYNTHETIC.get(source.name)
    if made is not None:
        return made(source.picked.limit or 6000, source.picked.seed)
    return from_trace(read_trace(source.name), source.picked)


@lru_cache(maxsize=16)
def _prepared(source: Source, cache_tokens: int, model: str) -> Workload:
    workload = workload_of(source)
    return workload if model == "serial" else workload.fitting(cache_tokens)


@lru_cache(maxsize=32)
def _in_burst(cell: Cell) -> Workload:
    """Return the workload with its middle part faster."""
    assert cell.burst is not None
    workload = _prepared(cell.source, cell.cache_tokens, cell.model)
    first, last = (int(share * len(workload.jobs)) for share in BURST_SHARES)
    begin_s, end_s = workload.jobs[first].at_s, workload.jobs[last].at_s
    jobs = []
    for job in workload.jobs:
        moved = Job(
            job.index, job.session, job.blocks, tokens=(job.prompt_tokens, job.output_tokens)
        )
        moved.head_blocks, moved.earlier, moved.opener = job.head_blocks, job.earlier, job.opener
        inside_s = min(max(0.0, job.at_s - begin_s), end_s - begin_s)
        moved.at_s = job.at_s - inside_s * (1 - 1 / cell.burst.factor)
        jobs.append(moved)
    return Workload(workload.name, jobs, closed_loop=False)


def chooser_of(policy: str, stage: Stage, cell: Cell) -> Chooser:
    shared = cell.sharing == "all"
    if ours.is_ours(policy):
        delay_s = cell.note_delay_s if shared else None
        return ours.Ours(
            stage,
            policy,
            believed=cell.believed,
            delay_s=delay_s,
            scrape_s=cell.scrape_s,
            points=cell.points,
        )
    return Rival(stage, rivals.rule_of(policy), shared=shared, believed=cell.believed)


def check_policy(policy: str) -> None:
    """Raise `ValueError` for a name that nobody has."""
    if ours.is_ours(policy):
        ours.check(policy)
    else:
        rivals.rule_of(policy)


# --- load ---------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def full_rate(source: Source, cache_tokens: int, model: str, replicas: int) -> float:
    """Return requests a second at which round robin would have all replicas busy."""
    workload = _prepared(source, cache_tokens, model)
    fleet = Fleet(replicas=replicas, capacity_tokens=cache_tokens, model=model)
    if model == "serial":
        tokens = _round_robin_tokens(workload, replicas, cache_tokens)
        return replicas * fleet.timing.prefill_tokens_per_s / tokens
    # Everything at once: each replica is busy until its own share is done.
    stage = Stage(workload, fleet, Drive(scale=math.inf))
    stage.run(Rival(stage, rivals.round_robin(), shared=True))
    busy_s = sum(engine.busy_s for engine in stage.engines)
    return replicas * len(workload.jobs) / busy_s


def _round_robin_tokens(workload: Workload, replicas: int, cache_tokens: int) -> float:
    """Return the mean of uncached tokens under round robin, after warm-up."""
    caches = Caches(replicas, cache_tokens // BLOCK_TOKENS)
    tokens = count = 0
    for place, job in enumerate(workload.jobs):
        replica = place % replicas
        depth = caches.depth(replica, job.blocks)
        caches.insert(replica, job.blocks)
        if place >= len(workload.jobs) // 10:
            tokens += max(1, job.prompt_tokens - depth * BLOCK_TOKENS)
            count += 1
    return tokens / count


def scale_of(cell: Cell) -> float:
    """Return by how much time is compressed to reach the cell's load."""
    workload = _prepared(cell.source, cell.cache_tokens, cell.model)
    if workload.closed_loop:
        return 1.0
    replicas = cell.burst.before if cell.burst else cell.replicas
    most = full_rate(cell.source, cell.cache_tokens, cell.model, replicas)
    return cell.load * most / (len(workload.jobs) / workload.span_s)


# --- one run ------------------------------------------------------------------------------------


def run_cell(cell: Cell, policy: str) -> Figures:
    """Return the figures of a policy."""
    scale = scale_of(cell)
    if cell.burst is None:
        stage = _stage(
            cell,
            _prepared(cell.source, cell.cache_tokens, cell.model),
            Drive(scale=scale, proxies=cell.proxies, seed=cell.seed),
        )
        first = cell.after or len(stage.workload.jobs) // 10
        last = len(stage.workload.jobs)
    else:
        workload = _in_burst(cell)
        first, last = (int(share * len(workload.jobs)) for share in BURST_SHARES)
        ready_s = workload.jobs[first].at_s / scale + cell.burst.cold_s
        plan = ((0.0, cell.burst.before), (ready_s, cell.replicas))
        stage = _stage(
            cell, workload, Drive(scale=scale, proxies=cell.proxies, seed=cell.seed, plan=plan)
        )
    stage.run(chooser_of(policy, stage, cell))
    return _figures(policy, stage, first, last)


def run_workload(
    workload: Workload, cell: Cell, policy: str, *, scale: float, timing: Timing
) -> Figures:
    """Return the figures of a policy on requests and engines that are no cell's own."""
    drive = Drive(scale=scale, proxies=cell.proxies, seed=cell.seed)
    stage = _stage(cell, workload, drive, timing)
    stage.run(chooser_of(policy, stage, cell))
    return _figures(policy, stage, len(workload.jobs) // 10, len(workload.jobs))


def _stage(cell: Cell, workload: Workload, drive: Drive, timing: Timing = _USUAL) -> Stage:
    fleet = Fleet(
        timing=timing,
        replicas=cell.replicas,
        capacity_tokens=cell.cache_tokens,
        model=cell.model,
        slow=cell.slow,
    )
    return Stage(workload, fleet, drive)


def _figures(policy: str, stage: Stage, first: int, last: int) -> Figures:
    flights = sorted(stage.flights, key=lambda flight: flight.arrived_s)
    measured = flights[first:last]
    ideal_tokens, rate = stage.workload.ideal_tokens, stage.fleet.timing.prefill_tokens_per_s
    ttfts_s = [flight.ttft_s for flight in measured]
    excess_s = [f.ttft_s - ideal_tokens[f.job.index] / rate for f in measured]
    tpots_s = [
        (f.ended_s - f.first_s) / (f.job.output_tokens - 1)
        for f in measured
        if f.job.output_tokens > 1
    ]
    work_s = [engine.work_s for engine in stage.engines]
    span_s = flights[-1].arrived_s - flights[0].arrived_s
    return Figures(
        policy=policy,
        requests=len(measured),
        hit=_hit(measured),
        hit_bound=stage.workload.ideal_hit,
        later_hit=_hit([flight for flight in measured if flight.job.earlier]),
        ttft_mean_s=sum(ttfts_s) / max(1, len(ttfts_s)),
        ttft_p50_s=_at(ttfts_s, 0.5),
        ttft_p95_s=_at(ttfts_s, 0.95),
        ttft_p99_s=_at(ttfts_s, 0.99),
        excess_p95_s=_at(excess_s, 0.95),
        excess_p99_s=_at(excess_s, 0.99),
        tpot_p50_s=_at(tpots_s, 0.5),
        tpot_p99_s=_at(tpots_s, 0.99),
        work_max_over_mean=max(work_s) * len(work_s) / max(1e-9, sum(work_s)),
        utilisation=sum(work_s) / len(work_s) / max(1e-9, span_s),
        rate=len(flights) / max(1e-9, span_s),
        scale=stage.drive.scale,
        decision_us=stage.deciding_ns / max(1, stage.decisions) / 1000,
        held_max=stage.peak_held,
    )


def _at(values: Sequence[float], share: float) -> float:
    found = quantile(values, share)
    return math.nan if found is None else found


def _hit(flights: Sequence[Flight]) -> float:
    tokens = sum(flight.job.prompt_tokens for flight in flights)
    return sum(flight.cached_tokens for flight in flights) / max(1, tokens)


def goodput(cell: Cell, policy: str, ttft_s_max: float) -> float:
    """Return the greatest rate, in requests a second, at which 95 % start within `ttft_s_max`."""
    workload = _prepared(cell.source, cell.cache_tokens, cell.model)
    scale = scale_of(cell)
    low, high = 0.0, GOODPUT_MOST * scale
    for _ in range(GOODPUT_STEPS):
        middle = (low + high) / 2
        drive = Drive(scale=middle, proxies=cell.proxies, seed=cell.seed, late_s_max=ttft_s_max)
        stage = _stage(cell, workload, drive)
        if stage.run(chooser_of(policy, stage, cell)):
            low = middle
        else:
            high = middle
    return low * len(workload.jobs) / workload.span_s
