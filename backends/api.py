"""The manager's API: the fleet for the proxies, health and metrics, the wishes of operators.

It has no key and listens on loopback by default. A web page that the operator happens to visit
could still send it a POST; browsers put an `Origin` on every such request, and no tool does, so a
POST with one is refused.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

import msgspec
import orjson
from aiohttp import web

from backends import manager_metrics, targets
from backends.autoscale import Autoscaler
from backends.exposition import answer
from backends.feed import Feed
from backends.keeper import Keeper
from backends.keys.api import KeysApi
from backends.keys.feed import KeyFeed
from backends.ladder import Rung
from backends.lifecycle import Event
from backends.notices import Reclaims
from backends.reclaim_api import ReclaimApi
from backends.scaling_api import ScalingApi, refuse_web_pages
from backends.turns import RefusedError
from backends.watches import Watches
from proxy.contract import FLEET_PATH, FLEET_WATCH_PATH, HELD_REASON

REPLICA_PATH = "/v1/replicas/{replica_id}"
BODY_BYTES_MAX = 16 * 1024

_WISHES = {
    "drain": (Event.HOLD, HELD_REASON),
    "undrain": (Event.RELEASE, ""),
    "restart": (Event.RESTART, "restarted by an operator"),
}
_TURNS = ("sleep", "wake", "snapshot")


class Source(Protocol):
    """What the API tells of."""

    @property
    def keepers(self) -> Mapping[str, Keeper]: ...

    @property
    def feed(self) -> Feed: ...

    @property
    def scaler(self) -> Autoscaler: ...

    @property
    def reclaims(self) -> Reclaims: ...

    @property
    def serving(self) -> bool: ...


class Api:
    """The handlers, and the watchers that they serve."""

    def __init__(
        self, source: Source, keys: KeyFeed | None = None, peer_key: str | None = None
    ) -> None:
        """`keys` is None where no keys are told from here; else they are, to who has `peer_key`."""
        self._source = source
        self._scaling = ScalingApi(source.scaler)
        self._reclaim = ReclaimApi(source.reclaims)
        self._keys = KeysApi(keys, peer_key)
        self._watches = Watches()

    def application(self) -> web.Application:
        app = web.Application(client_max_size=BODY_BYTES_MAX, middlewares=[answer_errors])
        app.add_routes(
            [
                web.get(FLEET_PATH, self._fleet),
                web.get(FLEET_WATCH_PATH, self._watch),
                web.get("/livez", self._live),
                web.get("/readyz", self._ready),
                web.get("/metrics", self._metrics),
                web.get(targets.TARGETS_PATH, self._targets),
                web.get(REPLICA_PATH, self._replica),
                web.post(REPLICA_PATH + "/{wish}", self._wish),
                *self._scaling.routes(),
                *self._reclaim.routes(),
                *self._keys.routes(),
            ]
        )
        return app

    def end_watches(self) -> None:
        """Let the watchers go, so that the listener can close."""
        self._watches.end()
        self._keys.end_watches()

    async def _live(self, _request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _ready(self, _request: web.Request) -> web.Response:
        if not self._source.serving:
            return web.Response(status=503, text="not serving\n")
        return web.Response(text="ok\n")

    async def _metrics(self, request: web.Request) -> web.Response:
        return answer(request, manager_metrics.collect(self._source, len(self._watches)))

    async def _targets(self, request: web.Request) -> web.Response:
        """Tell Prometheus where engines are to be scraped: its HTTP service discovery."""
        snapshot = self._source.feed.snapshot
        groups = targets.groups_of((*snapshot.replicas, *snapshot.workers))
        return web.json_response(groups)

    async def _fleet(self, _request: web.Request) -> web.Response:
        return web.Response(body=self._source.feed.line, content_type="application/json")

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        return await self._watches.answer(request, self._source.feed)

    async def _wish(self, request: web.Request) -> web.Response:
        refuse_web_pages(request)
        await request.read()  # bounded by client_max_size; nothing in it is needed
        wish = request.match_info["wish"]
        if wish not in _WISHES and wish not in _TURNS:
            known = ", ".join([*_WISHES, *_TURNS])
            raise web.HTTPNotFound(text=f"no such action; there are {known}")
        keeper = self._keeper(request)
        if wish != "restart" and keeper.questions.gives_back:
            words = "it is an engine worker: it takes no requests and does not rest; it can be "
            words += "restarted, and its pool scaled"
            raise web.HTTPConflict(text=f"{keeper.spec.replica_id}: {words}")
        try:
            if wish == "sleep":
                keeper.lower(_rung(request), "going down, as an operator asked", _level(request))
            elif wish == "wake":
                keeper.raise_("woken by an operator")
            elif wish == "snapshot":
                keeper.pose("an image of it is made, as an operator asked")
            else:
                keeper.apply(*_WISHES[wish])
        except RefusedError as error:
            raise web.HTTPConflict(text=f"{keeper.spec.replica_id}: {error}") from error
        record = keeper.record()
        return web.json_response({"replica_id": record.replica_id, "state": record.state.value})

    async def _replica(self, request: web.Request) -> web.Response:
        """Tell of one replica as it is now; the fleet is told of changes a moment later."""
        keeper = self._keeper(request)
        told = msgspec.to_builtins(keeper.record()) | {"phase": keeper.state.phase.value}
        told["image"] = msgspec.to_builtins(keeper.images.progress)
        return web.json_response(told)

    def _keeper(self, request: web.Request) -> Keeper:
        replica_id = request.match_info["replica_id"]
        keeper = self._source.keepers.get(replica_id)
        if keeper is None:
            raise web.HTTPNotFound(
                text=f"no replica '{replica_id}'; `doherty status` and GET {FLEET_PATH} list them"
            )
        return keeper


def _rung(request: web.Request) -> Rung:
    text = request.query.get("rung", Rung.ASLEEP.value)
    if text not in {Rung.ASLEEP, Rung.SUSPENDED}:
        raise web.HTTPBadRequest(text=f"rung={text}: use {Rung.ASLEEP} or {Rung.SUSPENDED}")
    return Rung(text)


def _level(request: web.Request) -> int | None:
    text = request.query.get("level")
    if text not in {None, "1", "2"}:
        raise web.HTTPBadRequest(text=f"no sleep level '{text}'; there are 1 and 2")
    return int(text) if text else None


@web.middleware
async def answer_errors(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Give every refusal the shape of an OpenAI error."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        text = error.text or error.reason
        kind = "invalid_request_error" if error.status < 500 else "server_error"
        problem = {"message": text, "type": kind, "param": None, "code": _word(error.reason)}
        headers = {k: v for k, v in error.headers.items() if k.lower() == "allow"}
        return web.Response(
            status=error.status,
            body=orjson.dumps({"error": problem}),
            content_type="application/json",
            headers=headers,
        )


def _word(reason: str) -> str:
    return reason.lower().replace(" ", "_")
