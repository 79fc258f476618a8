"""Which prefixes are everybody's: the few that a good part of all requests begin with.

A head that many prompts share (a system prompt, a set of tools) is soon on every replica that takes
such prompts, and what computing it once more costs is shared by all who will use it there. So it
should not draw its prompts to where it happens to be already: what is hot is priced as if it were
everywhere, and by that it comes to be there.

Counted is, for each request, the longest prefix of it that any replica had; for a conversation that
goes on, that is its own past; for one that begins, the head that it shares. The counters are those
of Misra and Gries (1982): with k of them every name with more than one in k of the requests has
one, and no count is too low by more than that share. Counts are halved now and then, to forget.
"""

from __future__ import annotations

from proxy.core import limits


class HotPrefixes:
    """Counts of the most frequent prefixes, in bounded space."""

    __slots__ = ("_counts", "_octets", "_seen")

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self._octets: dict[int, int] = {}  # of those that were worth asking how long they are
        self._seen = 0

    def count(self, name: int) -> bool:
        """A request came whose longest known prefix has this hash.

        Returns whether it has become so frequent that somebody may want to know its length.
        """
        self._seen += 1
        counts = self._counts
        before = counts.get(name, 0)
        if before or len(counts) < limits.HOT_COUNTERS_MAX:
            counts[name] = before + 1
        else:
            self._counts = {each: left - 1 for each, left in counts.items() if left > 1}
        if self._seen >= limits.HOT_WINDOW_MAX:
            self._seen //= 2
            self._counts = {each: left // 2 for each, left in self._counts.items() if left > 1}
        return before + 1 == limits.HOT_COUNT_MIN

    def measure(self, name: int, octets: int) -> None:
        """The prefix of this hash has so many octets."""
        if len(self._octets) >= limits.HOT_COUNTERS_MAX:
            self._octets = {each: n for each, n in self._octets.items() if each in self._counts}
        self._octets[name] = octets

    def hottest(self, most: int) -> list[tuple[int, int, int]]:
        """Return the most frequent by hash, count and octets, the hottest first."""
        found = [
            (name, count, self._octets[name])
            for name, count in self._counts.items()
            if name in self._octets
        ]
        return sorted(found, key=_by_count)[:most]

    def is_hot(self, name: int, octets: int, cache_octets: int) -> bool:
        """Whether a good part of the requests begin with these octets, and caches can spare them.

        At most so many can be as frequent as this one, and all of them together must fit into a
        small part of every cache: else they would displace each other everywhere.
        """
        count = self._counts.get(name, 0)
        if count < limits.HOT_COUNT_MIN or count < limits.HOT_SHARE * self._seen:
            return False
        return octets * self._seen <= limits.HOT_CACHE_SHARE * cache_octets * count


def _by_count(found: tuple[int, int, int]) -> tuple[int, int]:
    return -found[1], found[0]
