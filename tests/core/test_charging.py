"""What a request is charged, and what it needed in the end."""

from __future__ import annotations

import pytest

from proxy.core.charging import charge, settle
from proxy.core.fairness import Account, Shares
from proxy.core.lease import Lease
from proxy.core.loads import Loads
from proxy.core.policy import Request
from proxy.core.prefix import NO_CHAIN
from proxy.core.usage import Usage


def _charged(shares: Shares) -> tuple[Lease, Loads, Account]:
    loads = Loads()
    loads.open(0, "group", capacity_tokens=100_000)
    lease = Lease(0, "a", prefill_tokens=1_000, prompt_tokens=4_000)
    request = Request(NO_CHAIN, has_session=False)
    request.tenant = "t"
    charge(shares, lease, request, 0.0)
    loads.acquire(lease, 0.0)
    assert lease.account is not None
    return lease, loads, lease.account


@pytest.mark.parametrize(
    ("usage", "needed"),
    [(Usage(4_000, 50, 3_500), 550), (Usage(4_000, 50, None), 1_050), (Usage(400, 0, None), 400)],
)
def test_the_engines_count_is_what_counts(usage: Usage, needed: int) -> None:
    shares = Shares()
    lease, loads, account = _charged(shares)
    assert account.counter == 1_000 + account.output_tokens
    settle(shares, lease, loads, usage, 0.1, 1.0)
    assert account.counter == pytest.approx(needed)
    assert (account.open, lease.account) == (0, None)
    settle(shares, lease, loads, usage, 0.1, 1.0)  # of nobody any more
    assert account.counter == pytest.approx(needed)


def test_without_a_count_it_is_what_the_replica_can_have_done() -> None:
    shares = Shares()
    lease, loads, account = _charged(shares)
    half_s = 500 * loads.s_per_token[0]
    settle(shares, lease, loads, None, 0.0, half_s)
    assert account.counter == pytest.approx(500)
    lease, loads, account = _charged(shares)
    loads.decoded(0, 11, 0.1)
    settle(shares, lease, loads, None, 1.0, 3.0)
    assert account.counter == pytest.approx(500 + 1_000 + 200)
