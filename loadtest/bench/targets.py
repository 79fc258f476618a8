"""What ours is held to, as data, and the tables that say whether it is met."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import msgspec

from loadtest.bench.scenarios import Scenario
from loadtest.bench.stand import DIRECT, Sample


class Spread(msgspec.Struct, frozen=True):
    """The middle of the rounds, and the ends."""

    median: float
    low: float
    high: float


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """Ours may be `factor` times a rival's figure, and `plus` more; no rival: `plus` alone."""

    scenario: str
    rival: str = ""
    factor: float = 0.0
    plus: float = 0.0
    at_least: bool = False


TARGETS = (
    Target(scenario="1kb", rival="nginx", factor=1.7),
    Target(scenario="1kb", rival="sglang-cache_aware", factor=1 / 5),
    Target(scenario="16kb", rival="nginx", factor=1.7),
    Target(scenario="16kb", rival="sglang-cache_aware", factor=1 / 7),
    Target(scenario="128kb", rival="nginx", factor=1.0),
    Target(scenario="128kb", rival="sglang-cache_aware", factor=1 / 15),
    Target(scenario="burst", rival="nginx", factor=1.5),
    Target(scenario="paced", rival="nginx", factor=1.3),
    Target(scenario="ttfb", rival="nginx", factor=1.3),
    Target(scenario="upload", plus=20.0),
    Target(scenario="idle", rival="nginx", factor=2.0, plus=40.0),
    Target(scenario="streams", rival="nginx", factor=2.0, plus=40.0),
    Target(scenario="workers", plus=1.8, at_least=True),
    Target(scenario="placement", plus=100.0, at_least=True),
)


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """A target, and what was found."""

    target: str
    ours: float
    bound: float
    ratio: float | None
    met: bool


def spreads(
    samples: Sequence[Sample], scenarios: Sequence[Scenario]
) -> dict[tuple[str, str], Spread]:
    """Return the spread of each scenario and rival that has a figure.

    Where the figure is what comes on top of the engine itself, the engine's own in the same round
    is taken off.
    """
    found: dict[tuple[str, str], Spread] = {}
    above = {scenario.name for scenario in scenarios if scenario.above_direct}
    direct = {(s.scenario, s.round): s.value for s in samples if s.rival == DIRECT}
    values: dict[tuple[str, str], list[float]] = {}
    for one in samples:
        if one.value is None:
            continue
        floor = 0.0
        if one.scenario in above and one.rival != DIRECT:
            floor = direct.get((one.scenario, one.round)) or 0.0
        values.setdefault((one.scenario, one.rival), []).append(one.value - floor)
    for key, of_rounds in values.items():
        found[key] = Spread(statistics.median(of_rounds), min(of_rounds), max(of_rounds))
    return found


def verdicts(found: dict[tuple[str, str], Spread], scenarios: Sequence[Scenario]) -> list[Verdict]:
    """Return the targets of which both sides were measured."""
    captions = {scenario.name: scenario.caption for scenario in scenarios}
    judged = []
    for target in TARGETS:
        ours = found.get((target.scenario, "ours"))
        rival = found.get((target.scenario, target.rival))
        if ours is None or (target.rival and rival is None):
            continue
        against = rival.median if rival else 0.0
        bound = target.factor * against + target.plus
        met = ours.median >= bound if target.at_least else ours.median <= bound
        judged.append(
            Verdict(
                target=f"{captions[target.scenario]}: {_words(target)}",
                ours=ours.median,
                bound=bound,
                ratio=ours.median / against if against > 0 else None,
                met=met,
            )
        )
    return judged


def _words(target: Target) -> str:
    sign = ">=" if target.at_least else "<="
    parts = []
    if target.rival:
        share = f"{target.factor:g}" if target.factor >= 1 else f"1/{1 / target.factor:g}"
        parts.append(f"{share} x {target.rival}")
    if target.plus:
        parts.append(f"{target.plus:g}")
    return f"{sign} {' + '.join(parts)}"


def figures_table(
    found: dict[tuple[str, str], Spread], scenarios: Sequence[Scenario], rivals: Sequence[str]
) -> str:
    """Return a row per rival and a column per scenario: median [lowest-highest]."""
    rows = [["", *(scenario.caption for scenario in scenarios)]]
    rows.append(["", *(scenario.unit for scenario in scenarios)])
    for rival in rivals:
        cells = [found.get((scenario.name, rival)) for scenario in scenarios]
        rows.append([rival, *("-" if cell is None else _spread(cell) for cell in cells)])
    return aligned(rows)


def notes(samples: Sequence[Sample]) -> list[str]:
    """Return, in words, what a figure alone does not say; of several rounds the last one."""
    last = {one.scenario: one for one in samples if one.rival == "ours" and one.notes}
    lines = []
    if "workers" in last:
        n = last["workers"].notes
        lines.append(
            f"workers: 1 serves {n['rps_of_1']:,.0f}/s at {n['us_of_1']:.0f} us each, 2 serve "
            f"{n['rps_of_2']:,.0f}/s at {n['us_of_2']:.0f} us each"
        )
        if last["workers"].value is None:
            lines[-1] += f"; {n['cores']:.0f} cores are too few to call it a ratio (4 would do)"
    if "placement" in last:
        n = last["placement"].notes
        lines.append(
            f"placement: of {n['of']:.0f} requests {n['different_1kb']:.0f} of 1 KB and "
            f"{n['different_16kb']:.0f} of 16 KB go elsewhere the second time, with two workers"
        )
    if "idle" in last:
        lines.append(f"idle clients: {last['idle'].notes['open']:,.0f}")
    return lines


def verdicts_table(judged: Sequence[Verdict]) -> str:
    rows = [["target", "ours", "bound", "ratio", "met?"]]
    for one in judged:
        ratio = "-" if one.ratio is None else f"{one.ratio:.2f}"
        met = "met" if one.met else "missed"
        rows.append([one.target, number(one.ours), number(one.bound), ratio, met])
    return aligned(rows)


def _spread(spread: Spread) -> str:
    return f"{number(spread.median)} [{number(spread.low)}-{number(spread.high)}]"


def number(value: float) -> str:
    """Return three digits that count."""
    size = abs(value)
    return f"{value:,.0f}" if size >= 100 else f"{value:.1f}" if size >= 10 else f"{value:.2f}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
