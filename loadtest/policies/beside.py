"""The same requests in the lab as over HTTP, and whether the policies come out in the same order.

Over HTTP there are engines that batch in real time, connections, processes that compete for the
machine, and workers that hear of each other a little late. The lab has none of it. If it ranks
policies as they rank there, what it says of a policy holds for the proxy.

The order is that of the 95th percentile of the time to first token. Two policies that lie within
`SAME` of each other, in either place, have no order: another run would swap them.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from loadtest.policies.cells import Cell, Source, check_policy, run_workload
from loadtest.policies.engines import Timing
from loadtest.policies.ours import NAME
from loadtest.policies.workload import Picked, from_trace
from loadtest.traces import Trace

SAME: Final = 1.15  # two runs of one policy over HTTP differ by up to a tenth
# As the simulator's profile h200-8b: there a prompt of 100,000 tokens takes three times as long
# as at the rate of a short one.
TIMING: Final = Timing(prefill_tokens_per_s=1 / 21.5e-6, prefill_s_per_token_squared=5.05e-10)


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """What the lab shares with the run over HTTP."""

    replicas: int
    workers: int
    kv_cache_tokens: int
    speed: float  # of arrivals
    time_scale: float  # of the engines: their seconds in one of ours


class Seen(msgspec.Struct, frozen=True):
    """What a policy did, in the engines' seconds."""

    ttft_p95_s: float
    tpot_p99_s: float
    hit: float


def check(policies: Sequence[str]) -> None:
    """Raise `ValueError` for a policy that the lab has not."""
    for policy in policies:
        check_policy(spec_of(policy))


def spec_of(policy: str) -> str:
    """Return the lab's name of a policy of the proxy."""
    return NAME if policy == "prefix" else f"{NAME}:{policy}"


def in_the_lab(trace: Trace, policies: Sequence[str], setting: Setting) -> dict[str, Seen]:
    """Return what each policy does on `trace` in the lab. Raises `TraceError`."""
    workload = from_trace(trace, Picked()).fitting(setting.kv_cache_tokens)
    cell = Cell(
        source=Source(name=trace.source),
        replicas=setting.replicas,
        cache_tokens=setting.kv_cache_tokens,
        proxies=setting.workers,
    )
    scale = setting.speed / setting.time_scale
    seen = {}
    for policy in policies:
        figures = run_workload(workload, cell, spec_of(policy), scale=scale, timing=TIMING)
        seen[policy] = Seen(figures.ttft_p95_s, figures.tpot_p99_s, figures.hit)
    return seen


class Compared(msgspec.Struct, frozen=True):
    """The policies over HTTP and in the lab, each in order of TTFT p95, and what does not agree."""

    seen: dict[str, Seen]
    lab: dict[str, Seen]
    disagreements: list[str]


def compare(seen: Mapping[str, Seen], lab: Mapping[str, Seen]) -> Compared:
    return Compared(_ranked(seen), _ranked(lab), disagreements(seen, lab))


def _ranked(figures: Mapping[str, Seen]) -> dict[str, Seen]:
    return dict(sorted(figures.items(), key=lambda item: item[1].ttft_p95_s))


def table(compared: Compared) -> str:
    """Return both orders side by side, and where they differ."""
    columns = [["TTFT p95, least first", *map(str, range(1, len(compared.seen) + 1))]]
    for caption, ranked in (("over HTTP", compared.seen), ("in the lab", compared.lab)):
        column = [caption]
        for policy, figures in ranked.items():
            column.append(
                f"{policy} {figures.ttft_p95_s:.2f} s, hit {100 * figures.hit:.1f} %, "
                f"per token p99 {1000 * figures.tpot_p99_s:.0f} ms"
            )
        columns.append(column)
    widths = [max(map(len, column)) for column in columns]
    lines = [
        "  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)).rstrip()
        for row in zip(*columns, strict=True)
    ]
    return "\n".join([*lines, _verdict(compared)])


def _verdict(compared: Compared) -> str:
    if compared.disagreements:
        return "another order: " + "; ".join(compared.disagreements)
    here, there = list(compared.seen), list(compared.lab)
    swapped = [
        f"{one} and {other}"
        for one, other in itertools.combinations(here, 2)
        if there.index(one) > there.index(other)
    ]
    if swapped:
        return f"the same order, but for those that are too near to have one: {'; '.join(swapped)}"
    return "the same order"


def disagreements(seen: Mapping[str, Seen], lab: Mapping[str, Seen]) -> list[str]:
    """Return the pairs of policies that are clearly ordered in both, and not alike."""
    return [
        f"{one} and {other}"
        for one, other in itertools.combinations(seen, 2)
        if _order(seen, one, other) * _order(lab, one, other) < 0
    ]


def _order(figures: Mapping[str, Seen], one: str, other: str) -> int:
    """Return -1 when `one` is clearly less, 1 when `other` is, else 0."""
    first_s, second_s = figures[one].ttft_p95_s, figures[other].ttft_p95_s
    if first_s * SAME < second_s:
        return -1
    return 1 if second_s * SAME < first_s else 0
