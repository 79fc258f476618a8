"""What the lab says: a table a cell."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from loadtest.policies.cells import Cell, Figures
from loadtest.policies.runner import label

FIGURE = re.compile(r"[-+0-9x<>=]")
Column = tuple[str, Callable[[Figures], str]]

COLUMNS: tuple[Column, ...] = (
    ("policy", lambda f: f.policy),
    ("hit", lambda f: f"{f.hit:.3f}"),
    ("of bound", lambda f: f"{f.hit / f.hit_bound:.0%}" if f.hit_bound else "-"),
    ("TTFT p50", lambda f: f"{f.ttft_p50_s:.3f}"),
    ("p95", lambda f: f"{f.ttft_p95_s:.3f}"),
    ("p99", lambda f: f"{f.ttft_p99_s:.3f}"),
    ("excess p95", lambda f: f"{f.excess_p95_s:.3f}"),
    ("p99", lambda f: f"{f.excess_p99_s:.3f}"),
    ("per token p50", lambda f: f"{1000 * f.tpot_p50_s:.1f} ms"),
    ("p99", lambda f: f"{1000 * f.tpot_p99_s:.1f} ms"),
    ("work max/mean", lambda f: f"{f.work_max_over_mean:.2f}"),
    ("util", lambda f: f"{f.utilisation:.2f}"),
    ("decision", lambda f: f"{f.decision_us:.1f} us"),
)


def cell_table(cell: Cell, figures: Sequence[Figures]) -> str:
    """Return the figures of some policies in one cell, one a line."""
    first = figures[0]
    title = (
        f"{label(cell)}: {first.requests:,} requests at {first.rate:.2f}/s "
        f"(time x{first.scale:.2f}), any cache {first.hit_bound:.3f}"
    )
    rows = [[caption for caption, _ in COLUMNS]]
    rows += [[write(found) for _, write in COLUMNS] for found in figures]
    return f"{title}\n{aligned(rows)}"


def goodput_table(cell: Cell, rates: dict[str, float], ttft_s_max: float) -> str:
    """Return the greatest rates of some policies, and their ratio to the first."""
    title = f"{label(cell)}: requests/s of which 95 % start within {ttft_s_max:g} s"
    base = next(iter(rates.values()))
    rows = [["policy", "rate", "of the first"]]
    for policy, rate in rates.items():
        rows.append([policy, f"{rate:.2f}", f"x{rate / base:.2f}" if base else "-"])
    return f"{title}\n{aligned(rows)}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return rows: first column and words to the left, figures to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    left = {0} | {column for column, text in enumerate(rows[-1]) if not FIGURE.search(text[:1])}
    lines = []
    for row in rows:
        cells = [
            f"{text:<{width}}" if column in left else f"{text:>{width}}"
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)
