"""Two panels: time to first token over the replay, and how much of the prompts was cached.

Colours are of Okabe and Ito's palette, which people with any colour vision can tell apart; marks
and line styles differ too, for print without colour.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loadtest.measure import intervals
from loadtest.run import Run

INTERVALS = 16
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKS = ("o", "s", "^", "D", "v", "P", "X")
LINE_STYLES = ("-", "--", "-.", ":")
SUFFIXES = (".png", ".svg")


class PlotError(Exception):
    """The plot cannot be made; the text says what to do."""


def check(path: str) -> None:
    """Raise `PlotError` now rather than after an hour's replay."""
    if Path(path).suffix.lower() not in SUFFIXES:
        raise PlotError(f"--plot {path}: the name must end in {' or '.join(SUFFIXES)}")
    if not Path(path).resolve().parent.is_dir():
        raise PlotError(f"--plot {path}: no such folder")
    try:
        import matplotlib  # noqa: F401, PLC0415 - an extra, and slow to import
    except ImportError as error:
        raise PlotError("--plot needs matplotlib: pip install 'doherty[loadtest]'") from error


def draw(series: dict[str, list[Run]], title: str, path: str) -> None:
    """Draw one series a label into `path`; repeats are laid over each other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415
    from matplotlib.ticker import LogLocator, NullLocator  # noqa: PLC0415

    figure = Figure(figsize=(11, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    times, hits = figure.subplots(1, 2)
    for place, (label, runs) in enumerate(series.items()):
        colour = COLOURS[place % len(COLOURS)]
        mark = MARKS[place % len(MARKS)]
        dots = {"color": colour, "marker": mark}
        line = {**dots, "linestyle": LINE_STYLES[place % len(LINE_STYLES)], "markersize": 4}
        for repeat, run in enumerate(runs):
            _draw_run(times, hits, run, dots, {**line, "label": None if repeat else label})
    times.set(
        title="Time to first token: requests and median",
        xlabel="time since the replay began (s)",
        ylabel="time to first token (s, logarithmic)",
        yscale="log",
    )
    times.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    times.yaxis.set_major_formatter(lambda seconds, _: f"{seconds:g}")
    times.yaxis.set_minor_locator(NullLocator())
    hits.set(
        title="Prompt tokens found in the KV cache",
        xlabel="time since the replay began (s)",
        ylabel="hit rate (% of prompt tokens)",
    )
    hits.set_ylim(bottom=0)
    for axes in (times, hits):
        axes.grid(visible=True, alpha=0.3)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(loc="best")
    figure.suptitle(title)
    figure.savefig(path)


def _draw_run(times: Any, hits: Any, run: Run, dots: dict[str, Any], line: dict[str, Any]) -> None:
    good = [o for o in run.outcomes if not o.error and o.ttft_s is not None]
    times.scatter(
        [o.sent_s for o in good], [o.ttft_s for o in good], s=5, alpha=0.2, linewidths=0, **dots
    )
    pieces = intervals(run.outcomes, INTERVALS)
    timed = [p for p in pieces if p.ttft_p50_s is not None]
    times.plot([p.at_s for p in timed], [p.ttft_p50_s for p in timed], **line)
    known = [(p.at_s, 100 * p.hit_rate) for p in pieces if p.hit_rate is not None]
    if line["label"] and run.summary.hit_rate is not None:
        line = {**line, "label": f"{line['label']} ({100 * run.summary.hit_rate:.1f} % in all)"}
    hits.plot([at_s for at_s, _ in known], [percent for _, percent in known], **line)
