"""The part of the manager's API that is about machines which are taken away."""

from __future__ import annotations

import re

import msgspec
from aiohttp import web

from backends.notices import IN_S_MAX, Reclaims, RefusedNoticeError
from backends.scaling_api import refuse_web_pages

RECLAIM_PATH = "/v1/reclaim"
_SECONDS = re.compile(r"[0-9]{1,6}(\.[0-9]{1,6})?")


class ReclaimApi:
    """Takes notices, tells of them, and takes them back."""

    def __init__(self, reclaims: Reclaims) -> None:
        self._reclaims = reclaims

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get(RECLAIM_PATH, self._report),
            web.post(RECLAIM_PATH, self._take),
            web.delete(RECLAIM_PATH, self._cancel),
        ]

    async def _report(self, _request: web.Request) -> web.Response:
        body = msgspec.json.encode(self._reclaims.report())
        return web.Response(body=body, content_type="application/json")

    async def _take(self, request: web.Request) -> web.Response:
        refuse_web_pages(request)
        await request.read()  # bounded by client_max_size; nothing in it is needed
        in_s = _seconds(request.query.get("in_s", ""))
        named = request.query.get("gpus")
        gpus = None if named is None else [name.strip() for name in named.split(",")]
        try:
            self._reclaims.take(in_s, gpus, "the API")
        except RefusedNoticeError as error:
            raise web.HTTPBadRequest(text=str(error)) from error
        return await self._report(request)

    async def _cancel(self, request: web.Request) -> web.Response:
        refuse_web_pages(request)
        self._reclaims.cancel()
        return await self._report(request)


def _seconds(text: str) -> float:
    if not _SECONDS.fullmatch(text) or float(text) > IN_S_MAX:
        raise web.HTTPBadRequest(
            text=f"in_s must be the seconds that are left, at most {IN_S_MAX:g}, not '{text}'"
        )
    return float(text)
