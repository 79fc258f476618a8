"""What the policy lab predicts for a cell, before it is looked at: its requests, times, pool, rule.

The engine of the lab is the measured profile of one card. One number is taken from the run itself:
the capacity, since the loads are relative to it and the card may be another: the lab's replicas are
as quick as makes them do as much in the same measurement. All else is foretold.
The lab has no intake (HTTP, tokenizer, hashing of a prompt); what the profile says of it is added
to each first token.

Queues are chaotic: a request that comes some milliseconds later may go elsewhere, and what follows
with it, which moves a median by a tenth. So each cell is run several times with arrivals that lie
up to JITTER_S apart, and all their requests together are the word.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

import msgspec
from typing_extensions import override

from loadtest.gpu.fleet.plan import NGINX
from loadtest.measure import quantile
from loadtest.policies.cells import Cell, chooser_of
from loadtest.policies.engines import Flight, Timing
from loadtest.policies.workload import Workload
from loadtest.policies.world import HELD, Chooser, Drive, Fleet, Stage

SPEC: Final = {
    "ours": "doherty",
    "ours_no_events": "doherty",  # in the lab neither hears any
    "ours_round_robin": "doherty:round_robin",
    "ours_least_load": "doherty:least_load",
    NGINX: "round_robin",
    "sglang_cache_aware": "sglang:0.3:64:1.5",  # its defaults
    "vllm_consistent_hash": "ring:0",  # of the session
}
DRAWS: Final = 8
JITTER_S: Final = 0.01  # what takes in a prompt takes 9 to 60 ms of it
AT_ONCE: Final = 24  # requests under way on each replica when capacity is measured
LINES_SHARE: Final = 2.0  # of the prompt tokens that could be computed, were none cached
FITS_MAX: Final = 8
FIT_WITHIN: Final = 0.002


class Speeds(msgspec.Struct, frozen=True, kw_only=True):
    """An engine as it was measured on one H200 with the 8 B shape (loadtest/results/speeds-*)."""

    timing: Timing
    intake_s: float
    intake_s_per_token: float


SPEEDS: Final = {
    "vllm": Speeds(
        timing=Timing(
            prefill_tokens_per_s=1 / 22.25e-6,
            prefill_s_per_token_squared=4.06e-10,
            step_base_s=(
                (1, 5.192e-3), (8, 5.41e-3), (32, 5.468e-3), (64, 5.735e-3),
            ),
            step_s_per_context_token=3.103e-8,
        ),
        intake_s=8.863e-3,
        intake_s_per_token=1.777e-6,
    ),
    "sglang": Speeds(
        timing=Timing(
            prefill_tokens_per_s=1 / 25.73e-6,
            prefill_s_per_token_squared=2.983e-10,
            step_base_s=(
                (1, 5.007e-3), (8, 5.332e-3), (32, 5.409e-3), (64, 7.078e-3),
            ),
            step_s_per_context_token=3.205e-8,
        ),
        intake_s=1.969e-3,
        intake_s_per_token=0.0,
    ),
}  # fmt: skip


def speeds_of(engine: str, factor: float, time_scale: float) -> Speeds:
    """Return the engine's speeds: prefill quicker by `factor`, and everything by `time_scale`."""
    known = quicker(
        SPEEDS[engine], prompts=factor * time_scale, steps=time_scale, contexts=time_scale
    )
    return msgspec.structs.replace(
        known,
        intake_s=known.intake_s / time_scale,
        intake_s_per_token=known.intake_s_per_token / time_scale,
    )


def quicker(speeds: Speeds, *, prompts: float, steps: float, contexts: float) -> Speeds:
    """Return speeds of an engine that computes prompts, and reads weights and contexts, faster."""
    known = speeds.timing
    timing = msgspec.structs.replace(
        known,
        prefill_tokens_per_s=known.prefill_tokens_per_s * prompts,
        prefill_s_per_token_squared=known.prefill_s_per_token_squared / prompts,
        step_base_s=tuple((count, base_s / steps) for count, base_s in known.step_base_s),
        step_s_per_context_token=known.step_s_per_context_token / contexts,
    )
    return msgspec.structs.replace(speeds, timing=timing)


class Foretold(msgspec.Struct, frozen=True, kw_only=True):
    """The lab's word for one cell."""

    ttft_p50_s: float
    ttft_p95_s: float
    ttft_p99_s: float
    tpot_p50_s: float
    tpot_p99_s: float
    answer_p50_s: float  # from sending it to the last token
    answer_p95_s: float
    hit: float


class Pool(msgspec.Struct, frozen=True, kw_only=True):
    """The replicas of the run."""

    replicas: int
    cache_tokens: int
    speeds: Speeds
    workers: int = 1


def foretell(workload: Workload, arm: str, scale: float, warm_s: float, pool: Pool) -> Foretold:
    """Return what the arm does with these requests at this compression of their times."""
    return figures_of(flights_of(workload, arm, scale, warm_s, pool), pool.speeds)


def flights_of(
    workload: Workload, arm: str, scale: float, warm_s: float, pool: Pool
) -> list[Flight]:
    """Return the requests that are measured, as they went in each draw."""
    proxies = pool.workers if arm == NGINX or SPEC[arm].startswith("doherty") else 1
    cell = Cell(
        replicas=pool.replicas,
        cache_tokens=pool.cache_tokens,
        proxies=proxies,
        sharing="none" if arm == NGINX else "all",  # each of its workers counts for itself
    )
    found: list[Flight] = []
    for seed in range(DRAWS):
        drive = Drive(scale=scale, proxies=proxies, seed=seed, jitter_s=JITTER_S)
        stage = _stage(workload, pool, drive)
        stage.run(chooser_of(SPEC[arm], stage, cell))
        found += (flight for flight in stage.flights if flight.job.at_s / scale >= warm_s)
    return found


def _stage(workload: Workload, pool: Pool, drive: Drive) -> Stage:
    fleet = Fleet(
        replicas=pool.replicas, capacity_tokens=pool.cache_tokens, timing=pool.speeds.timing
    )
    return Stage(workload, fleet, drive)


def figures_of(flights: Sequence[Flight], speeds: Speeds) -> Foretold:
    """Return the figures of requests, of one cell or of several."""
    intakes_s = [
        speeds.intake_s + speeds.intake_s_per_token * flight.job.prompt_tokens for flight in flights
    ]
    ttfts_s = [f.ttft_s + intake_s for f, intake_s in zip(flights, intakes_s, strict=True)]
    tpots_s = [
        (f.ended_s - f.first_s) / (f.job.output_tokens - 1)
        for f in flights
        if f.job.output_tokens > 1
    ]
    answers_s = [
        f.ended_s - f.arrived_s + intake_s for f, intake_s in zip(flights, intakes_s, strict=True)
    ]
    prompt_tokens = sum(f.job.prompt_tokens for f in flights)
    return Foretold(
        ttft_p50_s=_at(ttfts_s, 0.5),
        ttft_p95_s=_at(ttfts_s, 0.95),
        ttft_p99_s=_at(ttfts_s, 0.99),
        tpot_p50_s=_at(tpots_s, 0.5),
        tpot_p99_s=_at(tpots_s, 0.99),
        answer_p50_s=_at(answers_s, 0.5),
        answer_p95_s=_at(answers_s, 0.95),
        hit=sum(f.cached_tokens for f in flights) / max(1, prompt_tokens),
    )


def _at(values: Sequence[float], share: float) -> float:
    found = quantile(values, share)
    return math.nan if found is None else found


# --- capacity -------------------------------------------------------------------------------------


class Saturating(Chooser):
    """Has so many requests under way on each replica, whose line is every so manieth request."""

    holds = True

    def __init__(self, replicas: int) -> None:
        self._lines: list[deque[Flight]] = [deque() for _ in range(replicas)]
        self._under_way = [0] * replicas
        self._arrived = 0

    @override
    def choose(self, flight: Flight, now_s: float) -> int:
        self._lines[self._arrived % len(self._lines)].append(flight)
        self._arrived += 1
        return HELD

    @override
    def take(self, now_s: float) -> Iterable[tuple[Flight, int]]:
        for replica, line in enumerate(self._lines):
            while line and self._under_way[replica] < AT_ONCE:
                self._under_way[replica] += 1
                yield line.popleft(), replica

    @override
    def ended(self, flight: Flight, now_s: float) -> None:
        self._under_way[flight.replica] -= 1

    @override
    def sent(self, flight: Flight, now_s: float) -> None: ...

    @override
    def first_token(self, flight: Flight, now_s: float) -> None: ...

    @override
    def alive(self, count: int, now_s: float) -> None: ...


class Window(NamedTuple):
    """When a capacity is counted, seconds after the first request."""

    since_s: float
    until_s: float

    @property
    def seconds(self) -> float:
        return self.until_s - self.since_s


def uncached_rate(workload: Workload, pool: Pool, window: Window) -> float:
    """Return the uncached tokens a second that a replica of the lab does when it never rests.

    Measured as on the engines: the same requests, as many under way, counted when their prompts
    are done.
    """
    stage = _stage(_enough(workload, pool, window.until_s), pool, Drive(scale=math.inf))
    stage.run(Saturating(pool.replicas))
    work = sum(
        max(1, flight.job.prompt_tokens - flight.cached_tokens)
        for flight in stage.flights
        if window.since_s <= flight.first_s < window.until_s
    )
    return work / pool.replicas / window.seconds


def _enough(workload: Workload, pool: Pool, seconds: float) -> Workload:
    """Return the first requests that no replica can be done with in time."""
    most = pool.replicas * pool.speeds.timing.prefill_tokens_per_s
    wanted, sums = LINES_SHARE * most * seconds, 0
    for count, job in enumerate(workload.jobs, 1):
        sums += job.prompt_tokens
        if sums >= wanted:
            return Workload(workload.name, workload.jobs[:count], closed_loop=False)
    return Workload(workload.name, workload.jobs, closed_loop=False)


def as_quick(
    workload: Workload, pool: Pool, manners: str, time_scale: float, wanted: float, window: Window
) -> Pool:
    """Return the pool with prefill as quick as makes it do `wanted` uncached tokens a second."""
    factor = 1.0
    for _ in range(FITS_MAX):
        found = uncached_rate(workload, pool, window)
        if abs(found / wanted - 1) < FIT_WITHIN:
            break
        factor *= wanted / found
        pool = msgspec.structs.replace(pool, speeds=speeds_of(manners, factor, time_scale))
    return pool
