"""Those who watch the view: a stream of server-sent events to each, of the newest and no other.

A view is whole, so a watcher that is slow skips what it missed: never more is kept for one than the
view that it is being sent. One that takes nothing for `STUCK_S` is let go, and there are at most
`WATCHERS_MAX`, so that forgotten pages cannot fill the listener that operators need in a bad night.
"""

from __future__ import annotations

import asyncio

from aiohttp import web

from proxy.io.viewing import Viewing

WATCHERS_MAX = 32
HEARTBEAT_S = 5.0  # a comment, when there was no view for so long
STUCK_S = 20.0
RETRY_MS = 1000  # before a browser connects again


class Watchers:
    """All of them."""

    def __init__(self, viewing: Viewing) -> None:
        self._viewing = viewing

    @property
    def full(self) -> bool:
        return self._viewing.watchers >= WATCHERS_MAX

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Serve one until it goes or the listener ends."""
        stream = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream",
                "Cache-Control": "no-store",
                "X-Accel-Buffering": "no",  # nginx would keep events back
            }
        )
        self._viewing.watchers += 1
        try:
            await stream.prepare(request)
            await self._tell(stream)
        except (ConnectionError, TimeoutError):
            if request.transport is not None:  # what it did not take is not to be waited for
                request.transport.abort()
        finally:
            self._viewing.watchers -= 1
        return stream

    async def _tell(self, stream: web.StreamResponse) -> None:
        viewing = self._viewing
        await _write(stream, b"retry: %d\n\n" % RETRY_MS)
        body, number = await viewing.newest(), viewing.number
        while not viewing.closed:
            await _write(stream, b"event: view\ndata: %b\n\n" % body)
            while not await viewing.newer(number, HEARTBEAT_S) and not viewing.closed:
                await _write(stream, b": nothing new\n\n")
            body, number = viewing.body, viewing.number


async def _write(stream: web.StreamResponse, octets: bytes) -> None:
    async with asyncio.timeout(STUCK_S):
        await stream.write(octets)
