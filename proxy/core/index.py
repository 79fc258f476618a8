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

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Final

from proxy.core import limits
from proxy.core.prefix import PrefixChain

# An entry's octets and the moment of its last use share one integer. A longer piece between two
# points counts as 16 MB, so that days of use fit into a word.
_OCTET_BITS: Final = 24
_OCTET_MASK: Final = (1 << _OCTET_BITS) - 1


class _Shelf:
    """What one replica is believed to hold. Time is counted in octets used."""

    __slots__ = (
        "capacity_octets", "evicted_octets", "ghost_octets", "ghosts", "live", "live_octets",
        "used_octets", "young_octets",
    )  # fmt: skip

    def __init__(self, capacity_octets: int) -> None:
        self.capacity_octets = capacity_octets
        # Hash: moment << _OCTET_BITS | octets; the least recently used first. Of ghosts the moment
        # is the one at which they were evicted, in octets evicted.
        self.live: OrderedDict[int, int] = OrderedDict()
        self.ghosts: OrderedDict[int, int] = OrderedDict()
        self.live_octets = 0
        self.ghost_octets = 0
        self.used_octets = 0
        self.young_octets = 0  # what was used since this moment is young
        self.evicted_octets = 0


class Sighting:
    """How long ago a replica last used the longest prefix that it is known to have had.

    `octets` is that prefix's length; `away` its place in the order of use: below 1 within the
    believed cache, 0 just used, 1 about to go; above 1 beyond it, by as many caches.
    """

    __slots__ = ("away", "octets")

    def __init__(self, octets: int, away: float) -> None:
        self.octets = octets
        self.away = away


class Index:
    """Chain hashes by replica slot, bounded in entries and in octets."""

    __slots__ = ("_entries_max", "_holders", "_shelves", "first_noted")

    def __init__(self) -> None:
        self.first_noted = 0  # of the points of what was noted last: all before were young
        self._holders: dict[int, int] = {}
        self._shelves: dict[int, _Shelf] = {}
        self._entries_max = limits.INDEX_ENTRIES_MAX

    def open(self, slot: int, capacity_octets: int) -> None:
        """A replica has taken the slot, with an empty cache."""
        self.close(slot)
        self._shelves[slot] = _Shelf(max(1, capacity_octets))
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
            for name in shelf.live:
                self._unset(name, slot)
            self._shelves[slot] = _Shelf(shelf.capacity_octets)

    def set_capacity(self, slot: int, capacity_octets: int) -> None:
        """Believe in a smaller or larger cache; ghosts within a larger one are believed again."""
        shelf = self._shelves[slot]
        grown = capacity_octets > shelf.capacity_octets
        shelf.capacity_octets = max(1, capacity_octets)
        self._evict(shelf, slot)
        oldest = shelf.live[next(iter(shelf.live))] >> _OCTET_BITS if shelf.live else 0
        while grown and shelf.ghosts:
            name, entry = shelf.ghosts.popitem(last=True)
            octets = entry & _OCTET_MASK
            if shelf.live_octets + octets > shelf.capacity_octets:
                shelf.ghosts[name] = entry
                return
            shelf.ghost_octets -= octets
            shelf.live_octets += octets
            shelf.live[name] = oldest << _OCTET_BITS | octets
            shelf.live.move_to_end(name, last=False)
            self._holders[name] = self._holders.get(name, 0) | (1 << slot)

    def entries(self) -> int:
        """Entries of all replicas, ghosts included."""
        return sum([len(shelf.live) + len(shelf.ghosts) for shelf in self._shelves.values()])

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

    def holders_of(self, name: int) -> int:
        """Return who holds what this hash names, slots as bits."""
        return self._holders.get(name, 0)

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
                name = chain.hashes[depth]
                entry = shelf.live.get(name, -1)
                if entry >= 0:
                    return _seen_live(
                        shelf, entry, chain.ends[depth], shelf.used_octets, shelf.live_octets
                    )
                entry = shelf.ghosts.get(name, -1)
                if entry >= 0:
                    return _seen_ghost(shelf, entry, chain.ends[depth])
        return None

    def count(self, slot: int) -> int:
        """Return how many entries `dump` would yield."""
        shelf = self._shelves.get(slot)
        return len(shelf.live) if shelf is not None else 0

    def dump(self, slot: int) -> Iterator[tuple[int, int]]:
        """Yield what a replica is believed to hold, least recently used first, with its octets."""
        shelf = self._shelves.get(slot)
        if shelf is not None:
            for name, entry in list(shelf.live.items()):
                yield name, entry & _OCTET_MASK

    # --- writing -----------------------------------------------------------------------------

    def note(self, slot: int, chain: PrefixChain) -> Sighting | None:
        """The replica was sent this prompt: it will hold it, as its most recent.

        Returns what `sighting` would have said before.
        """
        self.first_noted = 0
        shelf = self._shelves.get(slot)
        if shelf is None:
            return None
        hashes, ends, live = _listed(chain.hashes), _listed(chain.ends), shelf.live
        if (
            shelf.used_octets - shelf.young_octets
            > shelf.capacity_octets // limits.YOUNG_SPANS_PER_CACHE
        ):
            shelf.young_octets = shelf.used_octets
        young = (shelf.young_octets + 1) << _OCTET_BITS
        seen: Sighting | None = None
        used_octets, live_octets = shelf.used_octets, shelf.live_octets
        # Deepest first, so that a prefix is never older than what builds on it, and a prompt is
        # forgotten from its end, as engines evict leaf blocks first. By that, too, whatever comes
        # before something young is young itself.
        for depth in range(len(hashes) - 1, -1, -1):
            name = hashes[depth]
            entry = live.get(name, -1)
            if entry >= 0:
                if seen is None:
                    seen = _seen_live(shelf, entry, ends[depth], used_octets, live_octets)
                if entry >= young:
                    self.first_noted = depth
                    break
                self._use(shelf, name, entry & _OCTET_MASK)
                continue
            if name in shelf.ghosts:
                entry = shelf.ghosts.pop(name)
                if seen is None:
                    seen = _seen_ghost(shelf, entry, ends[depth])
                shelf.ghost_octets -= entry & _OCTET_MASK
            self._add(shelf, slot, name, ends[depth] - (ends[depth - 1] if depth else 0))
        entries = len(live) + len(shelf.ghosts)
        if shelf.live_octets > shelf.capacity_octets or entries > self._entries_max:
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
        if shelf is not None:
            entry = shelf.live.pop(name, -1)
            if entry >= 0:
                shelf.live_octets -= entry & _OCTET_MASK
                self._unset(name, slot)
            ghost = shelf.ghosts.pop(name, -1)
            if ghost >= 0:
                shelf.ghost_octets -= ghost & _OCTET_MASK

    def _touch(self, shelf: _Shelf, slot: int, name: int, octets: int) -> None:
        entry = shelf.live.get(name, -1)
        if entry >= 0:
            self._use(shelf, name, entry & _OCTET_MASK)
            return
        ghost = shelf.ghosts.pop(name, -1)
        if ghost >= 0:
            shelf.ghost_octets -= ghost & _OCTET_MASK
        self._add(shelf, slot, name, octets)

    def _use(self, shelf: _Shelf, name: int, octets: int) -> None:
        """Where other points cut the same prompt, its length since the point before differs: what
        it was counted with at first, it is counted with for good.
        """
        shelf.used_octets += octets
        shelf.live[name] = shelf.used_octets << _OCTET_BITS | octets
        shelf.live.move_to_end(name)

    def _add(self, shelf: _Shelf, slot: int, name: int, octets: int) -> None:
        octets = min(octets, _OCTET_MASK)
        shelf.used_octets += octets
        shelf.live_octets += octets
        shelf.live[name] = shelf.used_octets << _OCTET_BITS | octets
        self._holders[name] = self._holders.get(name, 0) | (1 << slot)

    def _evict(self, shelf: _Shelf, slot: int) -> None:
        while shelf.live_octets > shelf.capacity_octets and shelf.live:
            name, entry = shelf.live.popitem(last=False)
            octets = entry & _OCTET_MASK
            shelf.live_octets -= octets
            shelf.ghost_octets += octets
            shelf.evicted_octets += octets
            shelf.ghosts[name] = shelf.evicted_octets << _OCTET_BITS | octets
            self._unset(name, slot)
        ghost_octets_max = shelf.capacity_octets * limits.GHOST_CACHES_MAX
        entries = len(shelf.live) + len(shelf.ghosts)
        while shelf.ghosts and (
            shelf.ghost_octets > ghost_octets_max or entries > self._entries_max
        ):
            _, entry = shelf.ghosts.popitem(last=False)
            shelf.ghost_octets -= entry & _OCTET_MASK
            entries -= 1
        while entries > self._entries_max:
            name, entry = shelf.live.popitem(last=False)
            shelf.live_octets -= entry & _OCTET_MASK
            self._unset(name, slot)
            entries -= 1

    def _unset(self, name: int, slot: int) -> None:
        bits = self._holders.get(name, 0) & ~(1 << slot)
        if bits:
            self._holders[name] = bits
        else:
            self._holders.pop(name, None)


def _seen_live(
    shelf: _Shelf, entry: int, octets: int, used_octets: int, live_octets: int
) -> Sighting:
    """`used_octets` and `live_octets` were the shelf's when the entry was as it is."""
    oldest = shelf.live[next(iter(shelf.live))] >> _OCTET_BITS
    age = used_octets - (entry >> _OCTET_BITS)
    # A cache that is not full has not shown yet where it ends.
    full = min(1.0, live_octets / shelf.capacity_octets)
    return Sighting(octets, full * age / max(1, used_octets - oldest))


def _seen_ghost(shelf: _Shelf, entry: int, octets: int) -> Sighting:
    since = shelf.evicted_octets - (entry >> _OCTET_BITS)
    return Sighting(octets, 1.0 + since / shelf.capacity_octets)


def _listed(numbers: Sequence[int]) -> list[int]:
    """Return numbers, mostly as they are, in what the translation reads by place."""
    return numbers if isinstance(numbers, list) else list(numbers)
