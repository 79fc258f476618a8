"""The consistent-hash ring: a key to replicas in a fixed order.

A pure function of the replicas' names: the same in every worker and every proxy, and after every
restart, with nothing shared. Each replica has many points on a circle of 64-bit hashes; a key
belongs to the next point clockwise, and its successors are the further replicas met on the way.
Taking one of n replicas away moves its own keys, about 1/n, and no others (Karger et al., 1997).

A weight scales the number of a replica's points, of its own alone: weights that were relative to
the others' would move keys between those that stay whenever somebody comes or goes. For the same
reason it is configured and not read off a cache's size, which is not known while an engine starts.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Final

from xxhash import xxh3_64_intdigest

from proxy.core import limits

ALL_EQUAL: Final[Mapping[str, float]] = MappingProxyType({})


def points_of(weight: float, virtual_nodes: int = limits.VIRTUAL_NODES) -> int:
    """Return how many points a replica of this weight has."""
    return min(limits.VIRTUAL_NODES_MAX, max(1, round(virtual_nodes * weight)))


class Ring:
    """An immutable ring of replica names. `weights` has those that are not 1."""

    __slots__ = ("_owners", "_points", "names")

    def __init__(
        self,
        names: Iterable[str],
        virtual_nodes: int = limits.VIRTUAL_NODES,
        weights: Mapping[str, float] = ALL_EQUAL,
    ) -> None:
        self.names = tuple(sorted(set(names)))
        placed = sorted(
            (xxh3_64_intdigest(f"{name}#{point}".encode()), name)
            for name in self.names
            for point in range(points_of(weights.get(name, 1.0), virtual_nodes))
        )
        self._points = [point for point, _ in placed]
        self._owners = [name for _, name in placed]

    def placed(self) -> tuple[list[int], list[str]]:
        """Return all points in order, and whose each is, for those who show the ring."""
        return self._points, self._owners

    def walk(self, key: int) -> Iterator[str]:
        """Yield every replica once: the key's home, then its successors."""
        owners = self._owners
        size = len(owners)
        at = bisect_left(self._points, key)
        met: set[str] = set()
        left = len(self.names)
        for step in range(size):
            name = owners[(at + step) % size]
            if name not in met:
                met.add(name)
                yield name
                left -= 1
                if not left:
                    return
