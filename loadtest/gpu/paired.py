"""What one way costs more than another, from requests that were sent both ways.

Two questions, two answers. *Distributions*: p50 and p99 of one side less those of the other; this
is what a client sees. *Pairs*: the median of the differences within pairs, which drifts of the
engine do not move. A third arm, direct once more, goes through the same sums: what it differs by is
noise, and a difference of the proxy that is no larger says nothing.

An interval by resampling whole rounds says how sure a difference is; rounds, because requests of
one round share what the engine did at that moment.

A promise is kept when the whole interval is within its limit, and broken when the whole interval is
beyond it; anything else is undecided, however near the middle of the interval is. Rounds that stand
for each other do not know of a drift that all of them saw, so the control has a say, too: where
being off by as much as it is would bring the difference to the other side of the limit, nothing is
decided either. More rounds narrow the interval; no rule here moves the limit.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Sequence

import msgspec

RESAMPLES = 200
INTERVAL = (0.025, 0.975)
P50, P99 = 0.5, 0.99

Rounds = Sequence[Sequence[float]]  # for each round the values of one arm, in one order


class Judgement(enum.StrEnum):
    """Whether a promise was kept."""

    KEPT = "kept"
    BROKEN = "BROKEN"
    UNDECIDED = "UNDECIDED"  # the interval has the limit inside, or the control is as far off
    TOO_FEW = "too few"  # values to say anything of that share


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


def quantile(ordered: Sequence[float], share: float) -> float:
    """Return the value below which `share` of all lie, in order, by linear interpolation."""
    if not ordered:
        raise ValueError("no values")
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def flat(rounds: Rounds) -> list[float]:
    return [value for one in rounds for value in one]


def differences(
    one: Rounds, other: Rounds, shares: Sequence[float], draw: random.Random
) -> list[Difference]:
    """Return the quantiles of `one` less those of `other`, each with its interval."""
    count = min(len(one), len(other))
    drawn: list[list[float]] = [[] for _ in shares]
    for _ in range(RESAMPLES):
        places = draw.choices(range(count), k=count)
        first = sorted(flat([one[at] for at in places]))
        second = sorted(flat([other[at] for at in places]))
        for share, found in zip(shares, drawn, strict=True):
            found.append(quantile(first, share) - quantile(second, share))
    first, second = sorted(flat(one)), sorted(flat(other))
    return [
        Difference(
            value=quantile(first, share) - quantile(second, share),
            low=quantile(sorted(found), INTERVAL[0]),
            high=quantile(sorted(found), INTERVAL[1]),
        )
        for share, found in zip(shares, drawn, strict=True)
    ]


def paired(one: Rounds, other: Rounds) -> float:
    """Return the median of the differences within pairs: same round, same place."""
    pairs = [
        first - second
        for left, right in zip(one, other, strict=True)
        for first, second in zip(left, right, strict=False)
    ]
    return quantile(sorted(pairs), P50)


def compare(direct: Rounds, again: Rounds, proxied: Rounds, draw: random.Random) -> Comparison:
    """Compare the arms of one cell. Raises `ValueError` when one is empty."""

    # Both direct arms together are the better known distribution; apart they are the control.
    both = [[*one, *other] for one, other in zip(direct, again, strict=True)]
    values, once, twice = (sorted(flat(arm)) for arm in (both, direct, again))
    p50, p99 = differences(proxied, both, (P50, P99), draw)
    return Comparison(
        samples=len(flat(proxied)),
        p50_direct=quantile(values, P50),
        p99_direct=quantile(values, P99),
        p50=p50,
        p99=p99,
        paired_p50=paired(proxied, direct),
        control_p50=quantile(twice, P50) - quantile(once, P50),
        control_p99=quantile(twice, P99) - quantile(once, P99),
        control_paired_p50=paired(again, direct),
    )


def judge(
    found: Difference, control: float, limit: float, samples: int, samples_min: int
) -> Judgement:
    """Judge a difference against its limit: by its interval, and beside its noise."""
    if samples < samples_min:
        return Judgement.TOO_FEW
    if found.high <= limit and found.value + abs(control) <= limit:
        return Judgement.KEPT
    if found.low > limit and found.value - abs(control) > limit:
        return Judgement.BROKEN
    return Judgement.UNDECIDED
