"""An engine's cache and the requests that pass through it, in time that a test moves.

The blocks are the simulator's own (`backends.simulator.kv_cache`); what is here is the order of
things: a request is matched when it begins, grows its path when its prefill ends, one block at a
time while it answers, and lets go at its end. Each of these is a step, and a step a batch.
"""

from __future__ import annotations

from collections.abc import Sequence

from xxhash import xxh3_64_intdigest

from backends.simulator import kv_cache
from backends.simulator.kv_cache import KvCache, extend_chain
from proxy.core.kv_wire import CLEARED, Event, Removed, Stored
from proxy.core.prefix import PrefixChain
from proxy.core.usage import Usage

TOKEN_BYTES = 4
BLOCK_TOKENS = 4
BLOCK_BYTES = TOKEN_BYTES * BLOCK_TOKENS


def chain_of(prompt: bytes, ends: Sequence[int]) -> PrefixChain:
    """Return a chain with a point at each of `ends` within the prompt, and at its end."""
    points = sorted({end for end in ends if end < len(prompt)} | {len(prompt)})
    hashes = [xxh3_64_intdigest(prompt[:end]) for end in points]
    return PrefixChain(0, hashes, points, len(prompt))


class Asked:
    """One request within the engine."""

    def __init__(self, prompt: bytes, answer: bytes) -> None:
        self.prompt = prompt
        self.tokens = prompt
        self.answer = answer
        self.blocks: list[int] = extend_chain([], 0, prompt, BLOCK_TOKENS)
        self.cached_blocks = 0
        self.sealed = 0
        self.private = 0

    @property
    def usage(self) -> Usage:
        return Usage(
            len(self.prompt) // TOKEN_BYTES,
            (len(self.tokens) - len(self.prompt)) // TOKEN_BYTES,  # so far
            self.cached_blocks * BLOCK_TOKENS,
        )


class CachedEngine:
    """A cache of so many blocks, and the batches that it has told."""

    def __init__(self, blocks_max: int) -> None:
        self.cache = KvCache(blocks_max, BLOCK_TOKENS, record_events=True)

    def begin(self, asked: Asked) -> bool:
        """Take a request in; False when there is no room for it."""
        cache = self.cache
        whole = -(-(len(asked.prompt) + len(asked.answer)) // BLOCK_BYTES)
        # The last token is always computed.
        asked.cached_blocks = cache.match(
            asked.blocks, (len(asked.prompt) // TOKEN_BYTES - 1) // BLOCK_TOKENS
        )
        idle = cache.idle_count(asked.blocks, asked.cached_blocks)
        if whole - asked.cached_blocks > cache.available_blocks - idle:
            return False
        cache.hold(asked.blocks, asked.cached_blocks)
        asked.sealed = asked.cached_blocks
        asked.private = whole - asked.cached_blocks
        cache.take(asked.private)
        return True

    def prefill(self, asked: Asked) -> None:
        """Compute what is left of the prompt."""
        self._seal(asked, len(asked.blocks))

    def decode(self, asked: Asked) -> bool:
        """Fill one more block of the answer; False when the last one is full."""
        end = min(len(asked.prompt + asked.answer), (asked.sealed + 1) * BLOCK_BYTES)
        asked.tokens = (asked.prompt + asked.answer)[:end]
        extend_chain(asked.blocks, 0, asked.tokens, BLOCK_TOKENS)
        if len(asked.blocks) == asked.sealed:
            return False
        self._seal(asked, len(asked.blocks))
        return True

    def end(self, asked: Asked) -> None:
        self.cache.release(asked.blocks, asked.sealed, asked.private)

    def _seal(self, asked: Asked, blocks: int) -> None:
        start, asked.sealed = asked.sealed, blocks
        asked.private -= blocks - start
        tokens = asked.tokens[start * BLOCK_BYTES : blocks * BLOCK_BYTES]
        self.cache.seal(asked.blocks, start, blocks, tokens)

    def told(self) -> list[Event]:
        """Return the events since the last call."""
        events: list[Event] = []
        for event in self.cache.drain_events():
            if isinstance(event, kv_cache.Stored):
                parent = event.parent or None
                hashes = list(event.hashes)
                events.append(Stored(hashes, parent, BLOCK_TOKENS, 0, "", "GPU", ""))
            elif isinstance(event, kv_cache.Removed):
                events.append(Removed([event.block], 0, "GPU"))
            else:
                events.append(CLEARED)
        return events
