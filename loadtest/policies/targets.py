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
from typing import Final

import msgspec

from loadtest.policies import decisions, rivals
from loadtest.policies.cells import Burst, Cell, Figures, Source, workload_of
from loadtest.policies.runner import Result, Task, label, run_tasks
from loadtest.policies.tables import aligned

OURS: Final = "doherty"
LOADS: Final = (0.5, 0.75, 0.9)
FLEETS: Final = (4, 8, 16, 32)
CACHES: Final = (100_000, 300_000, 1_000_000)
BLIND: Final = ("round_robin", "least_requests", "least_tokens", "power_of_two")
NOTHING_SHARED_MAX: Final = 0.01  # hit rate of any cache
STRAGGLER_LOAD: Final = 0.6
BURST_LOAD: Final = 0.6
BELIEF_AFTER: Final = 2000
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

    def tasks(self) -> Iterator[Task]:
        for pair in self._pairs:
            yield from (task for task in pair if task is not None)

    def verdict(self, results: Results) -> Verdict:
        found: list[tuple[float, str]] = []
        for task, base in self._pairs:
            value = self._value(results, task)
            if base is not None:
                value = _over(value, self._value(results, base))
            found.append((value, label(task.cell)))
        figure, where = min(found) if self._at_least else max(found)
        return Verdict(
            name=self._name, figure=figure, bound=self._bound, at_least=self._at_least, where=where
        )

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

    def tasks(self) -> Iterator[Task]:
        for cell in self._cells:
            for policy in (OURS, *self._others):
                yield Task(cell=cell, policy=policy)

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

    def tasks(self) -> Iterator[Task]:
        for policy in (OURS, *self._others):
            yield self._task(policy)

    def verdict(self, results: Results) -> Verdict:
        rates: dict[str, float] = {}
        for policy in (OURS, *self._others):
            rate = results[self._task(policy)]
            assert isinstance(rate, float)
            rates[policy] = rate
        best = max(self._others, key=rates.__getitem__)
        return Verdict(
            name=self._name,
            figure=_over(rates[OURS], rates[best]),
            bound=self._bound,
            at_least=True,
            where=f"{label(self._cell)}; {best}",
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


def _pairs(cells: Sequence[Cell], base: str, ours: str = OURS) -> list[Pair]:
    return [(Task(cell=cell, policy=ours), Task(cell=cell, policy=base)) for cell in cells]


def _other_cell(cell: Cell, base: Cell) -> list[Pair]:
    return [(Task(cell=cell, policy=OURS), Task(cell=base, policy=OURS))]


def targets_of(sources: Sequence[Source]) -> list[Target]:
    """Return the targets that can be judged with these sources."""
    kinds: dict[str, list[Source]] = {"chat": [], "agents": [], "nothing": []}
    for source in sources:
        kinds[_kind(source)].append(source)
    made: list[Target] = []
    for source in kinds["chat"]:
        made += _chat(source)
    for source in kinds["agents"]:
        made += _agents(source)
    nothing = [*kinds["nothing"], Source(name="nothing-shared")]
    cells = [
        Cell(source=source, replicas=8, load=load) for source in nothing for load in (0.75, 0.9)
    ]
    made.append(OverBest("nothing shared: p99 / best blind rule's", cells, BLIND, 1.05))
    head = [Cell(source=Source(name="shared-head"), load=load) for load in (0.75, 0.9)]
    alone: list[Pair] = [(Task(cell=cell, policy=OURS), None) for cell in head]
    made += [
        Ratio("shared head: work max/mean", _imbalance, alone, 1.15),
        Ratio("shared head: later turns' hit / oracle's", _later_hit, _pairs(head, "oracle"), 0.9,
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
        Ratio(f"{name}: TTFT p99 / oracle's", _p99, pairs, 1.05),
    ]


def _chat(source: Source) -> list[Target]:
    grid = [
        Cell(source=source, replicas=replicas, cache_tokens=cache, load=load)
        for replicas in FLEETS
        for cache in CACHES
        for load in LOADS
    ]
    usual, busy = Cell(source=source), Cell(source=source, load=0.9)
    return [
        *_against_oracle("chat", grid),
        Ratio("chat at 75 %: p95 / round robin's", _p95, _pairs([usual], "round_robin"), 0.27),
        Ratio("chat at 75 %: p99 / round robin's", _p99, _pairs([usual], "round_robin"), 0.40),
        Ratio("chat at 90 %: p99 / round robin's", _p99, _pairs([busy], "round_robin"), 0.25),
        Ratio("chat at 90 %: per token p99 / round robin's", _tpot_p99,
              _pairs([busy], "round_robin"), 0.5),
        Goodput("goodput / round robin's", usual, ("round_robin",), 2.8),
        Goodput("goodput / best rival's", usual, rivals.RIVALS, 1.10),
        *_several_proxies(source),
        *_adversities(source),
    ]  # fmt: skip


def _several_proxies(source: Source) -> list[Target]:
    one = Cell(source=source, replicas=16)
    told = msgspec.structs.replace(one, proxies=4)
    untold = msgspec.structs.replace(told, sharing="none")
    return [
        Ratio("four proxies that share: hit / one's", _hit, _other_cell(told, one), 0.98,
              at_least=True),
        Ratio("four proxies that share: p99 / one's", _p99, _other_cell(told, one), 1.03),
        Ratio("four that share nothing: hit / one's", _hit, _other_cell(untold, one), 0.85,
              at_least=True),
        Ratio("four that share nothing: p99 / one's", _p99, _other_cell(untold, one), 1.3),
    ]  # fmt: skip


def _adversities(source: Source) -> list[Target]:
    right = Cell(source=source, after=BELIEF_AFTER)
    made: list[Target] = []
    for believed in (0.25, 2.0):
        pairs = _other_cell(msgspec.structs.replace(right, believed=believed), right)
        name = f"cache believed x{believed:g}"
        made.append(Ratio(f"{name}: hit / the right one's", _hit, pairs, 0.95, at_least=True))
        made.append(Ratio(f"{name}: p99 / the right one's", _p99, pairs, 1.05))
    healthy = Cell(source=source, load=STRAGGLER_LOAD)
    slow = msgspec.structs.replace(healthy, slow=0.4)
    made.append(Ratio("one at 0.4 of the speed: p99", _p99, _other_cell(slow, healthy), 1.4))
    at_once = Cell(source=source, load=BURST_LOAD, burst=Burst(factor=2, cold_s=0.0, before=4))
    late = msgspec.structs.replace(at_once, burst=Burst(factor=2, cold_s=15.0, before=4))
    name = "arrivals double, replicas 15 s late: p99 / at once"
    made.append(Ratio(name, _p99, _other_cell(late, at_once), 1.2))
    return made


def _agents(source: Source) -> list[Target]:
    grid = [
        Cell(source=source, replicas=replicas, cache_tokens=cache)
        for replicas in (4, 8, 16)
        for cache in AGENT_CACHES
    ]
    usual = _pairs([Cell(source=source)], "round_robin")
    return [
        *_against_oracle("agents", grid),
        Ratio("agents: p50 / round robin's", _p50, usual, 0.04),
        Ratio("agents: p99 / round robin's", _p99, usual, 0.60),
    ]


# --- judging --------------------------------------------------------------------------------------


def judge(sources: Sequence[Source], processes: int, say: Callable[[str], None]) -> list[Verdict]:
    """Return what was reached of each target."""
    targets = targets_of(sources)
    tasks = list(dict.fromkeys(task for target in targets for task in target.tasks()))
    results = run_tasks(tasks, processes, say)
    verdicts = [target.verdict(results) for target in targets]
    for cost in decisions.measure(sources[0]):
        verdicts.append(
            Verdict(
                name=f"one decision among {cost.replicas}: us",
                figure=cost.decision_us,
                bound=cost.target_us,
                at_least=False,
                where="translated" if cost.translated else "from the sources",
            )
        )
    return verdicts


def table(verdicts: Sequence[Verdict]) -> str:
    rows = [["target", "figure", "bound", "", "worst in"]]
    for verdict in verdicts:
        rows.append(
            [
                verdict.name,
                f"{verdict.figure:.3f}",
                f"{'>=' if verdict.at_least else '<='} {verdict.bound:g}",
                "kept" if verdict.kept else "MISSED",
                verdict.where,
            ]
        )
    kept = sum(verdict.kept for verdict in verdicts)
    return f"{aligned(rows)}\n{kept} of {len(verdicts)} kept"
