"""What an engine tells of its KV cache, out of the octets in which it tells it.

A message is three frames: topic, sequence number (8 octets, big-endian) and a msgpack batch. Three
generations of batches are about, and all are read: an array of events that are arrays (vLLM to
0.23, SGLang to 0.5.17), an array of events that are maps by `type` (since vLLM 0.27 and SGLang
0.5.20), and a map of such maps (builds between). Fields at their default may be missing, and kinds
of events that nobody here knows are passed over: a new release must not blind us to its old words.

Token ids are most of the octets and never wanted: they are skipped where they lie, whether they are
numbers or, under EAGLE, pairs. A batch that cannot be read raises `BadBatchError`: what it said is
lost, so it counts as one that never came.

A module of its own, not translated by mypyc: msgspec reads the annotations.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Annotated, Final, NamedTuple

import msgspec

from proxy.core import limits

_Hash = int | bytes  # octets, where VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES is 0
_AnyHashes = Annotated[list[_Hash], msgspec.Meta(max_length=limits.KV_EVENT_BLOCKS_MAX)]
_Hashes = Annotated[list[int], msgspec.Meta(max_length=limits.KV_EVENT_BLOCKS_MAX)]
_Raws = Annotated[list[msgspec.Raw], msgspec.Meta(max_length=limits.KV_BATCH_EVENTS_MAX)]
_JOINED_MAX: Final = 32  # blocks in one event, of those that come singly
_HASH_BYTES: Final = 8
# Array of up to 15, of 16 bits, of 32 bits: the first octet of a msgpack value says what it is.
_ARRAYS: Final = frozenset((*range(0x90, 0xA0), 0xDC, 0xDD))
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


class _StoredMap(msgspec.Struct, tag_field="type", tag="BlockStored", gc=False):
    block_hashes: _Hashes
    parent_block_hash: int | None = None
    block_size: int = 0
    medium: str | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    session_id: str | None = None


class _RemovedMap(msgspec.Struct, tag_field="type", tag="BlockRemoved", gc=False):
    block_hashes: _Hashes
    medium: str | None = None
    group_idx: int | None = None


class _StoredAnyMap(msgspec.Struct, tag_field="type", tag="BlockStored", gc=False):
    block_hashes: _AnyHashes
    parent_block_hash: _Hash | None = None
    block_size: int = 0
    medium: str | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    session_id: str | None = None


class _RemovedAnyMap(msgspec.Struct, tag_field="type", tag="BlockRemoved", gc=False):
    block_hashes: _AnyHashes
    medium: str | None = None
    group_idx: int | None = None


class _ClearedMap(msgspec.Struct, tag_field="type", tag="AllBlocksCleared", gc=False):
    pass


class _StoredArray(msgspec.Struct, array_like=True, tag="BlockStored", gc=False):
    block_hashes: _Hashes
    parent_block_hash: int | None = None
    token_ids: msgspec.Raw = msgspec.Raw()
    block_size: int = 0
    lora_id: msgspec.Raw = msgspec.Raw()
    medium: str | None = None
    lora_name: msgspec.Raw = msgspec.Raw()
    extra_keys: msgspec.Raw = msgspec.Raw()
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    # No engine of this generation names sessions; the field makes the two forms alike.
    session_id: None = None


class _RemovedArray(msgspec.Struct, array_like=True, tag="BlockRemoved", gc=False):
    block_hashes: _Hashes
    medium: str | None = None
    group_idx: int | None = None


class _StoredAnyArray(msgspec.Struct, array_like=True, tag="BlockStored", gc=False):
    block_hashes: _AnyHashes
    parent_block_hash: _Hash | None = None
    token_ids: msgspec.Raw = msgspec.Raw()
    block_size: int = 0
    lora_id: msgspec.Raw = msgspec.Raw()
    medium: str | None = None
    lora_name: msgspec.Raw = msgspec.Raw()
    extra_keys: msgspec.Raw = msgspec.Raw()
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    session_id: None = None


class _RemovedAnyArray(msgspec.Struct, array_like=True, tag="BlockRemoved", gc=False):
    block_hashes: _AnyHashes
    medium: str | None = None
    group_idx: int | None = None


class _ClearedArray(msgspec.Struct, array_like=True, tag="AllBlocksCleared", gc=False):
    pass


_Map = _StoredMap | _RemovedMap | _ClearedMap
_AnyMap = _StoredAnyMap | _RemovedAnyMap | _ClearedMap
_Array = _StoredArray | _RemovedArray | _ClearedArray
_AnyArray = _StoredAnyArray | _RemovedAnyArray | _ClearedArray
_STORED: Final = (_StoredMap, _StoredArray)
_REMOVED: Final = (_RemovedMap, _RemovedArray)


class _BatchArray(msgspec.Struct, array_like=True, gc=False):
    ts: float
    events: _Raws
    data_parallel_rank: int | None = None


class _BatchMap(msgspec.Struct, gc=False):
    ts: float
    events: _Raws
    data_parallel_rank: int | None = None


class _BatchOfMaps(msgspec.Struct, array_like=True, gc=False):
    """A usual form, read in one go."""

    ts: float
    events: Annotated[list[_Map], msgspec.Meta(max_length=limits.KV_BATCH_EVENTS_MAX)]
    data_parallel_rank: int | None = None


class _BatchOfArrays(msgspec.Struct, array_like=True, gc=False):
    """The usual form of older releases."""

    ts: float
    events: Annotated[list[_Array], msgspec.Meta(max_length=limits.KV_BATCH_EVENTS_MAX)]
    data_parallel_rank: int | None = None


class _MapKind(msgspec.Struct, gc=False):
    type: str


class _ArrayKind(msgspec.Struct, array_like=True, gc=False):
    type: str


_of_maps: Final = msgspec.msgpack.Decoder(_BatchOfMaps)
_of_arrays: Final = msgspec.msgpack.Decoder(_BatchOfArrays)
_batch_array: Final = msgspec.msgpack.Decoder(_BatchArray)
_batch_map: Final = msgspec.msgpack.Decoder(_BatchMap)
_map: Final[msgspec.msgpack.Decoder[_AnyMap]] = msgspec.msgpack.Decoder(_AnyMap)
_array: Final[msgspec.msgpack.Decoder[_AnyArray]] = msgspec.msgpack.Decoder(_AnyArray)
_map_kind: Final = msgspec.msgpack.Decoder(_MapKind)
_array_kind: Final = msgspec.msgpack.Decoder(_ArrayKind)
_KNOWN: Final = ("BlockStored", "BlockRemoved", "AllBlocksCleared")


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
    if payload[0] not in _ARRAYS:
        told: _BatchMap | _BatchArray = _batch_map.decode(payload)
    else:
        usual = _usual(payload)
        if usual is not None:
            return Batch(usual.ts, _joined(usual.events), usual.data_parallel_rank)
        told = _batch_array.decode(payload)
    events = [_numbered(event) for raw in told.events if (event := _one(raw)) is not None]
    return Batch(told.ts, events, told.data_parallel_rank)


def _usual(payload: bytes) -> _BatchOfMaps | _BatchOfArrays | None:
    """Return a batch of one of the usual forms; None: hashes are octets, or a kind is not known."""
    with contextlib.suppress(msgspec.ValidationError):
        return _of_maps.decode(payload)
    with contextlib.suppress(msgspec.ValidationError):
        return _of_arrays.decode(payload)
    return None


def _one(raw: msgspec.Raw) -> _AnyMap | _AnyArray | None:
    """Return one event; None when nobody here knows its kind."""
    octets = memoryview(raw)
    is_array = octets[0] in _ARRAYS
    try:
        if is_array:
            return _array.decode(octets)
        return _map.decode(octets)
    except msgspec.ValidationError:
        kind = _array_kind.decode(octets).type if is_array else _map_kind.decode(octets).type
        if kind in _KNOWN:
            raise
        return None


def _joined(told: Iterable[_Map | _Array]) -> list[Event]:
    """Return the events, in a row those alike together: engines tell of each block by itself."""
    events: list[Event] = []
    last: _Map | _Array | None = None
    for event in told:
        if isinstance(last, _REMOVED):
            if isinstance(event, _REMOVED) and _removed_with(last, event):
                last.block_hashes.extend(event.block_hashes)
                continue
        elif isinstance(last, _STORED) and isinstance(event, _STORED) and _stored_on(last, event):
            last.block_hashes.extend(event.block_hashes)
            continue
        last = event
        events.append(_plain(event))
    return events


def _removed_with(last: _RemovedMap | _RemovedArray, event: _RemovedMap | _RemovedArray) -> bool:
    alike = last.group_idx == event.group_idx and last.medium == event.medium
    return alike and len(last.block_hashes) < _JOINED_MAX


def _stored_on(last: _StoredMap | _StoredArray, event: _StoredMap | _StoredArray) -> bool:
    """Say whether the path goes on with these blocks, and in the same way."""
    hashes = last.block_hashes
    return (
        0 < len(hashes) < _JOINED_MAX
        and event.parent_block_hash == hashes[-1]
        and event.medium == last.medium
        and event.group_idx == last.group_idx
        and event.block_size == last.block_size
        and event.kv_cache_spec_kind == last.kv_cache_spec_kind
        and event.session_id == last.session_id
    )


def _plain(event: _Map | _Array) -> Event:
    if isinstance(event, _STORED):
        return Stored(
            event.block_hashes,
            event.parent_block_hash,
            event.block_size,
            event.group_idx,
            event.kv_cache_spec_kind or "",
            event.medium or "",
            event.session_id or "",
        )
    if isinstance(event, _REMOVED):
        return Removed(event.block_hashes, event.group_idx, event.medium or "")
    return CLEARED


def _numbered(event: _AnyMap | _AnyArray) -> Event:
    """The same of the forms whose hashes may be octets."""
    if isinstance(event, _StoredAnyMap | _StoredAnyArray):
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
    if isinstance(event, _RemovedAnyMap | _RemovedAnyArray):
        hashes = [_number(name) for name in event.block_hashes]
        return Removed(hashes, event.group_idx, event.medium or "")
    return CLEARED


def _number(name: _Hash) -> int:
    """Return the number that vLLM itself would give: the low 64 bits."""
    return name if isinstance(name, int) else int.from_bytes(name[-_HASH_BYTES:], "big")
