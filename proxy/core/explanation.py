"""Why a request would go where it would: every replica with every term, as plain values.

The terms are those that the policy adds up, out of the same picture, at the same moment.
"""

from __future__ import annotations

from proxy.core.fleet import Pool
from proxy.core.hearsay import Hearsay
from proxy.core.picture import Picture
from proxy.core.policy import Decision, Request, terms
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


def candidates(
    request: Request, pool: Pool, picture: Picture, hearsay: Hearsay, now_s: float
) -> list[Shown]:
    """Return the replicas of a pool: those that may take the request by price, then the others."""
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
        if slot >= 0:
            cached_octets = picture.index.held_of(slot, request.chain)
            found = terms(Decision(replica, slot, "", cached_octets), request, picture, now_s)
            shown |= {**found.as_dict(), **_slot_shown(picture, slot)}
            shown |= _source_shown(hearsay, name, now_s)
            able.append((found.price_s, name, shown))
        reason = _why_not(replica, slot, picture)
        if reason:
            shown |= {"may_take": False, "reason": reason}
            unable.append(shown)
            able = [entry for entry in able if entry[2] is not shown]
    return [entry[2] for entry in sorted(able, key=lambda entry: entry[:2])] + unable


def _why_not(replica: Replica, slot: int, picture: Picture) -> str:
    if not replica.available:
        return "unreachable" if replica.suspect else f"it is {replica.state}"
    if slot < 0:
        return "it is not known yet"
    most = picture.loads.inflight_max[slot]
    if most and picture.loads.inflight[slot] >= most:
        return f"it has as many requests as it may hold ({most})"
    return ""


def _slot_shown(picture: Picture, slot: int) -> Shown:
    loads = picture.loads
    output_s = loads.s_per_output_token[slot]
    return {
        "inflight": loads.inflight[slot],
        "queued_tokens": loads.queued_tokens(slot),
        "decoding": round(loads.decoding[slot], 3),
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
