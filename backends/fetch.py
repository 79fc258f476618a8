"""Ask an engine something over HTTP: one question, one bounded answer, one deadline."""

from __future__ import annotations

import asyncio
import enum
from typing import Protocol

import aiohttp
import msgspec

ANSWER_BYTES_MAX = 8 * 1024 * 1024
CONNECTIONS_MAX = 64  # to one replica: it is asked a few things at a time


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

    async def drop(self, url: str) -> None:
        """Close the connections to the replica at `url`; it may be asked again."""


class HttpFetch:
    """Asks through a pool of connections for each replica. To be closed.

    A pool each, because what is suspended, dumped or gone must not leave connections behind that
    look alive: those of one replica are dropped, and of no other.
    """

    def __init__(self) -> None:
        self._sessions: dict[str, aiohttp.ClientSession] = {}

    async def get(self, url: str, timeout_s: float) -> Answer:
        return await self._ask("GET", url, None, timeout_s)

    async def post(self, url: str, body: bytes, timeout_s: float) -> Answer:
        return await self._ask("POST", url, body, timeout_s)

    async def drop(self, url: str) -> None:
        session = self._sessions.pop(_origin(url), None)
        if session is not None:
            await session.close()

    async def close(self) -> None:
        for origin in list(self._sessions):
            await self.drop(origin)

    def _session(self, url: str) -> aiohttp.ClientSession:
        origin = _origin(url)
        if origin not in self._sessions:
            self._sessions[origin] = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=CONNECTIONS_MAX, keepalive_timeout=4.0),
                timeout=aiohttp.ClientTimeout(),
                trust_env=False,  # replicas are never behind the user's web proxy
            )
        return self._sessions[origin]

    async def _ask(self, method: str, url: str, body: bytes | None, timeout_s: float) -> Answer:
        headers = {"content-type": "application/json"} if body is not None else {}
        try:
            async with (
                asyncio.timeout(timeout_s),
                self._session(url).request(
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


def _origin(url: str) -> str:
    """Return the part of `url` that names the server."""
    return "/".join(url.split("/", 3)[:3])


async def read_bounded(response: aiohttp.ClientResponse, bytes_max: int) -> bytes:
    """Return the body, cut off at `bytes_max`; a cut body closes the connection."""
    content = bytearray()
    async for chunk in response.content.iter_any():
        content += chunk
        if len(content) > bytes_max:
            response.close()
            break
    return bytes(content[:bytes_max])
