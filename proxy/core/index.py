"""Which replicas hold which prefixes, as far as this proxy knows: what was sent where, and to when.

One table for all replicas: a chain hash to the set of slots that hold it, as bits of one integer,
so that a look-up costs the prompt's points and not the fleet's replicas. What a replica holds is
bounded as its engine bounds it: least recently used goes first, by the octets of its KV cache, and
of one prompt its end before its beginning. The order is exact to a part of the cache: what has been
used since that part began is young, and not moved again.

What has aged out is kept a while as a *ghost*: not believed, but when an answer shows that the
engine had it after all, the cache is larger than believed; and smaller, when something believed was
not there. The size is learned from both (see `picture`). A belief is never a truth: a wrong one
costs a prefill, and no wrong answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from proxy.core import limits
from proxy.core.prefix import PrefixChain
from proxy.core.shelf import Shelf, Sighting, is_ghost


class Index:
    """Chain hashes by replica slot, bounded in entries and in octets."""

    __slots__ = ("_entries_max", "_holders", "_shelves", "first_noted")

    def __init__(self) -> None:
        self.first_noted = 0  # of the points of what was noted last: all before were young
        self._holders: dict[int, int] = {}
        self._shelves: dict[int, Shelf] = {}
        self._entries_max = limits.INDEX_ENTRIES_MAX

    def open(self, slot: int, capacity_octets: int) -> None:
        """A replica has taken the slot, with an empty cache."""
        self.close(slot)
        self._shelves[slot] = Shelf(max(1, capacity_octets))
        self._share_out()

    def close(self, slot: int) -> None:
        self.clear(slot)
        self._shelves.pop(slot, None)
        self._share_out()

    def _share_out(self) -> None:
        each = limits.INDEX_ENTRIES_TOTAL_MAX // max(1, len(self._shelves))
        self._entries_max = min(limits.INDEX_ENTRIES_MAX, each)

    def clear(self, slot: int) -> None:
        """Its cache is empty: it restarted, slept, or was told to forget."""
        shelf = self._shelves.get(slot)
        if shelf is not None:
            for name, entry in shelf.known.items():
                if not is_ghost(entry):
                    self._unset(name, slot)
            self._shelves[slot] = Shelf(shelf.capacity_octets)

    def set_capacity(self, slot: int, capacity_octets: int) -> None:
        """Believe in a smaller or larger cache; ghosts within a larger one are believed again."""
        shelf = self._shelves[slot]
        grown = capacity_octets > shelf.capacity_octets
        shelf.capacity_octets = max(1, capacity_octets)
        self._evict(shelf, slot)
        if grown:
            for name in shelf.revive():
                self._holders[name] = self._holders.get(name, 0) | (1 << slot)

    def entries(self) -> int:
        """Entries of all replicas, ghosts included."""
        return sum([len(shelf.known) for shelf in self._shelves.values()])

    def held_octets(self, slot: int) -> int:
        shelf = self._shelves.get(slot)
        return shelf.live_octets if shelf is not None else 0

    # --- reading -----------------------------------------------------------------------------

    def match(self, chain: PrefixChain, among: int) -> list[tuple[int, int]]:
        """Return who of the slots `among` (as bits) holds a prompt up to which of its points.

        The sets are disjoint, longest prefix first; who is in none holds nothing of it.
        """
        found: list[tuple[int, int]] = []
        left = among
        holders, hashes = self._holders, _listed(chain.hashes)
        for depth in range(len(hashes) - 1, -1, -1):
            bits = holders.get(hashes[depth], 0) & left
            if bits:
                found.append((bits, depth))
                left ^= bits
                if not left:
                    break
        return found

    def held_of(self, slot: int, chain: PrefixChain) -> int:
        """Return how many octets of the prompt one replica is believed to hold."""
        bit = 1 << slot
        for depth in range(len(chain.hashes) - 1, -1, -1):
            if self._holders.get(chain.hashes[depth], 0) & bit:
                return chain.ends[depth]
        return 0

    def sighting(self, slot: int, chain: PrefixChain) -> Sighting | None:
        """Return when the replica last used the longest prefix that it ever had; None: never."""
        shelf = self._shelves.get(slot)
        if shelf is not None:
            for depth in range(len(chain.hashes) - 1, -1, -1):
                entry = shelf.known.get(chain.hashes[depth], -1)
                if entry >= 0:
                    return shelf.seen(
                        entry, chain.ends[depth], shelf.used_octets, shelf.live_octets
                    )
        return None

    def count(self, slot: int) -> int:
        """Return how many entries `dump` would yield."""
        shelf = self._shelves.get(slot)
        return shelf.live_count if shelf is not None else 0

    def dump(self, slot: int) -> Iterator[tuple[int, int]]:
        """Yield what a replica is believed to hold, least recently used first, with its octets."""
        shelf = self._shelves.get(slot)
        if shelf is not None:
            yield from shelf.live().items()

    # --- writing -----------------------------------------------------------------------------

    def note(self, slot: int, chain: PrefixChain) -> Sighting | None:
        """The replica was sent this prompt: it will hold it, as its most recent.

        Returns what `sighting` would have said before.
        """
        self.first_noted = 0
        shelf = self._shelves.get(slot)
        if shelf is None:
            return None
        hashes, ends, known = _listed(chain.hashes), _listed(chain.ends), shelf.known
        young = shelf.begin_young(limits.YOUNG_SPANS_PER_CACHE)
        seen: Sighting | None = None
        used_octets, live_octets = shelf.used_octets, shelf.live_octets
        # Deepest first, so that a prefix is never older than what builds on it, and a prompt is
        # forgotten from its end, as engines evict leaf blocks first. By that, too, whatever comes
        # before something young is young itself.
        for depth in range(len(hashes) - 1, -1, -1):
            name = hashes[depth]
            entry = known.get(name, -1)
            if entry >= 0:
                if seen is None:
                    seen = shelf.seen(entry, ends[depth], used_octets, live_octets)
                if not is_ghost(entry):
                    if entry >= young:
                        self.first_noted = depth
                        break
                    shelf.use(name, entry)
                    continue
                shelf.forget_ghost(entry)
            self._add(shelf, slot, name, ends[depth] - (ends[depth - 1] if depth else 0))
        if shelf.live_octets > shelf.capacity_octets or len(known) > self._entries_max:
            self._evict(shelf, slot)
        return seen

    def renew(self) -> None:
        """Nothing is young any more: whoever follows our notes may have missed some."""
        for shelf in self._shelves.values():
            shelf.young_octets = shelf.used_octets

    def load(self, slot: int, name: int, octets: int) -> None:
        """Take over one entry of somebody else's `dump`, in its order."""
        shelf = self._shelves.get(slot)
        if shelf is not None and octets >= 0:
            self._touch(shelf, slot, name, octets)
            self._evict(shelf, slot)

    def drop(self, slot: int, name: int) -> None:
        """The engine said that this is gone."""
        shelf = self._shelves.get(slot)
        if shelf is not None and shelf.drop(name):
            self._unset(name, slot)

    def _touch(self, shelf: Shelf, slot: int, name: int, octets: int) -> None:
        entry = shelf.known.get(name, -1)
        if entry >= 0 and not is_ghost(entry):
            shelf.use(name, entry)
            return
        if entry >= 0:
            shelf.forget_ghost(entry)
        self._add(shelf, slot, name, octets)

    def _add(self, shelf: Shelf, slot: int, name: int, octets: int) -> None:
        shelf.add(name, octets)
        self._holders[name] = self._holders.get(name, 0) | (1 << slot)

    def _evict(self, shelf: Shelf, slot: int) -> None:
        while shelf.live_octets > shelf.capacity_octets and shelf.live_count:
            self._unset(shelf.evict(), slot)
        ghost_octets_max = shelf.capacity_octets * limits.GHOST_CACHES_MAX
        while shelf.ghost_count and (
            shelf.ghost_octets > ghost_octets_max or len(shelf.known) > self._entries_max
        ):
            shelf.lay_ghost()
        while len(shelf.known) > self._entries_max:
            self._unset(shelf.evict_for_good(), slot)

    def _unset(self, name: int, slot: int) -> None:
        bits = self._holders.get(name, 0) & ~(1 << slot)
        if bits:
            self._holders[name] = bits
        else:
            self._holders.pop(name, None)


def _listed(numbers: Sequence[int]) -> list[int]:
    """Return numbers, mostly as they are, in what the translation reads by place."""
    return numbers if isinstance(numbers, list) else list(numbers)
