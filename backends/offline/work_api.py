"""The desk over HTTP: what engine workers ask and report, wherever they run.

Workers hold lines of all tenants, so they present a key of their own (`offline.work_key`) wherever
the service can be reached from outside its machine. A page in somebody's browser cannot be a
worker: what says where it comes from (`Origin`) is refused.

An ask that waits ends early when the service does, with the answer that there are no lines: the
worker asks again and finds the next service.
"""

from __future__ import annotations

import asyncio
from typing import TypeVar

import msgspec
from aiohttp import web

from backends.offline.api_errors import ApiError
from backends.offline.tenants import presented_key, same
from backends.offline.until import until
from backends.offline.work import (
    ASK_PATH,
    REPORT_PATH,
    WORK_BYTES_MAX,
    Ask,
    Desk,
    Report,
)

BODIES_BYTES_MAX = WORK_BYTES_MAX // 2  # of lines in one answer: what is around them fits, too

T = TypeVar("T")
_ASK = msgspec.json.Decoder(Ask)
_REPORT = msgspec.json.Decoder(Report)
ENCODE = msgspec.json.Encoder().encode


class WorkApi:
    """The handlers; `ending` is set when the service ends."""

    def __init__(self, desk: Desk, work_key: str | None, ending: asyncio.Event) -> None:
        self._desk = desk
        self._work_key = work_key
        self._ending = ending

    def routes(self) -> list[web.RouteDef]:
        return [web.post(ASK_PATH, self._ask), web.post(REPORT_PATH, self._report)]

    async def _ask(self, request: web.Request) -> web.Response:
        ask = _decoded(_ASK, await self._body(request))
        if ask.bytes_max > BODIES_BYTES_MAX:
            ask = msgspec.structs.replace(ask, bytes_max=BODIES_BYTES_MAX)
        chunk = await until(self._ending, self._desk.ask(ask))
        if chunk is None:
            return web.Response(status=204)
        if request.transport is None or request.transport.is_closing():
            # Whoever asked has gone meanwhile; others need not wait until the hold is over.
            gone = Report(
                worker_id=ask.worker_id, chunk_id=chunk.chunk_id, fence=chunk.fence, done=True
            )
            await self._desk.report(gone)
        return _json(chunk)

    async def _report(self, request: web.Request) -> web.Response:
        report = _decoded(_REPORT, await self._body(request))
        return _json(await self._desk.report(report))

    async def _body(self, request: web.Request) -> bytes:
        if "Origin" in request.headers:
            raise ApiError(403, "Web pages are no workers.")
        if self._work_key is not None:
            key = presented_key(request.headers)
            if not same(key, self._work_key):
                message = "The key of a worker is missing or wrong (DOHERTY_WORK_KEY)."
                raise ApiError(401, message, code="invalid_work_key")
        if (request.content_length or 0) > WORK_BYTES_MAX:
            raise ApiError(413, f"The body has more than {WORK_BYTES_MAX} bytes.")
        body = bytearray()
        async for piece in request.content.iter_any():
            body += piece
            if len(body) > WORK_BYTES_MAX:
                raise ApiError(413, f"The body has more than {WORK_BYTES_MAX} bytes.")
        return bytes(body)


def _decoded(decoder: msgspec.json.Decoder[T], body: bytes) -> T:
    try:
        return decoder.decode(body)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ApiError(400, f"This is not what workers say: {error}") from error


def _json(value: msgspec.Struct) -> web.Response:
    return web.Response(body=ENCODE(value), content_type="application/json")
