"""An admin listener that shows the views it is given: for what watches a proxy.

Use as `async with ViewServer(view) as server`. `show` sends another view to whoever watches.
"""

from __future__ import annotations

import asyncio
from typing import Self

from aiohttp import web

from proxy.contract.view import View, encode_view


class ViewServer:
    def __init__(self, view: View, key: str = "") -> None:
        self.view = view
        self.key = key
        self.refused = 0  # status of every answer, if any
        self.wishes: list[tuple[str, str]] = []
        self.wish_answer: tuple[int, str] = (202, "")
        self.explained: list[tuple[str, bytes]] = []
        self.explanation = b"{}"
        self.watchers = 0
        self.met = 0  # watchers, ever
        self.port = 0
        self._changed = asyncio.Condition()
        self._runner: web.AppRunner

    async def __aenter__(self) -> Self:
        app = web.Application(middlewares=[self._guard])
        app.router.add_get("/view", self._view)
        app.router.add_get("/view/watch", self._watch)
        app.router.add_post("/replicas/{replica_id}/{wish}", self._wish)
        app.router.add_post("/debug/route", self._route)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port)
        await site.start()
        self.port = self._runner.addresses[0][1]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def show(self, view: View) -> None:
        async with self._changed:
            self.view = view
            self._changed.notify_all()

    async def cut(self) -> None:
        """End every stream."""
        async with self._changed:
            self.watchers = -1
            self._changed.notify_all()

    @web.middleware
    async def _guard(self, request: web.Request, handler: object) -> web.StreamResponse:
        if self.refused:
            return _error(self.refused, "watched enough")
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return _error(401, "send the admin key as a bearer token")
        return await handler(request)  # type: ignore[operator,no-any-return]

    async def _view(self, _: web.Request) -> web.Response:
        return web.Response(body=encode_view(self.view), content_type="application/json")

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await answer.prepare(request)
        async with self._changed:
            self.met += 1
            self.watchers = 1
            self._changed.notify_all()
            while self.watchers > 0:
                body = encode_view(self.view)
                await answer.write(b": a comment\n\nevent: view\ndata: " + body + b"\n\n")
                await self._changed.wait()
        return answer

    async def _wish(self, request: web.Request) -> web.Response:
        self.wishes.append((request.match_info["replica_id"], request.match_info["wish"]))
        status, words = self.wish_answer
        return _error(status, words) if status >= 400 else web.json_response({}, status=status)

    async def _route(self, request: web.Request) -> web.Response:
        self.explained.append((request.query["path"], await request.read()))
        return web.Response(body=self.explanation, content_type="application/json")


def _error(status: int, message: str) -> web.Response:
    return web.json_response({"error": {"message": message}}, status=status)
