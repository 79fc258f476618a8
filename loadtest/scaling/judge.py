"""What the lab's figures, means over its seeds, come to: a table per cell, and the targets.

The targets, over all loads and start times: nothing is lost; there are never more replicas than
the oracle's peak and one; under noise the direction changes at most `TURNS_MAX` times in half an
hour; replica-seconds are at most 1.25 times the oracle's; and against Knative's law and target
tracking we are behind in neither the p99 of TTFT nor replica-seconds. TTFT counts by what it is
over instant capacity's: below that nobody waited for a replica. A tenth of a second, or two
hundredths of the replica-seconds, is no difference: another seed moves them by more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import msgspec

from loadtest.scaling.cells import Cell, Figures
from loadtest.scaling.loads import LOADS

OVERSHOOT_MAX = 1
TURNS_MAX = 11  # one in three minutes, and one when the load ends
PAID_MAX = 1.25
SAME_S = 0.1
SAME_SHARE = 0.02
RIVALS = ("knative", "tracking")


class Miss(msgspec.Struct, frozen=True):
    """A target that was not reached, and by how much."""

    cell: Cell
    target: str
    text: str


def excess_s(figures: Figures, instant: Figures) -> float:
    """Return by how much the p99 of TTFT is over instant capacity's."""
    return max(0.0, figures.ttft_p99_s - instant.ttft_p99_s)


def misses(cell: Cell, found: Mapping[str, Figures]) -> Iterator[Miss]:
    """Yield the targets that ours missed in a cell."""
    ours, oracle, instant = found["doherty"], found["oracle"], found["instant"]
    if ours.lost:
        yield Miss(cell, "lost", f"{ours.lost} of {ours.requests} lost")
    if ours.peak - oracle.peak > OVERSHOOT_MAX + 1e-6:  # means are not exact
        yield Miss(
            cell, "overshoot", f"{ours.peak - oracle.peak:.1f} above the oracle's {oracle.peak:.1f}"
        )
    if LOADS[cell.load].steady and ours.turns > TURNS_MAX:
        yield Miss(cell, "turns", f"{ours.turns:.1f} changes of direction")
    if ours.paid_s > PAID_MAX * oracle.paid_s:
        yield Miss(cell, "paid", f"{ours.paid_s / oracle.paid_s:.2f} x the oracle's")
    for name in RIVALS:
        yield from _behind(cell, ours, found[name], instant)


def _behind(cell: Cell, ours: Figures, rival: Figures, instant: Figures) -> Iterator[Miss]:
    late_s = excess_s(ours, instant) - excess_s(rival, instant)
    if late_s > SAME_S:
        paid = rival.paid_s / ours.paid_s
        text = f"TTFT p99 {late_s:.2f} s later than {rival.law}, which pays {paid:.2f} x ours"
        yield Miss(cell, f"before {rival.law}", text)
    if ours.paid_s > (1 + SAME_SHARE) * rival.paid_s:
        more = ours.paid_s / rival.paid_s - 1
        text = (
            f"{more:.1%} more replica-seconds than {rival.law}, whose p99 is {-late_s:.2f} s later"
        )
        yield Miss(cell, f"cheaper than {rival.law}", text)


def cell_table(cell: Cell, found: Mapping[str, Figures]) -> str:
    """Return the figures of one cell, a law a line."""
    oracle, static = found["oracle"], found["static"]
    first = next(iter(found.values()))
    head = ("law", "TTFT p50", "p99", "over instant", "lost", "peak", "above oracle", "turns",
            "replica-s", "of oracle", "of static")  # fmt: skip
    rows = [head]
    for law, figures in found.items():
        rows.append(
            (
                law,
                f"{figures.ttft_p50_s:.3f}",
                f"{figures.ttft_p99_s:.3f}",
                f"{excess_s(figures, found['instant']):.3f}",
                f"{figures.lost}",
                f"{figures.peak:.1f}",
                f"{figures.peak - oracle.peak:+.1f}",
                f"{figures.turns:.1f}",
                f"{figures.paid_s:.0f}",
                f"{figures.paid_s / oracle.paid_s:.2f}",
                f"{figures.paid_s / static.paid_s:.2f}",
            )
        )
    title = f"{cell.load} ({LOADS[cell.load].what}), start {cell.start_s:g} s: {first.requests:,}"
    return f"{title} requests\n{aligned(rows)}"


def summary(missed: Sequence[Miss], cells: int) -> str:
    """Return what was missed, a line each; or that nothing was."""
    if not missed:
        return f"all targets reached in {cells} cells"
    lines = [f"{len(missed)} targets missed in {cells} cells:"]
    for miss in missed:
        where = f"{miss.cell.load}, start {miss.cell.start_s:g} s"
        lines += [f"  {where}, {miss.target}: {miss.text}"]
    return "\n".join(lines)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return rows with the first column to the left and the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  "
        + "  ".join(
            text.rjust(width) if column else text.ljust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
