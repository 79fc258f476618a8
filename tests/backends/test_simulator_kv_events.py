"""KV events: byte for byte the engines' wire form, and the sockets."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from backends.simulator.kv_cache import CacheEvent, Cleared, Removed, Stored
from backends.simulator.kv_events import (
    AllBlocksCleared,
    Dialect,
    Endpoint,
    SglangBlockRemoved,
    SglangBlockStored,
    VllmBlockRemoved,
    VllmBlockStored,
    encode_batch,
    to_wire,
)
from backends.simulator.tokens import pack_ids
from tests.fakes.simulator import Simulated, simulator

GOLDEN = Path(__file__).parents[1] / "golden"
FIXTURES = {
    "vllm-0.33.0-kv-events.json": [
        VllmBlockStored(
            block_hashes=[11, 12],
            parent_block_hash=None,
            token_ids=[1, 2, 3, 4],
            block_size=2,
            lora_id=None,
            medium="GPU",
            lora_name=None,
        ),
        VllmBlockRemoved(block_hashes=[11], medium="GPU"),
        AllBlocksCleared(),
    ],
    "sglang-0.5.23-kv-events.json": [
        SglangBlockStored(
            block_hashes=[11, 12],
            parent_block_hash=None,
            token_ids=[1, 2, 3, 4],
            block_size=2,
            lora_id=None,
            medium="GPU",
        ),
        SglangBlockRemoved(block_hashes=[11], medium="GPU"),
        AllBlocksCleared(),
    ],
}


@pytest.mark.parametrize("name", FIXTURES)
def test_batches_are_the_engines_byte_for_byte(name: str) -> None:
    golden = msgspec.json.decode((GOLDEN / name).read_bytes())["hex"]
    assert encode_batch(1.0, FIXTURES[name], None).hex() == golden  # type: ignore[arg-type]


HIGH = 2**63 + 5
EVENTS: list[CacheEvent] = [
    Stored((HIGH, 12), 0, pack_ids([1, 2, 3, 4])),
    Stored((13,), HIGH, pack_ids([5, 6])),
    Removed(HIGH),
    Cleared(),
]


def decoded(dialect: Dialect) -> list[dict[str, Any]]:
    """Return the events as a stranger reads them."""
    value = msgspec.msgpack.decode(encode_batch(2.5, to_wire(EVENTS, dialect, 2), 0))
    assert (value[0], value[2]) == (2.5, 0)
    return list(value[1])


def test_vllm_tells_many_blocks_at_once_unsigned() -> None:
    stored, after, removed, cleared = decoded("vllm")
    assert stored["block_hashes"] == [HIGH, 12]
    assert stored["parent_block_hash"] is None
    assert stored["token_ids"] == [1, 2, 3, 4]
    assert stored["block_size"] == 2
    assert stored["medium"] == "GPU"
    assert after["parent_block_hash"] == HIGH
    assert removed == {
        "type": "BlockRemoved",
        "block_hashes": [HIGH],
        "medium": "GPU",
        "group_idx": 0,
    }
    assert cleared == {"type": "AllBlocksCleared"}


def test_sglang_tells_each_page_signed() -> None:
    first, second, after, removed, cleared = decoded("sglang")
    assert first["block_hashes"] == [HIGH - 2**64]
    assert (first["parent_block_hash"], first["token_ids"]) == (None, [1, 2])
    assert second["block_hashes"] == [12]
    assert (second["parent_block_hash"], second["token_ids"]) == (HIGH - 2**64, [3, 4])
    assert after["parent_block_hash"] == HIGH - 2**64
    assert removed["block_hashes"] == [HIGH - 2**64]
    assert cleared == {"type": "AllBlocksCleared"}


async def receive(socket: zmq.Socket[bytes]) -> list[bytes]:
    """Return the next message without blocking the loop."""
    async with asyncio.timeout(10):
        while True:
            try:
                return socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                await asyncio.sleep(0.005)


async def replay(context: zmq.Context[zmq.Socket[bytes]], port: int, start: int) -> list[Any]:
    """Ask for all batches from `start` on; return (sequence, batch) until the end marker."""
    socket = context.socket(zmq.DEALER)
    socket.connect(f"tcp://127.0.0.1:{port}")
    socket.send_multipart((b"", start.to_bytes(8, "big")))
    batches: list[Any] = []
    try:
        while True:
            empty, topic, number, payload = await receive(socket)
            assert (empty, topic) == (b"", b"kv")
            if number == b"\xff" * 8:
                assert payload == b""
                return batches
            batches.append((int.from_bytes(number, "big"), msgspec.msgpack.decode(payload)))
    finally:
        socket.close(linger=0)


async def complete(engine: Simulated, text: str) -> None:
    """Generate two tokens after a text."""
    body = {"model": "demo", "prompt": text, "max_tokens": 2}
    assert (await engine.post("/v1/completions", body))[0] == 200


async def test_batches_go_out_in_sequence_and_can_be_had_again() -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    endpoint = Endpoint(replay_port=0, topic="kv")
    try:
        async with simulator(kv_events=endpoint, kv_cache_tokens=128, sleep_mode=True) as engine:
            _, sources = await engine.get("/kv_event_sources")
            subscriber = context.socket(zmq.SUB)
            subscriber.connect(sources["0"]["endpoint"])
            subscriber.subscribe("kv")
            replay_port = int(sources["0"]["replay_endpoint"].rpartition(":")[2])
            # A subscription takes a moment to arrive; what was missed before is had by replay.
            while not subscriber.poll(0):
                for letter in "abcdef":  # more than the pool holds
                    await complete(engine, letter * 4 * 40)
            topic, number, payload = await receive(subscriber)
            assert topic == b"kv"
            seen = int.from_bytes(number, "big")
            batches = await replay(context, replay_port, 0)
            assert [n for n, _ in batches] == list(range(len(batches)))
            assert batches[seen][1] == msgspec.msgpack.decode(payload)
            first = batches[0][1][1][0]
            assert first["type"] == "BlockStored"
            assert len(first["block_hashes"]) == 2
            assert len(first["token_ids"]) == 32
            kinds = {event["type"] for _, batch in batches for event in batch[1]}
            assert kinds == {"BlockStored", "BlockRemoved"}
            assert [n for n, _ in await replay(context, replay_port, 2)] == list(
                range(2, len(batches))
            )
            subscriber.close(linger=0)
    finally:
        context.destroy(linger=0)


async def test_a_reset_is_told_with_the_next_step() -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        async with simulator(kv_events=Endpoint(replay_port=0, topic="kv")) as engine:
            _, sources = await engine.get("/kv_event_sources")
            port = int(sources["0"]["replay_endpoint"].rpartition(":")[2])
            await complete(engine, "a" * 200)
            before = await replay(context, port, 0)
            assert (await engine.post("/reset_prefix_cache"))[1] == {"success": True}
            assert await replay(context, port, 0) == before
            await complete(engine, "b" * 8)
            after = await replay(context, port, len(before))
            assert after[0][1][1] == [{"type": "AllBlocksCleared"}]
    finally:
        context.destroy(linger=0)


async def test_sglang_says_where_its_events_are() -> None:
    async with simulator(dialect="sglang", kv_events=Endpoint(topic="t")) as engine:
        _, info = await engine.get("/server_info")
        assert info["kv_events"]["publisher"] == "zmq"
        assert info["kv_events"]["endpoint_port_base"] > 0
        assert info["kv_events"]["block_size"] == 16
        assert info["page_size"] == 16
