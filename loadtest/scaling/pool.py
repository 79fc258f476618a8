"""Many models on one pool of cards: what sharing saves, and whom it makes wait.

Each model has a request every few minutes and now and then a burst, uncorrelated with the others'.
On cards of its own it needs as many as its highest burst; on shared ones replicas of idle models
are suspended, all of them at the beginning, and cards given to whoever bursts. The project's own
control law, ladder and arbiter decide, in virtual time, on replicas that cost what vLLM's did on an
H200.

Besides the project's arbiter: `first come`, the same without anybody giving up what it still wants,
and `no ladder`, the project's where a replica that gives up its card has to start anew.

example:
  python -m loadtest pool
  python -m loadtest pool --cards 16,20,24 --models 20 --offline 2
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Iterator, Sequence
from typing import Final

import msgspec

from backends.arbiter import arbitrate
from backends.ladder import Ladder, Rung
from backends.planning.goal import WorkClass
from loadtest.scaling.replicas import Job
from loadtest.scaling.sharing import (
    RESTS,
    SPEEDS,
    TARGET_INPUTS,
    Backlog,
    Sharer,
    Sharing,
    first_come,
)
from loadtest.scaling.world import Pool, World

SUMMARY = "many models on one pool of cards: the peak-to-average gain, and the waits"
PROMPT_TOKENS: Final = 2_000
OUTPUT_TOKENS: Final = 600
SIGMA: Final = 0.6  # of the logarithm of both
QUIET_S: Final = (120.0, 600.0)  # between two requests, when there is no burst: a model has its own
BURSTS: Final = (1.0, 2.0, 3.0, 4.0)  # replicas
BURST_S: Final = (60.0, 240.0)
SPARE: Final = 1  # replicas that a pool may have beyond what its highest burst comes to
GAP_S: Final = 900.0  # mean, between the bursts of one model
SHARES: Final = (0.75, 0.65, 0.55, 0.45)  # of the cards that each for itself would need
ARRANGEMENTS: Final = ("ours", "first come", "no ladder")


class Model(msgspec.Struct, frozen=True):
    """What one model is asked: bursts are (from, until, replicas)."""

    name: str
    work_class: WorkClass
    base: float
    bursts: tuple[tuple[float, float, float], ...]

    def level(self, at_s: float) -> float:
        """Return how many replicas the load comes to at their target."""
        return max([self.base, *(size for a, b, size in self.bursts if a <= at_s < b)])

    @property
    def peak(self) -> int:
        return math.ceil(max([self.base, *(size for _, _, size in self.bursts)]))


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """What is the same for all arrangements."""

    models: int = 20
    offline: int = 0
    span_s: float = 1200.0
    seed: int = 7


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """What one arrangement came to."""

    name: str
    cards: int
    requests: int
    ttft_p50_s: float
    ttft_p99_s: float
    online_p99_s: float  # of the online models alone
    worst_p99_s: float  # of the model that is served worst
    longest_s: float
    lost: int
    unserved_s: float  # the longest that a model wanted a replica and had none
    fairness: float
    moves_per_min: float
    used: float  # share of the cards' time that replicas serve in
    offline_tokens: int = 0
    offline_taken: int = 0


def add_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--models", type=int, default=20, help="that burst (default 20)")
    add("--offline", type=int, default=2, help="models of offline work beside them (default 2)")
    add("--cards", type=_counts, default=(), help="cards to share; default: some shares of the sum")
    add("--minutes", type=float, default=20.0, help="of load (default 20)")
    add("--seed", type=int, default=7)


def run(args: argparse.Namespace) -> int:
    case = Case(models=args.models, span_s=60.0 * args.minutes, seed=args.seed)
    models = models_of(case)
    peaks = sum(model.peak for model in models)
    cards = args.cards or tuple(max(1, round(peaks * share)) for share in SHARES)
    print("\n".join(_about(case, models)))
    print(_line(HEADINGS))
    print(_line(_row(run_own(case))))
    for count in cards:
        for arrangement in ARRANGEMENTS:
            print(_line(_row(run_shared(case, arrangement, count))), flush=True)
    beside = msgspec.structs.replace(case, offline=args.offline)
    if beside.offline:
        print(f"\nwith {beside.offline} models of offline work beside them, on what is left")
        print(_line(HEADINGS))
        for count in cards:
            figures = run_shared(beside, "ours", count)
            print(_line(_row(figures)), flush=True)
            rate = figures.offline_tokens / case.span_s
            print(f"    offline: {rate:,.0f} tokens/s, gave way {figures.offline_taken} times")
    return 0


# --- loads --------------------------------------------------------------------------------------


def models_of(case: Case) -> tuple[Model, ...]:
    """Return the models that burst: every fifth of them is semi-online."""
    chance = random.Random(case.seed)
    return tuple(_model(f"m{n:02}", n, case.span_s, chance) for n in range(case.models))


def _model(name: str, number: int, span_s: float, chance: random.Random) -> Model:
    unit = SPEEDS.rate_at(TARGET_INPUTS, PROMPT_TOKENS, OUTPUT_TOKENS)
    base = 1 / (unit * chance.uniform(*QUIET_S))
    bursts = []
    at_s = chance.expovariate(1 / GAP_S)
    while at_s < span_s:
        end_s = min(span_s, at_s + chance.uniform(*BURST_S))
        bursts.append((at_s, end_s, chance.choice(BURSTS)))
        at_s = end_s + chance.expovariate(1 / GAP_S)
    work_class: WorkClass = "semi-online" if number % 5 == 4 else "online"
    return Model(name, work_class, base, tuple(bursts))


def jobs_of(model: Model, case: Case) -> Iterator[Job]:
    """Yield a model's requests in the order of arrival: Poisson, at a rate that holds a second."""
    chance = random.Random(f"{case.seed} {model.name}")
    unit = SPEEDS.rate_at(TARGET_INPUTS, PROMPT_TOKENS, OUTPUT_TOKENS)
    for second in range(int(case.span_s)):
        rate = unit * model.level(second)
        at_s = second + chance.expovariate(rate)
        while at_s < second + 1:
            yield Job(at_s, _size(chance, PROMPT_TOKENS), _size(chance, OUTPUT_TOKENS))
            at_s += chance.expovariate(rate)


def _size(chance: random.Random, mean: float) -> int:
    return max(1, round(chance.lognormvariate(math.log(mean) - SIGMA * SIGMA / 2, SIGMA)))


# --- arrangements -------------------------------------------------------------------------------


def run_own(case: Case) -> Figures:
    """Run every model on cards of its own, as many as its highest burst needs, always awake."""
    models = models_of(case)
    world = World()
    pools: list[Pool] = []
    for model in models:
        pool = Pool(world, start_s=0.0, max_inputs=12, speeds=SPEEDS)
        for _ in range(model.peak):
            pool.open(0.0)
        pools.append(pool)
    jobs = _serve(world, models, pools, case)
    peaks = sum(model.peak for model in models)
    mean = sum(m.level(s) for m in models for s in range(int(case.span_s))) / case.span_s
    return _figures("own peaks", peaks, models, jobs, used=mean / peaks)


def run_shared(case: Case, arrangement: str, cards: int) -> Figures:
    """Run all models on shared cards. The same arguments give the same figures."""
    models = models_of(case)
    world, ladder = World(), Ladder()
    allowed = frozenset({Rung.ASLEEP} if arrangement == "no ladder" else RESTS)
    pools = [
        Sharer(
            world,
            model.name,
            model.work_class,
            ladder,
            allowed=allowed,
            replicas_max=model.peak + SPARE,
        )
        for model in models
    ]
    sizes = (PROMPT_TOKENS, OUTPUT_TOKENS)
    backlogs = [Backlog(world, f"off{n}", ladder, sizes, case.span_s) for n in range(case.offline)]
    arbiter = first_come if arrangement == "first come" else arbitrate
    sharing = Sharing(world, [*pools, *backlogs], cards, arbiter)
    if arrangement != "no ladder":
        for pool in pools:
            pool.suspend_all()
    sharing.govern(case.span_s + 60.0)
    jobs = _serve(world, models, pools, case)
    return _figures(
        arrangement,
        cards,
        models,
        jobs,
        unserved_s=max(sharing.unserved_max_s[model.name] for model in models),
        fairness=_fairness([p.had_s / p.wanted_s for p in pools if p.wanted_s]),
        moves_per_min=60 * sum(sharing.moves.values()) / case.span_s,
        used=sharing.awake_s / (cards * (case.span_s + 60.0)),
        offline_tokens=sum(backlog.done_total for backlog in backlogs) * OUTPUT_TOKENS,
        offline_taken=sharing.offline_taken,
    )


def _serve(
    world: World, models: Sequence[Model], pools: Sequence[Pool], case: Case
) -> list[list[Job]]:
    """Run it all; return the requests of each model."""
    jobs = [list(jobs_of(model, case)) for model in models]
    arrivals = [(job, pool) for pool, mine in zip(pools, jobs, strict=True) for job in mine]
    world.run(sorted(arrivals, key=lambda one: one[0].at_s), case.span_s + 60.0)
    return jobs


def _figures(
    name: str,
    cards: int,
    models: Sequence[Model],
    jobs: Sequence[Sequence[Job]],
    *,
    used: float,
    unserved_s: float = 0.0,
    fairness: float = 1.0,
    moves_per_min: float = 0.0,
    offline_tokens: int = 0,
    offline_taken: int = 0,
) -> Figures:
    waits = [sorted(j.first_s - j.at_s for j in mine if j.first_s < math.inf) for mine in jobs]
    every = sorted(wait for mine in waits for wait in mine)
    online = sorted(
        wait
        for model, mine in zip(models, waits, strict=True)
        for wait in mine
        if model.work_class == "online"
    )
    return Figures(
        name=name,
        cards=cards,
        requests=sum(len(mine) for mine in jobs),
        ttft_p50_s=_quantile(every, 0.50),
        ttft_p99_s=_quantile(every, 0.99),
        online_p99_s=_quantile(online, 0.99),
        worst_p99_s=max(_quantile(mine, 0.99) for mine in waits),
        longest_s=max(every, default=0.0),
        lost=sum(job.first_s == math.inf for mine in jobs for job in mine),
        unserved_s=unserved_s,
        fairness=fairness,
        moves_per_min=moves_per_min,
        used=used,
        offline_tokens=offline_tokens,
        offline_taken=offline_taken,
    )


def _quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def _fairness(shares: Sequence[float]) -> float:
    """Return Jain's index: 1 where all got the same share of what they wanted."""
    squares = sum(share * share for share in shares)
    return sum(shares) ** 2 / (len(shares) * squares) if squares else 1.0


# --- what is said of it -------------------------------------------------------------------------

HEADINGS: Final = (
    *("arrangement", "cards", "TTFT p50", "p99", "online p99", "worst model", "longest", "lost"),
    *("without any", "fairness", "moves/min", "used"),
)


def _about(case: Case, models: Sequence[Model]) -> Iterator[str]:
    peaks = sum(model.peak for model in models)
    sums = [sum(model.level(s) for model in models) for s in range(int(case.span_s))]
    mean = sum(sums) / len(sums)
    yield f"{len(models)} models, {case.span_s / 60:g} minutes, seed {case.seed}"
    yield (
        f"load in replicas: {mean:.1f} on average, {max(sums):.1f} at the highest, "
        f"{peaks} cards when each model has its own for its highest burst"
    )
    yield f"peak to average: {peaks / mean:.1f} each for itself, {max(sums) / mean:.1f} together"


def _row(figures: Figures) -> tuple[str, ...]:
    return (
        figures.name,
        str(figures.cards),
        f"{figures.ttft_p50_s:.2f} s",
        f"{figures.ttft_p99_s:.2f} s",
        f"{figures.online_p99_s:.2f} s",
        f"{figures.worst_p99_s:.1f} s",
        f"{figures.longest_s:.0f} s",
        str(figures.lost),
        f"{figures.unserved_s:.0f} s",
        f"{figures.fairness:.3f}",
        f"{figures.moves_per_min:.1f}",
        f"{figures.used:.0%}",
    )


def _line(cells: Sequence[str]) -> str:
    return f"{cells[0]:<12}" + "".join(f"{cell:>12}" for cell in cells[1:])


def _counts(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))
