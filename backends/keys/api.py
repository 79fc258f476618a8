"""The manager's pages of keys: the set as it is, and a watch of it for proxies and other regions.

A manager without keys has no such pages (404), so that those who ask know that there are none. One
that does not know yet (it follows another region, and has never reached it) answers 503: whoever
asks goes on asking, and lets nobody in meanwhile. Where proxies share a `peer_key`, only who shows
that he has it is told: what is told is what the file of keys hides from other users.
"""

from __future__ import annotations

import hmac

from aiohttp import web

from backends.keys.feed import KeyFeed
from backends.watches import Watches
from proxy.contract.keys import KEYS_PATH, KEYS_WATCH_PATH, follow_token


class KeysApi:
    """The handlers, and the watchers that they serve."""

    def __init__(self, feed: KeyFeed | None, peer_key: str | None) -> None:
        self._feed = feed
        self._expected = b"" if peer_key is None else f"Bearer {follow_token(peer_key)}".encode()
        self._watches = Watches()

    def routes(self) -> list[web.RouteDef]:
        return [web.get(KEYS_PATH, self._whole), web.get(KEYS_WATCH_PATH, self._watch)]

    def end_watches(self) -> None:
        self._watches.end()

    def _known(self, request: web.Request) -> KeyFeed:
        shown = request.headers.get("authorization", "").encode("utf-8", "surrogateescape")
        if self._expected and not hmac.compare_digest(shown, self._expected):
            raise web.HTTPUnauthorized(text="another peer_key, or none")
        if self._feed is None:
            raise web.HTTPNotFound(text="this manager keeps no API keys (manager.keys_path)")
        if self._feed.keys is None:
            raise web.HTTPServiceUnavailable(text="the region that has the keys was never reached")
        return self._feed

    async def _whole(self, request: web.Request) -> web.Response:
        return web.Response(body=self._known(request).line, content_type="application/json")

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        return await self._watches.answer(request, self._known(request))
