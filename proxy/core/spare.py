"""How much of a replica offline work may take beside work that somebody waits for.

What has begun in an engine cannot be called back from its batch. So it is not enough that offline
work goes only when nothing more urgent waits: a replica that is given some in each such moment is
never idle again, and whoever comes next stands behind what is left of it. Under a queue that goes
by urgency without interrupting, each part of the time that goes to less urgent work lengthens the
wait of the urgent by as much of it (Cobham, "Priority Assignment in Waiting Line Problems",
Operations Research 1954), and the longer, the less time is left. Hence a part is all that it gets:
the square of what the urgent leave, so nearly all of that where there are few of them and hardly
any where they fill the replica; but always a little, so that it goes on.

It is counted in seconds of prefill, by replica, of all that is dispatched by whomever. Where
nothing urgent has come for `BESIDE_S` there is nobody to be spared, and no bound.
"""

from __future__ import annotations

from typing import Final

from proxy.core import claim_limits

_LONG_AGO_S: Final = -1e9


class Spare:
    """What was lately given to either, by slot. One writer."""

    __slots__ = ("_at_s", "_next_s", "_work_s")

    def __init__(self) -> None:
        self._at_s: list[float] = []  # when urgent work came last
        self._work_s: list[float] = []  # how much of it came lately, as it was then
        self._next_s: list[float] = []  # when offline work may come again

    def open(self, slot: int) -> None:
        """A replica has taken the slot, and nothing has come there yet."""
        while len(self._at_s) <= slot:
            self._at_s.append(_LONG_AGO_S)
            self._work_s.append(0.0)
            self._next_s.append(_LONG_AGO_S)
        self._at_s[slot] = self._next_s[slot] = _LONG_AGO_S
        self._work_s[slot] = 0.0

    def dispatched(self, slot: int, seconds: float, now_s: float, *, urgent: bool) -> None:
        """Work with so much to prefill goes there; `urgent`: somebody waits for it.

        More offline work may come when what has gone is no more than its part.
        """
        if urgent:
            self._work_s[slot] = self._lately_s(slot, now_s) + seconds
            self._at_s[slot] = now_s
        elif self.beside(slot, now_s):
            begin_s = max(self._next_s[slot], now_s)
            self._next_s[slot] = begin_s + seconds / self.part(slot, now_s)

    def beside(self, slot: int, now_s: float) -> bool:
        """Whether offline work there would be beside urgent work."""
        return now_s - self._at_s[slot] < claim_limits.BESIDE_S

    def part(self, slot: int, now_s: float) -> float:
        """Return the part of its time that offline work may take."""
        busy = self._lately_s(slot, now_s) / claim_limits.BESIDE_S
        left = max(0.0, claim_limits.SPARE_BUSY_MAX - busy)
        return max(claim_limits.SPARE_SHARE_MIN, left * left)

    def opens_s(self, slot: int, now_s: float) -> float:
        """Return from when on offline work may come; not after `now_s`: it may."""
        if not self.beside(slot, now_s):
            return now_s
        return min(self._next_s[slot], self._at_s[slot] + claim_limits.BESIDE_S)

    def _lately_s(self, slot: int, now_s: float) -> float:
        """Return how much urgent work came lately; what is longer ago counts less."""
        passed = (now_s - self._at_s[slot]) / claim_limits.BESIDE_S
        # As an exponential would forget it, and without its cost.
        return self._work_s[slot] / (1.0 + max(0.0, passed))
