"""Batches of KV events as msgspec reads them, in all forms that engines have had for them.

A batch of one of the two usual forms is read in one go. What is in neither, since its hashes are
octets or it tells of something that nobody here knows, is read event by event.

A module of its own for the same reason as `wire.py`: what msgspec decodes into is not translated.
"""

from __future__ import annotations

import contextlib
from typing import Annotated, Final

import msgspec

from proxy.core import limits

Hash = int | bytes  # octets, where VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES is 0
_AnyHashes = Annotated[list[Hash], msgspec.Meta(max_length=limits.KV_EVENT_BLOCKS_MAX)]
_Hashes = Annotated[list[int], msgspec.Meta(max_length=limits.KV_EVENT_BLOCKS_MAX)]
_Raws = Annotated[list[msgspec.Raw], msgspec.Meta(max_length=limits.KV_BATCH_EVENTS_MAX)]
# Array of up to 15, of 16 bits, of 32 bits: the first octet of a msgpack value says what it is.
_ARRAYS: Final = frozenset((*range(0x90, 0xA0), 0xDC, 0xDD))


class StoredMap(msgspec.Struct, tag_field="type", tag="BlockStored", gc=False):
    block_hashes: _Hashes
    parent_block_hash: int | None = None
    block_size: int = 0
    medium: str | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    session_id: str | None = None


class RemovedMap(msgspec.Struct, tag_field="type", tag="BlockRemoved", gc=False):
    block_hashes: _Hashes
    medium: str | None = None
    group_idx: int | None = None


class StoredAnyMap(msgspec.Struct, tag_field="type", tag="BlockStored", gc=False):
    block_hashes: _AnyHashes
    parent_block_hash: Hash | None = None
    block_size: int = 0
    medium: str | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    session_id: str | None = None


class RemovedAnyMap(msgspec.Struct, tag_field="type", tag="BlockRemoved", gc=False):
    block_hashes: _AnyHashes
    medium: str | None = None
    group_idx: int | None = None


class ClearedMap(msgspec.Struct, tag_field="type", tag="AllBlocksCleared", gc=False):
    pass


class StoredArray(msgspec.Struct, array_like=True, tag="BlockStored", gc=False):
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


class RemovedArray(msgspec.Struct, array_like=True, tag="BlockRemoved", gc=False):
    block_hashes: _Hashes
    medium: str | None = None
    group_idx: int | None = None


class StoredAnyArray(msgspec.Struct, array_like=True, tag="BlockStored", gc=False):
    block_hashes: _AnyHashes
    parent_block_hash: Hash | None = None
    token_ids: msgspec.Raw = msgspec.Raw()
    block_size: int = 0
    lora_id: msgspec.Raw = msgspec.Raw()
    medium: str | None = None
    lora_name: msgspec.Raw = msgspec.Raw()
    extra_keys: msgspec.Raw = msgspec.Raw()
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    session_id: None = None


class RemovedAnyArray(msgspec.Struct, array_like=True, tag="BlockRemoved", gc=False):
    block_hashes: _AnyHashes
    medium: str | None = None
    group_idx: int | None = None


class ClearedArray(msgspec.Struct, array_like=True, tag="AllBlocksCleared", gc=False):
    pass


MapEvent = StoredMap | RemovedMap | ClearedMap
AnyMapEvent = StoredAnyMap | RemovedAnyMap | ClearedMap
ArrayEvent = StoredArray | RemovedArray | ClearedArray
AnyArrayEvent = StoredAnyArray | RemovedAnyArray | ClearedArray
STORED: Final = (StoredMap, StoredArray)
REMOVED: Final = (RemovedMap, RemovedArray)


class BatchArray(msgspec.Struct, array_like=True, gc=False):
    ts: float
    events: _Raws
    data_parallel_rank: int | None = None


class BatchMap(msgspec.Struct, gc=False):
    ts: float
    events: _Raws
    data_parallel_rank: int | None = None


class BatchOfMaps(msgspec.Struct, array_like=True, gc=False):
    """A usual form, read in one go."""

    ts: float
    events: Annotated[list[MapEvent], msgspec.Meta(max_length=limits.KV_BATCH_EVENTS_MAX)]
    data_parallel_rank: int | None = None


class BatchOfArrays(msgspec.Struct, array_like=True, gc=False):
    """The usual form of older releases."""

    ts: float
    events: Annotated[list[ArrayEvent], msgspec.Meta(max_length=limits.KV_BATCH_EVENTS_MAX)]
    data_parallel_rank: int | None = None


class _MapKind(msgspec.Struct, gc=False):
    type: str


class _ArrayKind(msgspec.Struct, array_like=True, gc=False):
    type: str


_of_maps: Final = msgspec.msgpack.Decoder(BatchOfMaps)
_of_arrays: Final = msgspec.msgpack.Decoder(BatchOfArrays)
_batch_array: Final = msgspec.msgpack.Decoder(BatchArray)
_batch_map: Final = msgspec.msgpack.Decoder(BatchMap)
_map: Final[msgspec.msgpack.Decoder[AnyMapEvent]] = msgspec.msgpack.Decoder(AnyMapEvent)
_array: Final[msgspec.msgpack.Decoder[AnyArrayEvent]] = msgspec.msgpack.Decoder(AnyArrayEvent)
_map_kind: Final = msgspec.msgpack.Decoder(_MapKind)
_array_kind: Final = msgspec.msgpack.Decoder(_ArrayKind)
_KNOWN: Final = ("BlockStored", "BlockRemoved", "AllBlocksCleared")


def read_usual(payload: bytes) -> BatchOfMaps | BatchOfArrays | None:
    """Return a batch of one of the usual forms; None: hashes are octets, or a kind is not known."""
    with contextlib.suppress(msgspec.ValidationError):
        return _of_maps.decode(payload)
    with contextlib.suppress(msgspec.ValidationError):
        return _of_arrays.decode(payload)
    return None


def read_unusual(payload: bytes) -> BatchArray | BatchMap:
    """Return a batch whose events are not read yet."""
    decoder = _batch_array if payload[0] in _ARRAYS else _batch_map
    return decoder.decode(payload)


def read_one(raw: msgspec.Raw) -> AnyMapEvent | AnyArrayEvent | None:
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
