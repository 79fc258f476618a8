"""Whether a tenant may have this request now, within its limits; and if not, why, and when.

A request is counted in full before it runs: one request, one at a time, and as many tokens as its
prompt is believed to have and its answer may have. When it is over, what it used takes the place of
what was reserved. So a tenant cannot get beyond its limit by sending much at once, and what it did
not use is free for others the moment that is known. Tokens count at the moment in which the request
was let in; those beyond the reservation, where a prompt turned out longer than believed, count when
they are known.

Requests a minute, tokens a minute and requests at a time come and go: who is refused for them may
come again. A day's tokens and budget are gone until midnight, UTC. A request that asks for more
than a limit has in all is never let in, and is told so.
"""

from __future__ import annotations

import math
from typing import Final

from proxy.config_access import AccessConfig, ModelAccess, TenantConfig
from proxy.core import claim_limits, quota
from proxy.core.http1 import Field
from proxy.core.quota import Account
from proxy.core.usage import Usage

NANO: Final = 1_000_000_000  # costs are counted in billionths, so that single tokens are whole
_NONE: Final = -1  # no limit

_REQUEST_FIELDS: Final = (
    b"x-ratelimit-limit-requests", b"x-ratelimit-remaining-requests",
    b"x-ratelimit-reset-requests",
)  # fmt: skip
_TOKEN_FIELDS: Final = (
    b"x-ratelimit-limit-tokens", b"x-ratelimit-remaining-tokens", b"x-ratelimit-reset-tokens",
)  # fmt: skip
_MINUTE: Final = b"1m0s"

# What a refusal is for: as metrics have it.
REQUESTS: Final = "requests"
TOKENS: Final = "tokens"
CONCURRENT: Final = "concurrent"
DAY_TOKENS: Final = "tokens_per_day"
BUDGET: Final = "budget_per_day"
KINDS: Final = (REQUESTS, TOKENS, CONCURRENT, DAY_TOKENS, BUDGET)
_WORDS: Final = {
    REQUESTS: "requests per min",
    TOKENS: "tokens per min",
    CONCURRENT: "concurrent requests",
    DAY_TOKENS: "tokens per day",
    BUDGET: "budget per day",
}


class Allowance:
    """What one tenant may have; below 0: as much as it wants."""

    __slots__ = ("concurrent", "cost_per_day", "requests_per_min", "tokens_per_day",
                 "tokens_per_min")  # fmt: skip

    def __init__(self, tenant: TenantConfig) -> None:
        self.requests_per_min = tenant.requests_per_min or _NONE
        self.tokens_per_min = tenant.tokens_per_min or _NONE
        self.concurrent = tenant.max_concurrent or _NONE
        self.tokens_per_day = tenant.tokens_per_day or _NONE
        budget = tenant.budget_per_day
        self.cost_per_day = _NONE if budget is None else int(budget * NANO)

    @property
    def any(self) -> bool:
        return max(
            self.requests_per_min, self.tokens_per_min, self.concurrent, self.tokens_per_day,
            self.cost_per_day,
        ) >= 0  # fmt: skip


def allowances(access: AccessConfig) -> dict[str, Allowance]:
    """Return those who have a limit, in the order of their names."""
    found = {tenant.name: Allowance(tenant) for tenant in access.tenants}
    return {name: found[name] for name in sorted(found) if found[name].any}


class Prices:
    """What tokens of one model cost, in billionths of the currency each."""

    __slots__ = ("cached", "completion", "prompt")

    def __init__(self, access: ModelAccess) -> None:
        # The price of a million tokens, in millionths, is that of one.
        self.prompt = access.prompt_price * 1000.0
        self.cached = access.cached_price * 1000.0
        self.completion = access.completion_price * 1000.0

    def of(self, usage: Usage) -> int:
        cached = min(usage.cached_tokens or 0, usage.prompt_tokens)
        return int(
            (usage.prompt_tokens - cached) * self.prompt
            + cached * self.cached
            + usage.completion_tokens * self.completion
            + 0.5
        )


FREE: Final = Prices(ModelAccess())


class Claim:
    """What one request has of its tenant's limits, until it is settled: once."""

    __slots__ = ("bucket", "cost", "open", "rated", "tokens")

    def __init__(self, tokens: int, cost: int, *, rated: bool = True) -> None:
        """Those that are not `rated` count for the day alone, such as the lines of a job."""
        self.tokens = tokens
        self.cost = cost
        self.rated = rated
        self.bucket = 0  # of the moment in which it was let in
        self.open = False


class Refused:
    """Why a request is not let in. `wait_s`: when it may come again; below 0: not like this."""

    __slots__ = ("kind", "limit", "requested", "used", "wait_s")

    def __init__(self, kind: str, limit: int, used: int, requested: int, wait_s: float) -> None:
        self.kind = kind
        self.limit = limit
        self.used = used
        self.requested = requested
        self.wait_s = wait_s

    @property
    def over(self) -> bool:
        """Whether the day's share is spent, or too little of it is left for this."""
        return self.wait_s < 0.0 and self.kind in (DAY_TOKENS, BUDGET)

    def message(self, tenant: str) -> str:
        """Say it as OpenAI does: which limit, how much of it is used, what was asked, when."""
        words = _WORDS[self.kind]
        limit, used, requested = (self._shown(n) for n in (self.limit, self.used, self.requested))
        facts = f"Limit {limit}, Used {used}, Requested {requested}."
        if self.over:
            return (
                f"You exceeded your current quota on {words} (tenant {tenant}): {facts} "
                "It begins anew at midnight UTC."
            )
        if self.wait_s < 0.0:
            return (
                f"Request too large on {words} (tenant {tenant}): Limit {limit}, Requested "
                f"{requested}. It can never be let in; ask for fewer tokens."
            )
        again = "" if self.kind == CONCURRENT else f" Please try again in {duration(self.wait_s)}."
        return f"Rate limit reached on {words} (tenant {tenant}): {facts}{again}"

    def _shown(self, amount: int) -> str:
        return f"{amount / NANO:.6g}" if self.kind == BUDGET else str(amount)


def admit(
    account: Account, allowed: Allowance, claim: Claim, now_s: float, unix_s: float
) -> Refused | None:
    """Take what a request claims, or return why it may not have it."""
    if claim.rated and 0 <= allowed.tokens_per_min < claim.tokens:
        return Refused(TOKENS, allowed.tokens_per_min, 0, claim.tokens, -1.0)
    claim.bucket = quota.bucket_at(now_s)
    account.advance(claim.bucket)
    _hold(account, claim)
    refused = _of_day(account, allowed, claim, unix_s)
    if refused is None and claim.rated:
        refused = _of_minute(account, allowed, claim, now_s)
    if refused is not None:
        _let_go(account, claim)
        _unrate(account, claim, claim.tokens, 1)
    return refused


def _hold(account: Account, claim: Claim) -> None:
    claim.open = True
    account.add(quota.HELD_TOKENS, claim.tokens)
    account.add(quota.HELD_COST, claim.cost)
    if claim.rated:
        account.add(quota.CONCURRENT, 1)
        account.use(claim.bucket, quota.REQUESTS, 1)
        account.use(claim.bucket, quota.TOKENS, claim.tokens)


def _let_go(account: Account, claim: Claim) -> None:
    claim.open = False
    account.add(quota.HELD_TOKENS, -claim.tokens)
    account.add(quota.HELD_COST, -claim.cost)
    if claim.rated:
        account.add(quota.CONCURRENT, -1)


def _unrate(account: Account, claim: Claim, tokens: int, requests: int) -> None:
    """Have so much of it not count for the minute."""
    if claim.rated:
        account.give_back(claim.bucket, quota.REQUESTS, requests)
        account.give_back(claim.bucket, quota.TOKENS, tokens)


def _of_day(account: Account, allowed: Allowance, claim: Claim, unix_s: float) -> Refused | None:
    today = quota.day_at(unix_s)
    for kind, limit, held, spent, claimed in (
        (DAY_TOKENS, allowed.tokens_per_day, quota.HELD_TOKENS, quota.DAY_TOKENS, claim.tokens),
        (BUDGET, allowed.cost_per_day, quota.HELD_COST, quota.DAY_COST, claim.cost),
    ):
        if limit < 0:
            continue
        # What runs first: whoever ends it meanwhile, elsewhere, has added to the day before.
        running = account.sum(held) - claimed
        used = account.of_day(spent, today)
        # Who has spent all gets nothing more, even what costs nothing.
        if used >= limit or used + claimed > limit:
            return Refused(kind, limit, used, claimed, -1.0)
        if used + running + claimed > limit:  # some of it may come back when they have ended
            return Refused(kind, limit, used + running, claimed, claim_limits.CLAIM_RETRY_S)
    return None


def _of_minute(account: Account, allowed: Allowance, claim: Claim, now_s: float) -> Refused | None:
    if allowed.concurrent >= 0:
        running = account.sum(quota.CONCURRENT)
        if running > allowed.concurrent:
            return Refused(
                CONCURRENT, allowed.concurrent, running - 1, 1, claim_limits.CLAIM_RETRY_S
            )
    for kind, limit, counted, claimed in (
        (REQUESTS, allowed.requests_per_min, quota.REQUESTS, 1),
        (TOKENS, allowed.tokens_per_min, quota.TOKENS, claim.tokens),
    ):
        if limit >= 0 and claimed:
            used = account.sum(counted)
            if used > limit:
                wait_s = account.frees_s(counted, used - limit, now_s)
                return Refused(kind, limit, used - claimed, claimed, wait_s)
    return None


def settle(
    account: Account,
    claim: Claim,
    usage: Usage | None,
    cost: int,
    now_s: float,
    unix_s: float,
    *,
    begun: bool,
) -> None:
    """A request is over. Once: `usage` is what it used, None: nothing; `begun`: a replica had it.

    Nothing of what no replica has had counts. A request that one has refused counts as a request.
    """
    assert claim.open
    bucket = quota.bucket_at(now_s)
    account.advance(bucket)
    tokens = usage.prompt_tokens + usage.completion_tokens if usage is not None else 0
    # Before it is let go: in between, it counts twice for others, and never not at all.
    if tokens or cost:
        account.add_to_day(quota.day_at(unix_s), tokens, cost)
    _let_go(account, claim)
    _unrate(account, claim, max(0, claim.tokens - tokens), 0 if begun else 1)
    if claim.rated:
        account.use(bucket, quota.TOKENS, max(0, tokens - claim.tokens))


# --- what clients are told -----------------------------------------------------------------------


def told(account: Account, allowed: Allowance, now_s: float) -> list[Field]:
    """Return the fields that say how much is left of a minute, as OpenAI has them.

    Reset is when nothing of what was used counts any more, if nothing more comes, to within a
    tenth of a second.
    """
    fields: list[Field] = []
    if allowed.requests_per_min >= 0:
        fields += _told_of(
            _REQUEST_FIELDS, account, quota.REQUESTS, allowed.requests_per_min, now_s
        )
    if allowed.tokens_per_min >= 0:
        fields += _told_of(_TOKEN_FIELDS, account, quota.TOKENS, allowed.tokens_per_min, now_s)
    return fields


def _told_of(
    names: tuple[bytes, bytes, bytes], account: Account, kind: int, limit: int, now_s: float
) -> list[Field]:
    used = account.sum(kind)
    whole_s = account.whole_s(kind, used, now_s)
    # Nearly always a minute: this request is one of those that count.
    reset = _MINUTE if whole_s >= quota.WINDOW_S else duration(whole_s).encode()
    left = max(0, limit - used)
    return [(names[0], b"%d" % limit), (names[1], b"%d" % left), (names[2], reset)]


def duration(seconds: float) -> str:
    """Return a time as OpenAI writes it: `20ms`, `1.5s`, `6m0s`; rounded up, whoever waits it."""
    millis = max(0, math.ceil(seconds * 1000.0 - 1e-6))
    if millis < 1000:
        return f"{millis}ms"
    if millis < 60_000:
        return f"{millis / 1000:.3f}".rstrip("0").rstrip(".") + "s"
    minutes, rest_s = divmod(math.ceil(millis / 1000), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{rest_s}s" if hours else f"{minutes}m{rest_s}s"
