"""What happened of late: counters at two moments, and what lies between them.

Counters of all workers only ever grow, so that the difference of two sums is what happened between
them, however many workers there are and whoever else reads them. A series that has fallen, or that
is new, began anew in between: then all of it is of now. Percentiles are read off the differences of
a histogram's buckets, evenly within one bucket, as Prometheus' `histogram_quantile` has it; what is
above the last edge is said to be at that edge, which is the least that it can be.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Final

from proxy.contract.view import Percentiles

Labels = tuple[tuple[str, str], ...]

WINDOW_S: Final = 30.0
MOMENT_INTERVAL_S: Final = 2.5
NONE: Final = Percentiles()


class Totals:
    """Counters of one moment, summed: by name, then by labels. Histograms have buckets besides."""

    __slots__ = ("at_s", "buckets", "values")

    def __init__(self, at_s: float) -> None:
        self.at_s = at_s
        self.values: dict[str, dict[Labels, float]] = {}
        self.buckets: dict[str, dict[Labels, list[int]]] = {}

    def add(self, name: str, labels: Labels, value: float, buckets: Sequence[int] = ()) -> None:
        series = self.values.setdefault(name, {})
        series[labels] = series.get(labels, 0.0) + value
        if buckets:
            counts = self.buckets.setdefault(name, {})
            before = counts.get(labels)
            counts[labels] = (
                list(buckets)
                if before is None
                else [a + b for a, b in zip(before, buckets, strict=True)]
            )


class Window:
    """What was counted from one moment to another."""

    def __init__(self, before: Totals, after: Totals) -> None:
        self._before, self._after = before, after
        self.seconds = max(0.0, after.at_s - before.at_s)

    def by(self, name: str, *labels: str) -> dict[tuple[str, ...], float]:
        """Return how much a counter has grown, by these of its labels."""
        out: dict[tuple[str, ...], float] = {}
        before = self._before.values.get(name, {})
        for series, value in self._after.values.get(name, {}).items():
            grown = value - before.get(series, 0.0)
            key = _key(series, labels)
            out[key] = out.get(key, 0.0) + (grown if grown >= 0.0 else value)
        return out

    def rates(self, name: str, label: str) -> dict[str, float]:
        """Return the growth a second, by one label; only of what has grown."""
        if not self.seconds:
            return {}
        return {key[0]: n / self.seconds for key, n in self.by(name, label).items() if n}

    def buckets_by(self, name: str, label: str) -> dict[str, list[int]]:
        """Return how many values fell into each bucket of a histogram, by one label."""
        out: dict[str, list[int]] = {}
        before = self._before.buckets.get(name, {})
        for series, counts in self._after.buckets.get(name, {}).items():
            old = before.get(series)
            if old is None or len(old) != len(counts) or sum(old) > sum(counts):
                grown = counts
            else:
                grown = [now - was for now, was in zip(counts, old, strict=True)]
            key = _key(series, (label,))[0]
            known = out.get(key)
            if known is None or len(known) != len(grown):
                out[key] = list(grown)
            else:
                out[key] = [a + b for a, b in zip(known, grown, strict=True)]
        return out


class History:
    """The moments of the last window, the oldest first: a bounded number of them."""

    def __init__(self, window_s: float = WINDOW_S, interval_s: float = MOMENT_INTERVAL_S) -> None:
        self._window_s, self._interval_s = window_s, interval_s
        self._moments: deque[Totals] = deque(maxlen=int(window_s / interval_s) + 2)

    def due(self, now_s: float) -> bool:
        """Whether it is time for another moment. Times may be a little early, as timers are."""
        return not self._moments or now_s - self._moments[-1].at_s >= 0.9 * self._interval_s

    def keep(self, totals: Totals) -> None:
        self._moments.append(totals)

    def window(self, now: Totals) -> Window:
        """Return the window that ends now: as long as it should be, or as there is anything."""
        before = now
        for moment in self._moments:
            before = moment
            if now.at_s - moment.at_s <= self._window_s + self._interval_s / 2:
                break
        return Window(before, now)


def percentiles(edges: Sequence[float], counts: Sequence[int]) -> Percentiles:
    """Return what the buckets of a histogram tell; the last is above all edges."""
    count = sum(counts)
    if not count:
        return NONE
    p50_s, p95_s, p99_s = (_quantile(edges, counts, q * count) for q in (0.50, 0.95, 0.99))
    return Percentiles(p50_s=p50_s, p95_s=p95_s, p99_s=p99_s, count=count)


def _quantile(edges: Sequence[float], counts: Sequence[int], rank: float) -> float:
    seen = 0
    low = 0.0
    for edge, count in zip(edges, counts, strict=False):
        if count and seen + count >= rank:
            return round(low + (edge - low) * (rank - seen) / count, 6)
        seen += count
        low = edge
    return edges[-1]


def _key(series: Labels, labels: Sequence[str]) -> tuple[str, ...]:
    named: Mapping[str, str] = dict(series)
    return tuple([named.get(label, "") for label in labels])
