"""How many replicas each pool may have of the machine's cards: the rule of who comes before whom.

1. What cannot be moved (on its way up, wanted and younger than its own start took, an operator's)
   is as it is; offline work can be moved at any time.
2. Every pool's `min`, of online pools before that of semi-online ones before that of offline ones;
   within a class what a pool has of it before what another lacks.
3. The first replica of every online pool that wants one, then of every semi-online one. Whoever
   waits for an answer should find its model somewhere before another model gets faster.
4. What more online pools have and want, or lack while requests wait; the same of semi-online ones.
5. What more these want though nothing waits (a buffer, a forecast): nobody who waits gives up a
   card for that, least of all for a start from nothing, which leaves a card idle for a minute.
6. Offline work, its first replicas before its further ones.

Further replicas go to whoever has least for its weight (max-min fairness, by cards). Of equals
whoever has it already keeps it, so that equal claims do not take from each other; then who has most
work waiting per second that its replica takes to come.

**Turns.** Where a class has more pools than replicas fit, the first ones go round: a pool keeps its
last replica for its turn, `TURN_STARTS` times what the replica's start took (times the pool's
weight where that is above 1, so that lasting scarcity is shared by weight too); after that it goes
to the pool that has waited longest. A turn is never shorter, so that starts take no more than a
fifth of the time.

**Nobody starves.** A pool that has wanted a replica for `PATIENCE_S` of its class and had none asks
for its first one as if it were online, until it has had it for a while, and comes before all that
have waited less. So with N pools whose replicas have a turn of at most T seconds, take at most u to
come and d to go, and room for S of them besides what `min` keeps, a pool that wants one has it
within

    patience + ceil(N / S) x (T + u + d).

For once it is patient no more, only pools that have waited longer come before it, at most N - 1;
each that comes up leaves that company; and as long as one waits, no replica but those within their
turn is given to anybody else: in each T + u + d all S places are given out anew. With replicas of
several sizes S counts places of the largest: where one that is next needs more cards than can be
moved yet, nobody after it gets a new replica, or small ones would pass it for ever.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final

import msgspec

from backends.claims import RANKS, Claim, Holder
from backends.planning.goal import WorkClass

TURN_STARTS: Final = 4.0
TURN_S_MIN: Final = 10.0  # where starts take no time
REQUEST_TOKENS: Final = 256  # what a request that waits weighs beside its prompt: its answer
FRESH_S: Final = 5.0  # up to here a pool's work decides, from here on how long it has waited
PATIENCE_S: Final[Mapping[WorkClass, float]] = MappingProxyType(
    {"online": FRESH_S, "semi-online": 60.0, "offline": 600.0}
)


class Shares(msgspec.Struct, frozen=True):
    """How many replicas each pool may have, and in which order they were given out."""

    replicas: Mapping[str, int]
    order: tuple[str, ...] = ()  # a pool for each replica


def share_out(claims: Sequence[Claim], cards: int) -> Shares:
    """Return what each pool may have of this many cards, those in use included."""
    deal = _Deal(claims, cards)
    for claim in claims:
        deal.note_fixed(claim)
    by_rank = sorted(claims, key=lambda claim: (RANKS[claim.work_class], claim.pool))
    for _, same in itertools.groupby(by_rank, key=lambda claim: RANKS[claim.work_class]):
        of_class = list(same)
        for claim in of_class:
            deal.grant_up_to(claim, min(claim.min, len(claim.serving)))
        for claim in of_class:
            deal.grant_up_to(claim, claim.min)
    for deal_out in (deal.share_firsts, deal.share_needed, deal.share_wanted):
        deal_out(RANKS["online"])
        deal_out(RANKS["semi-online"])
    deal.share_firsts(RANKS["offline"])
    deal.share_wanted(RANKS["offline"])
    return Shares(deal.granted, tuple(deal.order))


class _Deal:
    """Cards while they are given out."""

    def __init__(self, claims: Sequence[Claim], cards: int) -> None:
        self.claims = claims
        self.left = cards
        self.granted = {claim.pool: 0 for claim in claims}
        self.order: list[str] = []
        self._serving = {claim.pool: _kept_first(claim) for claim in claims}
        self._soon = dict.fromkeys(RANKS.values(), 0)  # cards that cannot be moved yet, by class
        self._saving = False  # for a pool that is next and needs more cards than can be moved yet

    def note_fixed(self, claim: Claim) -> None:
        """Take what cannot be moved as it is."""
        for holder in claim.holders:
            if holder.serves and not claim.may_yield(holder):
                self._give(claim)
                if not holder.kept and self.granted[claim.pool] > claim.min:
                    self._soon[RANKS[claim.work_class]] += claim.gpus_each
            elif holder.kept and not holder.serves:
                self.left -= len(holder.devices)

    def grant_up_to(self, claim: Claim, count: int) -> None:
        while self.granted[claim.pool] < count and self._fits(claim):
            self._give(claim)

    def share_firsts(self, rank: int) -> None:
        """Give its first replica to each pool that asks for it in this class."""
        in_time = self.left + sum(cards for other, cards in self._soon.items() if other >= rank)
        firsts = [
            claim
            for claim in self.claims
            if claim.wants and not self.granted[claim.pool] and self._rank(claim) == rank
        ]
        for claim in sorted(firsts, key=self._first_key):
            self.grant_up_to(claim, 1)
            waits = not self.granted[claim.pool] and claim.unserved_s >= FRESH_S
            self._saving = self._saving or (waits and claim.gpus_each <= in_time)

    def share_needed(self, rank: int) -> None:
        """Give the pools of this class what they have, and where requests wait what they want."""
        self._share(rank, {c.pool: c.wants if c.queued else len(c.serving) for c in self.claims})

    def share_wanted(self, rank: int) -> None:
        """Give the pools of this class all that they want."""
        self._share(rank, {claim.pool: claim.wants for claim in self.claims})

    def _share(self, rank: int, bounds: Mapping[str, int]) -> None:
        """Give what is left to whoever has least for its weight, up to its bound."""
        left = [claim for claim in self.claims if RANKS[claim.work_class] == rank]
        while left := [c for c in left if self._may(c, bounds[c.pool])]:
            self._give(min(left, key=self._next_key))

    def _may(self, claim: Claim, bound: int) -> bool:
        return self.granted[claim.pool] < min(bound, claim.wants) and self._fits(claim)

    def _rank(self, claim: Claim) -> int:
        """Return the class that a pool's first replica is asked for in."""
        patient = claim.unserved_s < PATIENCE_S[claim.work_class]
        return RANKS[claim.work_class] if patient else 0

    def _first_key(self, claim: Claim) -> tuple[float | str, ...]:
        # One that never gets ready has no turn: it would keep its card for ever.
        serving = [holder for holder in self._serving[claim.pool] if not holder.failing]
        if serving:
            up_for_s = max(holder.up_for_s for holder in serving)
            over = up_for_s >= turn_s(claim)
            return (2.0, up_for_s, 0.0, claim.pool) if over else (0.0, 0.0, 0.0, claim.pool)
        if claim.unserved_s >= FRESH_S:
            return 1.0, 0.0, -claim.unserved_s, claim.pool
        return 1.0, 1.0, -need(claim), claim.pool

    def _next_key(self, claim: Claim) -> tuple[float | str, ...]:
        count, serving = self.granted[claim.pool], self._serving[claim.pool]
        level = (count + 1) * claim.gpus_each / claim.weight
        if count < len(serving):
            holder = serving[count]
            idle = float(holder.in_flight == 0)
            return level, 0.0, idle, float(-holder.heat), -holder.come_back_s, claim.pool
        return level, 1.0, -need(claim), 0.0, 0.0, claim.pool

    def _fits(self, claim: Claim) -> bool:
        if not claim.gpus_each:
            return True
        new = self.granted[claim.pool] >= len(self._serving[claim.pool])
        return claim.gpus_each <= self.left and not (new and self._saving)

    def _give(self, claim: Claim) -> None:
        self.left -= claim.gpus_each
        self.granted[claim.pool] += 1
        self.order.append(claim.pool)


def _kept_first(claim: Claim) -> list[Holder]:
    """Return those that serve, the last to be given up first."""

    def order(holder: Holder) -> tuple[float | str, ...]:
        return claim.may_yield(holder), *(-part for part in holder.yields), holder.replica_id

    return sorted(claim.serving, key=order)


def turn_s(claim: Claim) -> float:
    """Return for how long a pool may keep its last replica while others of its class wait."""
    start_s = max((holder.start_s for holder in claim.serving), default=0.0)
    return max(TURN_S_MIN, TURN_STARTS * start_s) * max(1.0, claim.weight)


def need(claim: Claim) -> float:
    """Return the work that waits for a pool, for each second that its next replica would take."""
    work = claim.queued_tokens + REQUEST_TOKENS * claim.queued
    up_s = claim.ways_up[0].up_s if claim.ways_up else 0.0
    return work / max(up_s, 0.1)
