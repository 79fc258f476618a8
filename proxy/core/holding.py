"""Late binding: a request waits here while every replica has enough to do, and then goes.

What has been sent to a replica stays there, whatever happens next; what waits here can still go to
the replica that is free first, or to one that comes up meanwhile. So near saturation requests are
held, and each replica is given the next one when it is about to run out of work (`RUNWAY_S`).

Each waits in the line of the replica that was best for it when it was looked at last, and has a
place reserved there: who comes later sees that work as if it were on its way. So nobody is held up
by those who wait for another replica, and one look asks for few: the first of each line that is
open, then, should nobody want what is open, some out of the lines that are closed, in turn.

The order in a line is shortest first with ageing: by the least prefill that the request needs on
any replica, less the time it has waited. As everybody ages alike, the place in the order never
changes: it is that prefill plus the time of arrival, each in seconds. Less urgent classes stand as
if they had come later, by more than most queues are long: so online work goes first, and still
nobody waits for ever (`core.classes`).

Where nothing of a model is awake, those who wait for it have a line of their own, in which nothing
is known of their prefill: they go in the order in which they came, and hold up nobody else.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable
from typing import Final

from proxy.core import limits
from proxy.core.classes import OFFLINE, YIELD_S
from proxy.core.fleet import Pool
from proxy.core.opening import has_little_to_do, has_room, is_open
from proxy.core.picture import Picture
from proxy.core.policy import Decision, Policy, Request
from proxy.core.prefix import NO_CHAIN

_NOBODY: Final = Request(NO_CHAIN, has_session=False)
# Lines go by the slot of their replica. Those who have not been looked at yet have one, and so has
# each set of replicas of which none may take those who wait for it, and each queue for which there
# is no replica: see `_line_of_all` and `_line_of_nobody`.
_UNSEEN: Final = -1


def class_of(held: Held) -> int:
    """Return the class of one that waits; what nobody has said is online work."""
    return max(0, held.request.work_class)


def yields(held: Held, now_s: float) -> bool:
    """Whether one that waits lets all online work go first, wherever that waits.

    It does for as long as its rank yields to it: so it may wait long, and not for ever.
    """
    return class_of(held) == OFFLINE and now_s - held.since_s < YIELD_S[OFFLINE]


class Held:
    """One request that waits, and what is called with its decision when that has come."""

    __slots__ = (
        "gone", "held_bytes", "line", "needed_tokens", "on_decision", "order", "pool_of", "queue",
        "rank_s", "request", "since_s", "tokens",
    )  # fmt: skip

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
        self.order = 0
        self.line = _UNSEEN
        self.queue = 0  # the number of what it waits for, the same for all who wait for the same
        self.held_bytes = 0  # of its body
        self.needed_tokens = 0  # of its prompt that no replica held when it came
        self.tokens = 0  # what it would have computed where it has reserved its place
        self.gone = False


class _Line:
    """Those who wait for one replica, best first, and the tokens that they bring there."""

    __slots__ = ("entries", "next_at", "tokens")

    def __init__(self) -> None:
        self.entries: list[tuple[float, int, Held]] = []
        self.tokens = 0
        self.next_at = 0  # where the next look goes on while the line is closed


class Holding:
    """The requests that wait, by what they wait for. Bounded by whoever adds."""

    __slots__ = ("_count", "_lines", "_order", "_turn")

    def __init__(self) -> None:
        self._lines: dict[int, _Line] = {}
        self._count = 0
        self._order = 0
        self._turn = 0

    def __len__(self) -> int:
        return self._count

    @property
    def unseen(self) -> bool:
        """Whether some have not been looked at yet, so that nobody knows what they wait for."""
        return _UNSEEN in self._lines

    def awaits(self, slot: int) -> bool:
        """Whether somebody waits for this replica, or may do so."""
        if slot in self._lines or _UNSEEN in self._lines:
            return True
        bits = 0
        for name in self._lines:
            bits |= _bits_of(name)
        return bits >> slot & 1 > 0

    def add(self, held: Held, picture: Picture) -> None:
        arrival_s = held.since_s + YIELD_S[class_of(held)]
        prefill_s = _least_prefill_s(held, picture)
        held.rank_s = arrival_s * limits.AGEING_WEIGHT + max(0.0, prefill_s)
        self._order += 1
        held.order = self._order
        self._count += 1
        self._enter(held, _UNSEEN if prefill_s >= 0.0 else _line_of_nobody(held.queue), 0)

    def drop(self, held: Held) -> None:
        """It waits no longer: cancelled, or its time is over. Harmless when repeated."""
        if not held.gone:
            self._leave(held)
            held.gone = True
            held.request = _NOBODY
            self._count -= 1

    def renew(self, queue: int, *, empty: bool) -> None:
        """Other replicas may take those of a queue now: look anew at who waited for any of them.

        Until that has been done no newcomer gets before them. `empty`: none may.
        """
        to = _line_of_nobody(queue) if empty else _UNSEEN
        for name in [name for name in self._lines if name < 0 and name != to]:
            for entry in list(self._lines[name].entries):
                if entry[2].queue == queue:
                    self.move(entry[2], to, 0)

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
        look = _Look(self, policy, picture, now_s, at_once, braked)
        self._forget_replicas(picture)
        found = self._among_unseen(look)
        if found is None:
            closed: list[int] = []
            found = self._among_open(look, closed)
            if found is None and closed:
                found = self._among_closed(look, closed)
        if found is not None:
            held = found[0]
            self._leave(held)
            held.gone = True
            self._count -= 1
        return found

    def _among_unseen(self, look: _Look) -> tuple[Held, Decision] | None:
        unseen = self._lines.get(_UNSEEN)
        if unseen is not None:
            for entry in unseen.entries[: limits.HELD_TRIED_MAX]:
                decision = look.ask(entry[2], 0)
                if decision is not None:
                    return entry[2], decision
        return None

    def _among_open(self, look: _Look, closed: list[int]) -> tuple[Held, Decision] | None:
        """Ask the first of each line that may be open, in order; name the others in `closed`."""
        first = [
            (line.entries[0][0], line.entries[0][1], name)
            for name, line in self._lines.items()
            if name != _UNSEEN
        ]
        heapq.heapify(first)
        left = limits.HELD_TRIED_MAX + len(first)
        while first:
            name = heapq.heappop(first)[2]
            line = self._lines.get(name)
            if line is None:
                continue
            if name >= 0 and not look.open(name):
                closed.append(name)
                continue
            while line.entries and left:
                left -= 1
                held = line.entries[0][2]
                decision = look.ask(held, 0)
                if decision is not None:
                    return held, decision
                if held.line == name:
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
            at = line.next_at if line.next_at < len(line.entries) else 0
            before_tokens = sum([entry[2].tokens for entry in line.entries[:at]])
            for _ in range(min(share, left)):
                if at >= len(line.entries):
                    break
                left -= 1
                held = line.entries[at][2]
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
            for entry in list(self._lines[name].entries):
                self.move(entry[2], _UNSEEN, 0)

    def reserve(self, picture: Picture, held: Held, before_tokens: int, sign: int) -> None:
        """Let the picture show (or no longer) what waits, as `held` sees it: that before it."""
        pending_tokens = picture.loads.pending_tokens
        for name, line in self._lines.items():
            if name >= 0:
                tokens = before_tokens if name == held.line else line.tokens
                pending_tokens[name] += sign * tokens

    def overtaken(self, held: Held, slot: int) -> bool:
        """Whether others wait for this replica to which `held` comes only now."""
        if slot == held.line:
            return False
        if slot in self._lines:
            return True
        if held.line == _UNSEEN and len(self._lines) > 1:
            place = (held.rank_s, held.order)
            for name, line in self._lines.items():
                if _bits_of(name) >> slot & 1 and line.entries[0][:2] < place:
                    return True
        return False

    def move(self, held: Held, name: int, tokens: int) -> None:
        if held.line != name:
            self._leave(held)
            self._enter(held, name, tokens)
        else:
            self._lines[name].tokens += tokens - held.tokens
            held.tokens = tokens

    def _enter(self, held: Held, name: int, tokens: int) -> None:
        line = self._lines.get(name)
        if line is None:
            line = self._lines[name] = _Line()
        insort(line.entries, (held.rank_s, held.order, held))
        line.tokens += tokens
        held.line, held.tokens = name, tokens

    def _leave(self, held: Held) -> None:
        line = self._lines[held.line]
        del line.entries[bisect_left(line.entries, (held.rank_s, held.order, held))]
        line.tokens -= held.tokens
        if not line.entries:
            del self._lines[held.line]


class _Look:
    """One look at those who wait: what it goes by."""

    __slots__ = ("_at_once", "_braked", "_holding", "_now_s", "_picture", "_policy")

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

    def _goes(self, held: Held, decision: Decision) -> bool:
        picture = self._picture
        if self._at_once:
            goes = has_room(decision, held.request, picture)
        elif self._braked >> decision.slot & 1 and yields(held, self._now_s):
            goes = False
        else:
            goes = not self._holding.overtaken(held, decision.slot) and is_open(
                decision, held.request, picture, self._now_s
            )
        return goes and picture.reserve(held.request.chain, decision.cached_octets, decision.slot)


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
