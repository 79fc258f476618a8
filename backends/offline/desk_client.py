"""The desk, reached over HTTP: what a worker on any machine holds in place of the store.

Every call is repeated until it is answered or `patience_s` is over. That is safe for a report,
because the same twice counts once (see `work`), and for an ask, because a chunk whose answer was
lost on the way is held by nobody who knows of it and goes out anew once its hold is over. A refusal
is not repeated: a wrong key stays wrong.

Imports nothing that an engine's own Python lacks: aiohttp and msgspec are dependencies of vLLM's.
"""

from __future__ import annotations

import asyncio
import random

import aiohttp
import msgspec

from backends.offline.work import (
    ASK_PATH,
    REPORT_PATH,
    WORK_BYTES_MAX,
    Ask,
    Chunk,
    Receipt,
    Report,
)

ANSWER_S_MAX = 30.0  # beyond what an ask may wait; a report is one transaction
PAUSE_S_MIN, PAUSE_S_MAX = 0.1, 5.0  # between attempts, doubled each time, half of it by chance
SHOWN_BYTES_MAX = 300
_RANDOM = random.Random()  # noqa: S311 - so that workers do not come back all at once


class DeskLostError(Exception):
    """The desk has not answered for as long as the caller would wait."""


class DeskRefusedError(Exception):
    """The desk answered that it never will: its word is the text."""


def work_headers(work_key: str) -> dict[str, str]:
    """Return the headers of a worker's request."""
    headers = {"content-type": "application/json"}
    if work_key:
        headers["authorization"] = f"Bearer {work_key}"
    return headers


def pause_s(attempt: int, chance: float) -> float:
    """Return how long to wait after failure number `attempt` (from 0); `chance` in [0, 1)."""
    whole_s = min(PAUSE_S_MAX, PAUSE_S_MIN * 2.0 ** min(attempt, 16))
    return whole_s * (0.5 + 0.5 * chance)


class RemoteDesk:
    """A `Desk` at `url`. To be closed."""

    def __init__(self, url: str, work_key: str = "", patience_s: float = 60.0) -> None:
        self._url = url.rstrip("/")
        self._headers = work_headers(work_key)
        self._patience_s = patience_s
        self._session: aiohttp.ClientSession | None = None

    async def ask(self, ask: Ask) -> Chunk | None:
        """Return lines to do; None: there are none. Raises the two errors above."""
        content = await self._call(ASK_PATH, msgspec.json.encode(ask), ask.wait_s, None)
        return msgspec.json.decode(content, type=Chunk | None) if content else None

    async def report(self, report: Report, patience_s: float | None = None) -> Receipt:
        """Take results. Raises the two errors above."""
        content = await self._call(REPORT_PATH, msgspec.json.encode(report), 0.0, patience_s)
        return msgspec.json.decode(content, type=Receipt)

    async def close(self) -> None:
        """Let go of the connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _call(self, path: str, body: bytes, wait_s: float, patience_s: float | None) -> bytes:
        clock = asyncio.get_running_loop()
        patience_s = self._patience_s if patience_s is None else patience_s
        end_s = clock.time() + wait_s + patience_s
        attempt = 0
        while True:
            try:
                async with asyncio.timeout(wait_s + ANSWER_S_MAX):
                    status, content = await self._post(path, body)
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                problem = f"{type(error).__name__}: {error}"
            else:
                if status in (200, 204):
                    return content
                problem = f"{status} {content[:SHOWN_BYTES_MAX].decode('utf-8', 'replace')}"
                if status < 500 and status not in (408, 429):
                    raise DeskRefusedError(f"the desk at {self._url} answered {problem}")
            rest_s = pause_s(attempt, _RANDOM.random())
            if clock.time() + rest_s >= end_s:
                raise DeskLostError(f"the desk at {self._url} does not answer: {problem}")
            attempt += 1
            await asyncio.sleep(rest_s)

    async def _post(self, path: str, body: bytes) -> tuple[int, bytes]:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(),
                trust_env=False,  # the desk is never behind the user's web proxy
                read_bufsize=1024 * 1024,
            )
        async with self._session.post(
            self._url + path, data=body, headers=self._headers, allow_redirects=False
        ) as response:
            content = bytearray()
            async for piece in response.content.iter_any():
                content += piece
                if len(content) > WORK_BYTES_MAX:
                    raise aiohttp.ClientPayloadError(f"more than {WORK_BYTES_MAX} bytes")
            return response.status, bytes(content)
