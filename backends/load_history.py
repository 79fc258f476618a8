"""What a pool's load has been: running totals, one row a second, as far back as windows look.

An observation is taken to have held since the one before it, so that a total is an integral over
time, and a window is the difference of two rows whatever its length. Departures are not counted by
anybody; they follow from arrivals and from what is still there.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from typing import NamedTuple

ROWS_MAX = 4096  # a longer window looks back no further


class Totals(NamedTuple):
    """Sums since the beginning, or over a window; `…_s` are integrals over time."""

    at_s: float = 0.0
    span_s: float = 0.0
    stock_s: float = 0.0  # requests in flight and queued
    flight_s: float = 0.0  # requests in flight
    ready_s: float = 0.0  # replicas that serve
    kv_s: float = 0.0  # whole KV caches that requests hold
    tokens_s: float = 0.0  # prompt tokens that nobody computes yet
    arrivals: float = 0.0
    departures: float = 0.0
    calm_flight_s: float = 0.0  # the next four: while no replica had far more than it should
    calm_ready_s: float = 0.0
    calm_kv_s: float = 0.0
    calm_passed: float = 0.0  # mean of requests that came to a replica and that left one

    @property
    def rate(self) -> float:
        """Arrivals a second."""
        return self.arrivals / self.span_s if self.span_s else 0.0

    def rate_less(self, deviations: float) -> float:
        """Return a lower bound of the rate, if arrivals are Poisson."""
        less = self.arrivals - deviations * self.arrivals**0.5
        return max(0.0, less / self.span_s) if self.span_s else 0.0

    def rate_more(self, deviations: float) -> float:
        """Return an upper bound of the rate, likewise; one more may always have come."""
        more = self.arrivals + deviations * (self.arrivals + 1) ** 0.5
        return more / self.span_s if self.span_s else 0.0


class LoadHistory:
    """The totals of a pool, over the last `span_s` seconds, a row per `width_s`."""

    def __init__(self, width_s: float, span_s: float) -> None:
        self.width_s = width_s
        self._rows: deque[Totals] = deque()
        self.keep(span_s)

    def keep(self, span_s: float) -> None:
        """Look back so far from now on; what is there stays."""
        count = min(ROWS_MAX, int(span_s / self.width_s) + 3)
        if count != self._rows.maxlen:
            self._rows = deque(self._rows, maxlen=count)

    def add(self, passed: Totals) -> None:
        """Add what happened until `passed.at_s`, which is not before the last one."""
        if not self._rows:
            self._rows.append(Totals(at_s=passed.at_s))
            return
        last = self._rows[-1]
        if int(last.at_s / self.width_s) == int(passed.at_s / self.width_s):
            self._rows.pop()
        if not self._rows:  # all within the first row
            self._rows.append(Totals(at_s=last.at_s - last.span_s))
        sums = (before + more for before, more in zip(last[1:], passed[1:], strict=True))
        self._rows.append(Totals(passed.at_s, *sums))

    def window(self, from_s: float, until_s: float | None = None) -> Totals:
        """Return what happened after `from_s`, until `until_s` or now, to the width of a row."""
        if not self._rows:
            return Totals(at_s=from_s)
        first = self._row(from_s)
        last = self._rows[-1] if until_s is None else self._row(until_s)
        changes = (after - before for after, before in zip(last[1:], first[1:], strict=True))
        return Totals(first.at_s, *changes)

    def _row(self, at_s: float) -> Totals:
        """Return the last row that is not after a moment; else the first there is."""
        index = bisect_right(self._rows, at_s + self.width_s / 100, key=lambda row: row.at_s)
        return self._rows[max(0, index - 1)]
