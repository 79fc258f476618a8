"""Stands in for the admin listener under the dashboard: it shows whatever view a test wants.

It has the paths that the page knows, in a thread of its own, so that a test may wait for a browser.
What is asked of it is kept: the wishes, the requests to be explained, the credentials.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from pathlib import Path
from typing import Any, Self

import msgspec
from aiohttp import web

from proxy.contract.view import VIEW_PATH, VIEW_WATCH_PATH, WISH_PATH, View, encode_view
from proxy.io.dashboard import SECURITY_FIELDS

PAGES = Path(__file__).parents[2] / "proxy" / "dashboard"
KINDS = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}


class DashboardServer:
    """Use as `with DashboardServer(view) as server`; `server.view` is shown from then on."""

    def __init__(self, view: View, *, key: str = "", interval_s: float = 0.25) -> None:
        self.view: View | bytes = view
        self.key = key
        self.interval_s = interval_s
        self.silent = False  # streams stay open and say nothing
        self.refusing = ""  # why streams are refused
        self.explained: tuple[int, dict[str, Any]] = (200, {})
        self.wish_status = 202
        self.asked: list[tuple[str, str]] = []  # method and path
        self.bodies: list[tuple[dict[str, str], bytes]] = []  # to be explained
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._up = threading.Event()
        self._end = asyncio.Event()
        self._cut = asyncio.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._up.wait(20)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._loop.call_soon_threadsafe(self._cut.set)
        self._thread.join(20)
        self._loop.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def cut(self) -> None:
        """End all streams."""
        self._loop.call_soon_threadsafe(self._cut.set)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        app = web.Application(middlewares=[self._guard])
        app.router.add_get("/", self._page)
        app.router.add_get(VIEW_PATH, self._once)
        app.router.add_get(VIEW_WATCH_PATH, self._watch)
        app.router.add_post("/debug/route", self._explain)
        app.router.add_post(WISH_PATH, self._wish)
        app.router.add_get("/{name}", self._page)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.port = runner.addresses[0][1]
        self._up.set()
        await self._end.wait()
        await runner.cleanup()

    @web.middleware
    async def _guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.asked.append((request.method, request.path))
        open_path = request.method == "GET" and request.path != VIEW_WATCH_PATH
        given = request.headers.get("authorization")
        if self.key and not open_path and given != f"Bearer {self.key}":
            return _error(401, "send the admin key as a bearer token")
        answer: web.StreamResponse = await handler(request)
        return answer

    async def _page(self, request: web.Request) -> web.Response:
        path = PAGES / (request.match_info.get("name") or "index.html")
        if path.suffix not in KINDS or not path.is_file():
            return _error(404, "no such page")
        headers = {
            "Content-Type": f"{KINDS[path.suffix]}; charset=utf-8",
            "Cache-Control": "no-store",
        }
        return web.Response(body=path.read_bytes(), headers={**SECURITY_FIELDS, **headers})

    async def _once(self, _: web.Request) -> web.Response:
        return web.Response(body=self._encoded(0.0), content_type="application/json")

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        if self.refusing:
            return _error(503, self.refusing)
        self._cut.clear()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        shown_at_s = time.monotonic()
        while not self._cut.is_set():
            if not self.silent:
                passed_s = time.monotonic() - shown_at_s
                with contextlib.suppress(ConnectionResetError):  # the page has gone
                    data = self._encoded(passed_s)
                    await response.write(b"event: view\ndata: " + data + b"\n\n")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._cut.wait(), self.interval_s)
        return response

    def _encoded(self, passed_s: float) -> bytes:
        if isinstance(self.view, bytes):
            return self.view
        return encode_view(msgspec.structs.replace(self.view, at_s=self.view.at_s + passed_s))

    async def _explain(self, request: web.Request) -> web.Response:
        self.bodies.append((dict(request.headers), await request.read()))
        status, said = self.explained
        return web.json_response(said, status=status)

    async def _wish(self, request: web.Request) -> web.Response:
        if self.wish_status >= 400:
            return _error(self.wish_status, "the manager cannot be reached")
        return web.json_response({}, status=self.wish_status)


def _error(status: int, message: str) -> web.Response:
    return web.json_response({"error": {"message": message, "code": "x"}}, status=status)
