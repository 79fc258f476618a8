"""Whether a request is computed here or in another region; and where it may be computed at all.

A request stays where it came, unless its price here exceeds the price there plus the round trip
and a slack (`REGION_SLACK_S`). Both prices are in seconds, and of the same terms as those between
replicas (`core.cost`): what waits, and what of this prompt is not cached, at its surcharge. So a
conversation goes away when its region is behind by more than its prefix is worth, stays where it
went for as long as that is cheaper, and comes back when it is not. Equal prices stay here.

Nobody is pushed upon another region: it is sent what it says that it would begin at once, less what
was sent since it said so, and nothing while anybody waits there (selective pushing, after Xia et
al., "SkyWalker: A Locality-Aware Cross-Region Load Balancer for LLM Inference", 2025). A request
waits there only where nothing of its model is awake in either region, and it is served there
sooner; or where nothing ever will be here.

Rules that do not price (round robin and others) stay here while anybody here may take it.

Residency comes before all that: `Residency.within` is the one gate. What a request may not go to is
in no pool that it is shown, so that no rule, no retry and no stored answer can choose it; and
`permits` is asked once more of what was chosen, before anything is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Final

from proxy.contract.regions import RemoteState
from proxy.core import claim_limits
from proxy.core.cost import Terms
from proxy.core.fleet import Pool
from proxy.core.picture import Picture, Seats
from proxy.core.policy import Decision, Policy, Request, prefix, terms
from proxy.core.replica import Replica, remote_replica

_NEVER: Final = float("inf")
REASON: Final = "region"

# --- residency ---------------------------------------------------------------------------------


def permits(regions: frozenset[str] | None, replica: Replica) -> bool:
    """Whether what is bound to these regions may be computed there. None: bound to none."""
    return regions is None or replica.region in regions


class Residency:
    """Pools as those see them who may not go everywhere: what they may not go to is not there."""

    __slots__ = ("_own", "_seen")

    def __init__(self, own: str) -> None:
        """`own` is this region: what may not be computed in it waits for no start in it."""
        self._own = own
        self._seen: dict[tuple[int, frozenset[str]], tuple[Pool, Pool]] = {}

    def within(self, pool: Pool, regions: frozenset[str] | None) -> Pool:
        """Return the pool without what lies outside of these regions."""
        if regions is None:
            return pool
        key = (id(pool), regions)
        found = self._seen.get(key)
        if found is None or found[0] is not pool:
            if len(self._seen) >= claim_limits.RESIDENT_POOLS_MAX:
                self._seen.clear()
            found = self._seen[key] = (pool, self._restricted(pool, regions))
        return found[1]

    def forget(self, own: str) -> None:
        """The fleet has changed: none of its pools are asked for any more."""
        self._own = own
        self._seen.clear()

    def _restricted(self, pool: Pool, regions: frozenset[str]) -> Pool:
        return replace(
            pool,
            replicas={name: r for name, r in pool.replicas.items() if permits(regions, r)},
            available=tuple([r for r in pool.available if permits(regions, r)]),
            remotes=tuple([r for r in pool.remotes if permits(regions, r)]),
            starts_in_s=pool.starts_in_s if self._own in regions else _NEVER,
        )


# --- who is there ------------------------------------------------------------------------------


Place = tuple[str, str, str, tuple[str, ...]]  # name, region and URL of a proxy, and its models


def places_of(states: Iterable[RemoteState], before: Iterable[Place], own: str) -> list[Place]:
    """Return what requests can be sent to in other regions than our `own`.

    What one has told of its models counts until it tells of others, linked or not: `before` are
    the places as they were. One that drains takes nothing back: its models are as good as gone for
    now, which is a reason to come again (503), and not unknown (404).
    """
    known = {place[0]: place[3] for place in before}
    found: list[Place] = []
    for state in states:
        if state.region == own:
            continue
        models = known.get(state.name, ())
        if state.linked and state.summary is not None and not state.summary.draining:
            models = tuple(sorted(state.summary.models)[: claim_limits.REMOTE_MODELS_MAX])
        found.append((state.name, state.region, state.url, models))
    return found


def remotes_of(places: Iterable[Place]) -> tuple[Replica, ...]:
    """Return the remotes of these places, one for each model.

    A URL that nothing can be done with is that of no remote: the configuration is where it is
    refused.
    """
    found: list[Replica] = []
    for name, region, url, models in places:
        try:
            found += [remote_replica(name, region, url, model) for model in models]
        except ValueError:
            continue
    return tuple(found)


# --- here or there -----------------------------------------------------------------------------


def terms_abroad(
    request: Request, slot: int, picture: Picture, now_s: float, as_slot: int, least_octets: int = 0
) -> Terms:
    """Return the price of a remote, in the tokens of the model as `as_slot` counts them.

    `least_octets` of the prompt count as cached anywhere.
    """
    chain = request.chain
    octets = max(least_octets, picture.index.held_of(slot, chain))
    return Terms(
        picture.loads,
        slot,
        now_s,
        cached_tokens=picture.cached_tokens_of(chain, octets, as_slot),
        uncached_tokens=picture.tokens_of(chain.prompt_bytes - octets, as_slot),
        outlook=picture.outlooks.of[slot],
    )


def why_not(
    request: Request, replica: Replica, slot: int, pool: Pool, picture: Picture, now_s: float
) -> str:
    """Return why a request may not go to a remote now; empty: it may."""
    outlook = picture.outlooks.of.get(slot)
    if outlook is None:
        return "it is not known yet"
    if not request.abroad:
        return "this request may not leave the region"
    if replica.name in request.tried:
        return "it was tried"
    reason = outlook.why_not(now_s)
    if reason:
        return reason
    inflight = picture.loads.inflight[slot]
    if outlook.begins(inflight, now_s):
        return ""
    if pool.available or (outlook.said.awake and pool.starts_in_s < _NEVER):
        return "it would not begin one at once"  # here it can still go wherever it begins first
    return "" if outlook.takes(inflight, now_s) else "it serves none"


def may_have_state(
    request: Request, slot: int, seats: Seats, picture: Picture, now_s: float
) -> bool:
    """Whether a request may go to this remote because what it goes on from is there."""
    return slot in seats.away_slots and request.abroad and not picture.outlooks.of[slot].gone(now_s)


def choose_region(
    home: Decision | None,
    request: Request,
    pool: Pool,
    picture: Picture,
    now_s: float,
    *,
    priced: bool,
    held: Callable[[Pool], int],
) -> Decision | None:
    """Return `home`, which a policy has chosen here, or a remote that is cheaper.

    `priced`: the policy goes by prices. `held(pool)` returns how many wait for the pool.
    """
    if home is not None and not priced:
        return home
    seats = picture.seats(pool)
    least_octets = _hot_octets(home, request)
    as_slot = home.slot if home is not None else seats.slots[0] if seats.slots else -1
    if home is not None:
        best_s = _home_s(home, request, picture, now_s, least_octets)
    elif seats.slots:
        best_s = _full_s(request, seats.slots, picture, held(pool))
    else:
        best_s = pool.starts_in_s
    best_at = -1
    for at, slot in enumerate(seats.away_slots):
        # Most requests need not look further: no place there is better than its way is long.
        if picture.outlooks.of[slot].round_trip_s + claim_limits.REGION_SLACK_S >= best_s:
            continue
        if why_not(request, seats.away[at], slot, pool, picture, now_s):
            continue
        of_slot = as_slot if as_slot >= 0 else slot
        one = terms_abroad(request, slot, picture, now_s, of_slot, least_octets)
        if one.price_s < best_s:
            best_s, best_at = one.price_s, at
    if best_at < 0:
        return home
    slot = seats.away_slots[best_at]
    known = home.known if home is not None else 0
    octets = picture.index.held_of(slot, request.chain)
    return Decision(seats.away[best_at], slot, REASON, octets, known)


def _home_s(
    home: Decision, request: Request, picture: Picture, now_s: float, least_octets: int
) -> float:
    """Return the price of what was chosen here, where so much counts as cached anywhere.

    Neither slow streams nor those that it would hold up are held against this region: nobody tells
    of them elsewhere.
    """
    octets = max(home.cached_octets, least_octets)
    as_if = Decision(home.replica, home.slot, home.reason, octets, home.known)
    found = terms(as_if, request, picture, now_s)
    return found.price_s - found.pace_s - found.stall_s


def _hot_octets(home: Decision | None, request: Request) -> int:
    """Return what counts as cached everywhere, because many prompts begin with it."""
    if home is None or home.reason != "hot" or home.known not in request.chain.hashes:
        return 0
    return request.chain.ends[request.chain.hashes.index(home.known)]


def _full_s(request: Request, slots: list[int], picture: Picture, held: int) -> float:
    """Return the price of staying where all are full and `held` wait already.

    One of those that run has to end for each that waits; a replica ends as many in the time that
    a request holds its place as it has.
    """
    loads = picture.loads
    per_s = 0.0
    for slot in slots:
        per_s += loads.inflight[slot] / (loads.request_s[slot] or claim_limits.UNKNOWN_REQUEST_S)
    if per_s <= 0.0:
        return _NEVER
    most_octets = max([picture.index.held_of(slot, request.chain) for slot in slots])
    uncached = picture.tokens_of(request.chain.prompt_bytes - most_octets, slots[0])
    return (1 + held) / per_s + uncached * min([loads.price_per_token[slot] for slot in slots])


def prices_regions(policy: Policy) -> bool:
    """Whether a policy goes by prices, so that regions can be compared by them."""
    return policy is prefix
