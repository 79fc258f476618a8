"""The room in which requests wait: how many, how many octets, of which class, and for how long yet.

Count and octets are bounded as a whole, and less urgent classes to a part of it each. That alone
would let a burst of offline work take room from an online request that comes later; so where there
is no room, a newcomer takes the place of those of a less urgent class that came last. They are told
to come again, and nobody has begun their work.

Nor may one tenant keep the others of its class out by coming first with a thousand: where there is
no room, a newcomer takes the place of the latest of the tenant who has most of it for his weight,
as long as that leaves him no less than the newcomer's tenant has then. That is the longest queue
giving way (McKenney, "Stochastic Fairness Queueing", INFOCOM 1990), with weights.

Who finds no room is told when to come: when as many have left as wait now. They leave at the pace
of the last seconds, and faster once the replicas serve that are on their way.
"""

from __future__ import annotations

from math import ceil
from typing import Final

from proxy.core import limits
from proxy.core.classes import NAMES, OFFLINE, ONLINE, SHARES
from proxy.core.fairness import Account
from proxy.core.held import Held, class_of
from proxy.core.prospects import Prospect
from proxy.errors import RETRY_AFTER_S_MAX


class Part:
    """Those of one tenant, in the order in which they came."""

    __slots__ = ("bytes", "members")

    def __init__(self) -> None:
        self.bytes = 0
        self.members: dict[Held, None] = {}

    def enter(self, held: Held) -> None:
        self.members[held] = None
        self.bytes += held.held_bytes

    def leave(self, held: Held) -> None:
        del self.members[held]
        self.bytes -= held.held_bytes


_NOTHING: Final = Part()  # of a tenant of whom nobody waits
_FITS, _CLASS_OVER, _WHOLE_OVER = range(3)


class Room:
    """Those who wait in one worker, by class, in the order in which they came."""

    __slots__ = ("_bytes", "_bytes_max", "_classes", "_counts_max", "_parts", "bytes", "count")

    def __init__(self) -> None:
        self.count = 0
        self.bytes = 0  # of their bodies
        self._classes: list[dict[Held, None]] = [{} for _ in NAMES]
        self._parts: dict[Account, Part] = {}  # of tenants, where they are told apart
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

    def count_max_of(self, work_class: int) -> int:
        return self._counts_max[work_class]

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
        leaving: dict[Held, None] = {}
        gone_bytes = 0
        while True:
            over = self._over(work_class, len(leaving), size - gone_bytes)
            if over == _FITS:
                break
            other = self._latest_below(work_class, leaving) if over == _WHOLE_OVER else None
            other = other or self._latest_of_most(held, leaving)
            if other is None:
                return None
            leaving[other] = None
            gone_bytes += other.held_bytes
        self._classes[work_class][held] = None
        self._bytes[work_class] += size
        self.count += 1
        self.bytes += size
        if held.account is not None:
            self._parts.setdefault(held.account, Part()).enter(held)
        return list(leaving)

    def _over(self, work_class: int, leaving: int, more_bytes: int) -> int:
        """Return what would be over its limits with one more of a class: that, or the whole.

        Of those who leave while the class is over, all are of that class.
        """
        if (
            len(self._classes[work_class]) - leaving >= self._counts_max[work_class]
            or self._bytes[work_class] + more_bytes > self._bytes_max[work_class]
        ):
            return _CLASS_OVER
        whole = self.count - leaving >= self._counts_max[ONLINE]
        whole = whole or self.bytes + more_bytes > self._bytes_max[ONLINE]
        return _WHOLE_OVER if whole else _FITS

    def _latest_below(self, work_class: int, leaving: dict[Held, None]) -> Held | None:
        """Return who came last of the least urgent class that is less urgent than this."""
        for lower in range(OFFLINE, work_class, -1):
            for other in reversed(self._classes[lower]):
                if other not in leaving:
                    return other
        return None

    def _latest_of_most(self, held: Held, leaving: dict[Held, None]) -> Held | None:
        """Return who came last of the tenant, in this class, that has most of the room.

        None where that would have less of it then than the newcomer's.
        """
        account = held.account
        if account is None:
            return None
        own = self._parts.get(account, _NOTHING)
        most = self._share(account, len(own.members) + 1, own.bytes + held.held_bytes)
        found: Held | None = None
        for other, part in self._parts.items():
            if other is account or other.work_class != account.work_class:
                continue
            count, size = len(part.members), part.bytes
            for each in reversed(part.members):
                count, size = count - 1, size - each.held_bytes
                if each not in leaving:
                    share = self._share(other, count, size)
                    if share >= most:
                        found, most = each, share
                    break
        return found

    def _share(self, account: Account, count: int, size: int) -> float:
        """Return which part of the room so much is, for its weight: of places or of octets."""
        places = count / max(1, self._counts_max[account.work_class])
        octets = size / max(1, self._bytes_max[account.work_class])
        return max(places, octets) / account.weight

    def leave(self, held: Held) -> None:
        work_class = class_of(held)
        del self._classes[work_class][held]
        self._bytes[work_class] -= held.held_bytes
        self.count -= 1
        self.bytes -= held.held_bytes
        if held.account is not None:
            part = self._parts[held.account]
            part.leave(held)
            if not part.members:
                del self._parts[held.account]


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
