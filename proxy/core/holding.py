"""Late binding: a request waits here while every replica has enough to do, and then goes.

What has been sent to a replica stays there, whatever happens next; what waits here can still go to
the replica that is free first, or to one that comes up meanwhile. So near saturation requests are
held, and each replica is given the next one when it is about to run out of work (`RUNWAY_S`).

Each waits in the line of the replica that was best for it when it was looked at last, and has a
place reserved there: who comes later sees that work as if it were on its way. So nobody is held up
by those who wait for another replica, and one look asks for few: the first of each line that is
open, then, should nobody want what is open, some out of the lines that are closed, in turn.

Who is first in a line: `core.held` says it of one tenant's requests, `core.lines` of several
tenants'. Where there are none to tell apart, it is shortest first with ageing, and the same place
for all of a request's life.

Where nothing of a model is awake, those who wait for it have a line of their own, in which nothing
is known of their prefill: they go in the order in which they came, and hold up nobody else.
"""

from __future__ import annotations

import heapq
from typing import Final

from proxy.core import claim_limits, limits
from proxy.core.fairness import Shares
from proxy.core.held import Held, begin_by_s, class_of, rank_s, yields
from proxy.core.lines import Line, Order
from proxy.core.opening import has_little_to_do, has_room, is_open, runway_beside_s
from proxy.core.picture import Picture
from proxy.core.policy import Decision, Policy, Request
from proxy.core.prefix import NO_CHAIN

_NOBODY: Final = Request(NO_CHAIN, has_session=False)
# Lines go by the slot of their replica. Those who have not been looked at yet have one, and so has
# each set of replicas of which none may take those who wait for it, and each queue for which there
# is no replica: see `_line_of_all` and `_line_of_nobody`.
_UNSEEN: Final = -1
_NEVER: Final = float("inf")


class Holding:
    """The requests that wait, by what they wait for. Bounded by whoever adds."""

    __slots__ = ("_count", "_due", "_lines", "_order", "_turn", "shares")

    def __init__(self, shares: Shares | None = None) -> None:
        self.shares = shares if shares is not None else Shares()
        self._lines: dict[int, Line] = {}
        self._due: list[tuple[float, int, Held]] = []  # who can still meet a deadline: a heap
        self._count = 0
        self._order = 0
        self._turn = 0

    def __len__(self) -> int:
        return self._count

    @property
    def unseen(self) -> bool:
        """Whether some have not been looked at yet, so that nobody knows what they wait for."""
        return _UNSEEN in self._lines

    @property
    def runway_s_min(self) -> float:
        """Return how little a replica must have to do to be open to all that wait."""
        return claim_limits.RUNWAY_OVER_S if self.shares.on else limits.RUNWAY_S

    def awaits(self, slot: int) -> bool:
        """Whether somebody waits for this replica, or may do so."""
        if slot in self._lines or _UNSEEN in self._lines:
            return True
        bits = 0
        for name in self._lines:
            bits |= _bits_of(name)
        return bits >> slot & 1 > 0

    def add(self, held: Held, picture: Picture) -> None:
        prefill_s = held.prefill_s = _least_prefill_s(held, picture)
        held.rank_s = rank_s(held)
        self._order += 1
        held.order = self._order
        self._count += 1
        self._await_deadline(held)
        if held.account is not None:
            self.shares.begins_to_wait(held.account)
        self._enter(held, _UNSEEN if prefill_s >= 0.0 else _line_of_nobody(held.queue), 0)

    def _await_deadline(self, held: Held) -> None:
        due_s = begin_by_s(held)
        if due_s <= 0.0:
            return
        if len(self._due) > 2 * self._count + limits.HELD_TRIED_MAX:  # most of it has gone
            self._due = [each for each in self._due if not each[2].gone]
            heapq.heapify(self._due)
        heapq.heappush(self._due, (due_s, held.order, held))

    def overdue(self, now_s: float) -> list[Held]:
        """Return those that cannot meet their deadlines any more; they are late now.

        Once each, and once more when its client will not listen any longer.
        """
        out: list[Held] = []
        while self._due and (self._due[0][2].gone or self._due[0][0] < now_s):
            held = heapq.heappop(self._due)[2]
            if held.gone:
                continue
            out.append(held)
            if not held.late:
                self.be_late(held)
        return out

    @property
    def next_due_s(self) -> float:
        """Return when the next one may be late."""
        return self._due[0][0] if self._due else _NEVER

    def be_late(self, held: Held) -> None:
        """It goes behind those that can still meet theirs."""
        line = self._lines[held.line]
        line.leave(held)
        held.late = True
        held.rank_s = rank_s(held)
        line.enter(held)
        self._await_deadline(held)

    def drop(self, held: Held) -> None:
        """It waits no longer: cancelled, or its time is over. Harmless when repeated."""
        if not held.gone:
            self._gone(held)
            held.request = _NOBODY

    def _gone(self, held: Held) -> None:
        self._leave(held)
        held.gone = True
        self._count -= 1
        if held.account is not None:
            self.shares.waits_no_more(held.account)

    def renew(self, queue: int, *, empty: bool) -> None:
        """Other replicas may take those of a queue now: look anew at who waited for any of them.

        Until that has been done no newcomer gets before them. `empty`: none may.
        """
        to = _line_of_nobody(queue) if empty else _UNSEEN
        for name in [name for name in self._lines if name < 0 and name != to]:
            for held in self._lines[name].all():
                if held.queue == queue:
                    self.move(held, to, 0)

    def take(
        self,
        policy: Policy,
        picture: Picture,
        now_s: float,
        *,
        at_once: bool = False,
        braked: int = 0,
    ) -> tuple[Held, Decision] | None:
        """Return who goes next, and where; it waits no longer. Call again when it has gone.

        `at_once`: whatever there is to do, as far as replicas may take more. `braked` are the
        replicas, as bits of their slots, that no offline work goes to now.
        """
        self.shares.refresh(now_s)
        look = _Look(self, policy, picture, now_s, at_once, braked)
        self._forget_replicas(picture)
        found = self._among_unseen(look)
        if found is None:
            closed: list[int] = []
            found = self._among_open(look, closed)
            if found is None and closed:
                found = self._among_closed(look, closed)
        if found is not None:
            self._gone(found[0])
        return found

    def _among_unseen(self, look: _Look) -> tuple[Held, Decision] | None:
        unseen = self._lines.get(_UNSEEN)
        if unseen is not None:
            for held in unseen.firsts(look.order, limits.HELD_TRIED_MAX):
                decision = look.ask(held, 0)
                if decision is not None:
                    return held, decision
        return None

    def _among_open(self, look: _Look, closed: list[int]) -> tuple[Held, Decision] | None:
        """Ask the first of each line that may be open, in order; name the others in `closed`."""
        order = look.order
        first = [
            (order.place(line.first(order)), name)
            for name, line in self._lines.items()
            if name != _UNSEEN
        ]
        heapq.heapify(first)
        left = limits.HELD_TRIED_MAX + len(first)
        while first:
            name = heapq.heappop(first)[1]
            line = self._lines.get(name)
            if line is None:
                continue
            if name >= 0 and not look.open(name):
                closed.append(name)
                continue
            while line.count and left:
                left -= 1
                held = line.first(order)
                late = held.late
                decision = look.ask(held, 0)
                if decision is not None:
                    return held, decision
                if held.line == name and held.late == late:
                    break  # it has to wait, and those behind it with it
        return None

    def _among_closed(self, look: _Look, closed: list[int]) -> tuple[Held, Decision] | None:
        """Ask those who wait for busy replicas whether one that is idle has become as good.

        Whoever is last in a long line gains most from it, so each look goes on where the one before
        has ended.
        """
        left = limits.HELD_TRIED_MAX
        share = max(1, left // len(closed))
        self._turn += share < 2
        for number in range(len(closed)):
            name = closed[(number + self._turn * (share < 2)) % len(closed)]
            line = self._lines.get(name)
            if line is None or left <= 0:
                continue
            at = line.next_at if line.next_at < line.count else 0
            before_tokens, waiting = line.part(look.order, at, min(share, left))
            for held in waiting:
                left -= 1
                decision = look.ask(held, before_tokens)
                if decision is not None:
                    return held, decision
                if held.line == name:
                    at += 1
                    before_tokens += held.tokens
            line.next_at = at
        return None

    def _forget_replicas(self, picture: Picture) -> None:
        """Who waits for a replica that is gone is looked at anew."""
        present = picture.slots.values()
        for name in [name for name in self._lines if name >= 0 and name not in present]:
            for held in self._lines[name].all():
                self.move(held, _UNSEEN, 0)

    def reserve(self, picture: Picture, held: Held, before_tokens: int, sign: int) -> None:
        """Let the picture show (or no longer) what waits, as `held` sees it: that before it."""
        pending_tokens = picture.loads.pending_tokens
        for name, line in self._lines.items():
            if name >= 0:
                tokens = before_tokens if name == held.line else line.tokens_for(held)
                pending_tokens[name] += sign * tokens

    def overtaken(self, held: Held, slot: int, order: Order) -> bool:
        """Whether others wait for this replica to which `held` comes only now."""
        if slot == held.line:
            return False
        if slot in self._lines:
            return not self._lines[slot].gives_way(held, order)
        if held.line == _UNSEEN and len(self._lines) > 1:
            place = order.place(held)
            for name, line in self._lines.items():
                if _bits_of(name) >> slot & 1 and order.place(line.first(order)) < place:
                    return True
        return False

    def move(self, held: Held, name: int, tokens: int) -> None:
        if held.line != name:
            self._leave(held)
            self._enter(held, name, tokens)
        else:
            self._lines[name].bring(held, tokens)

    def _enter(self, held: Held, name: int, tokens: int) -> None:
        line = self._lines.get(name)
        if line is None:
            line = self._lines[name] = Line()
        line.enter(held)
        line.bring(held, tokens)
        held.line = name

    def _leave(self, held: Held) -> None:
        line = self._lines[held.line]
        line.bring(held, 0)
        line.leave(held)
        if not line.count:
            del self._lines[held.line]


class _Look:
    """One look at those who wait: what it goes by."""

    __slots__ = ("_at_once", "_braked", "_holding", "_now_s", "_picture", "_policy", "order")

    def __init__(
        self,
        holding: Holding,
        policy: Policy,
        picture: Picture,
        now_s: float,
        at_once: bool,
        braked: int,
    ) -> None:
        self._holding = holding
        self._policy = policy
        self._picture = picture
        self._now_s = now_s
        self._at_once = at_once
        self._braked = braked
        self.order = Order(holding.shares, now_s)

    def open(self, slot: int) -> bool:
        """Whether the line of a replica may be open."""
        return self._at_once or has_little_to_do(slot, self._picture, self._now_s)

    def ask(self, held: Held, before_tokens: int) -> Decision | None:
        """Return where it goes; or have it wait where it would go, and return None."""
        holding, picture, pool = self._holding, self._picture, held.pool_of()
        if pool is None:
            holding.move(held, _line_of_nobody(held.queue), 0)
            return None
        holding.reserve(picture, held, before_tokens, 1)
        try:
            decision = self._policy(held.request, pool, picture, self._now_s)
            goes = decision is not None and self._goes(held, decision)
        finally:
            holding.reserve(picture, held, before_tokens, -1)
        if decision is None:
            bits = picture.seats(pool).bits
            holding.move(held, _line_of_all(bits) if bits else _line_of_nobody(held.queue), 0)
        elif goes:
            return decision
        else:
            octets = held.request.chain.prompt_bytes - decision.cached_octets
            holding.move(held, decision.slot, picture.tokens_of(octets, decision.slot))
        return None

    def _in_time(self, held: Held, decision: Decision) -> bool:
        """Whether one that goes there now may go; who is late by that lets others go first."""
        request, loads, slot = held.request, self._picture.loads, decision.slot
        if request.deadline_s <= 0.0 or held.late:
            return True
        octets = request.chain.prompt_bytes - decision.cached_octets
        own_s = self._picture.tokens_of(octets, slot) * loads.s_per_token[slot]
        first_s = self._now_s + loads.wait_s(slot, self._now_s) + loads.extra_s[slot] + own_s
        if first_s <= request.deadline_s:
            return True
        self._holding.be_late(held)
        return False

    def _runway_s(self, held: Held, slot: int) -> float:
        runway_s = self._holding.shares.runway_s(held.account)
        if yields(held, self._now_s) and not held.request.spare:
            runway_s = min(runway_s, runway_beside_s(slot, self._picture, self._now_s))
        return runway_s

    def _goes(self, held: Held, decision: Decision) -> bool:
        picture = self._picture
        if self._at_once:
            goes = has_room(decision, held.request, picture)
        elif self._braked >> decision.slot & 1 and yields(held, self._now_s):
            goes = False
        else:
            goes = not self._holding.overtaken(held, decision.slot, self.order) and is_open(
                decision, held.request, picture, self._now_s, self._runway_s(held, decision.slot)
            )
        return (
            goes
            and self._in_time(held, decision)
            and picture.reserve(
                held.request.chain, decision.cached_octets, decision.slot, class_of(held)
            )
        )


def _line_of_all(bits: int) -> int:
    """Name the line of those whom none of these replicas may take: the first with room will do."""
    return _UNSEEN - 1 - 2 * bits


def _line_of_nobody(queue: int) -> int:
    """Name the line of those for whom no replica is there that could take them."""
    return _UNSEEN - 2 - 2 * queue


def _bits_of(line: int) -> int:
    """Return the replicas of which any will do for those in a line; 0 for other lines."""
    above = _UNSEEN - 1 - line
    return above >> 1 if above >= 0 and not above & 1 else 0


def _least_prefill_s(held: Held, picture: Picture) -> float:
    """Return the prefill that it needs where most of it is cached; its tokens are kept.

    Below 0: there is no replica.
    """
    pool, chain = held.pool_of(), held.request.chain
    seats = picture.seats(pool) if pool is not None else None
    if seats is None or not seats.slots:
        held.needed_tokens = chain.prompt_bytes // limits.BYTES_PER_TOKEN
        return -1.0
    found = picture.index.match(chain, seats.bits)
    most_octets = chain.ends[found[0][1]] if found else 0
    tokens = picture.tokens_of(chain.prompt_bytes - most_octets, seats.slots[0])
    held.needed_tokens = tokens
    return tokens * min([picture.loads.s_per_token[slot] for slot in seats.slots])
