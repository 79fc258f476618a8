"""What one way costs more than another, from requests that were sent both ways.

Two questions, two answers. *Distributions*: p50 and p99 of one side less those of the other; this
is what a client sees. *Pairs*: the median of the differences within pairs, which drifts of the
engine do not move. A third arm, direct once more, goes through the same sums: what it differs by is
noise, and a difference of the proxy that is no larger says nothing.

An interval by resampling whole rounds says how sure a difference is; rounds, because requests of
one round share what the engine did at that moment.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Callable, Sequence

import msgspec

RESAMPLES = 400
INTERVAL = (0.025, 0.975)
P50, P99 = 0.5, 0.99

Rounds = Sequence[Sequence[float]]  # for each round the values of one arm, in one order


class Judgement(enum.StrEnum):
    """Whether a promise was kept."""

    KEPT = "kept"
    BROKEN = "broken"
    UNDECIDED = "undecided"  # over the limit, and by no more than direct differs from direct


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """One arm less the other, in one statistic."""

    value: float
    low: float
    high: float


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """One cell and one metric. All in the unit of the values."""

    samples: int
    p50_direct: float
    p99_direct: float
    p50: Difference
    p99: Difference
    paired_p50: float
    control_p50: float  # direct again less direct
    control_p99: float
    control_paired_p50: float


def quantile(values: Sequence[float], share: float) -> float:
    """Return the value below which `share` of all lie, by linear interpolation."""
    ordered = sorted(values)
    if not ordered:
        raise ValueError("no values")
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def flat(rounds: Rounds) -> list[float]:
    return [value for one in rounds for value in one]


def difference(
    one: Rounds, other: Rounds, statistic: Callable[[Sequence[float]], float], draw: random.Random
) -> Difference:
    """Return `statistic` of `one` less that of `other`, with its interval."""
    count = min(len(one), len(other))
    drawn = []
    for _ in range(RESAMPLES):
        places = draw.choices(range(count), k=count)
        first = statistic(flat([one[at] for at in places]))
        drawn.append(first - statistic(flat([other[at] for at in places])))
    return Difference(
        value=statistic(flat(one)) - statistic(flat(other)),
        low=quantile(drawn, INTERVAL[0]),
        high=quantile(drawn, INTERVAL[1]),
    )


def paired(one: Rounds, other: Rounds) -> float:
    """Return the median of the differences within pairs: same round, same place."""
    pairs = [
        first - second
        for left, right in zip(one, other, strict=True)
        for first, second in zip(left, right, strict=False)
    ]
    return quantile(pairs, P50)


def compare(direct: Rounds, again: Rounds, proxied: Rounds, draw: random.Random) -> Comparison:
    """Compare the arms of one cell. Raises `ValueError` when one is empty."""

    def p50(values: Sequence[float]) -> float:
        return quantile(values, P50)

    def p99(values: Sequence[float]) -> float:
        return quantile(values, P99)

    # Both direct arms together are the better known distribution; apart they are the control.
    both = [[*one, *other] for one, other in zip(direct, again, strict=True)]
    values, once, twice = flat(both), flat(direct), flat(again)
    return Comparison(
        samples=len(flat(proxied)),
        p50_direct=p50(values),
        p99_direct=p99(values),
        p50=difference(proxied, both, p50, draw),
        p99=difference(proxied, both, p99, draw),
        paired_p50=paired(proxied, direct),
        control_p50=p50(twice) - p50(once),
        control_p99=p99(twice) - p99(once),
        control_paired_p50=paired(again, direct),
    )


def judge(value: float, control: float, limit: float) -> Judgement:
    """Judge a difference against its limit; noise of its size leaves it undecided."""
    if value <= limit:
        return Judgement.KEPT
    return Judgement.UNDECIDED if abs(control) >= value - limit else Judgement.BROKEN
