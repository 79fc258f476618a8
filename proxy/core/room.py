"""The room in which requests wait: how many, how many octets, of which class, and for how long yet.

Count and octets are bounded as a whole, and less urgent classes to a part of it each. That alone
would let a burst of offline work take room from an online request that comes later; so where there
is no room, a newcomer takes the place of those of a less urgent class that came last. They are told
to come again, and nobody has begun their work.

Who finds no room is told when to come: when as many have left as wait now. They leave at the pace
of the last seconds, and faster once the replicas serve that are on their way.
"""

from __future__ import annotations

from math import ceil

from proxy.core import limits
from proxy.core.classes import NAMES, OFFLINE, ONLINE, SHARES
from proxy.core.held import Held, class_of
from proxy.core.prospects import Prospect
from proxy.errors import RETRY_AFTER_S_MAX


class Room:
    """Those who wait in one worker, by class, in the order in which they came."""

    __slots__ = ("_bytes", "_bytes_max", "_classes", "_counts_max", "bytes", "count")

    def __init__(self) -> None:
        self.count = 0
        self.bytes = 0  # of their bodies
        self._classes: list[dict[Held, None]] = [{} for _ in NAMES]
        self._bytes = [0 for _ in NAMES]
        self._counts_max = [0 for _ in NAMES]  # each class's, and the first one's is the whole
        self._bytes_max = [0 for _ in NAMES]

    def resize(self, count_max: int, bytes_max: int) -> None:
        """Let so many wait from now on; who waits already stays."""
        self._counts_max = [ceil(count_max * share) for share in SHARES]
        self._bytes_max = [int(bytes_max * share) for share in SHARES]

    @property
    def count_max(self) -> int:
        return self._counts_max[ONLINE]

    def count_of(self, work_class: int) -> int:
        return len(self._classes[work_class])

    def bytes_of(self, work_class: int) -> int:
        return self._bytes[work_class]

    def oldest_s(self, work_class: int, now_s: float) -> float:
        """Return the longest wait of those who wait now; 0: none does."""
        for held in self._classes[work_class]:
            return max(0.0, now_s - held.since_s)
        return 0.0

    def enter(self, held: Held) -> list[Held] | None:
        """Let one wait; return who has to leave for it, mostly nobody, and `leave` is to be called.

        None where it finds no room.
        """
        work_class, size = class_of(held), held.held_bytes
        if (
            len(self._classes[work_class]) >= self._counts_max[work_class]
            or self._bytes[work_class] + size > self._bytes_max[work_class]
        ):
            return None
        leaving = self._displaced(work_class, size)
        if leaving is not None:
            self._classes[work_class][held] = None
            self._bytes[work_class] += size
            self.count += 1
            self.bytes += size
        return leaving

    def _displaced(self, work_class: int, size: int) -> list[Held] | None:
        count_over = self.count + 1 - self._counts_max[ONLINE]
        bytes_over = self.bytes + size - self._bytes_max[ONLINE]
        leaving: list[Held] = []
        lower = OFFLINE
        while lower > work_class and (count_over > 0 or bytes_over > 0):
            for other in reversed(self._classes[lower]):
                if count_over <= 0 and bytes_over <= 0:
                    break
                leaving.append(other)
                count_over -= 1
                bytes_over -= other.held_bytes
            lower -= 1
        return leaving if count_over <= 0 and bytes_over <= 0 else None

    def leave(self, held: Held) -> None:
        work_class = class_of(held)
        del self._classes[work_class][held]
        self._bytes[work_class] -= held.held_bytes
        self.count -= 1
        self.bytes -= held.held_bytes


class Pace:
    """How many leave in a second while any wait; what was long ago counts little."""

    __slots__ = ("_at_s", "_count", "_seconds")

    def __init__(self) -> None:
        self._at_s = 0.0
        self._count = 0.0
        self._seconds = 0.0

    def begin(self, now_s: float) -> None:
        """From now on somebody waits: the time before does not count."""
        self._at_s = now_s

    def left(self, now_s: float) -> None:
        self._pass_time(now_s)
        self._count += 1.0

    def per_s(self, now_s: float) -> float:
        self._pass_time(now_s)
        return self._count / self._seconds if self._seconds > 0.0 else 0.0

    def _pass_time(self, now_s: float) -> None:
        passed_s = now_s - self._at_s
        keep = 0.5 ** (passed_s / limits.DRAIN_HALF_LIFE_S)
        self._count *= keep
        self._seconds = self._seconds * keep + passed_s
        self._at_s = now_s


def retry_after_s(count: int, pace_per_s: float, awake: int, prospect: Prospect) -> int:
    """Return when as many will have left as wait now, in whole seconds that clients obey.

    `pace_per_s` is that of the replicas that are `awake`; those that come will add as much each.
    """
    ready_in_s = prospect.ready_in_s if prospect.coming else 0.0
    if pace_per_s <= 0.0:
        known_s = start_retry_s(prospect) if ready_in_s or not awake else 0
        return known_s or RETRY_AFTER_S_MAX
    if pace_per_s * RETRY_AFTER_S_MAX <= count and not ready_in_s:
        return RETRY_AFTER_S_MAX
    wait_s = count / pace_per_s
    if ready_in_s and wait_s > ready_in_s:
        grown = (awake + prospect.coming) / max(1, awake)
        wait_s = ready_in_s + (wait_s - ready_in_s) / grown
    return _whole_s(wait_s)


def start_retry_s(prospect: Prospect) -> int:
    """Return when something of a model may serve of which nothing does; 0: nobody knows."""
    wait_s = prospect.ready_in_s or prospect.start_s
    return _whole_s(wait_s) if wait_s else 0


def _whole_s(wait_s: float) -> int:
    return min(RETRY_AFTER_S_MAX, max(1, ceil(wait_s)))
