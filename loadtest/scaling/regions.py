"""Three regions whose days are shifted: one system that shares, against three islands.

Each region plays the same load, a third of its length later than the one before: a day's wave (an
hour long, so that a start weighs as much as it does in practice during a burst), and the 29 minutes
of a public code assistant, with two users for each of its own. The project's own control law
(`backends.scaling`) and its own sharing of demand (`backends.spread`) decide, in virtual time.

`islands`: every region serves what comes to it. `requests`: those that would wait go where they
begin at once, if that is sooner by more than the round trip; each manager scales by what is served
in its region. `demand`: the same, and what a region is short of is started where it comes up
soonest. The rule by which requests go is that of `proxy.core.regions`, on summaries of the age that
they have there: at home unless that costs more than the round trip and a slack, only to a region
where nobody waits, only as many as it says it would begin at once, one hop.

`cards` are replicas that a region can have at most: `ample` is more than anybody asks for, `scarce`
the mean over the day of what the region needs, and a fifth more.

example:
  python -m loadtest regions-day
  python -m loadtest regions-day --loads day --starts 15 --seeds 7,8,9
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product

import msgspec

from backends.scaling import Scaler
from loadtest.formats import read_trace
from loadtest.scaling.cells import FIRST_S, Cell, policy_of
from loadtest.scaling.judge import aligned
from loadtest.scaling.loads import LOADS, OUTPUT_TOKENS, PROMPT_TOKENS, jobs_of
from loadtest.scaling.region_world import DemandBetween, Land, Region, Traveller
from loadtest.scaling.replicas import Job, Speeds
from loadtest.scaling.world import AFTER_S, World

SUMMARY = "three regions in different hours of the day: one system against three islands"
REGIONS = ("eu", "us", "ap")
ROUND_TRIPS_S = {("eu", "us"): 0.080, ("ap", "eu"): 0.160, ("ap", "us"): 0.005}
ARRANGEMENTS = ("islands", "requests", "demand")
USERS = 2  # for each of the trace's
SPREAD_S = 0.5  # within which theirs come
CARDS = ("ample", "scarce")
SCARCE = 1.2  # of the mean need


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """What is the same for all arrangements."""

    load: str
    starts_s: tuple[float, ...]  # in each region
    cards: str
    seed: int = 7


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """What one arrangement came to, over all regions."""

    requests: int
    ttft_p50_s: float
    ttft_p99_s: float
    longest_s: float
    lost: int
    paid_s: float
    peak: int  # replicas of all regions together
    away: float  # share of the requests that another region served
    asked: float  # replica-seconds that regions asked of each other


def add_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add(
        "--loads",
        type=partial(_names, known=tuple(LOADS)),
        default="day,azure",
        metavar="NAMES",
        help=f"of {','.join(LOADS)} (day,azure)",
    )
    add(
        "--starts",
        type=_starts,
        default="2,15,60,60/2/15",
        metavar="S",
        help="seconds that a start takes, or those of each region (2,15,60,60/2/15)",
    )
    add(
        "--cards",
        type=partial(_names, known=CARDS),
        default="ample,scarce",
        metavar="NAMES",
        help="of ample,scarce (both)",
    )
    add("--seeds", type=_seeds, default="7,8,9", metavar="N", help="figures are means (7,8,9)")


def run(args: argparse.Namespace) -> int:
    print(f"round trips: {_distances()}; seeds {args.seeds}", end="\n\n")
    for load, cards, starts_s in product(args.loads, args.cards, args.starts):
        cases = [Case(load=load, starts_s=starts_s, cards=cards, seed=seed) for seed in args.seeds]
        found = {name: mean_of([run_case(c, name) for c in cases]) for name in ARRANGEMENTS}
        print(table(cases[0], found), end="\n\n", flush=True)
    return 0


def _names(text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    names = tuple(text.split(","))
    unknown = [name for name in names if name not in known]
    if unknown:
        raise argparse.ArgumentTypeError(f"no {unknown[0]!r}; there are {', '.join(known)}")
    return names


def _starts(text: str) -> tuple[tuple[float, ...], ...]:
    found = []
    for words in text.split(","):
        try:
            starts = tuple(float(word) for word in words.split("/"))
        except ValueError:
            starts = ()
        starts = starts * len(REGIONS) if len(starts) == 1 else starts
        if len(starts) != len(REGIONS) or not all(0 < start_s <= 600 for start_s in starts):
            raise argparse.ArgumentTypeError(
                f"{words!r} is not a number of seconds such as 15, or three such as 60/2/15"
            )
        found.append(starts)
    return tuple(found)


def _seeds(text: str) -> tuple[int, ...]:
    words = text.split(",")
    if not all(word.isdecimal() for word in words):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 7,8,9")
    return tuple(int(word) for word in words)


def _distances() -> str:
    return ", ".join(f"{a}-{b} {1e3 * s:.0f} ms" for (a, b), s in ROUND_TRIPS_S.items())


# --- one case ----------------------------------------------------------------------------------


def run_case(case: Case, arrangement: str) -> Figures:
    """Run an arrangement. The same arguments give the same figures."""
    cell = Cell(case.load, max(case.starts_s), seed=case.seed)
    jobs, span_s = jobs_of_region(case.load, cell)
    mean = mean_need(jobs, span_s, cell)
    most = max(2, math.ceil(SCARCE * mean)) if case.cards == "scarce" else cell.replicas_max
    policy = msgspec.structs.replace(policy_of(cell), max=most)
    world, until_s = World(), span_s + AFTER_S
    land = Land(world, round_trip_s, moves=arrangement != "islands")
    scalers = {}
    for name, start_s in zip(REGIONS, case.starts_s, strict=True):
        region = Region(land, name, start_s=start_s, max_inputs=cell.max_inputs)
        scalers[name] = Scaler(policy)
        land.add(region, most, cell.target_inputs)
    travellers = [
        (Traveller(job, name), land.regions[name])
        for number, name in enumerate(REGIONS)
        for job in shifted(jobs, number * span_s / len(REGIONS), span_s)
    ]
    travellers.sort(key=lambda pair: pair[0].at_s)
    for region in land.regions.values():
        theirs = [job for job, home in travellers if home is region and job.at_s < FIRST_S]
        for _ in range(max(1, math.ceil(mean_need(theirs, FIRST_S, cell) - 0.1))):
            region.open(0.0)
    between = DemandBetween(land, scalers, shares=arrangement == "demand")
    between.govern(until_s)
    if land.moves:
        land.tell(until_s)
    world.run(travellers, until_s)
    for region in land.regions.values():
        region.pay(max(until_s, world.now_s))
    return _figures([job for job, _ in travellers], land, between)


def round_trip_s(one: str, other: str) -> float:
    return ROUND_TRIPS_S[min(one, other), max(one, other)]


def jobs_of_region(load: str, cell: Cell) -> tuple[list[Job], float]:
    """Return what one region is asked, and how long its day is."""
    if load != "azure":
        return jobs_of(LOADS[load], cell.target_inputs, Speeds(), cell.seed), LOADS[load].span_s
    chance = random.Random(cell.seed)
    trace = read_trace("azure_code").arrivals
    jobs = [
        Job(
            max(0.0, a.at_s - trace[0].at_s + chance.uniform(-SPREAD_S, SPREAD_S)),
            a.input_tokens,
            max(1, a.output_tokens),
        )
        for a in trace
        for _ in range(USERS)
    ]
    return sorted(jobs, key=lambda job: job.at_s), LOADS["azure"].span_s


def shifted(jobs: Sequence[Job], by_s: float, span_s: float) -> Iterator[Job]:
    """Yield the same requests so much later in the day, the last ones at its beginning."""
    for job in jobs:
        yield Job((job.at_s + by_s) % span_s, job.prompt_tokens, job.output_tokens)


def mean_need(jobs: Sequence[Job], span_s: float, cell: Cell) -> float:
    """Return how many replicas the load comes to in the mean, each at its target."""
    speeds, count = Speeds(), max(1, len(jobs))
    prompt = sum(job.prompt_tokens for job in jobs) / count or PROMPT_TOKENS
    output = sum(job.output_tokens for job in jobs) / count or OUTPUT_TOKENS
    return len(jobs) / span_s / speeds.rate_at(cell.target_inputs, prompt, output)


# --- what it came to ---------------------------------------------------------------------------


def _figures(jobs: Sequence[Traveller], land: Land, between: DemandBetween) -> Figures:
    waits = sorted(j.first_s + j.round_trip_s - j.at_s for j in jobs if j.first_s < math.inf)
    away = sum(job.round_trip_s > 0.0 for job in jobs)
    return Figures(
        requests=len(jobs),
        ttft_p50_s=waits[len(waits) // 2],
        ttft_p99_s=waits[min(len(waits) - 1, int(0.99 * len(waits)))],
        longest_s=waits[-1],
        lost=len(jobs) - len(waits),
        paid_s=sum(region.paid_s for region in land.regions.values()),
        peak=between.peak,
        away=away / len(jobs),
        asked=between.asked_s,
    )


def mean_of(runs: Sequence[Figures]) -> Figures:
    """Return the means over seeds; what was lost, summed as the requests are."""
    count = len(runs)

    def mean(of: Callable[[Figures], float]) -> float:
        return sum(of(one) for one in runs) / count

    return Figures(
        requests=sum(one.requests for one in runs),
        ttft_p50_s=mean(lambda one: one.ttft_p50_s),
        ttft_p99_s=mean(lambda one: one.ttft_p99_s),
        longest_s=max(one.longest_s for one in runs),
        lost=sum(one.lost for one in runs),
        paid_s=mean(lambda one: one.paid_s),
        peak=max(one.peak for one in runs),
        away=mean(lambda one: one.away),
        asked=mean(lambda one: one.asked),
    )


def table(case: Case, found: dict[str, Figures]) -> str:
    """Return the figures of one case, an arrangement a line."""
    islands = found["islands"]
    rows = [("", "TTFT p50", "p99", "of islands", "longest", "lost", "replica-s", "of islands",
             "peak", "away", "asked, replica-s")]  # fmt: skip
    for name, one in found.items():
        rows.append(
            (
                name,
                f"{one.ttft_p50_s:.3f}",
                f"{one.ttft_p99_s:.3f}",
                f"{one.ttft_p99_s / islands.ttft_p99_s:.2f}",
                f"{one.longest_s:.1f}",
                f"{one.lost}",
                f"{one.paid_s:.0f}",
                f"{one.paid_s / islands.paid_s:.2f}",
                f"{one.peak}",
                f"{one.away:.1%}",
                f"{one.asked:.0f}",
            )
        )
    starts = "/".join(f"{start_s:g}" for start_s in dict.fromkeys(case.starts_s))
    title = f"{case.load}, cards {case.cards}, start {starts} s: {islands.requests:,}"
    return f"{title} requests\n{aligned(rows)}"
