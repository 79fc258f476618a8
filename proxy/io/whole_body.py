"""The body of an answer to a question of ours, as a whole and not without end.

`content.read(n)` of aiohttp returns what has come, be it the first of several packets.
"""

from __future__ import annotations

import aiohttp


class TooLargeError(Exception):
    """An answer is longer than any that is meant."""


async def whole_body(answer: aiohttp.ClientResponse, bytes_max: int) -> bytes:
    """Return the body. Raises `TooLargeError` and aiohttp's errors."""
    body = bytearray()
    async for piece in answer.content.iter_any():
        body += piece
        if len(body) > bytes_max:
            raise TooLargeError(f"{answer.url} answers with over {bytes_max} octets")
    return bytes(body)
