"""What the lab foretells of a whole plan before any engine runs.

The capacity is the lab's own, of the engine's measured profile. Where a run has measured one,
`gpu verdict` foretells with that.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

import msgspec

from loadtest.gpu.fleet import lab, load, plan
from loadtest.gpu.fleet.cell import WARM_SHARE
from loadtest.gpu.fleet.lab import Foretold, Pool
from loadtest.gpu.fleet.record import CellKey, Setting
from loadtest.policies.tables import aligned

HEAD = [
    "cell", "sent", "time x", "TTFT p50", "p95", "p99", "per token p50", "p99", "hit",
    "p50 / rr", "p95", "p99", "p50 / sglang", "p95", "p99",
]  # fmt: skip
WINDOW = lab.Window(10.0, 30.0)  # as `gpu fleet` measures a capacity
# As the fields of `Foretold`.
MEANS_HEAD = [
    "ours over", "cell", "repeats", "TTFT p50", "p95", "p99", "per token p50", "p99",
    "answer p50", "p95", "hit",
]  # fmt: skip


def foretell(cells: Sequence[CellKey], choice: load.Choice, setting: Setting, engine: str) -> str:
    """Return a row for each cell of one card a replica. Raises `TraceError`."""
    told: dict[CellKey, Foretold] = {}
    sent: dict[CellKey, tuple[int, float]] = {}
    for key in cells:
        replicas, cards = (int(word) for word in key.shape.split("x"))
        if key.event or cards > 1:
            continue
        pool = Pool(
            replicas=replicas,
            cache_tokens=setting.kv_cache_tokens,
            speeds=lab.speeds_of(engine, 1.0, setting.time_scale),
            workers=setting.workers,
        )
        trace = load.arrivals_of(choice, key.workload, key.repeat)
        paced = load.arrivals_of(choice, load.paced_by(key.workload), key.repeat)
        capacity = lab.uncached_rate(load.workload_of(paced), pool, WINDOW)
        scale = load.scale_for(
            trace,
            key.load * replicas * capacity,
            seconds=setting.seconds,
            replicas=replicas,
            cache_tokens=setting.kv_cache_tokens,
        )
        part = load.workload_of(load.within(trace, scale, setting.seconds))
        told[key] = lab.foretell(part, key.arm, scale, WARM_SHARE * setting.seconds, pool)
        sent[key] = len(part.jobs), scale
    rows = aligned([HEAD, *(_row(key, told, sent[key]) for key in told)])
    return f"{rows}\n\n{means(told)}"


def means(told: Mapping[CellKey, Foretold]) -> str:
    """Return a row for each load and rival: ours over theirs, geometric means over repeats."""
    found: dict[tuple[str, str], list[list[float]]] = {}
    for key, ours in told.items():
        for arm in (plan.SGLANG, plan.OURS_RR, plan.OURS_LEAST):
            other = told.get(msgspec.structs.replace(key, arm=arm))
            if key.arm == plan.OURS and other is not None:
                where = f"{key.workload} {key.load:g} {key.shape}"
                found.setdefault((arm, where), []).append(_over(ours, other))
    body = [
        [arm, where, str(len(ratios)), *(_mean(column) for column in zip(*ratios, strict=True))]
        for (arm, where), ratios in sorted(found.items())
    ]
    return aligned([MEANS_HEAD, *body])


def _over(ours: Foretold, other: Foretold) -> list[float]:
    below = msgspec.structs.astuple(other)
    pairs = zip(msgspec.structs.astuple(ours), below, strict=True)
    return [own / theirs if theirs else math.nan for own, theirs in pairs]


def _mean(ratios: Sequence[float]) -> str:
    whole = all(ratio > 0 for ratio in ratios)
    return f"{statistics.geometric_mean(ratios):.2f}" if whole else "-"


def _row(key: CellKey, told: dict[CellKey, Foretold], sent: tuple[int, float]) -> list[str]:
    own = told[key]
    times = [own.ttft_p50_s, own.ttft_p95_s, own.ttft_p99_s]
    ratios: list[str] = []
    for arm in (plan.OURS_RR, plan.SGLANG):
        other = told.get(msgspec.structs.replace(key, arm=arm))
        others = [other.ttft_p50_s, other.ttft_p95_s, other.ttft_p99_s] if other else [math.nan] * 3
        ratios += [
            "-" if math.isnan(below) else f"{value / below:.2f}"
            for value, below in zip(times, others, strict=True)
        ]
    return [
        key.text,
        str(sent[0]),
        f"{sent[1]:.1f}",
        *(f"{value:.3f}" for value in times),
        f"{1000 * own.tpot_p50_s:.1f} ms",
        f"{1000 * own.tpot_p99_s:.1f} ms",
        f"{own.hit:.3f}",
        *ratios,
    ]
