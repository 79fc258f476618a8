"""Which replica takes this request: filter, then walk or score, then one answer with its reason.

`prefix`, the default, is the consistent-hash ring bounded in seconds: the request goes to the first
replica on its walk whose price is within a slack of the least. The price of a replica is the
prefill queued on it plus what it would still have to compute of this prompt. A bound on request
counts spills constantly when few requests run and not enough when prompts differ a hundredfold;
seconds of prefill are what a person waits for. A hot replica spills its own requests and nobody
else's, and where nothing is known of the caches the ring alone decides.

Every policy is a function of its arguments; ties go by name or by ring order, never by luck.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Final

from proxy.core import limits
from proxy.core.accounts import Accounts
from proxy.core.fleet import Pool
from proxy.core.index import PrefixRecord
from proxy.core.prefix import PrefixChain
from proxy.core.replica import Replica


class Request:
    """What a choice depends on.

    `has_session`: the chain's key is a session's; `pinned`: and it stays at its home while that
    lives. `weight`: what a second of it counts against one of others. `adapter`: the LoRA adapter
    that it names apart from the model, or empty. `response_key`: of the stored response that it
    builds upon, or 0.
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
        self.response_key = response_key
        self.tried: set[str] = set()  # replicas that have already failed this request


class Decision:
    """The chosen replica, why, and what it is believed to have cached of the prompt."""

    __slots__ = ("cached_tokens", "reason", "replica")

    def __init__(self, replica: Replica, reason: str, cached_tokens: int = 0) -> None:
        self.replica = replica
        self.reason = reason
        self.cached_tokens = cached_tokens


class PolicyState:
    """What a policy may read and remember. `draw` returns the next number in [0, 1)."""

    __slots__ = ("accounts", "draw", "record", "turn")

    def __init__(self, accounts: Accounts, record: PrefixRecord, draw: Callable[[], float]) -> None:
        self.accounts = accounts
        self.record = record
        self.draw = draw
        self.turn = 0


Policy = Callable[[Request, Pool, PolicyState], Decision | None]

REASONS: Final = ("home", "session", "spill", "least_load", "round_robin", "random")


def candidates(pool: Pool, accounts: Accounts, tried: Collection[str]) -> list[Replica]:
    """Return the replicas that may take a request now, by name."""
    return [replica for replica in pool.available if _may_take(replica, accounts, tried)]


def _may_take(replica: Replica, accounts: Accounts, tried: Collection[str]) -> bool:
    if replica.replica_id in tried:
        return False
    inputs_max = replica.max_inputs
    return not inputs_max or accounts[replica.replica_id].inflight < inputs_max


class Offer:
    """What one replica would cost: seconds of prefill ahead of a newcomer, its own at a surcharge.

    Its own uncached tokens count more than once: computing them also delays whoever comes next,
    and writes them over what others have cached.
    """

    __slots__ = ("cached_tokens", "price_s", "replica")

    def __init__(self, request: Request, replica: Replica, state: PolicyState) -> None:
        name, chain = replica.replica_id, request.chain
        self.replica = replica
        self.cached_tokens = state.record.matched_tokens(name, chain)
        uncached_tokens = max(0, chain.prompt_tokens - self.cached_tokens)
        tokens = state.accounts[name].queued_tokens + limits.UNCACHED_WEIGHT * uncached_tokens
        self.price_s = tokens / limits.PREFILL_TOKENS_PER_S_DEFAULT


def prefix(request: Request, pool: Pool, state: PolicyState) -> Decision | None:
    at_home = "session" if request.has_session else "home"
    home = pool.replicas.get(pool.ring.home(request.chain.home_key) or "")
    if home is not None and home.available and _may_take(home, state.accounts, request.tried):
        offer = Offer(request, home, state)
        if offer.price_s <= limits.SPILL_SLACK_S:  # then nobody can be cheaper by more than that
            return Decision(home, at_home, offer.cached_tokens)
    offers = {
        replica.replica_id: Offer(request, replica, state)
        for replica in candidates(pool, state.accounts, request.tried)
    }
    if not offers:
        return None
    bound_s = min([offer.price_s for offer in offers.values()]) + limits.SPILL_SLACK_S
    for step, name in enumerate(pool.ring.walk(request.chain.home_key)):
        found = offers.get(name)
        if found is not None and found.price_s <= bound_s:
            return Decision(found.replica, "spill" if step else at_home, found.cached_tokens)
    raise AssertionError("the cheapest replica is within the bound")


def session(request: Request, pool: Pool, state: PolicyState) -> Decision | None:
    """The home while it lives, however busy: for state that only one replica has."""
    able = {r.replica_id: r for r in candidates(pool, state.accounts, request.tried)}
    for step, name in enumerate(pool.ring.walk(request.chain.home_key)):
        if name in able:
            cached_tokens = state.record.matched_tokens(name, request.chain)
            return Decision(able[name], "spill" if step else "session", cached_tokens)
    return None


def least_load(request: Request, pool: Pool, state: PolicyState) -> Decision | None:
    able = candidates(pool, state.accounts, request.tried)
    if not able:
        return None
    return _decide(
        min(able, key=lambda replica: _load(state.accounts, replica)), "least_load", request, state
    )


def _load(accounts: Accounts, replica: Replica) -> tuple[int, int, int, str]:
    """Queued tokens, then requests, then the work it was ever sent, so that ties rotate."""
    account = accounts[replica.replica_id]
    return account.queued_tokens, account.inflight, account.dispatched_tokens, replica.replica_id


def round_robin(request: Request, pool: Pool, state: PolicyState) -> Decision | None:
    able = candidates(pool, state.accounts, request.tried)
    if not able:
        return None
    chosen = able[state.turn % len(able)]
    state.turn += 1
    return _decide(chosen, "round_robin", request, state)


def random(request: Request, pool: Pool, state: PolicyState) -> Decision | None:
    able = candidates(pool, state.accounts, request.tried)
    if not able:
        return None
    return _decide(able[int(state.draw() * len(able))], "random", request, state)


def _decide(replica: Replica, reason: str, request: Request, state: PolicyState) -> Decision:
    cached_tokens = state.record.matched_tokens(replica.replica_id, request.chain)
    return Decision(replica, reason, cached_tokens)


POLICIES: Final[dict[str, Policy]] = {
    "prefix": prefix,
    "session": session,
    "least_load": least_load,
    "round_robin": round_robin,
    "random": random,
}
