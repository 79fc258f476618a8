"""Why a request would go where it would: every replica with every term, as plain values.

The prices and their order are the policy's own, out of the same picture, at the same moment, and
the terms beside a price add up to it. So under a prefix that is hot, and priced as if it lay
everywhere, the uncached tokens are those beyond it (`hot_octets`), whatever the replica has cached.
"""

from __future__ import annotations

from proxy.contract import ReplicaState
from proxy.core.cost import Terms
from proxy.core.fleet import Pool
from proxy.core.hearsay import Hearsay
from proxy.core.picture import Picture
from proxy.core.policy import Decision, Prices, Request, terms
from proxy.core.regions import terms_abroad, why_not
from proxy.core.replica import Replica

Shown = dict[str, object]


def chain_shown(request: Request) -> Shown:
    """Return the chain; a session's key is in it only as a hash."""
    chain = request.chain
    return {
        "home_key": f"{chain.home_key:016x}",
        "prompt_octets": chain.prompt_bytes,
        "points": [
            {"octets": end, "hash": f"{name:016x}"}
            for end, name in zip(chain.ends, chain.hashes, strict=True)
        ],
    }


def hot_octets(decision: Decision, request: Request, pool: Pool, picture: Picture) -> int:
    """Return how much of the prompt is priced as if every replica had it, at this moment."""
    chain, known, slots = request.chain, decision.known, picture.seats(pool).slots
    if not known or not slots or known not in chain.hashes:
        return 0
    octets = chain.ends[chain.hashes.index(known)]
    return octets if picture.hot.is_hot(known, octets, picture.cache_octets(slots[0])) else 0


def priced(
    decision: Decision, request: Request, pool: Pool, picture: Picture, now_s: float
) -> Terms:
    """Return the price of a decision as its policy had it, term by term."""
    found = terms(decision, request, picture, now_s)
    octets = hot_octets(decision, request, pool, picture)
    if octets <= decision.cached_octets:
        return found
    as_if = Decision(decision.replica, decision.slot, decision.reason, octets, decision.known)
    hot = terms(as_if, request, picture, now_s)
    hot.cached_tokens = found.cached_tokens  # what is there; the price is as if more were
    return hot


def candidates(
    request: Request, pool: Pool, picture: Picture, hearsay: Hearsay, now_s: float
) -> list[Shown]:
    """Return the replicas of a pool: those that may take the request by price, then the others."""
    prices = Prices(request, pool, picture, now_s)
    able: list[tuple[float, str, Shown]] = []
    unable: list[Shown] = []
    for name, replica in sorted(pool.replicas.items()):
        shown: Shown = {
            "replica": name,
            "region": replica.region,
            "state": str(replica.state),
            "may_take": True,
        }
        slot = picture.slots.get(name, -1)
        place = prices.seats.places.get(slot, -1)
        tokens = 0
        if slot >= 0:
            cached_octets = picture.index.held_of(slot, request.chain)
            tokens = picture.tokens_of(request.chain.prompt_bytes - cached_octets, slot)
            one = Decision(replica, slot, "", cached_octets, prices.known)
            shown |= {
                **priced(one, request, pool, picture, now_s).as_dict(),
                **_slot_shown(picture, slot),
            }
            shown |= _source_shown(hearsay, name, now_s)
            shown["hot_octets"] = prices.hot_octets
        reason = _why_not(replica, slot, picture, tokens)
        if reason or place < 0:
            shown |= {"may_take": False, "reason": reason or "it is not known yet"}
            unable.append(shown)
            continue
        shown["price_s"] = round(prices.prices_s[place], 6)
        able.append((prices.prices_s[place], name, shown))
    return [entry[2] for entry in sorted(able, key=lambda entry: entry[:2])] + unable


def candidates_abroad(
    request: Request, pool: Pool, picture: Picture, home: Decision | None, now_s: float
) -> list[Shown]:
    """Return other regions' proxies: those that may take the request by price, then the others.

    `home` is what the policy has chosen here, in whose tokens the prompt is counted.
    """
    seats = picture.seats(pool)
    hot = hot_octets(home, request, pool, picture) if home is not None else 0
    able: list[tuple[float, str, Shown]] = []
    unable: list[Shown] = []
    for replica in pool.remotes:
        slot = picture.slots.get(replica.name, -1)
        shown: Shown = {"replica": replica.name, "region": replica.region, "remote": True}
        reason = why_not(request, replica, slot, pool, picture, now_s)
        if slot in seats.away_slots:
            as_slot = home.slot if home is not None else seats.slots[0] if seats.slots else slot
            found = terms_abroad(request, slot, picture, now_s, as_slot, hot)
            outlook = picture.outlooks.of[slot]
            shown |= found.as_dict()
            shown |= {
                "inflight": picture.loads.inflight[slot],
                "room": outlook.room(picture.loads.inflight[slot], now_s),
                "awake": outlook.said.awake,
                "queued": outlook.said.queued,
                "summary_age_s": round(max(0.0, now_s - outlook.at_s), 3),
            }
            if not reason:
                able.append((found.price_s, replica.name, shown | {"may_take": True}))
                continue
        unable.append(shown | {"may_take": False, "reason": reason})
    return [entry[2] for entry in sorted(able, key=lambda entry: entry[:2])] + unable


def _why_not(replica: Replica, slot: int, picture: Picture, tokens: int) -> str:
    if replica.suspect:
        return "unreachable"
    if not replica.available:
        ready = replica.state is ReplicaState.READY
        return "it is asleep" if ready and replica.asleep else f"it is {replica.state}"
    if slot < 0:
        return "it is not known yet"
    most = picture.loads.inflight_max[slot]
    if most and picture.loads.inflight[slot] >= most:
        return f"it has as many requests as it may hold ({most})"
    if picture.loads.lacks_room(slot, tokens):
        return f"it may have no more tokens in its line ({picture.loads.tokens_max[slot]})"
    return ""


def _slot_shown(picture: Picture, slot: int) -> Shown:
    loads = picture.loads
    output_s = loads.s_per_output_token[slot]
    return {
        "inflight": loads.inflight[slot],
        "queued_tokens": loads.prefilling.queued_tokens(slot),
        "decoding": round(loads.decoding(slot), 3),
        "dispatched_tokens": loads.dispatched_tokens[slot],
        "prefill_tokens_per_s": round(1.0 / loads.s_per_token[slot], 1),
        "output_tokens_per_s": round(1.0 / output_s, 1) if output_s else None,
        "held_tokens": loads.held_tokens[slot],
        "cache_tokens": picture.cache_tokens(slot),
    }


def _source_shown(hearsay: Hearsay, name: str, now_s: float) -> Shown:
    """Return what the replica's cache is judged by, and how long ago that was told."""
    state = hearsay.states.get(name)
    if state is None or not state.fresh:
        return {"cache_source": "record"}
    return {
        "cache_source": "events",
        "cache_source_age_s": round(now_s - hearsay.states_at_s[name], 3),
        "resident_tokens": state.resident_tokens,
    }
