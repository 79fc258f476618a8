"""`doherty scale`: how many replicas the pools have and should have, and why; or set that."""

from __future__ import annotations

import urllib.request
from collections import Counter
from urllib.parse import quote

import msgspec

from backends.failure import StartError
from backends.operate import ask
from backends.scaling_report import (
    POOLS_PATH,
    SCALING_PATH,
    PoolReport,
    ScalingReport,
    decode_report,
)
from backends.status import check_manager_url

HEADINGS = ("POOL", "CLASS", "MIN", "MAX", "DESIRED", "READY", "COMING", "RESTING", "REASON")
NOTES_SHOWN = 10


def fetch_scaling(manager_url: str) -> ScalingReport:
    """Ask a manager. Raises `StartError` saying what to do."""
    check_manager_url(manager_url)
    url = manager_url.rstrip("/") + SCALING_PATH
    body = ask(manager_url, urllib.request.Request(url))  # noqa: S310  # checked
    try:
        return decode_report(body)
    except msgspec.MsgspecError as error:
        raise StartError(f"{url} answered something else than pools: {error}") from error


def scale(manager_url: str, pool: str | None, replicas: int | None) -> str:
    """Set the size of a pool, or tell of it, or of all. Raises `StartError`."""
    if pool is not None and replicas is not None:
        check_manager_url(manager_url)
        path = POOLS_PATH.format(pool_id=quote(pool, safe=""))
        url = f"{manager_url.rstrip('/')}{path}?replicas={replicas}"
        ask(manager_url, urllib.request.Request(url, data=b"", method="POST"))  # noqa: S310
        return f"pool {pool} is to have {replicas} replicas, until the configuration is read again"
    report = fetch_scaling(manager_url)
    if pool is None:
        return table(report)
    for known in report.pools:
        if known.pool == pool:
            return story(known)
    names = ", ".join(known.pool for known in report.pools) or "none"
    raise StartError(f"no pool '{pool}'; there are: {names}")


def table(report: ScalingReport) -> str:
    """Return one line for each pool under headings."""
    if not report.pools:
        return "no pools"
    rows = [HEADINGS, *(_row(pool) for pool in report.pools)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    if report.gpus.total:
        lines.append(f"GPUs: {report.gpus.free} of {report.gpus.total} free")
    return "\n".join(lines)


def story(pool: PoolReport) -> str:
    """Return a pool's line, what the last decision was made of, and the last changes of mind."""
    lines = [table(ScalingReport(at_s=0.0, proxies=0, pools=(pool,)))]
    if pool.decision is not None:
        terms = ", ".join(f"{name} {value:g}" for name, value in pool.decision.terms.items())
        lines.append(f"terms: {terms or 'none'}")
    for note in pool.notes[-NOTES_SHOWN:]:
        moves = "; ".join(note.moves)
        burst = " in a burst" if note.panicking else ""
        what = f"{note.was} to {note.desired}{burst}: {note.reason}"
        lines.append(f"{_clock(note.at_s)}  {what}" + (f" ({moves})" if moves else ""))
    return "\n".join(lines)


def _row(pool: PoolReport) -> tuple[str, ...]:
    resting = ", ".join(f"{n} {rung}" for rung, n in Counter(pool.resting.values()).items())
    reason = pool.decision.reason if pool.decision else "of a fixed size"
    if pool.decision and pool.decision.panicking:
        reason = f"burst: {reason}"
    if pool.waiting:
        reason += f"; waits: {pool.waiting}"
    numbers = (pool.min, pool.max, pool.desired, pool.ready, pool.coming)
    kind = f"{pool.work_class} jobs" if pool.serves == "jobs" else pool.work_class
    return (pool.pool, kind, *map(str, numbers), resting or "-", reason)


def _clock(at_s: float) -> str:
    """Return the time of day, UTC."""
    day_s = int(at_s) % 86_400
    return f"{day_s // 3600:02d}:{day_s // 60 % 60:02d}:{day_s % 60:02d}"
