"""Who is computing what: the load that this proxy has put on each replica.

Counted at dispatch, in requests and in prefill tokens, because everything counted later lets a
burst pile onto one replica before anybody notices. Each exchange holds one lease; it is released
exactly once, and the first octet of the answer ends its prefill.
"""

from __future__ import annotations


class Lease:
    """The load that one exchange holds on a replica."""

    __slots__ = ("prefill_tokens", "released", "replica_id")

    def __init__(self, replica_id: str, prefill_tokens: int) -> None:
        self.replica_id = replica_id
        self.prefill_tokens = prefill_tokens
        self.released = False


class Account:
    """One replica's load."""

    __slots__ = ("dispatched_tokens", "inflight", "queued_tokens")

    def __init__(self) -> None:
        self.inflight = 0  # requests
        self.queued_tokens = 0  # prefill tokens sent whose first octet has not come back
        self.dispatched_tokens = 0


_NOTHING = Account()


class Accounts:
    """The accounts of all replicas. One writer: the worker that dispatches."""

    __slots__ = ("_by_replica",)

    def __init__(self) -> None:
        self._by_replica: dict[str, Account] = {}

    def __getitem__(self, replica_id: str) -> Account:
        return self._by_replica.get(replica_id, _NOTHING)

    def acquire(self, replica_id: str, prefill_tokens: int) -> Lease:
        account = self._by_replica.get(replica_id)
        if account is None:
            account = self._by_replica[replica_id] = Account()
        account.inflight += 1
        account.queued_tokens += prefill_tokens
        account.dispatched_tokens += prefill_tokens
        return Lease(replica_id, prefill_tokens)

    def end_prefill(self, lease: Lease) -> None:
        """The first octet came back: the prompt has been computed. Harmless when repeated."""
        if lease.prefill_tokens:
            self._by_replica[lease.replica_id].queued_tokens -= lease.prefill_tokens
            lease.prefill_tokens = 0

    def release(self, lease: Lease) -> None:
        assert not lease.released, "a lease is released exactly once"
        self.end_prefill(lease)
        lease.released = True
        self._by_replica[lease.replica_id].inflight -= 1

    def retain(self, replica_ids: frozenset[str]) -> None:
        """Drop idle accounts of replicas that are gone; busy ones go at a later call."""
        for replica_id in [k for k, a in self._by_replica.items() if not a.inflight]:
            if replica_id not in replica_ids:
                del self._by_replica[replica_id]

    def inflight_total(self) -> int:
        return sum(account.inflight for account in self._by_replica.values())
