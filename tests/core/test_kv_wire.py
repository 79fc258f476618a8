"""Batches of all wire generations come out as the same events; nothing else comes out at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core import limits
from proxy.core.kv_tree import GPU, KvTree
from proxy.core.kv_wire import (
    BadBatchError,
    Batch,
    Cleared,
    Event,
    Removed,
    Stored,
    read_batch,
    read_frames,
    tells_of_clearing,
)

GOLDEN = Path(__file__).parents[1] / "golden"
# One batch as the publisher of each release writes it: arrays first, maps later.
RELEASES = {
    path.name.removesuffix("-kv-events.json"): msgspec.json.decode(path.read_bytes())["hex"]
    for path in sorted(GOLDEN.glob("*-kv-events.json"))
}
TOLD: list[Event] = [
    Stored([11, 12], None, 2, None, "", "GPU", ""),
    Removed([11], None, "GPU"),
    Cleared(),
]


def test_both_forms_of_both_engines_are_here() -> None:
    assert len(RELEASES) >= 9
    for engine in ("vllm", "sglang"):
        texts = [text for name, text in RELEASES.items() if name.startswith(engine)]
        key = b"type".hex()
        assert {key in text for text in texts} == {True, False}


@pytest.mark.parametrize("release", RELEASES)
def test_every_release_says_the_same(release: str) -> None:
    assert read_batch(bytes.fromhex(RELEASES[release])) == Batch(1.0, TOLD, None)


@pytest.mark.parametrize("release", RELEASES)
def test_a_clearing_is_seen_in_the_batch_of_every_release(release: str) -> None:
    assert tells_of_clearing(bytes.fromhex(RELEASES[release]))


def packed(value: Any) -> bytes:
    return msgspec.msgpack.encode(value)


def test_what_a_client_has_named_like_a_clearing_is_none() -> None:
    salted = changed(extra_keys=[["AllBlocksCleared"]], session_id="AllBlocksCleared")
    for events in ([STORED], [salted], ["AllBlocksCleared"], [["AllBlocksCleared"], 5]):
        assert not tells_of_clearing(packed([1.5, events, 3]))
    assert tells_of_clearing(packed([1.5, [salted, {"type": "AllBlocksCleared"}], 3]))


STORED = {
    "type": "BlockStored",
    "block_hashes": [2**64 - 1, 5],
    "parent_block_hash": 7,
    "token_ids": list(range(32)),
    "block_size": 16,
    "lora_id": None,
    "medium": "CPU",
    "lora_name": "l",
    "extra_keys": [None, [["mm", "id", 3]]],
    "group_idx": 1,
    "kv_cache_spec_kind": "full_attention",
    "session_id": "s",
    "lookahead_token_ids": [1],
}
READ = Stored([2**64 - 1, 5], 7, 16, 1, "full_attention", "CPU", "s")
ARRAY = ["BlockStored", [2**64 - 1, 5], 7, list(range(32)), 16, None, "CPU", "l", [None], 1,
         "full_attention", None]  # fmt: skip


def changed(**fields: Any) -> dict[str, Any]:
    return {**STORED, **fields}


def without(*names: str) -> dict[str, Any]:
    return {name: value for name, value in STORED.items() if name not in names}


CASES: dict[str, tuple[Any, list[Event]]] = {
    "array of maps": ([1.5, [STORED], 3], [READ]),
    "map of maps": ({"ts": 1.5, "events": [STORED], "data_parallel_rank": 3}, [READ]),
    "array of arrays": ([1.5, [ARRAY], 3], [READ._replace(session="")]),
    "mixed": ([1.5, [STORED, ARRAY], 3], [READ, READ._replace(session="")]),
    "a longer batch": ([1.5, [STORED], 3, "new", {"a": 1}], [READ]),
    "a longer array": ([1.5, [[*ARRAY, 1, "x"]], 3], [READ._replace(session="")]),
    "a short array": ([1.5, [ARRAY[:5]], 3], [Stored([2**64 - 1, 5], 7, 16, None, "", "", "")]),
    "pairs of tokens": ([1.5, [changed(token_ids=[[1, 2], [2, 3]])], 3], [READ]),
    "a new field": ([1.5, [changed(colour="red")], 3], [READ]),
    "missing fields": (
        [1.5, [without("parent_block_hash", "medium", "group_idx", "session_id", "lora_id",
                       "kv_cache_spec_kind", "token_ids", "block_size")], 3],
        [Stored([2**64 - 1, 5], None, 0, None, "", "", "")],
    ),
    "unknown map": ([1.5, [{"type": "BlockMoved", "to": 1}, STORED], 3], [READ]),
    "unknown array": ([1.5, [["BlockMoved", 1], ["AllBlocksCleared"]], 3], [Cleared()]),
    "signed": ([1.5, [changed(block_hashes=[-5], parent_block_hash=-7)], 3],
               [READ._replace(hashes=[-5], parent=-7)]),
    "octets": (
        [1.5, [changed(block_hashes=[b"\1" * 24 + b"\0" * 7 + b"\7"], parent_block_hash=b"\2")], 3],
        [READ._replace(hashes=[7], parent=2)],
    ),
    "octets removed": ([1.5, [{"type": "BlockRemoved", "block_hashes": [b"\1", 3]}], 3],
                       [Removed([1, 3], None, "")]),
    "no events": ([1.5, [], 3], []),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_is_said_is_read(name: str) -> None:
    value, events = CASES[name]
    assert read_batch(packed(value)) == Batch(1.5, events, 3)


BAD: dict[str, bytes] = {
    "nothing": b"",
    "no msgpack": b"\xc1",
    "a number": packed(5),
    "cut off": packed([1.5, [STORED], 3])[:-40],
    "octets after it": packed([1.5, [], 3]) + b"\0",
    "no events in it": packed([1.5]),
    "hashes of text": packed([1.5, [changed(block_hashes=["a"])], 3]),
    "a known array of nothing": packed([1.5, [["BlockStored"]], 3]),
    "an event that is a number": packed([1.5, [1], 3]),
    "an event without a kind": packed([1.5, [{"block_hashes": [1]}], 3]),
    "no text": packed([1.5, [], 3])[:-2] + b"\x91\x82\xa4type\xa2\xff\xff\xa0\xa0\xc0",
    "deep": b"\x93\x01\x91" + b"\x91" * 100_000,
    "a list that says it is long": b"\x93\x01\xdd\xff\xff\xff\xff",
    "more hashes than may be": packed(
        [1.5, [changed(block_hashes=list(range(limits.KV_EVENT_BLOCKS_MAX + 1)))], 3]
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_batch_that_cannot_be_read_is_refused(name: str) -> None:
    with pytest.raises(BadBatchError):
        read_batch(BAD[name])


@given(st.binary(max_size=60), st.sampled_from([*RELEASES.values()]), st.integers(0, 200))
def test_garbage_is_refused_or_read_and_nothing_else(junk: bytes, good: str, at: int) -> None:
    octets = bytes.fromhex(good)
    for payload in (junk, octets[:at] + junk + octets[at + len(junk) :]):
        try:
            batch = read_batch(payload)
        except BadBatchError:
            continue
        assert all(isinstance(event, Stored | Removed | Cleared) for event in batch.events)


def test_messages_and_replays_are_read_from_their_end() -> None:
    number = (5).to_bytes(8, "big")
    for frames in ([b"kv", number, b"p"], [b"", b"kv", number, b"p"], [b"", number, b"p"]):
        assert read_frames(frames) == (5, b"p")
    assert read_frames([b"", b"kv", b"\xff" * 8, b""]).number == -1


@pytest.mark.parametrize("frames", [[], [b"a"], [b"a", b"b"], [b"kv", b"\0" * 7, b"p"]])
def test_a_message_without_a_number_is_refused(frames: list[bytes]) -> None:
    with pytest.raises(BadBatchError):
        read_frames(frames)


def test_a_batch_has_a_largest_size() -> None:
    with pytest.raises(BadBatchError):
        read_frames([b"", b"\0" * 8, bytes(limits.KV_BATCH_BYTES_MAX + 1)])


def test_what_is_removed_in_a_row_is_one_event_of_some_tens_of_blocks() -> None:
    def removed(block: int, **more: object) -> dict[str, object]:
        return {"type": "BlockRemoved", "block_hashes": [block], **more}

    told = [removed(1), removed(2, medium="CPU"), removed(3, medium="CPU")]
    told += [{"type": "AllBlocksCleared"}]
    told += [removed(n, medium="CPU") for n in range(100, 140)]
    batch = read_batch(msgspec.msgpack.encode([1.0, told, None]))
    first, second, cleared, *rest = batch.events
    assert first == Removed([1], None, "")
    assert second == Removed([2, 3], None, "CPU")
    assert isinstance(cleared, Cleared)
    assert rest == [
        Removed(list(range(100, 132)), None, "CPU"),
        Removed(list(range(132, 140)), None, "CPU"),
    ]


def pages(*names: int, parent: int | None = None, medium: str = "GPU") -> list[list[Any]]:
    """Return what SGLang 0.5.17 tells of pages that it stores one upon the other."""
    parents = (parent, *names)
    return [
        ["BlockStored", [name], above, [1] * 64, 64, None, medium]
        for name, above in zip(names, parents, strict=False)
    ]


def as_map(event: list[Any]) -> dict[str, Any]:
    """The same as later releases tell it."""
    names = ("type", "block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id")
    return dict(zip((*names, "medium"), event, strict=True))


@pytest.mark.parametrize("form", [list, as_map])
def test_pages_stored_in_a_row_are_one_event_of_some_tens(form: Callable[[Any], Any]) -> None:
    def stored(hashes: list[int], parent: int | None, medium: str = "GPU") -> Stored:
        return Stored(hashes, parent, 64, None, "", medium, "")

    told = [
        *pages(1, 2, 3, parent=-7),
        *pages(12, 13, parent=2),  # branches off
        *pages(14, parent=13, medium="CPU"),
        *pages(21, 22),  # at the root
    ]
    batch = read_batch(packed([1.0, [*map(form, told)], 0]))
    assert batch.events == [
        stored([1, 2, 3], -7),
        stored([12, 13], 2),
        stored([14], 13, "CPU"),
        stored([21, 22], None),
    ]
    many = [*range(100, 140)]
    batch = read_batch(packed([1.0, [*map(form, pages(*many))], 0]))
    assert batch.events == [stored(many[:32], None), stored(many[32:], 131)]


def test_what_is_not_alike_is_told_by_itself() -> None:
    first = changed(block_hashes=[1], parent_block_hash=None)
    goes_on = changed(block_hashes=[2], parent_block_hash=1)
    others: dict[str, Any] = {
        "block_size": 32, "medium": "GPU", "group_idx": 2, "kv_cache_spec_kind": "mamba",
        "session_id": "t", "block_hashes": [], "parent_block_hash": 9,
    }  # fmt: skip
    assert len(read_batch(packed([1.0, [first, goes_on], 0])).events) == 1
    for name, value in others.items():
        second = goes_on | {name: value}
        third = changed(block_hashes=[3], parent_block_hash=2)
        events = read_batch(packed([1.0, [first, second, third], 0])).events
        if name == "block_hashes":  # nothing, and what follows goes on after something else
            assert [event.hashes for event in events if isinstance(event, Stored)] == [[1], [3]]
        else:
            assert len(events) == (2 if name == "parent_block_hash" else 3), name
    cleared = {"type": "AllBlocksCleared"}
    assert len(read_batch(packed([1.0, [first, cleared, goes_on], 0])).events) == 3


STEPS = st.lists(
    st.tuples(st.booleans(), st.lists(st.integers(1, 3), min_size=1, max_size=40)), max_size=20
)


@given(st.lists(STEPS, max_size=4))
def test_pages_told_together_grow_the_tree_that_each_by_itself_does(
    batches: list[list[tuple[bool, list[int]]]],
) -> None:
    together, singly = KvTree(0.0), KvTree(0.0)
    for number, steps in enumerate(batches):
        told: list[list[Any]] = []
        for stores, branches in steps:
            path = [hash(tuple(branches[: depth + 1])) for depth in range(len(branches))]
            if stores:
                told += pages(*path)
            else:  # the leaves first, as an engine evicts
                told += [["BlockRemoved", [name], "GPU"] for name in reversed(path)]
        for event in told:
            apply(singly, read_batch(packed([1.0, [event], 0])).events, float(number))
        apply(together, read_batch(packed([1.0, told, 0])).events, float(number))
        assert together.where.keys() == singly.where.keys()
        for block, run in together.where.items():
            same = singly.where[block]
            assert together.depth_in(run, block) == singly.depth_in(same, block)


def apply(tree: KvTree, events: list[Event], now_s: float) -> None:
    for event in events:
        if isinstance(event, Stored):
            tree.store(event.hashes, event.parent, GPU, now_s)
        elif isinstance(event, Removed):
            tree.remove(event.hashes, GPU)
