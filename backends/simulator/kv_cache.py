"""Which blocks of the KV cache hold what: prefix hits, allocation, eviction.

A block is known by the hash of its tokens chained to its parent's, so equal hash means equal
prefix. Full blocks are shared by reference count; with no references left they stay, the least
recently used first to go. A sequence lets go of its blocks last to first, so that a child is always
older in that order than its parent: no block is ever resident without the whole chain above it.

Each change is recorded as an event when somebody listens; the caller takes them off at the end of a
step, in order, and sends them as one batch.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import xxhash

from backends.simulator.tokens import TOKEN_BYTES


class Stored(NamedTuple):
    """Blocks of one chain became resident, `parent` before the first (0: none)."""

    hashes: tuple[int, ...]
    parent: int
    tokens: bytes


class Removed(NamedTuple):
    """A block was evicted."""

    block: int


class Cleared(NamedTuple):
    """Nothing is resident any more."""


CacheEvent = Stored | Removed | Cleared


def root_hash(adapter: str, salt: str) -> int:
    """Return the seed of all chains that may share blocks: same adapter, same salt."""
    if not adapter and not salt:
        return 0
    return xxhash.xxh3_64_intdigest(f"{adapter}\0{salt}".encode())


def extend_chain(
    chain: list[int], root: int, tokens: bytes | bytearray, block_tokens: int
) -> list[int]:
    """Append to `chain` the hashes of all full blocks of `tokens` that it lacks; return it."""
    block_bytes = block_tokens * TOKEN_BYTES
    parent = chain[-1] if chain else root
    view = memoryview(tokens)
    digest = xxhash.xxh3_64_intdigest
    try:
        for start in range(len(chain) * block_bytes, len(view) - block_bytes + 1, block_bytes):
            parent = digest(view[start : start + block_bytes], parent)
            chain.append(parent)
    finally:
        view.release()
    return chain


class KvCache:
    """A pool of `blocks_max` blocks."""

    def __init__(self, blocks_max: int, block_tokens: int, *, record_events: bool = False) -> None:
        assert blocks_max > 0
        assert block_tokens > 0
        self.blocks_max = blocks_max
        self.block_tokens = block_tokens
        self.evicted_blocks = 0
        self._record_events = record_events
        self._events: list[CacheEvent] = []
        self._references: dict[int, int] = {}  # resident and in use
        # Resident, not in use, oldest first (the front of a plain dict is slow after deletions).
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._private_blocks = 0  # in use, not yet full

    @property
    def available_blocks(self) -> int:
        """Blocks that can be taken now, evicting if need be."""
        return self.blocks_max - len(self._references) - self._private_blocks

    @property
    def used_blocks(self) -> int:
        """Blocks that sequences hold."""
        return len(self._references) + self._private_blocks

    @property
    def cached_blocks(self) -> int:
        """Blocks that hold a prefix nobody uses at the moment."""
        return len(self._idle)

    def match(self, chain: Sequence[int], blocks_max: int) -> int:
        """Return how many leading blocks of `chain` are resident, at most `blocks_max`."""
        references, idle = self._references, self._idle
        for index in range(min(blocks_max, len(chain))):
            block = chain[index]
            if block not in references and block not in idle:
                return index
        return min(blocks_max, len(chain))

    def idle_count(self, chain: Sequence[int], blocks: int) -> int:
        """Return how many of the first `blocks` of `chain` would be taken out of the idle ones."""
        return sum(block in self._idle for block in chain[:blocks])

    def hold(self, chain: Sequence[int], blocks: int) -> None:
        """Take a reference to the first `blocks` of `chain`, which are resident."""
        references = self._references
        for block in chain[:blocks]:
            count = references.get(block)
            if count is None:
                del self._idle[block]
                references[block] = 1
            else:
                references[block] = count + 1

    def take(self, blocks: int) -> None:
        """Take blocks for tokens to be computed; the caller has checked `available_blocks`."""
        assert 0 <= blocks <= self.available_blocks
        unused = self.blocks_max - self.used_blocks - len(self._idle)
        for _ in range(blocks - unused):
            self._evict()
        self._private_blocks += blocks

    def seal(self, chain: Sequence[int], start: int, end: int, tokens: bytes) -> None:
        """Turn the private blocks `start` to `end` of a chain, now full, into shared ones.

        `tokens` are those of these blocks. One that is resident already is not kept twice.
        """
        references = self._references
        fresh = 0  # blocks from here on are new; a resident child implies a resident parent
        for index in range(start, end):
            block = chain[index]
            self._private_blocks -= 1
            if block in self._idle:
                del self._idle[block]
                references[block] = 1
                fresh = index + 1 - start
            elif block in references:
                references[block] += 1
                fresh = index + 1 - start
            else:
                references[block] = 1
        if self._record_events and fresh < end - start:
            first = start + fresh
            self._events.append(
                Stored(
                    tuple(chain[first:end]),
                    chain[first - 1] if first else 0,
                    tokens[fresh * self.block_tokens * TOKEN_BYTES :],
                )
            )

    def release(self, chain: Sequence[int], sealed_blocks: int, private_blocks: int) -> None:
        """Let go of what a sequence holds."""
        references, idle = self._references, self._idle
        for index in range(sealed_blocks - 1, -1, -1):
            block = chain[index]
            count = references[block] - 1
            if count:
                references[block] = count
            else:
                del references[block]
                idle[block] = None
        self._private_blocks -= private_blocks
        assert self._private_blocks >= 0

    def clear(self) -> bool:
        """Forget all prefixes; False, and nothing done, while a sequence holds blocks."""
        if self.used_blocks:
            return False
        self._idle.clear()
        if self._record_events:
            self._events.append(Cleared())
        return True

    def drain_events(self) -> list[CacheEvent]:
        """Return the changes since the last call, in order."""
        events, self._events = self._events, []
        return events

    def _evict(self) -> None:
        block, _ = self._idle.popitem(last=False)
        self.evicted_blocks += 1
        if self._record_events:
            self._events.append(Removed(block))
