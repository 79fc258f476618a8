"""Several GPU types for the same goal: which first, and why.

Offline the cheapest token wins, whatever GPU makes it; online the types that meet the targets, then
the cheapest; semi-online likewise, but GPUs that are easy to get come before scarce ones, since a
burst is served by what can be had within minutes. Without prices, GPU-seconds stand in for money,
which flatters the newest types: the report says so. Where only some types have a price, they come
before those that have none, since seconds and money do not compare.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from backends.plan import Plan, make_plan
from backends.planning.failure import PlanError, RequestError
from backends.planning.goal import Goal
from backends.planning.hardware import Gpu
from backends.planning.shape import ModelShape


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """Plans, best first, and the types on which there is none."""

    plans: tuple[Plan, ...]
    refused: tuple[tuple[str, str], ...]  # name of the type, and why
    rule: str

    @property
    def best(self) -> Plan:
        return self.plans[0]


def compare(goal: Goal, shape: ModelShape, gpus: Sequence[Gpu]) -> Comparison:
    """Return a plan for each type that has one. Raises `PlanError` where none has."""
    plans: list[Plan] = []
    refused: list[tuple[str, str]] = []
    for gpu in gpus:
        try:
            plans.append(make_plan(goal, shape, gpu))
        except RequestError:  # the same on every type
            raise
        except PlanError as error:
            if len(gpus) == 1:
                raise
            refused.append((gpu.name, str(error).split("; it would fit")[0]))
    if not plans:
        raise PlanError(f"it fits none of them: {'; '.join(f'{n}: {why}' for n, why in refused)}")
    return Comparison(
        plans=tuple(sorted(plans, key=_rank)),
        refused=tuple(refused),
        rule=_rule(goal, plans),
    )


def _rank(plan: Plan) -> tuple[bool, bool, bool, float, str]:
    """Return the place of a plan. One without a price cannot be held against one that has it."""
    price = plan.cost.price_per_million
    cost = plan.cost.gpu_s_per_million if price is None else price
    scarce = plan.goal.work == "semi-online" and plan.gpu.scarce
    return bool(plan.missed), scarce, price is None, cost, plan.gpu.name


def _rule(goal: Goal, plans: Sequence[Plan]) -> str:
    first = {
        "online": "those that meet the targets first, then ",
        "semi-online": "those that meet the targets first, then those that are easy to get, then ",
        "offline": "",
    }[goal.work]
    unpriced = [plan.gpu.name for plan in plans if plan.cost.price_per_million is None]
    if not unpriced:
        return first + "by price per million tokens"
    if len(unpriced) < len(plans):
        return first + (
            f"by price per million tokens; no price for {', '.join(unpriced)}: these come after "
            "those that have one, by GPU-seconds"
        )
    return first + (
        "by GPU-seconds per million tokens, as if a second of each cost the same; set prices "
        "with --price TYPE=PER_HOUR or --prices FILE"
    )
