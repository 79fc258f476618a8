"""What the planner makes of replicas of several cards, in the lab, before such a cell is looked at.

`doherty plan MODEL --gpu TYPE --json` says what a step and a prompt are expected to take on one
card and on more. The lab's replica is the one that was measured on one card, quicker by the ratios
of those: of its prompts by that of first tokens, of its steps by that of steps. Each card reads its
part of the contexts and holds its part of the cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec

from loadtest.gpu.fleet import judge
from loadtest.gpu.fleet.judge import Group
from loadtest.gpu.fleet.lab import Foretold, Pool, quicker
from loadtest.gpu.fleet.record import CellKey, RecordError

HEAD = [
    "cell", "TTFT p50 foretold", "seen", "p99 foretold", "seen", "per token p50 foretold", "seen",
]  # fmt: skip


class Considered(msgspec.Struct, frozen=True):
    """The planner's word for one number of cards."""

    gpus: int
    step_expected_s: float
    first_token_expected_s: float


class _Plan(msgspec.Struct):
    considered: list[Considered]


class _Plans(msgspec.Struct):
    plans: list[_Plan]


def read_plan(path: str) -> dict[int, Considered]:
    """Return what a plan says, by the cards of a replica. Raises `RecordError`."""
    try:
        plans = msgspec.json.decode(Path(path).read_bytes(), type=_Plans).plans
    except OSError as error:
        raise RecordError(f"{path}: cannot be read: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise RecordError(f"{path}: {error}; expected what `doherty plan --json` says") from error
    if len(plans) != 1:
        raise RecordError(f"{path}: plans for {len(plans)} types of GPU; name one by --gpu")
    return {found.gpus: found for found in plans[0].considered}


def on_cards(pool: Pool, cards: int, plan: Mapping[int, Considered]) -> Pool | None:
    """Return replicas of so many cards, of one as `pool` has it; None where nothing is planned."""
    one, many = plan.get(1), plan.get(cards)
    if one is None or many is None:
        return None
    speeds = quicker(
        pool.speeds,
        prompts=one.first_token_expected_s / many.first_token_expected_s,
        steps=one.step_expected_s / many.step_expected_s,
        contexts=cards,
    )
    return msgspec.structs.replace(pool, cache_tokens=pool.cache_tokens * cards, speeds=speeds)


def rows(
    groups: Mapping[CellKey, Group], foretold: Mapping[CellKey, Foretold], shape: str
) -> list[list[str]]:
    """Return each cell of several cards a replica, below the same one of `shape`, and their ratio.

    Shown are cells that were both foretold; the ratio is of the second to the first.
    """
    found: list[list[str]] = []
    for key in sorted(groups):
        first = msgspec.structs.replace(key, shape=shape)
        if key.shape == shape or key not in foretold or first not in foretold:
            continue
        above, below = (_values(groups[one], foretold[one]) for one in (first, key))
        found += [_row(first.text, above), _row(key.text, below)]
        ratios = [f"{new / old:.2f}" for old, new in zip(above, below, strict=True)]
        found.append(["  the second over the first", *ratios])
    return found


def _values(group: Group, told: Foretold) -> list[float]:
    seen = group.rows
    return [
        told.ttft_p50_s, judge.ttft(0.5)(seen),
        told.ttft_p99_s, judge.ttft(0.99)(seen),
        1000 * told.tpot_p50_s, 1000 * judge.tpot(0.5)(seen),
    ]  # fmt: skip


def _row(name: str, values: list[float]) -> list[str]:
    times = [f"{value:.3f}" for value in values[:4]]
    return [name, *times, *(f"{value:.1f} ms" for value in values[4:])]
