"""What this proxy believes each replica has cached: a record of what it sent where.

Per replica a least-recently-used set of chain hashes, sized in tokens by the replica's KV cache, so
that what the engine has evicted is forgotten here at about the same time. A belief, not a truth: a
wrong one costs a prefill, never a wrong answer.
"""

from __future__ import annotations

from collections import OrderedDict

from proxy.core import limits
from proxy.core.prefix import PrefixChain


class PrefixRecord:
    """Chain hashes sent to each replica, bounded in entries and in tokens."""

    __slots__ = ("_by_replica", "_capacity_tokens", "_held_tokens")

    def __init__(self) -> None:
        self._by_replica: dict[str, OrderedDict[int, int]] = {}
        self._held_tokens: dict[str, int] = {}
        self._capacity_tokens: dict[str, int] = {}

    def set_capacity(self, replica_id: str, capacity_tokens: int) -> None:
        """Size a replica's record as its engine says; 0 means that it does not say."""
        if capacity_tokens > 0:
            self._capacity_tokens[replica_id] = capacity_tokens

    def forget(self, replica_id: str) -> None:
        """The replica is gone, restarted or asleep: its cache is empty."""
        self._by_replica.pop(replica_id, None)
        self._held_tokens.pop(replica_id, None)
        self._capacity_tokens.pop(replica_id, None)

    def entries(self) -> int:
        return sum(map(len, self._by_replica.values()))

    def matched_tokens(self, replica_id: str, chain: PrefixChain) -> int:
        """Return how many of the prompt's tokens the replica is believed to hold."""
        held = self._by_replica.get(replica_id)
        if held is None:
            return 0
        hashes = chain.hashes
        known, unknown = 0, len(hashes)
        # A prefix is always younger than what builds on it (see `note`), so what is held of a chain
        # is its beginning, and a bisection finds where that ends.
        while known < unknown:
            middle = (known + unknown) // 2
            if hashes[middle] in held:
                known = middle + 1
            else:
                unknown = middle
        return chain.ends[known - 1] // limits.BYTES_PER_TOKEN if known else 0

    def note(self, replica_id: str, chain: PrefixChain) -> None:
        """The replica was sent this prompt: it will hold it, as its most recent."""
        held = self._by_replica.get(replica_id)
        if held is None:
            held = self._by_replica[replica_id] = OrderedDict()
            self._held_tokens[replica_id] = 0
        added = 0
        # Deepest first, so that a prefix is always younger than what builds on it, and a chain is
        # forgotten from its end, as engines evict leaf blocks first.
        for depth in range(len(chain.hashes) - 1, -1, -1):
            name = chain.hashes[depth]
            if name in held:
                held.move_to_end(name)
                continue
            before = chain.ends[depth - 1] if depth else 0
            tokens = (chain.ends[depth] - before) // limits.BYTES_PER_TOKEN
            held[name] = tokens
            added += tokens
        total = self._held_tokens[replica_id] + added
        capacity = self._capacity_tokens.get(replica_id, limits.KV_CAPACITY_TOKENS_DEFAULT)
        while held and (total > capacity or len(held) > limits.RECORD_ENTRIES_MAX):
            total -= held.popitem(last=False)[1]
        self._held_tokens[replica_id] = total
