"""Which replica takes this request: price each one that may, take the cheapest, say why.

`prefix`, the default, prices a placement in seconds (`core.cost`): the work that waits there, and
what this request would still have to have computed there, at a surcharge for the harm it does. So a
conversation stays where its prefix is until staying costs more than computing it again elsewhere; a
hot replica spills its own requests and nobody else's; a prefix that many want comes to lie on as
many replicas as it takes (`core.sketch`); and where prompts share nothing, the least work is left.

Equal prices go to the replica that has been sent the least work, which evens out the use of caches.
A prompt of which nobody holds more than a head that most hold goes by the ring instead, as long as
that is nearly as cheap, when a session key names it or when others route to the same replicas
without telling us: the ring is what proxies agree on that share nothing.

Every policy is a function of its arguments; ties go by work, by ring order or name, never by luck.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from proxy.core import limits
from proxy.core.classes import ONLINE, UNSAID
from proxy.core.cost import Terms, stall_s
from proxy.core.fleet import Pool
from proxy.core.picture import Picture, Seats
from proxy.core.prefix import PrefixChain
from proxy.core.replica import Replica

_NEVER: Final = float("inf")


class Request:
    """What a choice depends on.

    `has_session`: the chain's key is a session's; `pinned`: its home is a must, which `io.choice`
    sees to before it asks a policy. `weight`: what a second of its waiting counts, a person's is 1.
    `work_class`: how urgent it is, which counts only among those who wait. `spare`: it
    does not wait, and is no demand. `deadline_s`, of the same clock as decisions, is when its first
    token is wanted, `tpot_s` the time between tokens that it wants, and `listens_until_s` when its
    client gives up. `regions`: where it may be computed; `abroad`: whether it may leave this one.
    Tenants share what is scarce by their weight. `held_for` says why it has to wait, if it has.
    """

    __slots__ = (
        "abroad", "adapter", "chain", "deadline_s", "has_session", "held_for", "listens_until_s",
        "pinned", "regions", "response_key", "spare", "stream", "tenant", "tenant_weight",
        "tpot_s", "tried", "weight", "work_class",
    )  # fmt: skip

    def __init__(
        self,
        chain: PrefixChain,
        *,
        has_session: bool,
        pinned: bool = False,
        stream: bool = False,
        weight: float = 1.0,
        work_class: int = UNSAID,
        adapter: str = "",
        response_key: int = 0,
        spare: bool = False,
    ) -> None:
        self.chain = chain
        self.has_session = has_session
        self.pinned = pinned
        self.stream = stream
        self.weight = weight
        self.work_class = work_class
        self.adapter = adapter
        self.response_key = response_key  # of the answer that this one goes on from; 0: none
        self.spare = spare
        self.tenant = ""
        self.tenant_weight = 1.0
        self.deadline_s = 0.0  # 0: none said
        self.tpot_s = 0.0  # 0: none said
        self.listens_until_s = 0.0  # 0: not known
        self.held_for = ""
        self.regions: frozenset[str] | None = None  # None: all
        self.abroad = not spare
        self.tried: set[str] = set()  # replicas that have already failed this request


class Decision:
    """The chosen replica, why, and what it is believed to have cached of the prompt."""

    __slots__ = ("cached_octets", "known", "reason", "replica", "slot")

    def __init__(
        self, replica: Replica, slot: int, reason: str, cached_octets: int = 0, known: int = 0
    ) -> None:
        """`known` is the hash of the longest prefix that any replica holds; 0: none."""
        self.replica = replica
        self.slot = slot
        self.reason = reason
        self.cached_octets = cached_octets
        self.known = known


Policy = Callable[[Request, Pool, Picture, float], Decision | None]

REASONS: Final = (
    "prefix", "spill", "hot", "new", "home", "session", "response",
    "least_load", "round_robin", "random", "region",
)  # fmt: skip


class Prices:
    """What each replica of a pool would cost, in the order of its seats.

    `distinct` says that some hold more of the prompt than a head that most hold, or all soon will.
    """

    __slots__ = (
        "_chain", "_found", "_octets_per_token", "_picture", "_slots", "distinct", "hot_octets",
        "known", "most_octets", "prices_s", "seats", "tokens",
    )  # fmt: skip

    def __init__(self, request: Request, pool: Pool, picture: Picture, now_s: float) -> None:
        seats = self.seats = picture.seats(pool)
        loads, slots, chain = picture.loads, seats.slots, request.chain
        self._picture, self._chain, self._slots = picture, chain, slots
        self.prices_s = loads.waits_s(slots, now_s)
        found = self._found = picture.index.match(chain, seats.bits)
        self.known = self.most_octets = self.hot_octets = self.tokens = 0
        self.distinct = False
        if not slots:
            return
        self._octets_per_token = picture.size_of[slots[0]].octets_per_token
        if found:
            depth = found[0][1]
            self.known, self.most_octets = chain.hashes[depth], chain.ends[depth]
            self.distinct = 2 * found[0][0].bit_count() <= len(slots)
            cache_octets = picture.cache_octets(slots[0])
            if picture.hot.is_hot(self.known, self.most_octets, cache_octets):
                self.hot_octets, self.distinct = self.most_octets, False
                found = []
        self._add_prefill(found)
        self._add_shortage()
        if request.tpot_s:
            self._add_lateness(request.tpot_s)
        self._exclude(request)

    def _add_prefill(self, found: list[tuple[int, int]]) -> None:
        """Nearly always one set holds most replicas (those with nothing, or with a head that all
        prompts share): price all as if they were of that one, then the others again.
        """
        chain, picture, slots, waits_s = self._chain, self._picture, self._slots, self.prices_s
        rest = self.seats.bits
        for bits, _ in found:
            rest ^= bits
        common, common_octets = rest, self.hot_octets
        for bits, depth in found:
            if bits.bit_count() > common.bit_count():
                common, common_octets = bits, chain.ends[depth]
        line_s, octets_per_token = limits.STALL_LINE_S, self._octets_per_token
        per_token, per_stalled = picture.loads.price_per_token, picture.loads.stall_per_token
        tokens = self.tokens = int((chain.prompt_bytes - common_octets) / octets_per_token)
        stalling = min(tokens, limits.STALL_TOKENS_MAX) * line_s  # see `cost.stall_s`
        prices_s = self.prices_s = []
        for place, slot in enumerate(slots):  # of all that a decision does, what is done most
            wait_s = waits_s[place]
            stalled_s = stalling * per_stalled[slot] / (line_s + wait_s)
            prices_s.append(wait_s + tokens * per_token[slot] + stalled_s)
        if rest and rest != common:
            self._reprice(rest, int(chain.prompt_bytes / octets_per_token), waits_s)
        for bits, depth in found:
            if bits != common:
                octets = chain.prompt_bytes - chain.ends[depth]
                self._reprice(bits, int(octets / octets_per_token), waits_s)

    def _reprice(self, bits: int, tokens: int, waits_s: list[float]) -> None:
        """Those would have so many tokens computed."""
        loads, places = self._picture.loads, self.seats.places
        while bits:
            low = bits & -bits
            bits ^= low
            slot = low.bit_length() - 1
            place = places[slot]
            price_s = waits_s[place] + tokens * loads.price_per_token[slot]
            self.prices_s[place] = price_s + stall_s(loads, slot, tokens, waits_s[place])

    def _add_shortage(self) -> None:
        """Where KV space is short, a long prompt waits for it, whether cached or not."""
        loads, slots = self._picture.loads, self._slots
        tokens = int(self._chain.prompt_bytes / self._octets_per_token)
        long = tokens > loads.capacity_tokens[slots[0]] * limits.KV_LONG_SHARE
        for slot in slots if long else list(loads.tight):
            place = self.seats.places.get(slot, -1)
            if place >= 0:
                self.prices_s[place] += loads.shortage_s(slot, tokens)

    def _add_lateness(self, tpot_s: float) -> None:
        """Make those dearer that would be too slow from one token to the next."""
        for place, slot in enumerate(self._slots):
            self.prices_s[place] += self._picture.loads.late_s(slot, tpot_s)

    def _exclude(self, request: Request) -> None:
        """Make those infinitely dear that may not take it, and dearer that lack its adapter."""
        loads, prices_s = self._picture.loads, self.prices_s
        for slot in loads.measured:
            place = self.seats.places.get(slot, -1)
            if place >= 0:
                octets = self._chain.prompt_bytes - self.cached_octets(place)
                if loads.lacks_room(slot, self._picture.tokens_of(octets, slot)):
                    prices_s[place] = _NEVER
        full = loads.lower_full if request.work_class > ONLINE else loads.full
        if full or loads.crowded or request.tried:
            slots = self._picture.slots
            tried = [slots.get(name, -1) for name in request.tried]
            for slot in full.union(loads.crowded, tried):
                place = self.seats.places.get(slot, -1)
                if place >= 0:
                    prices_s[place] = _NEVER
        if request.adapter:
            for place, replica in enumerate(self.seats.replicas):
                prices_s[place] += adapter_s(request, replica)

    def cached_octets(self, place: int) -> int:
        """Return what the replica is believed to hold of the prompt."""
        slot = self._slots[place]
        for bits, depth in self._found:
            if bits >> slot & 1:
                return self._chain.ends[depth]
        return 0

    def decision(self, place: int, reason: str) -> Decision:
        seats = self.seats
        octets = self.cached_octets(place)
        return Decision(seats.replicas[place], seats.slots[place], reason, octets, self.known)


def adapter_s(request: Request, replica: Replica) -> float:
    """Return what loading the request's adapter would take, where it is known not to be there."""
    known = replica.adapters
    missing = request.adapter and known is not None and request.adapter not in known
    return limits.ADAPTER_LOAD_S if missing else 0.0


def prefix(request: Request, pool: Pool, picture: Picture, now_s: float) -> Decision | None:
    prices = Prices(request, pool, picture, now_s)
    prices_s = prices.prices_s
    least_s = min(prices_s) if prices_s else _NEVER
    if least_s == _NEVER:
        return None
    if not prices.distinct and request.chain.hashes:
        if request.has_session:
            return _by_ring(request, pool, prices, least_s + limits.SPILL_SLACK_S)
        share = picture.loads.foreign_share(prices.seats.slots)
        if share > limits.FOREIGN_SHARE_MIN:
            own_s = prices.tokens * picture.loads.s_per_token[prices.seats.slots[0]]
            slack_s = limits.SPILL_SLACK_S + limits.RING_WEIGHT * share * own_s
            return _by_ring(request, pool, prices, least_s + slack_s)
    place = _least_used(prices_s, least_s, prices.seats.slots, picture)
    decision = prices.decision(place, "new")
    if prices.hot_octets:
        decision.reason = "hot"
    elif prices.most_octets:
        decision.reason = "prefix" if decision.cached_octets == prices.most_octets else "spill"
    return decision


def _least_used(prices_s: list[float], least_s: float, slots: list[int], picture: Picture) -> int:
    """Return the place, among those of the least price, that was ever sent the least work."""
    place = prices_s.index(least_s)
    bound_s = least_s + min(least_s * limits.SAME_PRICE_SHARE, limits.SAME_PRICE_S_MAX)
    bound_s += limits.SAME_PRICE_S
    used = picture.loads.dispatched_tokens
    least_used = used[slots[place]]
    for other, price_s in enumerate(prices_s):
        if price_s <= bound_s and used[slots[other]] < least_used:
            place, least_used = other, used[slots[other]]
    return place


def _by_ring(request: Request, pool: Pool, prices: Prices, bound_s: float) -> Decision:
    """Return the first on the ring's walk whose price is within the bound: the cheapest is."""
    by_name = {replica.name: place for place, replica in enumerate(prices.seats.replicas)}
    for step, name in enumerate(pool.ring.walk(request.chain.home_key)):
        place = by_name.get(name, -1)
        if place >= 0 and prices.prices_s[place] <= bound_s:
            at_home = "session" if request.has_session else "home"
            return prices.decision(place, "spill" if step else at_home)
    raise AssertionError("the cheapest replica is within the bound")


def session(request: Request, pool: Pool, picture: Picture, now_s: float) -> Decision | None:
    """The home while it may take more, however busy: for state that is better not moved."""
    seats = picture.seats(pool)
    by_name = {replica.name: place for place, replica in enumerate(seats.replicas)}
    for step, name in enumerate(pool.ring.walk(request.chain.home_key)):
        if name in by_name and name not in request.tried:
            slot = seats.slots[by_name[name]]
            if not _has_room(slot, request, picture):
                continue
            return _decide(by_name[name], "spill" if step else "session", request, seats, picture)
    return None


def least_load(request: Request, pool: Pool, picture: Picture, now_s: float) -> Decision | None:
    """Fewest queued tokens, then requests, then the work it was ever sent, so that ties rotate."""
    seats, loads = picture.seats(pool), picture.loads
    loads.prefilling.settle_due(now_s)
    best = -1
    least: tuple[int, int, int] = (0, 0, 0)
    for place in _able(request, seats, picture):
        slot = seats.slots[place]
        queued_tokens = loads.prefilling.queued_tokens(slot)
        load = (queued_tokens, loads.inflight[slot], loads.dispatched_tokens[slot])
        if best < 0 or load < least:
            best, least = place, load
    return _decide(best, "least_load", request, seats, picture) if best >= 0 else None


def round_robin(request: Request, pool: Pool, picture: Picture, now_s: float) -> Decision | None:
    seats = picture.seats(pool)
    able = _able(request, seats, picture)
    if not able:
        return None
    place = able[picture.turn % len(able)]
    picture.turn += 1
    return _decide(place, "round_robin", request, seats, picture)


def random(request: Request, pool: Pool, picture: Picture, now_s: float) -> Decision | None:
    seats = picture.seats(pool)
    able = _able(request, seats, picture)
    if not able or picture.draw is None:
        return None
    place = able[int(picture.draw() * len(able))]
    return _decide(place, "random", request, seats, picture)


def _has_room(slot: int, request: Request, picture: Picture) -> bool:
    loads = picture.loads
    if loads.is_full(slot, request.work_class):
        return False
    if slot not in loads.measured:
        return True
    octets = request.chain.prompt_bytes - picture.index.held_of(slot, request.chain)
    return not loads.lacks_room(slot, picture.tokens_of(octets, slot))


def _able(request: Request, seats: Seats, picture: Picture) -> list[int]:
    """Return the places of those that may take the request."""
    able = []
    for place, slot in enumerate(seats.slots):
        if _has_room(slot, request, picture) and seats.replicas[place].name not in request.tried:
            able.append(place)
    return able


def _decide(place: int, reason: str, request: Request, seats: Seats, picture: Picture) -> Decision:
    slot = seats.slots[place]
    cached_octets = picture.index.held_of(slot, request.chain)
    return Decision(seats.replicas[place], slot, reason, cached_octets)


def terms(decision: Decision, request: Request, picture: Picture, now_s: float) -> Terms:
    """Return the price of one decision, term by term."""
    picture.loads.prefilling.settle(decision.slot, now_s)
    outlook = picture.outlooks.of[decision.slot] if decision.replica.remote else None
    octets = request.chain.prompt_bytes - decision.cached_octets
    return Terms(
        picture.loads,
        decision.slot,
        now_s,
        cached_tokens=picture.cached_tokens_of(
            request.chain, decision.cached_octets, decision.slot
        ),
        uncached_tokens=picture.tokens_of(octets, decision.slot),
        adapter_s=adapter_s(request, decision.replica),
        tpot_s=request.tpot_s,
        outlook=outlook,
    )


POLICIES: Final[dict[str, Policy]] = {
    "prefix": prefix,
    "session": session,
    "least_load": least_load,
    "round_robin": round_robin,
    "random": random,
}
