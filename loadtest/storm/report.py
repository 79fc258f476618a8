"""What the scenarios showed, as a table, and what of it breaks a promise. Pure."""

from __future__ import annotations

import msgspec

from loadtest.storm.ledger import BROKEN, OUTCOMES, Tally
from loadtest.storm.scenarios import Back, Delivery, Stall

SCENARIOS = ("storm", "deliveries", "stall", "restart")
VISIBLE_S_WANTED = 0.05  # from a cut to its reader's notice, p99
BACK_S_WANTED = 1.0  # from a port to the first 200
BACK_AFTER_LONG_S_WANTED = 2.0
LONG_OUTAGE_S = 10.0
DETAILS_MAX = 20


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What is run. The defaults are the full measure."""

    scenarios: tuple[str, ...] = SCENARIOS
    streams: int = 10_000
    faults: int = 50
    concurrency: int = 200
    replicas: int = 4
    workers: int = 2
    seed: int = 1
    pace: float = 1.0  # 2: answers come twice as fast
    repeats: int = 3  # of each case of `deliveries`
    cases_every: int = 1  # 2: every second case of each point
    stall_streams: int = 50
    stall: float = 2.0
    outages: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0, 1.0, 30.0)


class Result(msgspec.Struct, kw_only=True):
    """What the scenarios showed; None where one was not run."""

    options: Options
    storm: Tally | None = None
    unrest: dict[str, float] = {}  # what the proxy had not back to zero
    deliveries: list[Delivery] = []
    stall: Stall | None = None
    restarts: list[Back] = []


def percentile(values: list[float], share: float) -> float:
    """Return the smallest value that at least this share does not exceed; 0 of none."""
    ordered = sorted(values)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)] if ordered else 0.0


def table(result: Result) -> str:
    """Return everything as text."""
    lines: list[str] = []
    if result.storm is not None:
        lines += _storm_lines(result.storm, result.options)
    if result.deliveries:
        lines += ["", *_columns(_delivery_rows(result.deliveries))]
    if result.stall is not None:
        lines += [
            "",
            f"stall of {result.stall.seconds:g} s: {result.stall.complete} of "
            f"{result.stall.streams} streams complete",
        ]
    if result.restarts:
        rows = [["restart after", "port to first 200", "to last failure", "wanted"]]
        for back in result.restarts:
            rows.append(
                [f"{back.outage_s:g} s", f"{back.first_s:.2f} s", f"{back.last_failure_s:.2f} s"]
            )
            rows[-1].append(f"< {_back_wanted_s(back):g} s")
        lines += ["", *_columns(rows)]
    rest = ", ".join(f"{name} {value:g}" for name, value in result.unrest.items())
    lines += ["", f"afterwards: {rest or 'gauges, connections and descriptors back to zero'}"]
    return "\n".join(lines).lstrip("\n")


def _back_wanted_s(back: Back) -> float:
    return BACK_AFTER_LONG_S_WANTED if back.outage_s > LONG_OUTAGE_S else BACK_S_WANTED


def _storm_lines(tally: Tally, options: Options) -> list[str]:
    rows = [["streams", *OUTCOMES, "twice", "bodies"]]
    counts = [tally.counts.get(word, 0) for word in OUTCOMES]
    rows.append([f"{n:,}" for n in (tally.streams, *counts, tally.twice, tally.spoiled_bodies)])
    return [
        f"{options.faults} faults, {options.replicas} engines, {options.workers} workers, "
        f"{options.concurrency} streams at a time, seed {options.seed}",
        *_columns(rows),
        *tally.details[:DETAILS_MAX],
        "",
        *_columns(_latency_rows(tally)),
    ]


def _latency_rows(tally: Tally) -> list[list[str]]:
    rows = [["cut is visible after", "cuts", "p50", "p99", "max", "wanted"]]
    kinds = sorted(tally.latencies_s.items())
    wanted = f"p99 < {VISIBLE_S_WANTED * 1e3:g} ms"
    for what, values in [
        *kinds,
        ("all", [s for _, more in kinds for s in more]),
        ("direct", tally.direct_s),
    ]:
        ms = [f"{percentile(values, share) * 1e3:.1f} ms" for share in (0.5, 0.99, 1.0)]
        rows.append([what, f"{len(values):,}", *ms, wanted if what == "all" else ""])
    return rows


def _delivery_rows(deliveries: list[Delivery]) -> list[list[str]]:
    rows = [["engine fails after", "requests", "delivered 0", "1", "more", "broken", "ends"]]
    for one in deliveries:
        more = sum(count for times, count in one.deliveries.items() if times > 1)
        counts = (one.requests, *(one.deliveries.get(n, 0) for n in (0, 1)), more, one.broken)
        ends = ", ".join(f"{count} {word}" for word, count in sorted(one.outcomes.items()))
        rows.append([one.point, *map(str, counts), ends])
    return rows


def _columns(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if i and not cell[:1].isalpha() else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def complaints(result: Result) -> list[str]:
    """Return the promises that were broken; times are shown, not judged: machines differ."""
    found = []
    if (tally := result.storm) is not None:
        found += [f"{n} {word}" for word in BROKEN if (n := tally.counts.get(word, 0))]
        found += [f"{tally.twice} delivered twice"] if tally.twice else []
        found += [f"{tally.spoiled_bodies} bodies spoiled"] if tally.spoiled_bodies else []
    found += [f"{one.broken} broken at {one.point!r}" for one in result.deliveries if one.broken]
    if result.stall is not None and result.stall.complete < result.stall.streams:
        found.append(f"a stall broke streams: {result.stall.outcomes}")
    found += [f"not back to zero: {name} {value:g}" for name, value in result.unrest.items()]
    return found
