"""What the lab foretells of a whole plan before any engine runs.

The capacity is the lab's own, of the engine's measured profile. Where a run has measured one,
`gpu verdict` foretells with that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from loadtest.gpu.fleet import lab, load, plan
from loadtest.gpu.fleet.cell import WARM_SHARE
from loadtest.gpu.fleet.lab import Foretold, Pool
from loadtest.gpu.fleet.record import CellKey, Setting
from loadtest.policies.tables import aligned

HEAD = [
    "cell", "sent", "time x", "TTFT p50", "p95", "p99", "per token p50", "p99", "hit",
    "p50 / rr", "p95", "p99", "p50 / sglang", "p95", "p99",
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
        capacity = lab.uncached_rate(load.workload_of(trace), pool, 4 * lab.AT_ONCE)
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
    return aligned([HEAD, *(_row(key, told, sent[key]) for key in told)])


def _row(key: CellKey, told: dict[CellKey, Foretold], sent: tuple[int, float]) -> list[str]:
    own = told[key]
    times = [own.ttft_p50_s, own.ttft_p95_s, own.ttft_p99_s]
    ratios: list[str] = []
    for arm in (plan.OURS_RR, plan.SGLANG):
        other = told.get(_with(key, arm))
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


def _with(key: CellKey, arm: str) -> CellKey:
    return CellKey(
        workload=key.workload, load=key.load, arm=arm, repeat=key.repeat, shape=key.shape
    )
