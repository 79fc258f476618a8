"""An engine's KV events, followed by a stranger beside the proxy: what was there to be heard.

The proxy says what it made of the events; this says what the engine told, so that the two can be
compared: batches, holes in their numbers, and how many tokens are stored by the engine's own word.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Iterable
from typing import Any

import msgspec
import orjson
import zmq
import zmq.asyncio

from loadtest.client import Client
from loadtest.fleet import get
from loadtest.gpu.gauges import Series
from loadtest.gpu.stack import Replica

CONNECT_PATIENCE_S = 10.0
SUBSCRIBE_S = 0.2  # the subscription follows the handshake, and nobody says when it has come
_HOST_ALL = re.compile(r"^tcp://(\*|0\.0\.0\.0|\[::\])(?=:)")


class Source(msgspec.Struct, frozen=True):
    """Where events are, and who said so."""

    endpoint: str
    topic: str
    told_by: str


class Told(msgspec.Struct, kw_only=True):
    """What has been told so far."""

    batches: int = 0
    holes: int = 0  # numbers that did not follow the one before
    stored: int = 0  # events
    removed: int = 0
    cleared: int = 0
    unread: int = 0  # batches that could not be read
    lags_s: list[float] = []
    blocks: dict[Any, int] = {}  # tokens of each block that is stored


async def find_source(engine: Client, replica: Replica, commands: Iterable[str]) -> Source | None:
    """Ask the manager, then the engine, then read the command line that it was started with."""
    if replica.kv_events:
        return Source(here(replica.kv_events), replica.kv_topic, "the manager")
    status, body = await get(engine, "/kv_event_sources")
    if status == 200:
        for told in orjson.loads(body).values():
            return Source(here(told["endpoint"]), told.get("topic") or "", "/kv_event_sources")
    status, body = await get(engine, "/server_info")
    if status == 200 and isinstance(named := orjson.loads(body).get("kv_events"), dict):
        endpoint = f"tcp://127.0.0.1:{named['endpoint_port_base']}"
        return Source(endpoint, named.get("topic") or "", "/server_info")
    for command in commands:
        if (match := re.search(r"--kv-events-config[= ](\{.*?\})(?= --|$)", command)) is not None:
            with contextlib.suppress(orjson.JSONDecodeError, KeyError):
                config = orjson.loads(match[1])
                return Source(here(config["endpoint"]), config.get("topic") or "", "its flags")
    return None


def here(endpoint: str) -> str:
    """Return a bound address as one on this machine connects to it."""
    return _HOST_ALL.sub("tcp://127.0.0.1", endpoint)


class Listener:
    """Hears the events of one engine until it is closed."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.told = Told()
        self._number: int | None = None
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
        self._socket.connect(source.endpoint)
        self._socket.setsockopt(zmq.SUBSCRIBE, source.topic.encode())
        self._task = asyncio.get_running_loop().create_task(self._listen())

    async def connected(self) -> bool:
        """Wait until nothing that is told from now on is missed; False: nobody is there."""
        try:
            async with asyncio.timeout(CONNECT_PATIENCE_S):
                await self._monitor.recv_multipart()
        except TimeoutError:
            return False
        await asyncio.sleep(SUBSCRIBE_S)
        return True

    async def close(self) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self._socket.disable_monitor()
        self._socket.close(0)
        self._context.destroy(0)

    async def _listen(self) -> None:
        while True:
            frames = await self._socket.recv_multipart()
            self.hear(frames, time.time())

    def hear(self, frames: list[bytes], at_s: float) -> None:
        """Take one message: topic, number, batch."""
        told = self.told
        try:
            number = int.from_bytes(frames[-2], "big")
            batch = msgspec.msgpack.decode(frames[-1])
            sent_s, events = float(batch[0]), list(batch[1])
        except (IndexError, TypeError, ValueError, msgspec.MsgspecError):
            told.unread += 1
            return
        if self._number is not None and number != self._number + 1:
            told.holes += 1
        self._number = number
        told.batches += 1
        told.lags_s.append(at_s - sent_s)
        for event in events:
            self._take(event)

    def _take(self, event: Any) -> None:
        told, (kind, hashes, tokens) = self.told, _parts(event)
        if kind == "BlockStored":
            told.stored += 1
            for block in hashes:
                told.blocks[block] = tokens
        elif kind == "BlockRemoved":
            told.removed += 1
            for block in hashes:
                told.blocks.pop(block, None)
        elif kind == "AllBlocksCleared":
            told.cleared += 1
            told.blocks.clear()


def _parts(event: Any) -> tuple[str, list[Any], int]:
    """Return kind, blocks and tokens a block; releases tell events as maps or as arrays."""
    if isinstance(event, dict):
        blocks, size = event.get("block_hashes"), event.get("block_size")
        return str(event.get("type")), blocks or [], int(size or 0)
    kind = str(event[0]) if event else ""
    blocks = event[1] if len(event) > 1 and isinstance(event[1], list) else []
    size = event[4] if kind == "BlockStored" and len(event) > 4 else 0
    return kind, blocks, int(size or 0)


def judged_by_events(found: Series) -> bool:
    """Return whether the proxy judges some replica's cache by its events at this moment."""
    return any(
        value and labels.get("source") == "events"
        for name, labels, value in found
        if name == "doherty_replica_cache_source"
    )
