"""The record of what was sent where: bounded, and forgotten from the end of a chain."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core import limits
from proxy.core.index import PrefixRecord
from proxy.core.prefix import NO_CHAIN, PrefixChain
from tests.core.builders import chain

_T = limits.BYTES_PER_TOKEN


def test_nothing_is_believed_of_a_stranger() -> None:
    record = PrefixRecord()
    assert record.matched_tokens("a", chain(1, 512)) == 0
    assert record.entries() == 0


def test_what_was_sent_is_matched_as_far_as_it_is_shared() -> None:
    record = PrefixRecord()
    sent = chain(1, 512, 1024, 1500)
    record.note("a", sent)
    assert record.matched_tokens("a", sent) == 1500 // _T
    assert record.matched_tokens("b", sent) == 0
    longer = PrefixChain(1, (*sent.hashes[:2], 77, 78), (512, 1024, 1536, 2000), 2000)
    assert record.matched_tokens("a", longer) == 1024 // _T
    other = PrefixChain(1, (99, 98, 97, 96), (1, 2, 3, 4), 4)  # each hash is of all before it
    assert record.matched_tokens("a", other) == 0


def test_a_replica_that_is_gone_is_forgotten_with_its_capacity() -> None:
    record = PrefixRecord()
    record.set_capacity("a", 1)
    record.note("b", chain(1, 512))
    record.forget("a")
    record.note("a", chain(1, 512))
    assert record.matched_tokens("a", chain(1, 512)) == 512 // _T
    record.forget("a")
    record.forget("a")
    assert record.matched_tokens("a", chain(1, 512)) == 0
    assert record.entries() == 1


def test_the_least_recently_sent_is_forgotten_first_and_from_its_end() -> None:
    record = PrefixRecord()
    record.set_capacity("a", 2048 // _T)
    old, new = chain(1, 512, 1024), chain(2, 512, 1024)
    record.note("a", old)
    record.note("a", new)
    assert record.matched_tokens("a", old) == 1024 // _T
    record.note("a", chain(3, 512))
    assert record.matched_tokens("a", old) == 512 // _T
    record.note("a", old)  # sent again: now `new` is the oldest
    assert record.matched_tokens("a", old) == 1024 // _T
    assert record.matched_tokens("a", new) == 512 // _T


def test_a_capacity_that_is_not_said_changes_nothing() -> None:
    record = PrefixRecord()
    record.set_capacity("a", 512 // _T)
    record.set_capacity("a", 0)
    record.note("a", chain(1, 512, 1024))
    assert record.matched_tokens("a", chain(1, 512, 1024)) == 512 // _T


def test_entries_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "RECORD_ENTRIES_MAX", 5)
    record = PrefixRecord()
    for key in range(20):
        record.note("a", chain(key, 4, 8, 12))
    assert record.entries() == 5


def test_an_empty_chain_is_harmless() -> None:
    record = PrefixRecord()
    record.note("a", NO_CHAIN)
    assert record.entries() == 0
    assert record.matched_tokens("a", NO_CHAIN) == 0


_CHAINS = st.builds(
    lambda key, depth: chain(key, *(4 * _T * (n + 1) for n in range(depth))),
    st.integers(1, 6),
    st.integers(0, 5),
)


@given(st.lists(st.tuples(st.sampled_from("ab"), _CHAINS), max_size=40), st.integers(1, 60))
def test_what_is_held_fits_and_is_always_a_prefix(
    sent: list[tuple[str, PrefixChain]], capacity_tokens: int
) -> None:
    record = PrefixRecord()
    for replica_id in "ab":
        record.set_capacity(replica_id, capacity_tokens)
    for replica_id, prompt in sent:
        record.note(replica_id, prompt)
        if prompt.hashes:
            believed = record.matched_tokens(replica_id, prompt)
            assert believed == min(prompt.prompt_bytes // _T, capacity_tokens // 4 * 4)
    for replica_id in "ab":
        deepest = [
            record.matched_tokens(replica_id, chain(key, *(4 * _T * (n + 1) for n in range(5))))
            for key in range(1, 7)
        ]
        assert sum(deepest) <= capacity_tokens
        # Nothing is held that no prefix reaches: each held entry counts four tokens.
    held = sum(
        record.matched_tokens(r, chain(key, *(4 * _T * (n + 1) for n in range(5))))
        for r in "ab"
        for key in range(1, 7)
    )
    assert record.entries() * 4 == held
