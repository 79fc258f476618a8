"""A relay that makes a way long: what goes in comes out unchanged, half a round trip later.

    python -m loadtest.regions.relay 10.77.1.1:9001=10.77.2.2:8000@80 …

Each word is where to listen, where that leads, and the round trip in milliseconds. Octets keep
their order and are bounded in number; a close travels as long as octets do.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections import deque
from typing import Final

UNDERWAY_BYTES_MAX: Final = 4 * 1024 * 1024  # of one direction of one connection
READ_BYTES: Final = 64 * 1024
Hop = tuple[str, int, str, int, float]  # from, to, half a round trip in seconds


def parse(word: str) -> Hop:
    """Return what a word of the command line says. Raises `ValueError`."""
    listen, _, rest = word.partition("=")
    target, _, round_trip_ms = rest.partition("@")
    host, _, port = listen.rpartition(":")
    to_host, _, to_port = target.rpartition(":")
    return host, int(port), to_host, int(to_port), float(round_trip_ms) / 2000


async def carry(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, one_way_s: float
) -> None:
    """Move octets in one direction until its sender closes."""
    clock = asyncio.get_running_loop().time
    underway: deque[tuple[float, bytes]] = deque()
    news, room = asyncio.Event(), asyncio.Event()
    underway_bytes = 0

    async def read() -> None:
        nonlocal underway_bytes
        data = b"-"
        while data:
            try:
                data = await reader.read(READ_BYTES)
            except ConnectionError:
                data = b""
            underway.append((clock() + one_way_s, data))
            underway_bytes += len(data)
            news.set()
            while underway_bytes > UNDERWAY_BYTES_MAX:
                room.clear()
                await room.wait()

    async def write() -> None:
        nonlocal underway_bytes
        while True:
            while not underway:
                news.clear()
                await news.wait()
            due_s, data = underway.popleft()
            await asyncio.sleep(max(0.0, due_s - clock()))
            if not data:
                return
            underway_bytes -= len(data)
            room.set()
            writer.write(data)
            await writer.drain()

    async with asyncio.TaskGroup() as group:
        reading = group.create_task(read())
        with contextlib.suppress(ConnectionError):
            await write()
        reading.cancel()
    writer.close()


async def serve(hop: Hop) -> asyncio.Server:
    host, port, to_host, to_port, one_way_s = hop

    async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await asyncio.sleep(one_way_s)  # the first packet's way
            there_reader, there = await asyncio.open_connection(to_host, to_port)
        except OSError:
            writer.transport.abort()
            return
        async with asyncio.TaskGroup() as group:
            group.create_task(carry(reader, there, one_way_s))
            group.create_task(carry(there_reader, writer, one_way_s))

    return await asyncio.start_server(accepted, host, port)


async def main(words: list[str]) -> None:
    servers = [await serve(parse(word)) for word in words]
    print("relaying", flush=True)
    await asyncio.gather(*[server.serve_forever() for server in servers])


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
