"""What a pool's load has been: buckets of equal width, as many as the windows need and no more.

An observation is taken to have held since the one before it. Departures are not counted by
anybody; they follow from arrivals and from what is still there, and with them Little's law gives
how long a request stays (John D. C. Little, Operations Research 9 (3), 1961): stay = in flight /
departures a second, over a window that is long against the stay.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

BUCKETS_MAX = 4096  # of one history; a longer window looks back no further


class Bucket:
    """Sums over a stretch of time; `…_s` are integrals over it."""

    __slots__ = (
        "admitted",
        "arrivals",
        "at_s",
        "departures",
        "flight_s",
        "kv_s",
        "preemptions",
        "ready_s",
        "span_s",
        "stock_s",
        "tokens_s",
    )

    def __init__(self, at_s: float) -> None:
        self.at_s = at_s
        self.span_s = 0.0
        self.stock_s = 0.0  # requests in flight and queued
        self.flight_s = 0.0  # requests in flight
        self.ready_s = 0.0  # replicas that serve
        self.kv_s = 0.0  # whole KV caches that requests hold
        self.tokens_s = 0.0  # prompt tokens that nobody computes yet
        self.arrivals = 0
        self.admitted = 0  # to a replica
        self.departures = 0
        self.preemptions = 0


class LoadHistory:
    """The last `span_s` seconds of a pool in buckets of `width_s`."""

    def __init__(self, width_s: float, span_s: float) -> None:
        self.width_s = width_s
        self.buckets: deque[Bucket] = deque()
        self.keep(span_s)

    def keep(self, span_s: float) -> None:
        """Keep so much from now on; what is there stays."""
        count = min(BUCKETS_MAX, int(span_s / self.width_s) + 2)
        if count != self.buckets.maxlen:
            self.buckets = deque(self.buckets, maxlen=count)

    def bucket(self, at_s: float) -> Bucket:
        """Return the bucket of a moment that is not before the last one."""
        start_s = at_s - at_s % self.width_s
        if not self.buckets or self.buckets[-1].at_s < start_s:
            self.buckets.append(Bucket(start_s))
        return self.buckets[-1]

    def since(self, at_s: float) -> Iterator[Bucket]:
        """Yield the buckets that begin after `at_s`, the newest first: what was observed in them
        reaches back before their begin by about what is cut off here."""
        for bucket in reversed(self.buckets):
            if bucket.at_s <= at_s:
                return
            yield bucket

    def summed(self, from_s: float, until_s: float | None = None) -> Bucket:
        """Return the sum over the buckets that begin after `from_s` and not after `until_s`."""
        total = Bucket(from_s)
        for bucket in self.since(from_s):
            if until_s is not None and bucket.at_s > until_s:
                continue
            total.at_s = bucket.at_s
            total.span_s += bucket.span_s
            total.stock_s += bucket.stock_s
            total.flight_s += bucket.flight_s
            total.ready_s += bucket.ready_s
            total.kv_s += bucket.kv_s
            total.tokens_s += bucket.tokens_s
            total.arrivals += bucket.arrivals
            total.admitted += bucket.admitted
            total.departures += bucket.departures
            total.preemptions += bucket.preemptions
        return total
