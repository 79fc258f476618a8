"""How far a job is, in one line. Pure."""

from __future__ import annotations

from backends.offline.client.values import Progress

BAR_CHARACTERS = 24
HEADINGS = ("ID", "STATE", "MODEL", "LINES", "DONE", "FAILED", "TOKENS", "COST")


def line(progress: Progress, columns: int | None = None) -> str:
    """Return state, bar, lines, speed, time left and cost, as much as fits in `columns`."""
    parts = [progress.state, bar(progress)] if progress.total else [progress.state]
    if progress.total:
        parts.append(f"{progress.done:,}/{progress.total:,} lines")
    if progress.failed:
        parts.append(f"{progress.failed:,} failed")
    if progress.tokens_per_s and not progress.ended:
        parts.append(f"{progress.tokens_per_s:,.0f} tokens/s")
    if progress.ended and progress.tokens:
        parts.append(f"{progress.tokens:,} tokens")
    if progress.eta_s and not progress.ended:
        parts.append(f"{duration(progress.eta_s)} left")
    if progress.cost is not None:
        parts.append(f"cost {progress.cost:,.4g}")
    text = "  ".join(parts)
    return text if columns is None else text[: max(0, columns - 1)]


def bar(progress: Progress) -> str:
    """Return a bar that is full when every line is done, and not before."""
    filled = BAR_CHARACTERS * progress.done // progress.total
    return "[" + "#" * filled + "." * (BAR_CHARACTERS - filled) + "]"


def duration(seconds: float) -> str:
    """Write a time for people, in its two greatest units."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def story(progress: Progress) -> str:
    """Return what is known of one job, in lines."""
    lines = [f"{progress.job_id}  {line(progress)}"]
    lines += [f"  {name}: {value}" for name, value in sorted(progress.metadata.items())]
    lines += [f"  {progress.problem}"] if progress.problem else []
    lines += [f"  {problem} ({problem.code})" for problem in progress.problems]
    return "\n".join(lines)


def table(jobs: list[Progress]) -> str:
    """Return one line for each job under headings."""
    if not jobs:
        return "no batches"
    rows = [HEADINGS, *map(_row, jobs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _row(job: Progress) -> tuple[str, ...]:
    counts = (job.total, job.done, job.failed, job.tokens)
    cost = "-" if job.cost is None else f"{job.cost:,.4g}"
    return (job.job_id, job.state, job.model or "-", *map(str, counts), cost)
