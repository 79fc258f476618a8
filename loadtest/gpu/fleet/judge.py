"""Figures of the cells, ratios with their intervals, and the targets: from the file alone.

Arms of a group were asked the same requests at the same times, so whole seconds of arrivals are
drawn again, the same ones for both (a block bootstrap; Efron and Tibshirani 1993, chapter 8): what
a burst did to one it may have done to the other. Repeats lie beside each other: their seconds are
drawn from one pot, and their requests make one distribution.

A target is *kept* or *missed* by its figure, and *shown* when the whole interval lies on that side
of the bound. What is not shown was not measured well enough, and is told as that.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import msgspec

from loadtest.gpu.fleet.record import CellKey, CellRecord, Row
from loadtest.measure import quantile

DRAWS: Final = 300
INTERVAL: Final = (0.025, 0.975)
GOOD_TTFT_S: Final = 2.0

Statistic = Callable[[Sequence[Row]], float]


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """One cell, all repeats together."""

    key: CellKey
    repeats: int
    requests: int
    errors: int
    ttft_p50_s: float
    ttft_p95_s: float
    ttft_p99_s: float
    tpot_p50_s: float
    tpot_p99_s: float
    answer_p50_s: float  # from sending it to the last token
    answer_p95_s: float
    output_tokens_per_s: float
    goodput_per_s: float  # whole answers that began within GOOD_TTFT_S
    hit: float  # of the measured requests, by each answer's usage
    engine_hit: float  # of the whole cell, by the engines' counters
    work_max_over_mean: float
    work_tokens_per_s: float  # uncached tokens of one replica, over the whole cell
    router_s_per_1000: float
    router_start_s: float
    router_mib: float


class Ratio(msgspec.Struct, frozen=True):
    """One arm over another."""

    value: float
    low: float
    high: float

    @property
    def text(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}-{self.high:.2f}]"


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """Cells that differ in their repeat alone."""

    cells: list[CellRecord]

    @property
    def rows(self) -> list[Row]:
        return [row for cell in self.cells for row in cell.measured]

    def blocks(self) -> dict[tuple[int, int], list[Row]]:
        """Return the measured requests by repeat and second of arrival."""
        found: dict[tuple[int, int], list[Row]] = {}
        for cell in self.cells:
            for row in cell.measured:
                found.setdefault((cell.key.repeat, int(row.at_s)), []).append(row)
        return found


def grouped(cells: Iterable[CellRecord]) -> dict[CellKey, Group]:
    """Return the cells that were run, by their key without the repeat; the last try counts."""
    latest = {cell.key: cell for cell in cells if not cell.failure}
    found: dict[CellKey, list[CellRecord]] = {}
    for key in sorted(latest):
        found.setdefault(msgspec.structs.replace(key, repeat=0), []).append(latest[key])
    return {key: Group(cells=made) for key, made in found.items()}


# --- statistics -----------------------------------------------------------------------------------


def at_share(values: Iterable[float | None], share: float) -> float:
    found = quantile((value for value in values if value is not None), share)
    return math.nan if found is None else found


def ttft(share: float) -> Statistic:
    return lambda rows: at_share((row.ttft_s for row in rows if not row.error), share)


def tpot(share: float) -> Statistic:
    return lambda rows: at_share((row.tpot_s for row in rows if not row.error), share)


def answer(share: float) -> Statistic:
    return lambda rows: at_share((row.total_s for row in rows if not row.error), share)


def hit(rows: Sequence[Row]) -> float:
    good = [row for row in rows if not row.error]
    return sum(row.cached_tokens for row in good) / max(1, sum(row.prompt_tokens for row in good))


def interval(
    one: Group, other: Group | None, statistic: Statistic, *, seed: int = 1
) -> Ratio | None:
    """Return the ratio of a statistic with its interval; without `other` the statistic itself.

    None where there is nothing to compare.
    """
    left, right = one.blocks(), (other or one).blocks()
    shared = sorted(left.keys() & right.keys())
    if not shared:
        return None

    def figure(places: Sequence[tuple[int, int]]) -> float:
        value = statistic([row for place in places for row in left[place]])
        if other is None:
            return value
        below = statistic([row for place in places for row in right[place]])
        return value / below if below else math.nan

    draw = random.Random(seed)
    drawn = (figure(draw.choices(shared, k=len(shared))) for _ in range(DRAWS))
    known = [value for value in drawn if not math.isnan(value)]
    if not known:
        return None
    return Ratio(figure(shared), at_share(known, INTERVAL[0]), at_share(known, INTERVAL[1]))


def figures_of(key: CellKey, group: Group) -> Figures:
    """Return the figures of a cell's repeats together."""
    rows, cells = group.rows, group.cells
    good = [row for row in rows if not row.error]
    measured_s = sum(cell.seconds - cell.warm_s for cell in cells)
    prompt = sum(one.prompt for cell in cells for one in cell.engines)
    cached = sum(one.cached for cell in cells for one in cell.engines)
    spread = [_max_over_mean([one.work for one in cell.engines]) for cell in cells]
    sent = sum(len(cell.rows) for cell in cells)
    return Figures(
        key=key,
        repeats=len(cells),
        requests=len(rows),
        errors=len(rows) - len(good),
        ttft_p50_s=ttft(0.5)(rows),
        ttft_p95_s=ttft(0.95)(rows),
        ttft_p99_s=ttft(0.99)(rows),
        tpot_p50_s=tpot(0.5)(rows),
        tpot_p99_s=tpot(0.99)(rows),
        answer_p50_s=answer(0.5)(rows),
        answer_p95_s=answer(0.95)(rows),
        output_tokens_per_s=sum(row.output_tokens for row in good) / measured_s,
        goodput_per_s=sum((row.ttft_s or math.inf) <= GOOD_TTFT_S for row in good) / measured_s,
        hit=hit(rows),
        engine_hit=cached / prompt if prompt else math.nan,
        work_max_over_mean=sum(spread) / len(spread),
        work_tokens_per_s=sum(
            sum(one.work for one in cell.engines) / len(cell.engines) / cell.seconds
            for cell in cells
            if cell.engines
        )
        / len(cells),
        router_s_per_1000=1000 * sum(cell.router_s for cell in cells) / max(1, sent),
        router_start_s=max(cell.router_start_s for cell in cells),
        router_mib=max(cell.router_mib for cell in cells),
    )


def _max_over_mean(work: Sequence[float]) -> float:
    return max(work) * len(work) / sum(work) if sum(work) > 0 else math.nan
