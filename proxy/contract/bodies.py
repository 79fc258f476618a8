"""A whole body of an answer, unless it is longer than it may be.

`StreamReader.read(n)` of aiohttp returns what has come so far, up to n octets: of a body of more
than one packet it may be the beginning.
"""

from __future__ import annotations

import aiohttp


class TooLongError(ValueError):
    """The body has more octets than anybody needs to say this."""


async def whole_body(answer: aiohttp.ClientResponse, bytes_max: int) -> bytes:
    """Return all of it. Raises `TooLongError`, and what aiohttp raises."""
    body = bytearray()
    async for piece in answer.content.iter_any():
        body += piece
        if len(body) > bytes_max:
            raise TooLongError(f"its answer is longer than {bytes_max} bytes")
    return bytes(body)
