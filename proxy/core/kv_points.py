"""Which block of an engine's cache the end of a chain hash lies in: the bindings of one engine.

A chain hash names the beginning of a prompt; bound to a block, it is cached while that block and
all before it are. So when a block goes, what is bound to it is gone, and what is bound further on
along its path, too: each bound block knows the next bound one above it and those below.

Bounded in chain hashes; the oldest binding goes first and is merely unknown again.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

_NO_CHAINS: Final[tuple[int, ...]] = ()


class Point:
    """A block to which chain hashes are bound."""

    __slots__ = ("above", "below", "block", "chains", "depth")

    def __init__(self, block: int, depth: int) -> None:
        self.block = block
        self.depth = depth
        self.chains: tuple[int, ...] = _NO_CHAINS
        self.above: Point | None = None
        self.below: set[Point] | None = None


class Points:
    """All bindings of one engine."""

    __slots__ = ("_by_block", "_by_chain", "chains_max")

    def __init__(self, chains_max: int) -> None:
        self.chains_max = chains_max
        # Oldest binding first; a plain dict that loses its first keys searches ever longer for one.
        self._by_chain: OrderedDict[int, Point] = OrderedDict()
        self._by_block: dict[int, Point] = {}

    def __len__(self) -> int:
        return len(self._by_chain)

    def at_chain(self, chain: int) -> Point | None:
        return self._by_chain.get(chain)

    def at_block(self, block: int) -> Point | None:
        return self._by_block.get(block)

    def bind(self, chain: int, block: int, depth: int) -> Point:
        """Bind a chain hash to a block, and to no other."""
        before = self._by_chain.pop(chain, None)
        point = self._by_block.get(block)
        if point is None:
            point = self._by_block[block] = Point(block, depth)
        if before is not point:
            if before is not None:
                self._unbind(before, chain)
            point.chains = (*point.chains, chain)
        self._by_chain[chain] = point
        while len(self._by_chain) > self.chains_max:
            oldest, point_of_oldest = self._by_chain.popitem(last=False)
            self._unbind(point_of_oldest, oldest)
        return point

    def join(self, above: Point, below: Point) -> None:
        """Say that one bound block is the next above another, along one path."""
        if below.above is above or below is above:
            return
        self._part(below)
        below.above = above
        if above.below is None:
            above.below = set()
        above.below.add(below)

    def gone(self, block: int) -> list[int]:
        """A block went. Return the chain hashes that are no longer cached; they are unbound."""
        first = self._by_block.get(block)
        if first is None:
            return []
        self._part(first)
        chains: list[int] = []
        waiting = [first]
        while waiting:
            point = waiting.pop()
            del self._by_block[point.block]
            for chain in point.chains:
                del self._by_chain[chain]
            chains += point.chains
            point.chains = _NO_CHAINS
            if point.below is not None:
                waiting += point.below
            point.above = point.below = None
        return chains

    def _unbind(self, point: Point, chain: int) -> None:
        point.chains = tuple([name for name in point.chains if name != chain])
        if point.chains:
            return
        # Nothing is bound here any more: who was below is now below the next one above.
        del self._by_block[point.block]
        above = point.above
        self._part(point)
        for below in list(point.below or ()):
            below.above = None
            if above is not None:
                self.join(above, below)
        point.below = None

    @staticmethod
    def _part(point: Point) -> None:
        if point.above is not None and point.above.below is not None:
            point.above.below.discard(point)
        point.above = None
