"""The accounts: whatever happens in between, everything returns to zero."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from proxy.core.accounts import Accounts, Lease

_REPLICAS = ("a", "b", "c")


class Interleavings(RuleBasedStateMachine):
    """Leases taken, prefills ended and leases released in any order, against a plain model."""

    leases = Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        self.accounts = Accounts()
        self.open: dict[int, tuple[str, int]] = {}  # what each open lease still weighs

    @rule(target=leases, replica_id=st.sampled_from(_REPLICAS), tokens=st.integers(0, 1000))
    def acquire(self, replica_id: str, tokens: int) -> Lease:
        before = self.accounts[replica_id].inflight
        lease = self.accounts.acquire(replica_id, tokens)
        assert self.accounts[replica_id].inflight == before + 1
        self.open[id(lease)] = (replica_id, tokens)
        return lease

    @rule(lease=leases)
    def end_prefill(self, lease: Lease) -> None:
        self.accounts.end_prefill(lease)
        self.open[id(lease)] = (lease.replica_id, 0)

    @rule(lease=consumes(leases))
    def release(self, lease: Lease) -> None:
        self.accounts.release(lease)
        del self.open[id(lease)]
        with pytest.raises(AssertionError, match="exactly once"):
            self.accounts.release(lease)

    @rule(known=st.frozensets(st.sampled_from(_REPLICAS)))
    def retain(self, known: frozenset[str]) -> None:
        self.accounts.retain(known)
        busy = {replica_id for replica_id, _ in self.open.values()}
        for replica_id in set(_REPLICAS) - known - busy:
            assert self.accounts[replica_id].inflight == 0

    @invariant()
    def accounts_are_the_sum_of_open_leases(self) -> None:
        for replica_id in _REPLICAS:
            weights = [tokens for owner, tokens in self.open.values() if owner == replica_id]
            assert self.accounts[replica_id].inflight == len(weights)
            assert self.accounts[replica_id].queued_tokens == sum(weights)
        assert self.accounts.inflight_total() == len(self.open)


TestInterleavings = Interleavings.TestCase


def test_a_stranger_has_no_load() -> None:
    accounts = Accounts()
    assert accounts["a"].inflight == 0
    assert accounts["a"].queued_tokens == 0
    assert accounts.inflight_total() == 0


def test_what_was_dispatched_is_counted_for_good() -> None:
    accounts = Accounts()
    accounts.release(accounts.acquire("a", 30))
    accounts.release(accounts.acquire("a", 12))
    assert accounts["a"].dispatched_tokens == 42
    accounts.retain(frozenset("a"))
    accounts.retain(frozenset())
    assert accounts["a"].dispatched_tokens == 0
