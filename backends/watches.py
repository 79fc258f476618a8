"""Those who watch something that is told as a whole: newest line first, then each newer one.

An empty line is a heartbeat. A watcher that is slow skips to the newest; one that takes no octets
is let go.
"""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

from aiohttp import web

from proxy.contract import HEARTBEAT_INTERVAL_S

WATCHERS_MAX = 256
WRITE_TIMEOUT_S = 10.0  # a watcher that takes no bytes for this long is gone


class Watched(Protocol):
    """What is told. Versions grow from 0 within one life of the manager."""

    @property
    def version(self) -> int: ...

    @property
    def line(self) -> bytes: ...

    async def newer(self, version: int, wait_s: float) -> bool:
        """Wait until there is one after `version`; say whether there is."""


class Watches:
    """The watchers of one thing."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def end(self) -> None:
        """Let the watchers go, so that the listener can close."""
        for task in self._tasks:
            task.cancel()

    async def answer(self, request: web.Request, watched: Watched) -> web.StreamResponse:
        if len(self._tasks) >= WATCHERS_MAX:
            raise web.HTTPServiceUnavailable(text=f"{WATCHERS_MAX} watchers are connected already")
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        response = web.StreamResponse(headers={"content-type": "application/x-ndjson"})
        try:
            await response.prepare(request)
            await _stream(response, watched)
        except (ConnectionError, TimeoutError):
            pass  # the watcher has gone
        finally:
            self._tasks.discard(task)
        return response


async def _stream(response: web.StreamResponse, watched: Watched) -> None:
    version = -1
    while True:
        line = b"\n"
        if version < 0 or await watched.newer(version, HEARTBEAT_INTERVAL_S):
            version, line = watched.version, watched.line + b"\n"
        async with asyncio.timeout(WRITE_TIMEOUT_S):
            await response.write(line)
