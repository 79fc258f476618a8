"""A manager's watch as it is read: lines that are each the whole, and empty ones, its pulse.

A watch that has been silent for three heartbeats is taken for broken: whoever follows it asks anew.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import aiohttp

from proxy.contract import HEARTBEAT_INTERVAL_S


async def newest_lines(
    session: aiohttp.ClientSession, url: str, bytes_max: int, authorization: str = ""
) -> AsyncIterator[bytes]:
    """Yield the last line of several that came together, or nothing in it for a heartbeat.

    Raises `aiohttp.ClientError`, `TimeoutError`, or `ValueError` for a line that has no end.
    """
    timeout = aiohttp.ClientTimeout(sock_connect=2.0, sock_read=3 * HEARTBEAT_INTERVAL_S)
    headers = {"authorization": authorization} if authorization else {}
    async with session.get(url, timeout=timeout, headers=headers) as answer:
        answer.raise_for_status()
        buffer = bytearray()
        async for piece in answer.content.iter_any():
            buffer += piece
            if len(buffer) > bytes_max:
                raise ValueError("a line of the watch is larger than it may be")
            *lines, rest = bytes(buffer).split(b"\n")
            buffer = bytearray(rest)
            if lines:
                full = [line for line in lines if line.strip()]
                yield full[-1] if full else b""
