"""The part of the manager's API that is about demand and about how many replicas there are."""

from __future__ import annotations

import re
from collections.abc import Iterable

import msgspec
from aiohttp import web
from msgspec import MsgspecError

from backends.arguments import REPLICAS_MAX
from backends.autoscale import Autoscaler, RefusedScaleError
from backends.demand import DemandBook
from backends.offline.work import NEEDS_PATH, JobNeeds
from backends.scaled_pool import ScaledPool
from backends.scaling_report import (
    POOLS_PATH,
    SCALING_PATH,
    DemandReport,
    ModelReport,
    encode_report,
)
from proxy.contract.demand import DEMAND_BYTES_MAX, DEMAND_PATH, decode_demand

READ_BYTES = 64 * 1024
NEEDS_BYTES_MAX = 4 * 1024 * 1024
_NEEDS = msgspec.json.Decoder(JobNeeds)
_WHOLE = re.compile("[0-9]{1,9}")


class ScalingApi:
    """Takes what proxies report, tells what follows, and takes the sizes that others decide."""

    def __init__(self, scaler: Autoscaler) -> None:
        self._scaler = scaler

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post(DEMAND_PATH, self._demand),
            web.get(DEMAND_PATH, self._demanded),
            web.post(NEEDS_PATH, self._needs),
            web.get(SCALING_PATH, self._report),
            web.post(POOLS_PATH, self._scale),
        ]

    async def _demand(self, request: web.Request) -> web.Response:
        body = await _body(request, DEMAND_BYTES_MAX)
        try:
            demand = decode_demand(body)
        except MsgspecError as error:
            raise web.HTTPBadRequest(text=f"that is no report of a proxy: {error}") from error
        self._scaler.take(demand)
        return web.Response(status=204)

    async def _demanded(self, _request: web.Request) -> web.Response:
        body = encode_report(demand_report(self._scaler.pools.values(), self._scaler.book))
        return web.Response(body=body, content_type="application/json")

    async def _needs(self, request: web.Request) -> web.Response:
        """Take what a service of jobs has left to do."""
        body = await _body(request, NEEDS_BYTES_MAX)
        try:
            needs = _NEEDS.decode(body)
        except (MsgspecError, RecursionError) as error:
            raise web.HTTPBadRequest(text=f"that is no report of what is left: {error}") from error
        self._scaler.take_needs(needs)
        return web.Response(status=204)

    async def _report(self, _request: web.Request) -> web.Response:
        body = encode_report(self._scaler.report())
        return web.Response(body=body, content_type="application/json")

    async def _scale(self, request: web.Request) -> web.Response:
        refuse_web_pages(request)
        await request.read()  # bounded by client_max_size; nothing in it is needed
        pool_id, replicas = request.match_info["pool_id"], _replicas(request)
        try:
            self._scaler.set_replicas(pool_id, replicas)
        except KeyError as error:
            known = ", ".join(self._scaler.pools) or "none"
            raise web.HTTPNotFound(text=f"no pool '{pool_id}'; there are: {known}") from error
        except RefusedScaleError as error:
            raise web.HTTPConflict(text=str(error)) from error
        return web.json_response({"pool": pool_id, "replicas": replicas})


def demand_report(pools: Iterable[ScaledPool], book: DemandBook) -> DemandReport:
    """Return what each model is asked for, and the burst that any of its pools sees."""
    models: dict[str, ModelReport] = {}
    for pool in pools:
        if pool.pool.serves == "jobs":
            continue  # nobody asks it for anything
        scale, first = pool.pool.autoscale, pool.pool.first
        if first.serves == "jobs":  # nothing is asked of these, and nothing is spare there
            continue
        panicking = pool.decision is not None and pool.decision.panicking
        kv_target = scale.kv_target if scale is not None else 1.0
        for name in (first.model, *first.adapters):
            other = models.get(name)
            models[name] = ModelReport(
                demand=book.of(name),
                panicking=panicking or (other is not None and other.panicking),
                kv_target=min(kv_target, other.kv_target if other is not None else 1.0),
            )
    return DemandReport(proxies=book.proxies, models=models)


async def _body(request: web.Request, bytes_max: int) -> bytes:
    """Return a report's body. Those of a region may be longer than what an operator sends."""
    refuse_web_pages(request)
    body = bytearray()
    while chunk := await request.content.read(READ_BYTES):
        body += chunk
        if len(body) > bytes_max:
            raise web.HTTPRequestEntityTooLarge(bytes_max, len(body))
    return bytes(body)


def refuse_web_pages(request: web.Request) -> None:
    """Refuse what a page in an operator's browser sends: browsers name its origin, tools do not."""
    if "origin" in request.headers:
        raise web.HTTPForbidden(text="requests of web pages are not taken")


def _replicas(request: web.Request) -> int:
    text = request.query.get("replicas", "")
    if not _WHOLE.fullmatch(text) or int(text) > REPLICAS_MAX:
        raise web.HTTPBadRequest(
            text=f"replicas must be a whole number from 0 to {REPLICAS_MAX}, not '{text[:80]}'"
        )
    return int(text)
