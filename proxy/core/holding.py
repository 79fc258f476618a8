"""Late binding: a request waits here while every replica has enough to do, and then goes.

What has been sent to a replica stays there, whatever happens next; what waits here can still go to
the replica that is free first, or to one that comes up meanwhile. So near saturation requests are
held, and each replica is given the next one when it is about to run out of work (`RUNWAY_S`).

The order is shortest first with ageing: by the least prefill that the request needs on any replica,
less the time it has waited. As everybody ages alike, the place in the order never changes: it is
that prefill plus the time of arrival, each in seconds. A request whose best replica is still busy
reserves its place there and goes on waiting, and those behind it may pass to other replicas.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Final

from proxy.core import limits
from proxy.core.fleet import Pool
from proxy.core.picture import Picture
from proxy.core.policy import Decision, Policy, Request
from proxy.core.prefix import NO_CHAIN

_NOBODY: Final = Request(NO_CHAIN, has_session=False)


class Held:
    """One request that waits, and what is called with its decision when that has come."""

    __slots__ = ("gone", "on_decision", "pool_of", "rank_s", "request", "since_s")

    def __init__(
        self,
        request: Request,
        pool_of: Callable[[], Pool | None],
        on_decision: Callable[[Decision], None],
        since_s: float,
    ) -> None:
        """`pool_of` returns the pool as it is now: the fleet changes while one waits."""
        self.request = request
        self.pool_of = pool_of
        self.on_decision = on_decision
        self.since_s = since_s
        self.rank_s = 0.0
        self.gone = False


class Holding:
    """The requests that wait, best first. Bounded by whoever adds."""

    __slots__ = ("_count", "_heap", "_order")

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Held]] = []
        self._count = 0
        self._order = 0

    def __len__(self) -> int:
        return self._count

    def add(self, held: Held, picture: Picture) -> None:
        held.rank_s = held.since_s * limits.AGEING_WEIGHT + _least_prefill_s(held, picture)
        self._order += 1
        heapq.heappush(self._heap, (held.rank_s, self._order, held))
        self._count += 1

    def drop(self, held: Held) -> None:
        """It waits no longer: cancelled, or its time is over. Harmless when repeated."""
        if not held.gone:
            held.gone = True
            held.request = _NOBODY  # what it holds is let go of now, its place in the heap later
            self._count -= 1
            if len(self._heap) > 2 * self._count + 64:
                self._heap = [entry for entry in self._heap if not entry[2].gone]
                heapq.heapify(self._heap)

    def take(self, policy: Policy, picture: Picture, now_s: float) -> tuple[Held, Decision] | None:
        """Return who goes next, and where; it waits no longer. Call again when it has gone."""
        kept: list[tuple[float, int, Held]] = []
        reserved: list[tuple[int, int]] = []
        found: tuple[Held, Decision] | None = None
        pending_tokens = picture.loads.pending_tokens
        while self._heap and len(kept) < limits.HELD_TRIED_MAX and found is None:
            entry = heapq.heappop(self._heap)
            held = entry[2]
            if held.gone:
                continue
            pool = held.pool_of()
            decision = policy(held.request, pool, picture, now_s) if pool is not None else None
            if decision is None:
                kept.append(entry)
            elif is_open(decision, held.request, picture, now_s):
                held.gone = True
                self._count -= 1
                found = held, decision
            else:
                kept.append(entry)
                octets = held.request.chain.prompt_bytes - decision.cached_octets
                tokens = picture.tokens_of(octets, decision.slot)
                pending_tokens[decision.slot] += tokens
                reserved.append((decision.slot, tokens))
        for slot, tokens in reserved:
            pending_tokens[slot] -= tokens
        for entry in kept:
            heapq.heappush(self._heap, entry)
        return found


def is_open(decision: Decision, request: Request, picture: Picture, now_s: float) -> bool:
    """Whether the replica can soon begin this, so that sending it there is right."""
    loads, slot = picture.loads, decision.slot
    if not loads.inflight[slot]:  # whatever is wrong there, waiting for nobody will not mend it
        return True
    wait_s = loads.wait_s(slot, now_s) + loads.extra_s[slot]
    if slot in loads.tight:
        tokens = picture.tokens_of(request.chain.prompt_bytes, slot)
        wait_s += loads.shortage_s(slot, tokens)
    return wait_s <= limits.RUNWAY_S


def _least_prefill_s(held: Held, picture: Picture) -> float:
    pool = held.pool_of()
    if pool is None:
        return 0.0
    seats = picture.seats(pool)
    if not seats.slots:
        return 0.0
    found = picture.index.match(held.request.chain, seats.bits)
    most_octets = held.request.chain.ends[found[0][1]] if found else 0
    tokens = picture.tokens_of(held.request.chain.prompt_bytes - most_octets, seats.slots[0])
    return tokens * min([picture.loads.s_per_token[slot] for slot in seats.slots])
