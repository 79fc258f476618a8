"""What is believed of caches: prefixes only, least recent out first, bounded, and it learns."""

from __future__ import annotations

import random
from collections import OrderedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core import limits
from proxy.core.index import Index
from proxy.core.prefix import PrefixChain
from tests.core.builders import chain

_KIB = 1024


def _index(*slots: int, capacity_octets: int = 1 << 40) -> Index:
    index = Index()
    for slot in slots:
        index.open(slot, capacity_octets)
    return index


def _prompt(session: int, turns: int) -> PrefixChain:
    """Turn after turn of one session: each begins with all of the one before."""
    ends = [(turn + 1) * _KIB for turn in range(turns)]
    return PrefixChain(session, [session * 1000 + turn for turn in range(turns)], ends, ends[-1])


def test_the_longest_prefix_that_each_holds_is_found_and_the_sets_are_disjoint() -> None:
    index = _index(0, 1, 2, 3)
    index.note(0, _prompt(1, 2))
    index.note(1, _prompt(1, 4))
    index.note(3, _prompt(1, 2))
    wanted = _prompt(1, 6)
    assert index.match(wanted, 0b1111) == [(0b0010, 3), (0b1001, 1)]
    assert index.match(wanted, 0b1101) == [(0b1001, 1)]
    assert index.match(_prompt(2, 6), 0b1111) == []
    assert [index.held_of(slot, wanted) for slot in range(4)] == [2048, 4096, 0, 2048]


def test_a_prompt_is_forgotten_from_its_end_and_the_least_used_first() -> None:
    index = _index(0, capacity_octets=64 * _KIB)
    index.note(0, _prompt(1, 8))
    index.note(0, _prompt(2, 8))
    for session in range(3, 12):
        index.note(0, _prompt(1, 8))
        index.note(0, _prompt(session, 8))
    assert index.held_of(0, _prompt(1, 8)) == 8 * _KIB  # used again and again
    assert index.held_of(0, _prompt(2, 8)) == 0
    assert index.held_of(0, _prompt(11, 8)) == 8 * _KIB
    assert index.held_octets(0) <= 64 * _KIB


def test_of_a_prompt_that_is_too_long_the_beginning_is_held() -> None:
    index = _index(0, capacity_octets=3 * _KIB)
    index.note(0, _prompt(1, 8))
    assert index.held_of(0, _prompt(1, 8)) == 3 * _KIB


_NOTES = st.lists(st.tuples(st.integers(0, 1), st.integers(1, 12), st.integers(1, 6)), max_size=160)


@given(_NOTES, st.integers(4, 60))
def test_it_is_least_recent_use_but_for_the_youngest(
    notes: list[tuple[int, int, int]], capacity_kib: int
) -> None:
    index = _index(0, 1, capacity_octets=capacity_kib * _KIB)
    exact: list[OrderedDict[int, None]] = [OrderedDict(), OrderedDict()]
    for slot, session, turns in notes:
        prompt = _prompt(session, turns)
        index.note(slot, prompt)
        for name in reversed(prompt.hashes):
            exact[slot].pop(name, None)
            exact[slot][name] = None
    slack_kib = (
        capacity_kib // limits.YOUNG_SPANS_PER_CACHE + 6
        if capacity_kib >= limits.YOUNG_SPANS_PER_CACHE
        else 0
    )
    for slot in (0, 1):
        held = [name for name, _ in index.dump(slot)]
        assert len(held) == len(set(held)) == min(len(exact[slot]), capacity_kib)
        assert index.held_octets(slot) == len(held) * _KIB
        assert set(held) >= set(list(exact[slot])[-(capacity_kib - slack_kib) :])
        if not slack_kib:
            assert held == list(exact[slot])[-capacity_kib:]
    for bits, depth in index.match(_prompt(1, 6), 0b11):
        for slot in (0, 1):
            if bits >> slot & 1:
                assert index.held_of(slot, _prompt(1, 6)) == (depth + 1) * _KIB


@given(_NOTES, st.integers(4, 300))
def test_a_prefix_is_as_young_as_what_builds_on_it(
    notes: list[tuple[int, int, int]], capacity_kib: int
) -> None:
    """To the part of the cache within which nothing is moved; and noting tells what was known."""
    index = _index(0, capacity_octets=capacity_kib * _KIB)
    slack = (capacity_kib // limits.YOUNG_SPANS_PER_CACHE + 7) / capacity_kib
    for _, session, turns in notes:
        prompt = _prompt(session, turns)
        before, said = index.sighting(0, prompt), index.note(0, prompt)
        assert (before is None) == (said is None)
        if before is not None and said is not None:
            assert (said.octets, said.away) == (before.octets, before.away)
    for session in range(1, 13):
        for turns in range(2, 7):
            longer = index.sighting(0, _prompt(session, turns))
            shorter = index.sighting(0, _prompt(session, turns - 1))
            if longer is not None and longer.octets == turns * _KIB:
                assert shorter is not None
                assert shorter.octets == (turns - 1) * _KIB
                assert shorter.away <= longer.away + slack


def test_ghosts_come_back_with_a_larger_cache_and_go_with_a_smaller() -> None:
    index = _index(0, capacity_octets=32 * _KIB)
    for session in range(1, 17):
        index.note(0, _prompt(session, 4))
    assert index.held_of(0, _prompt(2, 4)) == 0
    before = index.sighting(0, _prompt(2, 4))
    assert before is not None
    assert before.octets == 4 * _KIB
    assert 1.5 < before.away < 2.0
    index.set_capacity(0, 128 * _KIB)
    assert index.held_of(0, _prompt(2, 4)) == 4 * _KIB
    assert index.held_octets(0) == 64 * _KIB
    index.set_capacity(0, 16 * _KIB)
    assert index.held_of(0, _prompt(2, 4)) == 0
    assert index.held_of(0, _prompt(16, 4)) == 4 * _KIB
    assert index.held_octets(0) <= 16 * _KIB


def test_what_is_used_again_is_younger_in_octets_too() -> None:
    index = _index(0, capacity_octets=64 * _KIB)
    for session in range(1, 9):
        index.note(0, _prompt(session, 4))
    old = index.sighting(0, _prompt(1, 4))
    index.note(0, _prompt(1, 4))
    new = index.sighting(0, _prompt(1, 4))
    assert old is not None
    assert new is not None
    assert new.away < old.away < 1.0
    assert index.sighting(0, _prompt(99, 4)) is None
    assert index.sighting(7, _prompt(1, 4)) is None


def test_what_the_engine_says_is_gone_is_gone() -> None:
    index = _index(0)
    index.note(0, _prompt(1, 4))
    index.drop(0, 1003)
    assert index.held_of(0, _prompt(1, 4)) == 3 * _KIB
    index.drop(0, 1003)
    index.drop(5, 1003)
    assert index.held_octets(0) == 3 * _KIB
    index.note(0, _prompt(1, 4))
    assert index.held_of(0, _prompt(1, 4)) == 4 * _KIB


def test_a_replica_that_is_gone_or_empty_holds_nothing() -> None:
    index = _index(0, 1)
    index.note(0, _prompt(1, 4))
    index.note(1, _prompt(1, 4))
    index.clear(0)
    assert index.match(_prompt(1, 4), 0b11) == [(0b10, 3)]
    index.note(0, _prompt(1, 2))
    index.close(1)
    assert index.match(_prompt(1, 4), 0b11) == [(0b01, 1)]
    index.note(1, _prompt(1, 4))  # nobody has this slot
    assert index.entries() == 2


def test_a_dump_taken_over_is_the_same_belief() -> None:
    index, other = _index(0, capacity_octets=64 * _KIB), _index(0, capacity_octets=64 * _KIB)
    for session in (1, 2, 3, 1, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20):
        index.note(0, _prompt(session, 4))
    for name, octets in index.dump(0):
        other.load(0, name, octets)
    for session in range(1, 21):
        prompt = _prompt(session, 4)
        assert other.held_of(0, prompt) == index.held_of(0, prompt)


def test_entries_are_bounded_however_small_they_are() -> None:
    index = _index(0)
    random_keys = random.Random(3)
    bound = limits.INDEX_ENTRIES_MAX
    for _ in range(bound // 64 + 500):
        base = random_keys.getrandbits(50)
        index.note(0, PrefixChain(1, range(base, base + 64), range(1, 65), 64))
    assert index.entries() <= bound
    assert index.held_octets(0) == len(list(index.dump(0)))


def test_an_empty_chain_changes_nothing() -> None:
    index = _index(0)
    index.note(0, chain(1))
    assert index.entries() == 0
    assert index.match(chain(1), 1) == []


def test_a_cache_that_has_not_grown_takes_no_ghosts_back() -> None:
    index = _index(0, capacity_octets=32 * _KIB)
    for session in range(1, 17):
        index.note(0, _prompt(session, 4))
    index.drop(0, 16_003)
    index.set_capacity(0, 32 * _KIB)
    assert index.held_octets(0) == 31 * _KIB
    index.drop(0, 1003)  # a ghost is gone for good when the engine says so
    index.set_capacity(0, 1 << 30)
    assert index.held_of(0, _prompt(1, 4)) == 3 * _KIB


def test_entries_are_bounded_over_all_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "INDEX_ENTRIES_TOTAL_MAX", 4096)
    index = _index(*range(8))
    for session in range(1, 2000):
        index.note(session % 8, _prompt(session, 4))
    assert index.entries() <= 4096
