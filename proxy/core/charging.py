"""What a request is charged to its tenant's share, and when it is put right.

At dispatch it is what it should need: what is not believed cached of its prompt, and as many tokens
of an answer as this tenant's have. At its end it is what the engine counted. Where that does not
say, because the client left or did not want to know, it is what can have been computed in the time
that it took, at the speeds of that replica: so nobody pays less for hanging up, or for not asking.
"""

from __future__ import annotations

from proxy.core.fairness import Account, Shares
from proxy.core.lease import Lease
from proxy.core.loads import Loads
from proxy.core.policy import Request
from proxy.core.usage import Usage


def account_of(shares: Shares, request: Request, now_s: float) -> Account:
    """Return the account of the one who sent this, in the class that it is served as."""
    return shares.account(request.work_class, request.tenant, request.tenant_weight, now_s)


def charge(shares: Shares, lease: Lease, request: Request, now_s: float) -> None:
    """It is dispatched."""
    lease.account = account_of(shares, request, now_s)
    lease.charged_tokens = shares.dispatched(lease.account, lease.prefill_tokens)


def settle(
    shares: Shares,
    lease: Lease,
    loads: Loads,
    usage: Usage | None,
    first_octet_s: float,
    now_s: float,
) -> None:
    """It is over, and its lease is not yet released; harmless for one that was not charged."""
    account = lease.account
    if account is None:
        return
    lease.account = None
    if usage is None:
        needed = computed_tokens(lease, loads, account.output_tokens, first_octet_s, now_s)
    else:
        needed = float(uncached_tokens(lease, usage) + usage.completion_tokens)
        shares.learn(account, usage.completion_tokens)
    shares.over(account, lease.charged_tokens, needed)


def uncached_tokens(lease: Lease, usage: Usage) -> int:
    """Return what was computed of the prompt; what is not said was as it was believed."""
    if usage.cached_tokens is None:
        return min(lease.prefill_tokens, usage.prompt_tokens)
    return max(0, usage.prompt_tokens - usage.cached_tokens)


def computed_tokens(
    lease: Lease, loads: Loads, output_tokens: float, first_octet_s: float, now_s: float
) -> float:
    """Return what its replica can have computed of it until now."""
    slot = lease.slot
    taken_s = max(0.0, now_s - lease.started_s)
    prefill_s = lease.prefill_tokens * loads.s_per_token[slot]
    if not first_octet_s and taken_s < prefill_s:
        return taken_s / loads.s_per_token[slot]
    decoding_s = now_s - first_octet_s if first_octet_s else taken_s - prefill_s
    per_token_s = loads.s_per_output_token[slot]
    if per_token_s > 0.0:
        output_tokens = decoding_s / per_token_s
    return lease.prefill_tokens + output_tokens
