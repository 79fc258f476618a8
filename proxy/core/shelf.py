"""What one replica is believed to hold: prefixes by the octets of its cache, and who goes first.

One table holds what is believed and what has aged out, the *ghosts* (see `index`): an entry is a
number, in which the moment of last use, the octets and whether it is a ghost lie side by side. The
order of use is a queue to which every use appends; what was used again later is met in it as well
where it was used before, and passed over there. That takes a third of the time of an ordered table,
which looks every entry up three times more to move it. A queue of which less than half still counts
is written anew.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Final

# A longer piece between two points counts as 16 MB, so that a day's use fits into a machine word.
_OCTET_BITS: Final = 24
_OCTET_MASK: Final = (1 << _OCTET_BITS) - 1
_GHOST: Final = 1  # the lowest bit
_MOMENT_BITS: Final = _OCTET_BITS + 1
_NONE: Final = -1
_QUEUE_SLACK: Final = 64  # passed over without a thought


def octets_of(entry: int) -> int:
    return entry >> 1 & _OCTET_MASK


def moment_of(entry: int) -> int:
    return entry >> _MOMENT_BITS


def is_ghost(entry: int) -> bool:
    return entry & _GHOST > 0


class Sighting:
    """How long ago a replica last used the longest prefix that it is known to have had.

    `octets` is that prefix's length; `away` its place in the order of use: below 1 within the
    believed cache, 0 just used, 1 about to go; above 1 beyond it, by as many caches.
    """

    __slots__ = ("away", "octets")

    def __init__(self, octets: int, away: float) -> None:
        self.octets = octets
        self.away = away


class _Queue:
    """Names in the order in which they were put in, each with what its entry was then."""

    __slots__ = ("entries", "names")

    def __init__(self) -> None:
        self.names: deque[int] = deque()
        self.entries: deque[int] = deque()

    def append(self, name: int, entry: int) -> None:
        self.names.append(name)
        self.entries.append(entry)

    def drop_first(self) -> None:
        self.names.popleft()
        self.entries.popleft()


class Shelf:
    """Time is counted in octets used; that of ghosts, in octets evicted."""

    __slots__ = (
        "_ghost_queue", "_queue", "capacity_octets", "evicted_octets", "ghost_count",
        "ghost_octets", "known", "live_count", "live_octets", "used_octets", "young_octets",
    )  # fmt: skip

    def __init__(self, capacity_octets: int) -> None:
        self.capacity_octets = capacity_octets
        self.known: dict[int, int] = {}  # all entries, by hash
        self.live_count = self.live_octets = 0
        self.ghost_count = self.ghost_octets = 0
        self.used_octets = 0
        self.young_octets = 0  # what was used since this moment is young
        self.evicted_octets = 0
        self._queue = _Queue()
        self._ghost_queue = _Queue()

    # --- reading -----------------------------------------------------------------------------

    def live(self) -> dict[int, int]:
        """Return what is believed to be there, least recently used first, with its octets."""
        known = self.known
        return {
            name: octets_of(entry)
            for name, entry in zip(self._queue.names, self._queue.entries, strict=True)
            if known.get(name, _NONE) == entry
        }

    def oldest(self) -> int:
        """Return the moment of the least recent use; something is believed to be there."""
        names, entries, known = self._queue.names, self._queue.entries, self.known
        while known.get(names[0], _NONE) != entries[0]:
            self._queue.drop_first()
        return moment_of(entries[0])

    def seen(self, entry: int, octets: int, used_octets: int, live_octets: int) -> Sighting:
        """Return where an entry lay while so many octets were used and there."""
        if is_ghost(entry):
            since = self.evicted_octets - moment_of(entry)
            return Sighting(octets, 1.0 + since / self.capacity_octets)
        age = used_octets - moment_of(entry)
        # A cache that is not full has not shown yet where it ends.
        full = min(1.0, live_octets / self.capacity_octets)
        return Sighting(octets, full * age / max(1, used_octets - self.oldest()))

    # --- writing -----------------------------------------------------------------------------

    def begin_young(self, spans: int) -> int:
        """Return from which entry on one is young: used within the last such part of the cache."""
        if self.used_octets - self.young_octets > self.capacity_octets // spans:
            self.young_octets = self.used_octets
        return (self.young_octets + 1) << _MOMENT_BITS

    def use(self, name: int, entry: int) -> None:
        """It is the most recent now. What it was counted with at first, it is counted with for
        good, even where other points cut the same prompt.
        """
        octets = octets_of(entry)
        self.used_octets += octets
        self._put(name, octets)

    def add(self, name: int, octets: int) -> None:
        """It was not there."""
        octets = min(octets, _OCTET_MASK)
        self.used_octets += octets
        self.live_octets += octets
        self.live_count += 1
        self._put(name, octets)

    def _put(self, name: int, octets: int) -> None:
        entry = self.used_octets << _MOMENT_BITS | octets << 1
        self.known[name] = entry
        queue = self._queue
        queue.append(name, entry)
        if len(queue.names) > 2 * self.live_count + _QUEUE_SLACK:
            self._queue = self._rewritten(queue)

    def _rewritten(self, queue: _Queue) -> _Queue:
        """Return the queue without what is met again later in it, or is not there any more."""
        left, known = _Queue(), self.known
        for name, entry in zip(queue.names, queue.entries, strict=True):
            if known.get(name, _NONE) == entry:
                left.append(name, entry)
        return left

    def forget_ghost(self, entry: int) -> None:
        """It comes back: whoever calls this overwrites the entry."""
        self.ghost_octets -= octets_of(entry)
        self.ghost_count -= 1

    def drop(self, name: int) -> bool:
        """It is gone and leaves no ghost; return whether it was believed to be there."""
        entry = self.known.pop(name, _NONE)
        if entry == _NONE:
            return False
        if is_ghost(entry):
            self.forget_ghost(entry)
            return False
        self.live_octets -= octets_of(entry)
        self.live_count -= 1
        return True

    def evict(self) -> int:
        """Make a ghost of the least recently used; return its hash."""
        name, entry = self._take(self._queue)
        octets = octets_of(entry)
        self.live_octets -= octets
        self.live_count -= 1
        self.ghost_octets += octets
        self.ghost_count += 1
        self.evicted_octets += octets
        ghost = self.evicted_octets << _MOMENT_BITS | octets << 1 | _GHOST
        self.known[name] = ghost
        queue = self._ghost_queue
        queue.append(name, ghost)
        if len(queue.names) > 2 * self.ghost_count + _QUEUE_SLACK:
            self._ghost_queue = self._rewritten(queue)
        return name

    def lay_ghost(self) -> None:
        """Forget the ghost that has been one for longest."""
        name, entry = self._take(self._ghost_queue)
        del self.known[name]
        self.forget_ghost(entry)

    def evict_for_good(self) -> int:
        """Forget the least recently used; return its hash."""
        name, _ = self._take(self._queue)
        self.drop(name)
        return name

    def _take(self, queue: _Queue) -> tuple[int, int]:
        """Take the first of a queue that still counts: there is one."""
        known = self.known
        while True:
            name, entry = queue.names.popleft(), queue.entries.popleft()
            if known.get(name, _NONE) == entry:
                return name, entry

    def revive(self) -> Iterator[int]:
        """Believe in ghosts again, the last first, as far as the cache has room; yield hashes."""
        oldest = self.oldest() if self.live_count else 0
        ghosts, known = self._ghost_queue, self.known
        while self.ghost_count:
            name, entry = ghosts.names.pop(), ghosts.entries.pop()
            if known.get(name, _NONE) != entry:
                continue
            octets = octets_of(entry)
            if self.live_octets + octets > self.capacity_octets:
                ghosts.append(name, entry)
                return
            self.forget_ghost(entry)
            self.live_octets += octets
            self.live_count += 1
            known[name] = revived = oldest << _MOMENT_BITS | octets << 1
            self._queue.names.appendleft(name)
            self._queue.entries.appendleft(revived)
            yield name
