"""KV cache events in the engines' own wire forms, and the sockets they go out by.

A message is three frames: topic, sequence number (8 bytes, big-endian), msgpack batch
`[time, [event, ...], rank]`. Events are maps tagged by `type`, as vLLM has them since 0.27 and
SGLang since 0.5.20. The field lists below are whole, though few are ever set: the encoder leaves
out defaults, and how it writes the head of a map depends on how many fields there could be.

The engines differ in two points. vLLM tells of all blocks of a step at once and numbers them
unsigned; SGLang makes one event of each page and numbers them signed.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from typing import Literal

import msgspec
import zmq

from backends.simulator.kv_cache import CacheEvent, Removed, Stored
from backends.simulator.tokens import TOKEN_BYTES, unpack_ids

Dialect = Literal["vllm", "sglang"]

BUFFERED_BATCHES_MAX = 10_000  # what can be replayed; the engines' own default
HIGH_WATER_MARK = 100_000
_END_OF_REPLAY = (-1).to_bytes(8, "big", signed=True)
_MEDIUM = "GPU"


class VllmBlockStored(msgspec.Struct, tag="BlockStored", omit_defaults=True, kw_only=True):
    """Full blocks became resident."""

    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None
    locality: str | None = None
    ownership: str | None = None
    session_id: str | None = None
    lookahead_token_ids: list[int] | None = None


class VllmBlockRemoved(msgspec.Struct, tag="BlockRemoved", omit_defaults=True, kw_only=True):
    """Blocks were evicted."""

    block_hashes: list[int]
    medium: str | None
    group_idx: int | None = None
    locality: str | None = None
    ownership: str | None = None


class SglangBlockStored(msgspec.Struct, tag="BlockStored", omit_defaults=True, kw_only=True):
    """One page became resident."""

    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    cache_salt: str | None = None
    session_id: str | None = None
    lora_name: str | None = None


class SglangBlockRemoved(msgspec.Struct, tag="BlockRemoved", omit_defaults=True, kw_only=True):
    """Pages were evicted."""

    block_hashes: list[int]
    medium: str | None


class AllBlocksCleared(msgspec.Struct, tag="AllBlocksCleared", omit_defaults=True, kw_only=True):
    """Nothing is resident any more."""


WireEvent = (
    VllmBlockStored | VllmBlockRemoved | SglangBlockStored | SglangBlockRemoved | AllBlocksCleared
)


def signed(block: int) -> int:
    """Return the 64 bits of `block` read as a signed number."""
    return block - 2**64 if block >= 2**63 else block


def _to_vllm(event: CacheEvent, block_tokens: int) -> Iterable[WireEvent]:
    if isinstance(event, Stored):
        yield VllmBlockStored(
            block_hashes=list(event.hashes),
            parent_block_hash=event.parent or None,
            token_ids=unpack_ids(event.tokens),
            block_size=block_tokens,
            lora_id=None,
            medium=_MEDIUM,
            lora_name=None,
            extra_keys=[None] * len(event.hashes),
            group_idx=0,
            kv_cache_spec_kind="full_attention",
        )
    elif isinstance(event, Removed):
        yield VllmBlockRemoved(block_hashes=[event.block], medium=_MEDIUM, group_idx=0)
    else:
        yield AllBlocksCleared()


def _to_sglang(event: CacheEvent, block_tokens: int) -> Iterable[WireEvent]:
    if isinstance(event, Stored):
        block_bytes = block_tokens * TOKEN_BYTES
        parent = signed(event.parent) if event.parent else None
        for index, block in enumerate(event.hashes):
            tokens = event.tokens[index * block_bytes : (index + 1) * block_bytes]
            yield SglangBlockStored(
                block_hashes=[signed(block)],
                parent_block_hash=parent,
                token_ids=unpack_ids(tokens),
                block_size=block_tokens,
                lora_id=None,
                medium=_MEDIUM,
            )
            parent = signed(block)
    elif isinstance(event, Removed):
        yield SglangBlockRemoved(block_hashes=[signed(event.block)], medium=_MEDIUM)
    else:
        yield AllBlocksCleared()


def to_wire(events: Iterable[CacheEvent], dialect: Dialect, block_tokens: int) -> list[WireEvent]:
    """Return the events of one step as `dialect` tells them."""
    convert = _to_vllm if dialect == "vllm" else _to_sglang
    return [wire for event in events for wire in convert(event, block_tokens)]


def encode_batch(at_s: float, events: list[WireEvent], rank: int | None) -> bytes:
    """Return the payload of one message."""
    return msgspec.msgpack.encode([at_s, events, rank])


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """Where events go out; port 0 takes a free one."""

    host: str = "127.0.0.1"
    port: int = 0
    replay_port: int | None = None
    topic: str = ""


class EventPublisher:
    """The PUB socket and the ROUTER that replays; both serve from the event loop, never blocking.

    The last batches are kept, so that a subscriber who missed some can ask for them: it sends an
    empty frame and a sequence number and gets every batch from there, then the end marker.
    """

    def __init__(
        self, endpoint: Endpoint, dialect: Dialect, block_tokens: int, rank: int = 0
    ) -> None:
        """A rank has the ports of rank 0, and as many further; those that are 0 are any."""
        self._rank = rank
        self._dialect: Dialect = dialect
        self._block_tokens = block_tokens
        self.topic = endpoint.topic
        self._topic_frame = endpoint.topic.encode()
        self._sequence = 0
        self._buffer: deque[tuple[bytes, bytes]] = deque(maxlen=BUFFERED_BATCHES_MAX)
        self._context = zmq.Context()
        self._publisher = self._context.socket(zmq.PUB)
        self._publisher.set_hwm(HIGH_WATER_MARK)
        self.port = _bind(self._publisher, endpoint.host, endpoint.port, rank)
        self._router: zmq.Socket[bytes] | None = None
        self.replay_port: int | None = None
        if endpoint.replay_port is not None:
            self._router = self._context.socket(zmq.ROUTER)
            self._router.set_hwm(HIGH_WATER_MARK)
            self.replay_port = _bind(self._router, endpoint.host, endpoint.replay_port, rank)
            asyncio.get_running_loop().add_reader(self._router.fileno(), self._answer_replays)

    def publish(self, events: list[CacheEvent], at_s: float) -> None:
        """Send the events of one step as one batch."""
        wire = to_wire(events, self._dialect, self._block_tokens)
        frames = (self._sequence.to_bytes(8, "big"), encode_batch(at_s, wire, self._rank))
        self._sequence += 1
        self._buffer.append(frames)
        self._publisher.send_multipart((self._topic_frame, *frames), zmq.NOBLOCK)

    def close(self) -> None:
        """Close both sockets; what is not sent is lost."""
        if self._router is not None:
            asyncio.get_running_loop().remove_reader(self._router.fileno())
            self._router.close(linger=0)
        self._publisher.close(linger=0)
        self._context.term()

    def _answer_replays(self) -> None:
        # The descriptor is edge-triggered and tells of anything: read until nothing is left.
        assert self._router is not None
        while True:
            try:
                identity, *_, start = self._router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if len(start) != 8:
                continue
            for number, payload in self._buffer:
                if number >= start:  # equal length, big-endian: bytes compare as numbers do
                    self._reply(identity, number, payload)
            self._reply(identity, _END_OF_REPLAY, b"")

    def _reply(self, identity: bytes, number: bytes, payload: bytes) -> None:
        assert self._router is not None
        self._router.send_multipart((identity, b"", self._topic_frame, number, payload))


def _bind(socket: zmq.Socket[bytes], host: str, port: int, rank: int) -> int:
    """Bind and return the port."""
    socket.bind(f"tcp://{host}:{port + rank if port else '*'}")
    return int(socket.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])
