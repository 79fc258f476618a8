"""What is said at the end: a table for people, JSON for programs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import orjson

from loadtest.measure import Outcome, Summary, spread
from loadtest.run import Run


def duration(seconds: float) -> str:
    """Return `seconds` in the unit that reads best."""
    if seconds < 0.000995:
        return f"{1e6 * seconds:.0f} us"
    if seconds < 0.0995:
        return f"{1000 * seconds:.1f} ms"
    if seconds < 9.995:
        return f"{1000 * seconds:,.0f} ms"
    return f"{seconds:,.1f} s"


Figure = Callable[[Summary], float | None]

# What a comparison compares: caption, figure, how it is written.
FIGURES: tuple[tuple[str, Figure, Callable[[float], str]], ...] = (
    ("hit rate", lambda s: s.hit_rate, lambda v: f"{100 * v:.1f} %"),
    ("  bound of any cache", lambda s: s.hit_rate_bound, lambda v: f"{100 * v:.1f} %"),
    ("TTFT p50", lambda s: s.ttft_p50_s, duration),
    ("TTFT p95", lambda s: s.ttft_p95_s, duration),
    ("TTFT p99", lambda s: s.ttft_p99_s, duration),
    ("time per output token p50", lambda s: s.tpot_p50_s, duration),
    ("time per output token p99", lambda s: s.tpot_p99_s, duration),
    ("whole answer p50", lambda s: s.total_p50_s, duration),
    ("whole answer p99", lambda s: s.total_p99_s, duration),
    ("output tokens/s", lambda s: s.output_tokens_per_s, lambda v: f"{v:,.0f}"),
    ("work, max / mean", lambda s: s.work_max_over_mean, lambda v: f"{v:.2f}"),
    ("failed requests", lambda s: s.requests - s.succeeded, lambda v: f"{v:g}"),
    ("client lateness p99", lambda s: s.lateness_p99_s, duration),
)


def _or_dash(value: float | None, write: Callable[[float], str]) -> str:
    return "-" if value is None else write(value)


def _percent(value: float | None) -> str:
    return _or_dash(value, lambda v: f"{100 * v:.1f} %")


def run_table(run: Run) -> str:
    """Return the closing table of one replay."""
    summary = run.summary
    rows = [
        ("requests", f"{summary.requests:,} measured after {summary.warmup_requests:,} of warm-up"),
        ("succeeded", f"{summary.succeeded:,}"),
        ("errors", _errors(summary)),
        ("duration", duration(summary.duration_s)),
        ("prompt tokens", f"{summary.prompt_tokens:,}"),
        ("cached tokens", _cached(summary)),
        ("hit rate", f"{_percent(summary.hit_rate)} (bound {_percent(summary.hit_rate_bound)})"),
        (
            "TTFT p50 / p95 / p99",
            _times(summary.ttft_p50_s, summary.ttft_p95_s, summary.ttft_p99_s),
        ),
        ("time per output token p50 / p99", _times(summary.tpot_p50_s, summary.tpot_p99_s)),
        ("whole answer p50 / p99", _times(summary.total_p50_s, summary.total_p99_s)),
        ("output tokens/s", f"{summary.output_tokens_per_s:,.0f}"),
        *_replica_rows(summary),
        ("work, max / mean", _or_dash(summary.work_max_over_mean, lambda v: f"{v:.2f}")),
        ("client lateness p99 / max", _times(summary.lateness_p99_s, summary.lateness_max_s)),
        ("client processor", f"{_percent(summary.client_cpu_share)} of one core"),
    ]
    title = f"{run.label}: {run.settings['trace']} at speed {run.settings['speed']:g}"
    if run.interrupted:
        title += f", interrupted after {len(run.outcomes):,} of {run.request_count:,} requests"
    return f"{title}\n{two_columns(rows)}"


def _errors(summary: Summary) -> str:
    if not summary.errors:
        return "none"
    counts = ", ".join(f"{kind} {count:,}" for kind, count in summary.errors.items())
    return f"{counts} ({summary.error_example})" if summary.error_example else counts


def _cached(summary: Summary) -> str:
    if summary.cached_tokens is None:
        return "- (the server does not report them)"
    return f"{summary.cached_tokens:,}"


def _times(*values: float | None) -> str:
    return " / ".join(_or_dash(value, duration) for value in values)


def _replica_rows(summary: Summary) -> list[tuple[str, str]]:
    return [
        (
            f"replica {name}",
            f"{_percent(figures.request_share)} of requests, "
            f"{_percent(figures.prompt_token_share)} of prompt tokens, "
            f"{figures.work_tokens:,} computed",
        )
        for name, figures in summary.replicas.items()
    ]


def two_columns(rows: Sequence[tuple[str, str]]) -> str:
    width = max(len(caption) for caption, _ in rows)
    return "\n".join(f"  {caption:<{width}}  {text}" for caption, text in rows)


def comparison_table(runs_by_policy: dict[str, list[Run]]) -> str:
    """Return figures side by side: medians of the repeats, their range, the ratio to the first."""
    policies = list(runs_by_policy)
    lines = [["", *policies]]
    for caption, figure, write in FIGURES:
        cells = [caption]
        base: float | None = None
        for policy in policies:
            values = [v for run in runs_by_policy[policy] if (v := figure(run.summary)) is not None]
            cells.append(_cell(values, base, write, first=policy == policies[0]))
            if policy == policies[0] and (middle := spread(values)):
                base = middle.median
        lines.append(cells)
    held = [sum(sum(run.left.values()) for run in runs) for runs in runs_by_policy.values()]
    lines.append(["leases left", *(f"{left:g}" for left in held)])
    lines.append(["replicas' share of prompt tokens", *map(_shares, runs_by_policy.values())])
    widths = [max(len(line[column]) for line in lines) for column in range(len(policies) + 1)]
    rows = ("  ".join(f"{c:<{w}}" for c, w in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(row.rstrip() for row in rows)


def _cell(
    values: list[float], base: float | None, write: Callable[[float], str], *, first: bool
) -> str:
    middle = spread(values)
    if middle is None:
        return "-"
    text = write(middle.median)
    if len(values) > 1:
        text += f" [{write(middle.low)} to {write(middle.high)}]"
    if not first and base:
        text += f" (x{middle.median / base:.2f})"
    return text


def _shares(runs: list[Run]) -> str:
    shares = sorted(f.prompt_token_share for f in runs[0].summary.replicas.values())
    return " ".join(f"{100 * share:.0f}%" for share in reversed(shares)) or "-"


def run_value(run: Run) -> dict[str, Any]:
    """Return one replay as plain values: settings, figures, and columns with an entry a request."""
    return {
        "label": run.label,
        "settings": run.settings,
        "model": run.model,
        "request_count": run.request_count,
        "interrupted": run.interrupted,
        "summary": msgspec.to_builtins(run.summary),
        "left": run.left,
        "requests": _columns(run.outcomes),
    }


def _columns(outcomes: Sequence[Outcome]) -> dict[str, list[Any]]:
    return {
        "index": [o.index for o in outcomes],
        "sent_s": [round(o.sent_s, 6) for o in outcomes],
        "lateness_s": [round(o.lateness_s, 6) for o in outcomes],
        "ttft_s": [None if o.ttft_s is None else round(o.ttft_s, 6) for o in outcomes],
        "total_s": [round(o.ended_s - o.sent_s, 6) for o in outcomes],
        "prompt_tokens": [o.prompt_tokens for o in outcomes],
        "cached_tokens": [o.cached_tokens for o in outcomes],
        "output_tokens": [o.output_tokens for o in outcomes],
        "replica": [o.replica for o in outcomes],
        "error": [o.error for o in outcomes],
    }


def to_json(value: object) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
