"""Which replicas hold which prefixes, as far as this proxy knows: what was sent where, and to when.

One table for all replicas: a chain hash to the set of slots that hold it, as bits of one integer,
so that a look-up costs the prompt's points and not the fleet's replicas. What a replica holds is
bounded as its engine bounds it, by least recent use over the octets of its KV cache; the order of
use is kept in *epochs*, each a thirty-second part of the cache, so that a touch costs one step.

What has aged out is kept a while as a *ghost*: not believed, but when an answer shows that the
engine had it after all, the cache is larger than believed; and smaller, when something believed was
not there. `capacity` learns from both (see `observe`). A belief is never a truth: a wrong one costs
a prefill, and no wrong answer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from proxy.core import limits
from proxy.core.prefix import PrefixChain

_OCTET_BITS = 36  # an entry's octets and its epoch share one integer
_OCTET_MASK = (1 << _OCTET_BITS) - 1


class _Epoch:
    """Entries last used in one span of a replica's time. Some in `names` may have moved on."""

    __slots__ = ("names", "octets")

    def __init__(self) -> None:
        self.names: list[int] = []
        self.octets = 0


class _Shelf:
    """What one replica is believed to hold. Epochs are numbered; `epochs[0]` is number `first`."""

    __slots__ = ("capacity_octets", "epochs", "first", "horizon", "live_octets", "noted", "stamps")

    def __init__(self, capacity_octets: int) -> None:
        self.capacity_octets = capacity_octets
        self.stamps: dict[int, int] = {}  # hash: epoch << _OCTET_BITS | octets
        self.epochs: deque[_Epoch] = deque([_Epoch()])
        self.first = 0
        self.horizon = 0  # entries of earlier epochs are ghosts
        self.live_octets = 0
        self.noted = 0  # entries put into the last epoch


class Sighting:
    """How long ago, in octets used since, a replica last used the longest prefix known of a chain.

    `octets` is that prefix's length, ghosts included; `believed` says that it was thought present.
    """

    __slots__ = ("believed", "distance_octets", "octets")

    def __init__(self, octets: int, distance_octets: int, *, believed: bool) -> None:
        self.octets = octets
        self.distance_octets = distance_octets
        self.believed = believed


class Index:
    """Chain hashes by replica slot, bounded in entries and in octets."""

    __slots__ = ("_holders", "_shelves")

    def __init__(self) -> None:
        self._holders: dict[int, int] = {}
        self._shelves: dict[int, _Shelf] = {}

    def open(self, slot: int, capacity_octets: int) -> None:
        """A replica has taken the slot, with an empty cache."""
        self.clear(slot)
        self._shelves[slot] = _Shelf(max(1, capacity_octets))

    def close(self, slot: int) -> None:
        self.clear(slot)
        self._shelves.pop(slot, None)

    def clear(self, slot: int) -> None:
        """Its cache is empty: it restarted, slept, or was told to forget."""
        shelf = self._shelves.get(slot)
        if shelf is not None:
            for name in shelf.stamps:
                self._unset(name, slot)
            self._shelves[slot] = _Shelf(shelf.capacity_octets)

    def set_capacity(self, slot: int, capacity_octets: int) -> None:
        """Believe in a smaller or larger cache; ghosts within a larger one are believed again."""
        shelf = self._shelves[slot]
        shelf.capacity_octets = max(1, capacity_octets)
        self._bury(shelf, slot)
        while shelf.horizon > shelf.first:
            epoch = shelf.epochs[shelf.horizon - 1 - shelf.first]
            if shelf.live_octets + epoch.octets > shelf.capacity_octets:
                return
            shelf.horizon -= 1
            shelf.live_octets += epoch.octets
            for name in epoch.names:
                if shelf.stamps.get(name, -1) >> _OCTET_BITS == shelf.horizon:
                    self._set(name, slot)

    def entries(self) -> int:
        """Entries of all replicas, ghosts included."""
        return sum([len(shelf.stamps) for shelf in self._shelves.values()])

    def held_octets(self, slot: int) -> int:
        shelf = self._shelves.get(slot)
        return shelf.live_octets if shelf is not None else 0

    # --- reading -----------------------------------------------------------------------------

    def match(self, chain: PrefixChain, among: int) -> list[tuple[int, int]]:
        """Return who of the slots `among` (as bits) holds how many octets of a prompt.

        The sets are disjoint, longest prefix first; who is in none holds nothing of it.
        """
        found: list[tuple[int, int]] = []
        left = among
        holders, hashes = self._holders, chain.hashes
        for depth in range(len(hashes) - 1, -1, -1):
            bits = holders.get(hashes[depth], 0) & left
            if bits:
                found.append((bits, chain.ends[depth]))
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
        if shelf is None:
            return None
        for depth in range(len(chain.hashes) - 1, -1, -1):
            stamp = shelf.stamps.get(chain.hashes[depth], -1)
            if stamp >= 0:
                number = stamp >> _OCTET_BITS
                distance = shelf.epochs[number - shelf.first].octets // 2
                for later in range(number - shelf.first + 1, len(shelf.epochs)):
                    distance += shelf.epochs[later].octets
                return Sighting(chain.ends[depth], distance, believed=number >= shelf.horizon)
        return None

    def dump(self, slot: int) -> Iterator[tuple[int, int]]:
        """Yield what a replica is believed to hold, least recently used first, with its octets."""
        shelf = self._shelves.get(slot)
        if shelf is None:
            return
        for number, epoch in enumerate(list(shelf.epochs), shelf.first):
            if number >= shelf.horizon:
                for name in list(epoch.names):
                    stamp = shelf.stamps.get(name, -1)
                    if stamp >> _OCTET_BITS == number:
                        yield name, stamp & _OCTET_MASK

    # --- writing -----------------------------------------------------------------------------

    def note(self, slot: int, chain: PrefixChain) -> None:
        """The replica was sent this prompt: it will hold it, as its most recent."""
        shelf = self._shelves.get(slot)
        if shelf is None:
            return
        before = 0
        for depth in range(len(chain.hashes)):
            end = chain.ends[depth]
            self._touch(shelf, slot, chain.hashes[depth], end - before)
            before = end
        self._turn_page(shelf, slot)

    def load(self, slot: int, name: int, octets: int) -> None:
        """Take over one entry of somebody else's `dump`, in its order."""
        shelf = self._shelves.get(slot)
        if shelf is not None and 0 <= octets <= _OCTET_MASK:
            self._touch(shelf, slot, name, octets)
            self._turn_page(shelf, slot)

    def drop(self, slot: int, name: int) -> None:
        """The engine said that this is gone."""
        shelf = self._shelves.get(slot)
        if shelf is None:
            return
        stamp = shelf.stamps.pop(name, -1)
        if stamp >= 0:
            number = stamp >> _OCTET_BITS
            octets = stamp & _OCTET_MASK
            shelf.epochs[number - shelf.first].octets -= octets
            if number >= shelf.horizon:
                shelf.live_octets -= octets
                self._unset(name, slot)

    def _touch(self, shelf: _Shelf, slot: int, name: int, octets: int) -> None:
        current = shelf.first + len(shelf.epochs) - 1
        stamp = shelf.stamps.get(name, -1)
        if stamp >= 0:
            number = stamp >> _OCTET_BITS
            if number == current:
                return
            octets = stamp & _OCTET_MASK
            shelf.epochs[number - shelf.first].octets -= octets
            if number < shelf.horizon:
                self._set(name, slot)
                shelf.live_octets += octets
        else:
            self._set(name, slot)
            shelf.live_octets += octets
        epoch = shelf.epochs[-1]
        epoch.octets += octets
        epoch.names.append(name)
        shelf.noted += 1
        shelf.stamps[name] = current << _OCTET_BITS | octets

    def _turn_page(self, shelf: _Shelf, slot: int) -> None:
        """Begin an epoch when the last is full, and bury what no longer fits."""
        full = shelf.epochs[-1].octets >= shelf.capacity_octets // limits.EPOCHS_PER_CACHE
        if full or shelf.noted >= limits.INDEX_ENTRIES_MAX // limits.EPOCHS_PER_CACHE:
            shelf.epochs.append(_Epoch())
            shelf.noted = 0
        if shelf.live_octets > shelf.capacity_octets or full:
            self._bury(shelf, slot)

    def _bury(self, shelf: _Shelf, slot: int) -> None:
        last = shelf.first + len(shelf.epochs) - 1
        while shelf.live_octets > shelf.capacity_octets and shelf.horizon < last:
            epoch = shelf.epochs[shelf.horizon - shelf.first]
            for name in epoch.names:
                if shelf.stamps.get(name, -1) >> _OCTET_BITS == shelf.horizon:
                    self._unset(name, slot)
            shelf.live_octets -= epoch.octets
            shelf.horizon += 1
        while len(shelf.epochs) > limits.EPOCHS_KEPT_MAX or (
            len(shelf.stamps) > limits.INDEX_ENTRIES_MAX and len(shelf.epochs) > 1
        ):
            self._drop_oldest(shelf, slot)

    def _drop_oldest(self, shelf: _Shelf, slot: int) -> None:
        epoch = shelf.epochs.popleft()
        for name in epoch.names:
            if shelf.stamps.get(name, -1) >> _OCTET_BITS == shelf.first:
                del shelf.stamps[name]
                if shelf.first >= shelf.horizon:
                    self._unset(name, slot)
        if shelf.first >= shelf.horizon:  # more entries than we keep, in less than its cache
            shelf.live_octets -= epoch.octets
            shelf.horizon = shelf.first + 1
        shelf.first += 1

    def _set(self, name: int, slot: int) -> None:
        self._holders[name] = self._holders.get(name, 0) | (1 << slot)

    def _unset(self, name: int, slot: int) -> None:
        bits = self._holders.get(name, 0) & ~(1 << slot)
        if bits:
            self._holders[name] = bits
        else:
            self._holders.pop(name, None)
