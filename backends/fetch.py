"""Ask an engine something over HTTP: one question, one bounded answer, one deadline."""

from __future__ import annotations

import asyncio
import enum
from typing import Protocol

import aiohttp
import msgspec

ANSWER_BYTES_MAX = 8 * 1024 * 1024
CONNECTIONS_MAX = 1024


class Silence(enum.Enum):
    """Why there was no answer: a refusal says that nobody listens, a timeout may mean busy."""

    REFUSED = "refused"
    TIMEOUT = "no answer in time"
    BROKEN = "connection broken"


class Answer(msgspec.Struct, frozen=True):
    """A status and a body; `silence` when there is none, and then the status is 0."""

    status: int
    body: bytes = b""
    silence: Silence | None = None


class Fetch(Protocol):
    """Something that asks."""

    async def get(self, url: str, timeout_s: float) -> Answer: ...

    async def post(self, url: str, body: bytes, timeout_s: float) -> Answer: ...


class HttpFetch:
    """Asks through one pool of connections. To be closed."""

    def __init__(self) -> None:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=CONNECTIONS_MAX, keepalive_timeout=4.0),
            timeout=aiohttp.ClientTimeout(),
            trust_env=False,  # replicas are never behind the user's web proxy
        )

    async def get(self, url: str, timeout_s: float) -> Answer:
        return await self._ask("GET", url, None, timeout_s)

    async def post(self, url: str, body: bytes, timeout_s: float) -> Answer:
        return await self._ask("POST", url, body, timeout_s)

    async def close(self) -> None:
        await self._session.close()

    async def _ask(self, method: str, url: str, body: bytes | None, timeout_s: float) -> Answer:
        headers = {"content-type": "application/json"} if body is not None else {}
        try:
            async with (
                asyncio.timeout(timeout_s),
                self._session.request(
                    method, url, data=body, headers=headers, allow_redirects=False
                ) as response,
            ):
                content = await read_bounded(response, ANSWER_BYTES_MAX)
                return Answer(response.status, content)
        except TimeoutError:
            return Answer(0, silence=Silence.TIMEOUT)
        except aiohttp.ClientConnectorError:
            return Answer(0, silence=Silence.REFUSED)
        except (aiohttp.ClientError, OSError):
            return Answer(0, silence=Silence.BROKEN)


async def read_bounded(response: aiohttp.ClientResponse, bytes_max: int) -> bytes:
    """Return the body, cut off at `bytes_max`; a cut body closes the connection."""
    content = bytearray()
    async for chunk in response.content.iter_any():
        content += chunk
        if len(content) > bytes_max:
            response.close()
            break
    return bytes(content[:bytes_max])
