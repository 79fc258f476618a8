"""The targets, and whether the cells that were run keep them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from loadtest.gpu.fleet import judge, plan
from loadtest.gpu.fleet.judge import Figures, Group, Ratio, Statistic
from loadtest.gpu.fleet.lab import Foretold
from loadtest.gpu.fleet.load import AGENTS, CONVERSATION, UNIQUE
from loadtest.gpu.fleet.record import CellKey

FORETOLD_WITHIN: Final = 0.15


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """Ours over another arm in one statistic."""

    text: str
    workload: str
    loads: tuple[float, ...]
    base: str
    statistic: Statistic
    bound: float
    at_least: bool = False


def _over_round_robin() -> list[Target]:
    bounds = ((CONVERSATION, 0.5, 0.45), (CONVERSATION, 0.95, 0.6), (CONVERSATION, 0.99, 0.5))
    return [
        Target(
            text=f"TTFT p{100 * share:g} over round robin's",
            workload=workload,
            loads=(0.9,),
            base=plan.OURS_RR,
            statistic=judge.ttft(share),
            bound=bound,
        )
        for workload, share, bound in (*bounds, (AGENTS, 0.99, 0.6))
    ]


def _over_sglang() -> list[Target]:
    rows: tuple[tuple[str, Statistic, float], ...] = (
        ("TTFT p50", judge.ttft(0.5), 0.75),
        ("TTFT p95", judge.ttft(0.95), 0.8),
        ("TTFT p99", judge.ttft(0.99), 0.8),
        ("time per token p50", judge.tpot(0.5), 1.0),
        ("time per token p99", judge.tpot(0.99), 0.9),
    )
    made = [
        Target(
            text=f"{text} over sglang-router's",
            workload=CONVERSATION,
            loads=(0.75, 0.9),
            base=plan.SGLANG,
            statistic=statistic,
            bound=bound,
        )
        for text, statistic, bound in rows
    ]
    hits = Target(
        text="engine-counted hit rate over sglang-router's",
        workload=CONVERSATION,
        loads=(0.75, 0.9),
        base=plan.SGLANG,
        statistic=judge.hit,
        bound=0.97,
        at_least=True,
    )
    return [*made, hits]


def all_targets() -> list[Target]:
    """Return what is held as a ratio of two arms."""
    unique = Target(
        text="unique prompts: TTFT p99 over least load's",
        workload=UNIQUE,
        loads=(0.75,),
        base=plan.OURS_LEAST,
        statistic=judge.ttft(0.99),
        bound=1.02,
    )
    return [*_over_round_robin(), *_over_sglang(), unique]


def verdict(found: Ratio, bound: float, *, at_least: bool = False) -> str:
    """Say whether a target was kept, and whether the interval shows it."""
    kept = found.value >= bound if at_least else found.value <= bound
    inside = found.low >= bound if at_least else found.high <= bound
    outside = found.high < bound if at_least else found.low > bound
    word = "kept" if kept else "MISSED"
    return word if (inside if kept else outside) else f"{word}, not shown: the interval crosses"


def judged(groups: Mapping[CellKey, Group], shape: str) -> list[list[str]]:
    """Return a row for each target and load of the fleet: what, where, bound, figure, word."""
    rows = []
    for target in all_targets():
        for load in target.loads:
            ours, base = (
                groups.get(CellKey(workload=target.workload, load=load, arm=arm, shape=shape))
                for arm in (plan.OURS, target.base)
            )
            where = f"{target.workload} {load:g}"
            bound = f"{'>=' if target.at_least else '<='} {target.bound:g}"
            found = judge.interval(ours, base, target.statistic) if ours and base else None
            if found is None:
                rows.append([target.text, where, bound, "-", "not run"])
            else:
                word = verdict(found, target.bound, at_least=target.at_least)
                rows.append([target.text, where, bound, found.text, word])
    return rows


def processor_rows(figures: Mapping[CellKey, Figures]) -> list[list[str]]:
    """Return the rows of router processor time, ours over sglang-router's."""
    rows = []
    for key, ours in figures.items():
        base = figures.get(msgspec.structs.replace(key, arm=plan.SGLANG))
        if key.arm != plan.OURS or base is None or not base.router_s_per_1000:
            continue
        value = ours.router_s_per_1000 / base.router_s_per_1000
        word = "kept" if value <= 1 / 8 else "MISSED"
        where = f"{key.workload} {key.load:g}"
        rows.append(
            ["router processor time over sglang-router's", where, "<= 0.125", f"{value:.3f}", word]
        )
    return rows


def foretold_rows(
    groups: Mapping[CellKey, Group], lab: Mapping[CellKey, Foretold]
) -> list[list[str]]:
    """Return a row for each cell: what was foretold, what came, and whether that is near enough."""
    rows = []
    for key, told in lab.items():
        group = groups[key]
        row = [key.text]
        near = True
        for statistic, value in (
            (judge.ttft(0.5), told.ttft_p50_s),
            (judge.ttft(0.99), told.ttft_p99_s),
        ):
            seen = judge.interval(group, None, statistic)
            if seen is None:
                row += [f"{value:.3f}", "-"]
                continue
            row += [f"{value:.3f}", seen.text]
            near &= seen.low <= value <= seen.high or _within(value, seen.value)
        hit = judge.hit(group.rows)
        ratio = hit / told.hit if told.hit else math.nan
        row += [f"{told.hit:.3f}", f"{hit:.3f}", f"{ratio:.2f}"]
        hits = "" if math.isnan(ratio) or 0.95 <= ratio <= 1.05 else ", hit rate off"
        rows.append([*row, ("kept" if near else "MISSED") + hits])
    return rows


def _within(value: float, seen: float) -> bool:
    return abs(value - seen) <= FORETOLD_WITHIN * seen


def missed(rows: Sequence[Sequence[str]]) -> int:
    return sum("MISSED" in row[-1] for row in rows)
