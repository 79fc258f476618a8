"""Which replica takes this request: price each one that may, take the cheapest, say why.

`prefix`, the default, prices a placement in seconds (`core.cost`): the work that waits there, and
what this request would still have to have computed there, at a surcharge for the harm it does. So a
conversation stays where its prefix is until staying costs more than computing it again elsewhere; a
hot replica spills its own requests and nobody else's; a prefix that many want comes to lie on as
many replicas as it takes; and where prompts share nothing, what is left is the least work.

Equal prices go to the replica that has been sent the least work, which evens out the use of caches.
A prompt of which nobody holds anything goes by the ring instead, as long as that is nearly as
cheap, when a session key names it or when others route to the same replicas without telling us:
the ring is what proxies agree on that share nothing.

Every policy is a function of its arguments; ties go by work, by ring order or name, never by luck.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from proxy.core import limits
from proxy.core.cost import Terms
from proxy.core.fleet import Pool
from proxy.core.picture import Picture, Seats
from proxy.core.prefix import PrefixChain
from proxy.core.replica import Replica

_NEVER: Final = float("inf")


class Request:
    """What a choice depends on.

    `has_session`: the chain's key is a session's; `pinned`: and the session's home is a must.
    `weight`: what a second of its waiting counts, 1 for a person's.
    """

    __slots__ = (
        "adapter", "chain", "has_session", "pinned", "response_key", "stream", "tried", "weight",
    )  # fmt: skip

    def __init__(
        self,
        chain: PrefixChain,
        *,
        has_session: bool,
        pinned: bool = False,
        stream: bool = False,
        weight: float = 1.0,
        adapter: str = "",
        response_key: int = 0,
    ) -> None:
        self.chain = chain
        self.has_session = has_session
        self.pinned = pinned
        self.stream = stream
        self.weight = weight
        self.adapter = adapter
        self.response_key = response_key  # of the answer that this one goes on from; 0: none
        self.tried: set[str] = set()  # replicas that have already failed this request


class Decision:
    """The chosen replica, why, and what it is believed to have cached of the prompt."""

    __slots__ = ("cached_octets", "reason", "replica", "slot")

    def __init__(self, replica: Replica, slot: int, reason: str, cached_octets: int = 0) -> None:
        self.replica = replica
        self.slot = slot
        self.reason = reason
        self.cached_octets = cached_octets


Policy = Callable[[Request, Pool, Picture, float], Decision | None]

REASONS: Final = (
    "prefix", "spill", "new", "home", "session", "response",
    "least_load", "round_robin", "random",
)  # fmt: skip


class Prices:
    """What each replica of a pool would cost, in the order of its seats."""

    __slots__ = ("cached_octets", "distinct", "most_octets", "prices_s", "seats", "tokens")

    def __init__(self, request: Request, pool: Pool, picture: Picture, now_s: float) -> None:
        seats = self.seats = picture.seats(pool)
        loads, slots, chain = picture.loads, seats.slots, request.chain
        # Nearly always one set holds most replicas (those with nothing, or with the head that all
        # prompts share): price all as if they were of that one, then the others.
        found = picture.index.match(chain, seats.bits)
        rest = seats.bits
        for bits, _ in found:
            rest ^= bits
        common, common_octets = rest, 0
        for bits, octets in found:
            if bits.bit_count() > common.bit_count():
                common, common_octets = bits, octets
        self.most_octets = found[0][1] if found else 0
        # A head that most replicas hold says nothing of where the rest is.
        self.distinct = bool(found) and 2 * found[0][0].bit_count() <= len(slots)
        self.cached_octets = [common_octets] * len(slots)
        prices_s = self.prices_s = loads.waits_s(slots, now_s)
        self.tokens = 0
        if not slots:
            return
        per_token = loads.price_per_token
        tokens = self.tokens = picture.tokens_of(chain.prompt_bytes - common_octets, slots[0])
        for place in range(len(slots)):
            prices_s[place] += tokens * per_token[slots[place]]
        if rest and rest != common:
            found.append((rest, 0))
        for bits, octets in found:
            if bits != common:
                fewer = tokens - picture.tokens_of(chain.prompt_bytes - octets, slots[0])
                self._correct(bits, octets, fewer, per_token)
        self._exclude(request, picture)

    def _correct(self, bits: int, octets: int, fewer: int, per_token: list[float]) -> None:
        places, prices_s, cached_octets = self.seats.places, self.prices_s, self.cached_octets
        while bits:
            low = bits & -bits
            bits ^= low
            slot = low.bit_length() - 1
            place = places[slot]
            prices_s[place] -= fewer * per_token[slot]
            cached_octets[place] = octets

    def _exclude(self, request: Request, picture: Picture) -> None:
        """Make those infinitely dear that may not take it, and dearer that lack its adapter."""
        loads, prices_s = picture.loads, self.prices_s
        for place, slot in enumerate(self.seats.slots):
            most = loads.inflight_max[slot]
            if most and loads.inflight[slot] >= most:
                prices_s[place] = _NEVER
        for name in request.tried:
            slot = picture.slots.get(name, -1)
            if slot in self.seats.places:
                prices_s[self.seats.places[slot]] = _NEVER
        if request.adapter:
            for place, replica in enumerate(self.seats.replicas):
                prices_s[place] += adapter_s(request, replica)

    def decision(self, place: int, reason: str) -> Decision:
        seats = self.seats
        return Decision(
            seats.replicas[place], seats.slots[place], reason, self.cached_octets[place]
        )


def adapter_s(request: Request, replica: Replica) -> float:
    """Return what loading the request's adapter would take, where it is known not to be there."""
    known = replica.adapters
    missing = request.adapter and known is not None and request.adapter not in known
    return limits.ADAPTER_LOAD_S if missing else 0.0


def prefix(request: Request, pool: Pool, picture: Picture, now_s: float) -> Decision | None:
    if request.pinned:
        return session(request, pool, picture, now_s)
    prices = Prices(request, pool, picture, now_s)
    prices_s = prices.prices_s
    least_s = min(prices_s, default=_NEVER)
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
    reason = "new"
    if prices.most_octets:
        reason = "prefix" if prices.cached_octets[place] == prices.most_octets else "spill"
    return prices.decision(place, reason)


def _least_used(prices_s: list[float], least_s: float, slots: list[int], picture: Picture) -> int:
    """Return the place, among those of the least price, that was ever sent the least work."""
    place = prices_s.index(least_s)
    bound_s = least_s + limits.SAME_PRICE_S
    used = picture.loads.dispatched_tokens
    least_used = used[slots[place]]
    for other in range(len(prices_s)):
        if prices_s[other] <= bound_s and used[slots[other]] < least_used:
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
    """The home while it lives, however busy: for state that only one replica has."""
    seats = picture.seats(pool)
    by_name = {seats.replicas[place].name: place for place in _able(request, seats, picture)}
    for step, name in enumerate(pool.ring.walk(request.chain.home_key)):
        if name in by_name:
            return _decide(by_name[name], "spill" if step else "session", request, seats, picture)
    return None


def least_load(request: Request, pool: Pool, picture: Picture, now_s: float) -> Decision | None:
    """Fewest queued tokens, then requests, then the work it was ever sent, so that ties rotate."""
    seats, loads = picture.seats(pool), picture.loads
    best = -1
    least: tuple[int, int, int] = (0, 0, 0)
    for place in _able(request, seats, picture):
        slot = seats.slots[place]
        load = (loads.queued_tokens(slot), loads.inflight[slot], loads.dispatched_tokens[slot])
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


def _able(request: Request, seats: Seats, picture: Picture) -> list[int]:
    """Return the places of those that may take the request."""
    loads = picture.loads
    able = []
    for place, slot in enumerate(seats.slots):
        most = loads.inflight_max[slot]
        free = not most or loads.inflight[slot] < most
        if free and seats.replicas[place].name not in request.tried:
            able.append(place)
    return able


def _decide(place: int, reason: str, request: Request, seats: Seats, picture: Picture) -> Decision:
    slot = seats.slots[place]
    cached_octets = picture.index.held_of(slot, request.chain)
    return Decision(seats.replicas[place], slot, reason, cached_octets)


def terms(decision: Decision, request: Request, picture: Picture, now_s: float) -> Terms:
    """Return the price of one decision, term by term."""
    octets = request.chain.prompt_bytes - decision.cached_octets
    return Terms(
        picture.loads,
        decision.slot,
        now_s,
        cached_tokens=picture.tokens_of(decision.cached_octets, decision.slot),
        uncached_tokens=picture.tokens_of(octets, decision.slot),
        adapter_s=adapter_s(request, decision.replica),
    )


POLICIES: Final[dict[str, Policy]] = {
    "prefix": prefix,
    "session": session,
    "least_load": least_load,
    "round_robin": round_robin,
    "random": random,
}
