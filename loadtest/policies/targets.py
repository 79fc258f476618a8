"""The cells behind the targets, and what was reached in them.

Each target asks for some runs and makes one figure of them, most as a ratio to another policy or
to another cell: absolute times are the model's, ratios are the policy's. Which traces take part in
what follows from what they are: in an open loop with something to reuse (a chat service), in a
closed loop (agents), in an open loop with nothing to reuse.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import msgspec
from typing_extensions import override

from loadtest.policies import decisions, rivals
from loadtest.policies.cells import Burst, Cell, Figures, Source, workload_of
from loadtest.policies.runner import Result, Task, in_words, label, run_tasks
from loadtest.policies.tables import aligned
from loadtest.policies.workload import Picked

OURS: Final = "doherty"
LOADS: Final = (0.5, 0.75, 0.9)
FLEETS: Final = (4, 8, 16, 32)
CACHES: Final = (100_000, 300_000, 1_000_000)
BLIND: Final = ("round_robin", "least_requests", "least_tokens", "power_of_two")
NOTHING_SHARED_MAX: Final = 0.01  # hit rate of any cache
HIGH: Final = (0.75, 0.9)
CALM: Final = 0.6  # where something goes wrong: the fleet could carry it
BELIEF_AFTER: Final = 2000
SYNTHETIC_REQUESTS: Final = 6000
GOODPUT_TTFT_S: Final = 2.0
AGENT_CACHES: Final = (300_000, 1_000_000)

Results = dict[Task, Result]
Pair = tuple[Task, Task | None]


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """One target: the figure, its bound, and where it was worst."""

    name: str
    figure: float
    bound: float
    at_least: bool  # the figure must not be below the bound; else not above
    where: str

    @property
    def kept(self) -> bool:
        return self.figure >= self.bound if self.at_least else self.figure <= self.bound


class Target(abc.ABC):
    """What is to be reached, and the runs that show it."""

    @abc.abstractmethod
    def tasks(self) -> Iterator[Task]:
        """Yield the runs that are needed."""

    @abc.abstractmethod
    def verdict(self, results: Results) -> Verdict:
        """Return what they show."""


class Ratio(Target):
    """A figure of one run over that of another (or by itself), at its worst over some pairs."""

    def __init__(
        self,
        name: str,
        figure: Callable[[Figures], float],
        pairs: Sequence[Pair],
        bound: float,
        *,
        at_least: bool = False,
    ) -> None:
        self._name = name
        self._figure = figure
        self._pairs = pairs
        self._bound = bound
        self._at_least = at_least

    @override
    def tasks(self) -> Iterator[Task]:
        for pair in self._pairs:
            yield from (task for task in pair if task is not None)

    @override
    def verdict(self, results: Results) -> Verdict:
        found: list[tuple[float, str]] = []
        for task, base in self._pairs:
            value = self._value(results, task)
            if base is not None:
                value = _over(value, self._value(results, base))
            found.append((value, label(task.cell) + self._oracle_too(results, task, base)))
        figure, where = min(found) if self._at_least else max(found)
        return Verdict(
            name=self._name, figure=figure, bound=self._bound, at_least=self._at_least, where=where
        )

    def _oracle_too(self, results: Results, task: Task, base: Task | None) -> str:
        """Return what the oracle reached in the same cell, where it ran and is not the base."""
        oracle = Task(cell=task.cell, policy="oracle")
        if base is None or base.cell != task.cell or base == oracle or oracle not in results:
            return ""
        value = _over(self._value(results, oracle), self._value(results, base))
        return f"; the oracle {value:.3f}"

    def _value(self, results: Results, task: Task) -> float:
        figures = results[task]
        assert isinstance(figures, Figures)
        return self._figure(figures)


class OverBest(Target):
    """A figure of ours over the best of others, at its worst over some cells."""

    def __init__(
        self, name: str, cells: Sequence[Cell], others: Sequence[str], bound: float
    ) -> None:
        self._name = name
        self._cells = cells
        self._others = others
        self._bound = bound

    @override
    def tasks(self) -> Iterator[Task]:
        for cell in self._cells:
            for policy in (OURS, *self._others):
                yield Task(cell=cell, policy=policy)

    @override
    def verdict(self, results: Results) -> Verdict:
        found = []
        for cell in self._cells:
            p99s = {}
            for policy in (OURS, *self._others):
                figures = results[Task(cell=cell, policy=policy)]
                assert isinstance(figures, Figures)
                p99s[policy] = figures.ttft_p99_s
            best = min(self._others, key=p99s.__getitem__)
            found.append((_over(p99s[OURS], p99s[best]), f"{label(cell)}; {best}"))
        figure, where = max(found)
        return Verdict(
            name=self._name, figure=figure, bound=self._bound, at_least=False, where=where
        )


class Goodput(Target):
    """The greatest rate under a limit, over that of the best of others."""

    def __init__(self, name: str, cell: Cell, others: Sequence[str], bound: float) -> None:
        self._name = name
        self._cell = cell
        self._others = others
        self._bound = bound

    def _task(self, policy: str) -> Task:
        return Task(cell=self._cell, policy=policy, ttft_s_max=GOODPUT_TTFT_S)

    @override
    def tasks(self) -> Iterator[Task]:
        for policy in (OURS, *self._others, "oracle"):
            yield self._task(policy)

    @override
    def verdict(self, results: Results) -> Verdict:
        rates: dict[str, float] = {}
        for policy in (OURS, *self._others, "oracle"):
            rate = results[self._task(policy)]
            assert isinstance(rate, float)
            rates[policy] = rate
        best = max(self._others, key=rates.__getitem__)
        oracle = _over(rates["oracle"], rates[best])
        return Verdict(
            name=self._name,
            figure=_over(rates[OURS], rates[best]),
            bound=self._bound,
            at_least=True,
            where=f"{label(self._cell)}; {best}; the oracle {oracle:.3f}",
        )


def _over(ours: float, theirs: float) -> float:
    if theirs == 0:
        return 1.0 if ours == 0 else math.inf
    return ours / theirs


# --- which targets --------------------------------------------------------------------------------


def _p50(figures: Figures) -> float:
    return figures.ttft_p50_s


def _p95(figures: Figures) -> float:
    return figures.ttft_p95_s


def _p99(figures: Figures) -> float:
    return figures.ttft_p99_s


def _hit(figures: Figures) -> float:
    return figures.hit


def _later_hit(figures: Figures) -> float:
    return figures.later_hit


def _tpot_p99(figures: Figures) -> float:
    return figures.tpot_p99_s


def _imbalance(figures: Figures) -> float:
    return figures.work_max_over_mean


def _pairs(cells: Sequence[Cell], base: str) -> list[Pair]:
    return [(Task(cell=cell, policy=OURS), Task(cell=cell, policy=base)) for cell in cells]


def _against(cell: Cell, base: Cell) -> list[Pair]:
    return [(Task(cell=cell, policy=OURS), Task(cell=base, policy=OURS))]


def changed(cell: Cell, **fields: Any) -> Cell:
    return msgspec.structs.replace(cell, **fields)


def targets_of(sources: Sequence[Source], model: str) -> list[Target]:
    """Return the targets that can be judged with these sources, on replicas of one model."""
    chats, agents, nothing = (
        [source for source in sources if _kind(source) == kind]
        for kind in ("chat", "agents", "nothing")
    )
    made: list[Target] = []
    for source in chats:
        made += _chat(Cell(source=source, model=model))
    for source in agents:
        made += _agents(Cell(source=source, model=model))
    picked = Picked(limit=SYNTHETIC_REQUESTS)
    lonely = [*nothing, Source(name="nothing-shared", picked=picked)]
    cells = [Cell(source=source, load=load, model=model) for source in lonely for load in HIGH]
    made.append(OverBest("nothing shared: p99 / best blind rule's", cells, BLIND, 1.05))
    head = Source(name="shared-head", picked=picked)
    cells = [Cell(source=head, load=load, model=model) for load in HIGH]
    alone: list[Pair] = [(Task(cell=cell, policy=OURS), None) for cell in cells]
    made += [
        Ratio("shared head: work max/mean", _imbalance, alone, 1.15),
        Ratio("shared head: later turns' hit / oracle's", _later_hit, _pairs(cells, "oracle"), 0.9,
              at_least=True),
    ]  # fmt: skip
    return made


def _kind(source: Source) -> str:
    workload = workload_of(source)
    if workload.closed_loop:
        return "agents"
    return "nothing" if workload.ideal_hit < NOTHING_SHARED_MAX else "chat"


def _against_oracle(name: str, cells: Sequence[Cell]) -> list[Target]:
    pairs = _pairs(cells, "oracle")
    return [
        Ratio(f"{name}: hit rate / oracle's", _hit, pairs, 0.98, at_least=True),
        Ratio(f"{name}: p99 / oracle's", _p99, pairs, 1.05),
    ]


def _chat(usual: Cell) -> list[Target]:
    made: list[Target] = []
    for cache in CACHES:
        grid = [
            changed(usual, replicas=replicas, cache_tokens=cache, load=load)
            for replicas in FLEETS
            for load in LOADS
        ]
        made += _against_oracle(f"chat, {in_words(cache)} a replica", grid)
    at_75, at_90 = (_pairs([changed(usual, load=load)], "round_robin") for load in HIGH)
    made += [
        Ratio("chat at 75 %: p95 / round robin's", _p95, at_75, 0.27),
        Ratio("chat at 75 %: p99 / round robin's", _p99, at_75, 0.40),
        Ratio("chat at 90 %: p99 / round robin's", _p99, at_90, 0.25),
        Goodput("goodput / round robin's", usual, ("round_robin",), 2.8),
        Goodput("goodput / best rival's", usual, rivals.RIVALS, 1.10),
        *_several_proxies(usual),
        *_adversities(usual),
    ]
    if usual.model == "mixed":  # in the other, an answer takes as long whatever runs beside it
        name = "chat at 90 %: time per token p99 / round robin's"
        made.append(Ratio(name, _tpot_p99, at_90, 0.5))
    return made


def _several_proxies(usual: Cell) -> list[Target]:
    one = changed(usual, replicas=16)
    told, untold = changed(one, proxies=4), changed(one, proxies=4, sharing="none")
    name, other = "four proxies that share", "four that share nothing"
    return [
        Ratio(f"{name}: hit / one's", _hit, _against(told, one), 0.98, at_least=True),
        Ratio(f"{name}: p99 / one's", _p99, _against(told, one), 1.03),
        Ratio(f"{other}: hit / one's", _hit, _against(untold, one), 0.85, at_least=True),
        Ratio(f"{other}: p99 / one's", _p99, _against(untold, one), 1.3),
    ]


def _adversities(usual: Cell) -> list[Target]:
    right = changed(usual, after=BELIEF_AFTER)
    made: list[Target] = []
    for believed in (0.25, 2.0):
        pairs = _against(changed(right, believed=believed), right)
        name = f"cache believed x{believed:g}"
        made.append(Ratio(f"{name}: hit / the right one's", _hit, pairs, 0.95, at_least=True))
        made.append(Ratio(f"{name}: p99 / the right one's", _p99, pairs, 1.05))
    healthy = changed(usual, load=CALM)
    pairs = _against(changed(healthy, slow=0.4), healthy)
    made.append(Ratio("one at 0.4 of the speed: p99 / none", _p99, pairs, 1.4))
    at_once, late = (
        changed(usual, load=CALM, burst=Burst(factor=2, cold_s=cold_s, before=4))
        for cold_s in (0.0, 15.0)
    )
    name = "arrivals double, replicas 15 s late: p99 / at once"
    made.append(Ratio(name, _p99, _against(late, at_once), 1.2))
    return made


def _agents(usual: Cell) -> list[Target]:
    made: list[Target] = []
    for cache in AGENT_CACHES:
        grid = [changed(usual, replicas=replicas, cache_tokens=cache) for replicas in FLEETS]
        made += _against_oracle(f"agents, {in_words(cache)} a replica", grid)
    pairs = _pairs([usual], "round_robin")
    return [
        *made,
        Ratio("agents: p50 / round robin's", _p50, pairs, 0.04),
        Ratio("agents: p99 / round robin's", _p99, pairs, 0.60),
    ]


# --- judging --------------------------------------------------------------------------------------


def judge(
    sources: Sequence[Source],
    models: Sequence[str],
    processes: int,
    say: Callable[[str], None],
) -> list[Verdict]:
    """Return what was reached of each target."""
    targets = [target for model in models for target in targets_of(sources, model)]
    tasks = list(dict.fromkeys(task for target in targets for task in target.tasks()))
    results = run_tasks(tasks, processes, say)
    return [target.verdict(results) for target in targets] + [
        Verdict(
            name=f"one decision among {cost.replicas} replicas: us",
            figure=cost.decision_us,
            bound=cost.target_us,
            at_least=False,
            where="translated" if cost.translated else "from the sources",
        )
        for cost in decisions.measure(sources[0])
    ]


def table(verdicts: Sequence[Verdict]) -> str:
    rows = [["target", "figure", "bound", "", "worst in"]]
    rows += [
        [
            verdict.name,
            f"{verdict.figure:.3f}",
            f"{'>=' if verdict.at_least else '<='} {verdict.bound:g}",
            "kept" if verdict.kept else "MISSED",
            verdict.where,
        ]
        for verdict in verdicts
    ]
    kept = sum(verdict.kept for verdict in verdicts)
    return f"{aligned(rows)}\n{kept} of {len(verdicts)} kept"
