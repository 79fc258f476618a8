"""The block pool: hits, sharing, eviction, and the events it tells."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from backends.simulator.kv_cache import (
    Cleared,
    KvCache,
    Removed,
    Stored,
    extend_chain,
    root_hash,
)
from backends.simulator.tokens import encode_text

LAWS = settings(derandomize=True, max_examples=80, deadline=None)
BLOCK = 2


def chain_of(text: str, root: int = 0) -> list[int]:
    """Return the chain of a text of 8-character blocks."""
    return extend_chain([], root, encode_text(text), BLOCK)


def hold_all(cache: KvCache, text: str) -> tuple[list[int], int]:
    """Let a sequence compute a text; return its chain and the blocks that were cached."""
    chain = chain_of(text)
    hits = cache.match(chain, len(chain))
    cache.hold(chain, hits)
    cache.take(len(chain) - hits)
    cache.seal(chain, hits, len(chain), encode_text(text)[hits * BLOCK * 4 :])
    return chain, hits


def test_equal_prefix_equal_chain() -> None:
    one, other = chain_of("aaaaaaaabbbbbbbbcccccccc"), chain_of("aaaaaaaabbbbbbbbdddddddd")
    assert one[:2] == other[:2]
    assert one[2] != other[2]
    assert chain_of("bbbbbbbb") != one[1:2]
    assert len(chain_of("aaaaaaaabbbb")) == 1


def test_salt_and_adapter_separate_chains() -> None:
    roots = {root_hash("", ""), root_hash("", "s"), root_hash("s", ""), root_hash("a", "s")}
    assert len(roots) == 4
    assert len({chain_of("aaaaaaaa", root)[0] for root in roots}) == 4


def test_a_chain_grows_as_if_made_at_once() -> None:
    tokens = encode_text("aaaaaaaabbbbbbbbccccccccdddd")
    chain = extend_chain([], 7, tokens[:20], BLOCK)
    assert extend_chain(chain, 7, tokens, BLOCK) == extend_chain([], 7, tokens, BLOCK)


def test_released_blocks_are_found_again_and_shared_blocks_count_once() -> None:
    cache = KvCache(4, BLOCK)
    chain, hits = hold_all(cache, "aaaaaaaabbbbbbbb")
    assert (hits, cache.used_blocks) == (0, 2)
    _, hits = hold_all(cache, "aaaaaaaabbbbbbbb")
    assert (hits, cache.used_blocks) == (2, 2)
    cache.release(chain, 2, 0)
    assert (cache.used_blocks, cache.cached_blocks) == (2, 0)
    cache.release(chain, 2, 0)
    assert (cache.used_blocks, cache.cached_blocks, cache.available_blocks) == (0, 2, 4)
    assert cache.match(chain, 1) == 1


def test_the_least_recently_used_leaf_goes_first() -> None:
    cache = KvCache(4, BLOCK, record_events=True)
    old, _ = hold_all(cache, "aaaaaaaabbbbbbbb")
    new, _ = hold_all(cache, "ccccccccdddddddd")
    cache.release(old, 2, 0)
    cache.release(new, 2, 0)
    cache.drain_events()
    cache.take(3)
    assert cache.drain_events() == [Removed(old[1]), Removed(old[0]), Removed(new[1])]
    assert cache.evicted_blocks == 3


def test_a_block_computed_twice_at_once_is_kept_once() -> None:
    cache = KvCache(8, BLOCK, record_events=True)
    tokens = encode_text("aaaaaaaabbbbbbbb")
    chain = chain_of("aaaaaaaabbbbbbbb")
    cache.take(2)
    cache.take(2)
    cache.seal(chain, 0, 1, tokens[:8])
    cache.seal(chain, 0, 2, tokens)
    assert cache.used_blocks == 3  # one of the first sequence is still private
    assert cache.drain_events() == [
        Stored((chain[0],), 0, tokens[:8]),
        Stored((chain[1],), chain[0], tokens[8:]),
    ]


def test_clear_needs_nobody_in_it() -> None:
    cache = KvCache(4, BLOCK, record_events=True)
    chain, _ = hold_all(cache, "aaaaaaaa")
    assert not cache.clear()
    cache.release(chain, 1, 0)
    cache.drain_events()
    assert cache.clear()
    assert cache.match(chain, 1) == 0
    assert cache.drain_events() == [Cleared()]


TEXTS = [a * 8 + b * 8 + c * 8 for a in "ab" for b in "cd" for c in "ef"]


@LAWS
@given(st.lists(st.tuples(st.sampled_from(TEXTS), st.booleans()), max_size=40))
def test_events_tell_what_is_resident_and_parents_outlive_children(
    turns: list[tuple[str, bool]],
) -> None:
    cache = KvCache(9, BLOCK, record_events=True)
    held: list[Any] = []
    resident: dict[int, int] = {}  # block → parent, as a listener would know it
    for text, let_go in turns:
        if (let_go or cache.available_blocks < 3) and held:
            chain = held.pop(0)
            cache.release(chain, len(chain), 0)
        if cache.available_blocks < 3:
            continue
        chain, _ = hold_all(cache, text)
        held.append(chain)
        for event in cache.drain_events():
            if isinstance(event, Stored):
                parent = event.parent
                for block in event.hashes:
                    assert block not in resident
                    resident[block] = parent
                    parent = block
            elif isinstance(event, Removed):
                del resident[event.block]
        assert all(parent in resident or not parent for parent in resident.values())
        for known in TEXTS:
            chain = chain_of(known)
            told = next((i for i, block in enumerate(chain) if block not in resident), 3)
            assert cache.match(chain, 3) == told
        assert cache.used_blocks + cache.cached_blocks == len(resident)
    for chain in held:
        cache.release(chain, len(chain), 0)
    assert cache.used_blocks == 0
