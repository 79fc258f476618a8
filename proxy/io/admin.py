"""The admin listener: health, metrics, replicas, dry runs. On its own port: load cannot silence it.

Counters are summed over workers; what a dead worker had counted stays in the sums, as it last said,
so that no counter ever falls.
"""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import Awaitable, Callable, Iterable
from typing import Protocol

import orjson
from aiohttp import web

from proxy.contract import FleetSnapshot
from proxy.contract.view import VIEW_PATH, VIEW_WATCH_PATH, WISH_PATH
from proxy.core import limits
from proxy.errors import openai_type
from proxy.io.admin_guard import Guard, RefusedError
from proxy.io.dashboard import Dashboard, secure
from proxy.io.exposition import fleet_samples, render_metrics, sum_samples
from proxy.io.operating import Operators
from proxy.io.telemetry import Sample
from proxy.io.viewing import Viewing
from proxy.io.watching import WATCHERS_MAX, Watchers, takes_gzip


class Status(Protocol):
    """What the admin pages show; the supervisor has it."""

    def ready(self) -> str | None:
        """Return None when ready, else the reason why not."""

    def fleet(self) -> FleetSnapshot | None: ...

    def suspects(self) -> frozenset[str]: ...

    async def samples(self) -> tuple[list[Sample], list[Sample]]:
        """Return counters and gauges of all workers, unsummed."""

    async def recount(self) -> None:
        """Have the workers tell what they count."""

    def counted(self) -> tuple[list[Sample], list[Sample]]:
        """Return counters and gauges as the workers told them last."""

    async def explain(
        self, path: bytes, fields: list[tuple[bytes, bytes]], body: bytes
    ) -> tuple[int, bytes] | None:
        """Return the status and JSON of a dry run, or None when no worker says it in time."""


class _Pages:
    """The request handlers of the admin listener."""

    def __init__(
        self,
        status: Status,
        guard: Guard,
        viewing: Viewing,
        operators: Operators,
        dashboard: Dashboard,
        body_s: float,
    ) -> None:
        self._status = status
        self._body_s = body_s
        self._guard = guard
        self._viewing = viewing
        self._watchers = Watchers(viewing)
        self._operators = operators
        self.dashboard = dashboard
        self._open_paths = _OPEN_PATHS | dashboard.paths

    @web.middleware
    async def guard(
        self,
        request: web.Request,
        handler: Callable[[web.Request], Awaitable[web.StreamResponse]],
    ) -> web.StreamResponse:
        try:
            if request.path not in self._open_paths:
                self._guard.check(request)
            return await handler(request)
        except RefusedError as error:
            return _error(error.status, error.code, error.message)
        except web.HTTPException as error:
            return _error(error.status, "admin", error.reason)

    async def live(self, _: web.Request) -> web.Response:
        return web.json_response({"status": "alive"})

    async def ready(self, _: web.Request) -> web.Response:
        reason = self._status.ready()
        if reason is None:
            return web.json_response({"status": "ready"})
        return _error(503, "not_ready", reason)

    async def metrics(self, request: web.Request) -> web.Response:
        counters, gauges = await self._status.samples()
        gauges = [*gauges, *fleet_samples(self._status.fleet())]
        gauges.append(Sample("ready", (), float(self._status.ready() is None)))
        page, kind = render_metrics(counters, gauges, request.headers.get("Accept", ""))
        return web.Response(body=page, headers={"Content-Type": kind})

    async def replicas(self, _: web.Request) -> web.Response:
        await self._status.recount()
        _counters, gauges = self._status.counted()  # the lateness stays for /metrics to tell
        page = replicas_page(self._status.fleet(), self._status.suspects(), gauges)
        return web.Response(body=page, content_type="application/json")

    async def route(self, request: web.Request) -> web.Response:
        """Say what would be done with the request in the body, and why."""
        path = request.query.get("path", "/v1/chat/completions").encode("utf-8", "surrogateescape")
        fields = [(name.lower(), value) for name, value in request.raw_headers]
        told = [field for field in fields if field[0] not in _ADMINS_OWN]
        try:
            async with asyncio.timeout(self._body_s):
                body = await request.read()
        except TimeoutError as error:
            raise RefusedError(
                408, "request_timeout", "the rest of the body did not come"
            ) from error
        except web.RequestPayloadError as error:
            words = "the body is not packed as its Content-Encoding says"
            raise RefusedError(400, "bad_encoding", words) from error
        explained = await self._status.explain(path, told, body)
        if explained is None:
            return _error(503, "not_explained", "no worker could say it in time")
        status, body = explained
        return web.Response(status=status, body=body, content_type="application/json")

    async def view(self, request: web.Request) -> web.Response:
        body = await self._viewing.newest()
        headers = {"Cache-Control": "no-store", "Vary": "Accept-Encoding"}
        if takes_gzip(request.headers.get("Accept-Encoding", "")):
            headers["Content-Encoding"] = "gzip"
            body = gzip.compress(body, 1, mtime=0)
        return web.Response(body=body, content_type="application/json", headers=headers)

    async def watch(self, request: web.Request) -> web.StreamResponse:
        if self._watchers.full:
            raise RefusedError(
                *(503, "too_many_watchers"),
                f"{WATCHERS_MAX} watch already; close a page, or ask for {VIEW_PATH} now and then",
            )
        return await self._watchers.answer(request)

    async def wish(self, request: web.Request) -> web.Response:
        self._guard.check_wish()
        answer = await self._operators.answer(request)
        self._viewing.hurry()
        return answer

    async def end(self, _: web.Application) -> None:
        """Let watchers go, so that the listener can close."""
        self._viewing.close()


def make_app(
    status: Status,
    guard: Guard,
    viewing: Viewing,
    operators: Operators,
    dashboard: Dashboard | None = None,
    *,
    body_s: float = limits.BODY_IDLE_TIMEOUT_S,
) -> web.Application:
    """Return the admin application. Health and the page's files are open; `guard` has the rest."""
    pages = _Pages(status, guard, viewing, operators, dashboard or Dashboard(), body_s)
    app = web.Application(middlewares=[pages.guard], client_max_size=limits.EXPLAINED_BYTES_MAX)
    for path in _LIVE_PATHS:
        app.router.add_get(path, pages.live)
    for path in _READY_PATHS:
        app.router.add_get(path, pages.ready)
    app.router.add_get("/metrics", pages.metrics)
    app.router.add_get("/replicas", pages.replicas)
    app.router.add_post("/debug/route", pages.route)
    app.router.add_get(VIEW_PATH, pages.view)
    app.router.add_get(VIEW_WATCH_PATH, pages.watch, allow_head=False)
    app.router.add_post(WISH_PATH, pages.wish)
    for path in pages.dashboard.paths:
        app.router.add_get(path, pages.dashboard.serve)
    app.on_response_prepare.append(secure)
    app.on_shutdown.append(pages.end)
    return app


# What load balancers and orchestrators ask for, under all the names that they have for it.
_LIVE_PATHS = ("/livez", "/live", "/liveness", "/health", "/healthz")
_READY_PATHS = ("/readyz", "/ready", "/readiness")
# Fields of a request to be explained that are about the admin's own request.
_ADMINS_OWN = frozenset(
    (
        *(b"authorization", b"connection", b"content-encoding", b"content-length", b"expect"),
        *(b"host", b"transfer-encoding"),
    )
)
_OPEN_PATHS = frozenset(_LIVE_PATHS + _READY_PATHS)


def replicas_page(
    fleet: FleetSnapshot | None, suspects: frozenset[str], gauges: Iterable[Sample]
) -> bytes:
    """Return the replicas with what the manager and what the workers know of them."""
    summed = {(s.name, s.labels): s.value for s in sum_samples(gauges)}
    page = []
    for record in fleet.replicas if fleet else ():
        by = (("replica", record.replica_id),)
        by_events = (*by, ("source", "events"))
        load = record.load
        page.append(
            {
                "replica_id": record.replica_id,
                "url": record.url,
                "models": record.models,
                "pool": record.pool,
                "region": record.region,
                "engine": record.engine,
                "dp_size": record.dp_size,
                "adapters": record.adapters,
                "asleep": record.asleep,
                "state": str(record.state),
                "reason": record.reason,
                "suspect": record.replica_id in suspects,
                "inflight": int(summed.get(("replica_inflight", by), 0)),
                "queued_tokens": int(summed.get(("replica_queued_tokens", by), 0)),
                "wait_s": round(summed.get(("replica_wait_seconds", by), 0.0), 6),
                "decoding": round(summed.get(("replica_decoding", by), 0.0), 3),
                "prefill_tokens_per_second": round(
                    summed.get(("replica_prefill_tokens_per_second", by), 0.0), 1
                ),
                "cache_tokens": int(summed.get(("replica_cache_tokens", by), 0)),
                "cache_source": "events"
                if ("replica_cache_source", by_events) in summed
                else "record",
                "cache_source_age_s": summed.get(("replica_cache_source_age_seconds", by)),
                "running": load.running if load else None,
                "waiting": load.waiting if load else None,
                "kv_used_ratio": load.kv_used_ratio if load else None,
            }
        )
    return orjson.dumps({"replicas": page}, option=orjson.OPT_INDENT_2)


def _error(status: int, code: str, message: str) -> web.Response:
    error = {"message": message, "type": openai_type(status), "param": None, "code": code}
    return web.json_response({"error": error}, status=status)
