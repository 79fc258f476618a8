"""Two panels: time to first token, and hit rate. One cell: by policy; several: cell by cell."""

from __future__ import annotations

from typing import Any

from loadtest.plot import COLOURS, LINE_STYLES, MARKS
from loadtest.policies.cells import Cell, Figures
from loadtest.policies.runner import label

QUANTILES = (("p50", "ttft_p50_s"), ("p95", "ttft_p95_s"), ("p99", "ttft_p99_s"))


def draw(results: dict[Cell, list[Figures]], path: str) -> None:
    """Draw the figures into `path`, which `plot.check` has found to be fit."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - an extra, slow
    from matplotlib.figure import Figure  # noqa: PLC0415

    several = len(results) > 1
    rows = len(results) if several else len(next(iter(results.values())))
    size = (12.0, 5.0 if several else 1.8 + 0.3 * rows)
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    times, hits = figure.subplots(1, 2)
    if several:
        _by_cell(times, hits, results)
        figure.suptitle("p99 of the time to first token, and hit rate")
    else:
        ((cell, found),) = results.items()
        _by_policy(times, hits, found)
        figure.suptitle(label(cell))
    for axes in (times, hits):
        axes.grid(visible=True, alpha=0.3)
    figure.savefig(path)


def _by_policy(times: Any, hits: Any, found: list[Figures]) -> None:
    names = [figures.policy for figures in found]
    for place, (caption, field) in enumerate(QUANTILES):
        values = [getattr(figures, field) for figures in found]
        times.plot(values, names, MARKS[place], color=COLOURS[place], label=caption)
    times.set(xlabel="time to first token (s, logarithmic)", xscale="log")
    times.invert_yaxis()
    times.legend(loc="best")
    hits.barh(names, [100 * figures.hit for figures in found], color=COLOURS[2])
    hits.axvline(100 * found[0].hit_bound, color=COLOURS[6], linestyle="--", label="any cache")
    hits.set(xlabel="hit rate (% of prompt tokens)")
    hits.invert_yaxis()
    hits.legend(loc="best")


def _by_cell(times: Any, hits: Any, results: dict[Cell, list[Figures]]) -> None:
    names = [label(cell).partition(" ")[2] for cell in results]
    places = list(range(len(names)))
    for place, first in enumerate(next(iter(results.values()))):
        found = [row[place] for row in results.values()]
        line = {
            "color": COLOURS[place % len(COLOURS)],
            "marker": MARKS[place % len(MARKS)],
            "linestyle": LINE_STYLES[place // len(COLOURS) % len(LINE_STYLES)],
            "label": first.policy,
        }
        times.plot(places, [figures.ttft_p99_s for figures in found], **line)
        hits.plot(places, [100 * figures.hit for figures in found], **line)
    times.set(ylabel="time to first token, p99 (s, logarithmic)", yscale="log")
    hits.set(ylabel="hit rate (% of prompt tokens)")
    for axes in (times, hits):
        axes.set_xticks(places, names, rotation=30, ha="right", fontsize=7)
    hits.legend(loc="best", fontsize=7)
