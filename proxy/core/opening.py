"""Whether a replica may have a request, and whether it could soon begin it: then it is open.

Near saturation a request is better held than sent, since what has been sent stays where it is; so a
replica is open only while it is about to run out of work (`RUNWAY_S`), and time alone may open it.
"""

from __future__ import annotations

from typing import Final

from proxy.core import claim_limits, limits
from proxy.core.fleet import Pool
from proxy.core.picture import Picture
from proxy.core.policy import Decision, Request

_NEVER: Final = float("inf")


def has_room(decision: Decision, request: Request, picture: Picture) -> bool:
    """Whether a replica may have this request besides those that it has, and its tokens."""
    slot = decision.slot
    if picture.loads.is_full(slot, request.work_class):
        return False
    if slot not in picture.loads.measured:
        return True
    octets = request.chain.prompt_bytes - decision.cached_octets
    return not picture.loads.lacks_room(slot, picture.tokens_of(octets, slot))


def has_little_to_do(slot: int, picture: Picture, now_s: float) -> bool:
    """Whether a replica is open to a request that needs next to nothing."""
    loads = picture.loads
    if loads.is_full(slot):
        return False
    loads.prefilling.settle(slot, now_s)
    return (
        not loads.inflight[slot]
        or loads.wait_s(slot, now_s) + loads.extra_s[slot] <= limits.RUNWAY_S
    )


def is_open(
    decision: Decision,
    request: Request,
    picture: Picture,
    now_s: float,
    runway_s: float = limits.RUNWAY_S,
) -> bool:
    """Whether the replica can soon begin this, so that sending it there is right."""
    loads, slot = picture.loads, decision.slot
    if decision.replica.remote:  # it was chosen because it can (`core.regions`)
        return True
    if not has_room(decision, request, picture):
        return False
    if not loads.inflight[slot]:  # whatever is wrong there, waiting for nobody will not mend it
        return True
    wait_s = loads.wait_s(slot, now_s) + loads.extra_s[slot]
    if slot in loads.tight:
        tokens = picture.tokens_of(request.chain.prompt_bytes, slot)
        wait_s += loads.shortage_s(slot, tokens)
    return wait_s <= runway_s


def runway_beside_s(slot: int, picture: Picture, now_s: float) -> float:
    """Return how little a replica must have to do to be open to offline work.

    Beside more urgent work it is next to nothing, so that what waits for such a replica, here or at
    another worker, has it long before; and below zero while it has had its part (`core.spare`).
    """
    spare = picture.loads.spare
    if not spare.beside(slot, now_s):
        return limits.RUNWAY_S
    return claim_limits.RUNWAY_OVER_S if spare.opens_s(slot, now_s) <= now_s else -1.0


class Opening:
    """Whether a replica of a pool is open now to some request, and when time alone will open one.

    `next_s` is never where a first octet, an end or news of the fleet has to come before.
    """

    __slots__ = ("next_s", "now")

    def __init__(
        self,
        pool: Pool,
        picture: Picture,
        now_s: float,
        runway_s: float = limits.RUNWAY_S,
        *,
        offline: bool = False,
    ) -> None:
        """`runway_s` is the shortest by which any that wait go: it opens later for them.

        `offline`: work of that class waits, too.
        """
        self.now = False
        self.next_s = _NEVER
        seats = picture.seats(pool)
        if seats.away_slots:
            self.now = picture.may_leave(seats, now_s)
        for slot in seats.slots:
            if offline and (spare_s := picture.loads.spare.opens_s(slot, now_s)) > now_s:
                self.next_s = min(self.next_s, spare_s)
            until_s = limits.RUNWAY_S
            if has_little_to_do(slot, picture, now_s):
                self.now = True
                if runway_s >= until_s:
                    continue
                until_s = runway_s
            if picture.loads.is_full(slot):
                continue
            opens_s = _opens_s(slot, picture, now_s, until_s)
            if opens_s > now_s:
                self.next_s = min(self.next_s, opens_s)


def _opens_s(slot: int, picture: Picture, now_s: float, runway_s: float) -> float:
    """Return when a replica that is busy will be open if all goes as it should."""
    loads = picture.loads
    extra_s, end_s = loads.extra_s[slot], loads.head_end_s[slot]
    behind_s = loads.pending_tokens[slot] * loads.s_per_token[slot] + extra_s
    opens_s = loads.gauge_end_s[slot] + extra_s - runway_s
    if end_s <= 0.0:
        return opens_s
    if end_s > now_s and behind_s <= runway_s:
        return max(opens_s, end_s + behind_s - runway_s)
    if slot in loads.prefilling.unseen:
        return max(opens_s, end_s)  # the next one is the head then
    return _NEVER
