"""What an engine tells of its KV cache, out of the octets in which it tells it.

A message is three frames: topic, sequence number (8 octets, big-endian) and a msgpack batch. Three
generations of batches are about, and all are read: an array of events that are arrays (vLLM to
0.23, SGLang to 0.5.17), an array of events that are maps by `type` (since vLLM 0.27 and SGLang
0.5.20), and a map of such maps (builds between). Fields at their default may be missing, and kinds
of events that nobody here knows are passed over: a new release must not blind us to its old words.

Token ids are most of the octets and never wanted: they are skipped where they lie, whether they are
numbers or, under EAGLE, pairs. A batch that cannot be read raises `BadBatchError`: what it said is
lost, so it counts as one that never came.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter
from typing import Final, NamedTuple

import msgspec

from proxy.core import limits
from proxy.core.kv_forms import (
    REMOVED,
    STORED,
    AnyArrayEvent,
    AnyMapEvent,
    ArrayEvent,
    Hash,
    MapEvent,
    RemovedAnyArray,
    RemovedAnyMap,
    StoredAnyArray,
    StoredAnyMap,
    read_one,
    read_unusual,
    read_usual,
)

_JOINED_MAX: Final = 32  # blocks in one event, of those that come singly
_HASH_BYTES: Final = 8
# What events share that are told as one, two or five figures.
_of_removed: Final = attrgetter("group_idx", "medium")
_of_stored: Final = attrgetter(
    "group_idx", "medium", "block_size", "kv_cache_spec_kind", "session_id"
)
_CLEARED_TAG: Final = b"AllBlocksCleared"


class BadBatchError(Exception):
    """A message that cannot be read; the text says what was wrong, without its octets."""


class Stored(NamedTuple):
    """Blocks of one path became resident in `medium`, after `parent` (None: at the root)."""

    hashes: list[int]
    parent: int | None
    block_tokens: int
    group: int | None
    kind: str  # of attention, where the engine says
    medium: str
    session: str


class Removed(NamedTuple):
    """Blocks left `medium`."""

    hashes: list[int]
    group: int | None
    medium: str


class Cleared(NamedTuple):
    """Nothing is resident any more."""


Event = Stored | Removed | Cleared
CLEARED: Final = Cleared()


class Batch(NamedTuple):
    """The events of one step of an engine's rank."""

    at_s: float  # by the engine's clock
    events: list[Event]
    rank: int | None


class Frames(NamedTuple):
    """One numbered message; the end of a replay has the number -1."""

    number: int
    payload: bytes


def read_frames(frames: list[bytes]) -> Frames:
    """Return number and payload of a message, published or replayed.

    Replays have an empty frame before it, and older ones no topic: so it is read from the end.
    """
    if len(frames) < 2 or len(frames[-2]) != 8:
        raise BadBatchError(f"a message of {len(frames)} frames has no number")
    if len(frames[-1]) > limits.KV_BATCH_BYTES_MAX:
        raise BadBatchError("a batch is larger than it may be")
    number = frames[-2]
    return Frames(int.from_bytes(number, "big", signed=True), frames[-1])


def read_batch(payload: bytes) -> Batch:
    """Return the events of a batch. Raises `BadBatchError`."""
    try:
        return _read(payload)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise BadBatchError(str(error) or type(error).__name__) from None


def tells_of_clearing(payload: bytes) -> bool:
    """Say whether a batch tells of an emptied cache; most are not read for it.

    Salts and sessions are in a batch as clients name them, and one of them may be named so.
    """
    if _CLEARED_TAG not in payload:
        return False
    try:
        return CLEARED in read_batch(payload).events
    except BadBatchError:
        return False  # it is found out when it is read in its turn


def _read(payload: bytes) -> Batch:
    if not payload:
        raise BadBatchError("a batch is empty")
    usual = read_usual(payload)
    if usual is not None:
        return Batch(usual.ts, _joined(usual.events), usual.data_parallel_rank)
    told = read_unusual(payload)
    events = [_numbered(event) for raw in told.events if (event := read_one(raw)) is not None]
    return Batch(told.ts, events, told.data_parallel_rank)


def _joined(told: Iterable[MapEvent | ArrayEvent]) -> list[Event]:
    """Return the events, in a row those alike together: engines tell of each block by itself."""
    events: list[Event] = []
    hashes: list[int] = []  # of the last one
    shared: object = None
    for event in told:
        if isinstance(event, STORED):
            alike = _of_stored(event)
            goes_on = alike == shared and bool(hashes) and hashes[-1] == event.parent_block_hash
        elif isinstance(event, REMOVED):
            alike = _of_removed(event)
            goes_on = alike == shared
        else:
            events.append(CLEARED)
            shared = None
            continue
        if goes_on and len(hashes) < _JOINED_MAX:
            hashes += event.block_hashes
        else:
            hashes, shared = event.block_hashes, alike
            events.append(_plain(event))
    return events


def _plain(event: MapEvent | ArrayEvent) -> Event:
    if isinstance(event, STORED):
        return Stored(
            event.block_hashes,
            event.parent_block_hash,
            event.block_size,
            event.group_idx,
            event.kv_cache_spec_kind or "",
            event.medium or "",
            event.session_id or "",
        )
    if isinstance(event, REMOVED):
        return Removed(event.block_hashes, event.group_idx, event.medium or "")
    return CLEARED


def _numbered(event: AnyMapEvent | AnyArrayEvent) -> Event:
    """The same of the forms whose hashes may be octets."""
    if isinstance(event, StoredAnyMap | StoredAnyArray):
        parent = event.parent_block_hash
        return Stored(
            [_number(name) for name in event.block_hashes],
            None if parent is None else _number(parent),
            event.block_size,
            event.group_idx,
            event.kv_cache_spec_kind or "",
            event.medium or "",
            event.session_id or "",
        )
    if isinstance(event, RemovedAnyMap | RemovedAnyArray):
        hashes = [_number(name) for name in event.block_hashes]
        return Removed(hashes, event.group_idx, event.medium or "")
    return CLEARED


def _number(name: Hash) -> int:
    """Return the number that vLLM itself would give: the low 64 bits."""
    return name if isinstance(name, int) else int.from_bytes(name[-_HASH_BYTES:], "big")
