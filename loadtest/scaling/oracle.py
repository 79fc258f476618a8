"""The cheapest schedule of replicas for one that knows the future, with the same start time.

What is needed when comes from a run in which replicas are there the moment they are wanted: the
mean in flight over six seconds at the target, and what is in flight in the second at `max_inputs`,
the larger of the two. So the oracle is allowed what everybody is: to burst above the target for a
moment. It starts each replica `start_s` before it is needed and pays for that; where one is needed
again within `start_s` it is kept, because starting it again would cost as much.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

MEAN_S = 6


def needs(in_flight: Sequence[float], target: float, max_inputs: int, spare: float) -> list[int]:
    """Return the replicas that each second needs; `spare` of one is not worth another."""
    found = []
    for second, now in enumerate(in_flight):
        around = in_flight[max(0, second - MEAN_S // 2) : second + MEAN_S // 2]
        mean = sum(around) / len(around) if around else now
        found.append(max(1, math.ceil(mean / target - spare), math.ceil(now / max_inputs)))
    return found


def schedule(needed: Sequence[int], start_s: float) -> list[tuple[float, int]]:
    """Return the sizes to order, (from when, how many with those on their way)."""
    changes: list[tuple[float, int]] = []
    for level in range(1, max(needed, default=0) + 1):
        for begin_s, end_s in _stretches(needed, level, start_s):
            changes += [(begin_s - start_s, 1), (end_s, -1)]
    size, plan = 0, []
    for at_s, change in sorted(changes, key=lambda one: (one[0], -one[1])):
        size += change
        plan.append((at_s, size))
    return plan


def _stretches(needed: Sequence[int], level: int, start_s: float) -> list[tuple[float, float]]:
    """Return when at least `level` are needed, joined where the gap is no longer than a start."""
    found: list[tuple[float, float]] = []
    for second, count in enumerate(needed):
        if count < level:
            continue
        if found and second - found[-1][1] <= start_s:
            found[-1] = (found[-1][0], second + 1.0)
        else:
            found.append((float(second), second + 1.0))
    return found
