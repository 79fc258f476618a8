"""What an engine tells of its cache, against the requests that are under way to it.

A request was counted as cached from the moment it was sent; what the engine then says to be gone
may have gone before it began to compute. But it will compute it, and has it when it answers. So
nothing that a request under way is made of is told as gone, and after a clearing it is told as held
again, together with those that have just ended: the news may be older than their end. Who sent a
request, and what went, are heard of in any order: hence the moments.

Of one engine, or one rank of it. Times are of one clock.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable, Sequence

from proxy.core import limits
from proxy.core.prefix import PrefixChain


class Underway:
    """The requests under way, and what was told as gone a moment ago."""

    __slots__ = ("_cleared_s", "_ended", "_open", "_told", "_wanted")

    def __init__(self) -> None:
        self._open: dict[Hashable, PrefixChain] = {}
        self._ended: deque[tuple[float, PrefixChain]] = deque(maxlen=limits.KV_OPEN_MAX)
        self._wanted: dict[int, int] = {}  # chain hashes, and how many requests have each
        # Those told as gone, and when, the oldest first; ordered for the reason in `kv_points`.
        self._told: OrderedDict[int, float] = OrderedDict()
        self._cleared_s = float("-inf")

    def __len__(self) -> int:
        return len(self._open)

    def dispatched(self, key: Hashable, chain: PrefixChain, at_s: float, now_s: float) -> bool:
        """A request was sent then. Say whether it has to be told as held, since parts were gone."""
        self._end(key)
        if len(self._open) >= limits.KV_OPEN_MAX:
            self._end(next(iter(self._open)))
        self._open[key] = chain
        wanted = self._wanted
        for name in chain.hashes:
            wanted[name] = wanted.get(name, 0) + 1
        self._forget_told(now_s)
        gone_s = self._cleared_s
        if self._told:
            for name in chain.hashes:
                gone_s = max(gone_s, self._told.get(name, gone_s))
        return gone_s >= at_s - limits.KV_EARLY_S

    def released(self, key: Hashable, now_s: float) -> None:
        """It has ended. Harmless when repeated."""
        chain = self._end(key)
        if chain is not None:
            self._forget_ended(now_s)
            self._ended.append((now_s, chain))

    def _end(self, key: Hashable) -> PrefixChain | None:
        chain = self._open.pop(key, None)
        if chain is None:
            return None
        wanted = self._wanted
        for name in chain.hashes:
            count = wanted[name] - 1
            if count:
                wanted[name] = count
            else:
                del wanted[name]
        return chain

    def evicted(self, hashes: Sequence[int], now_s: float) -> list[int]:
        """These went. Return those to be told."""
        told = [name for name in hashes if name not in self._wanted]
        self._forget_told(now_s)
        for name in told:
            self._told.pop(name, None)
            self._told[name] = now_s
        while len(self._told) > limits.KV_TOLD_MAX:
            self._told.popitem(last=False)
        return told

    def cleared(self, now_s: float) -> list[PrefixChain]:
        """All went. Return what is held again, or soon."""
        self._cleared_s = now_s
        self._told.clear()
        self._forget_ended(now_s)
        return [*[chain for _, chain in self._ended], *self._open.values()]

    def _forget_ended(self, now_s: float) -> None:
        while self._ended and self._ended[0][0] < now_s - limits.KV_LATE_S:
            self._ended.popleft()

    def _forget_told(self, now_s: float) -> None:
        told = self._told
        while told:
            oldest = next(iter(told))
            if told[oldest] >= now_s - limits.KV_LATE_S:
                return
            del told[oldest]
