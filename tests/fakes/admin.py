"""The admin listener on a real socket in this process, over a fleet that a test says."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import orjson
from aiohttp import web
from typing_extensions import override

from proxy.contract import FleetSnapshot, ReplicaRecord
from proxy.contract.regions import RemoteState
from proxy.contract.view import ProxyView
from proxy.core import limits
from proxy.io.admin import make_app
from proxy.io.admin_door import admin_runner
from proxy.io.admin_guard import Guard
from proxy.io.control import HotPrefix
from proxy.io.dashboard import Dashboard
from proxy.io.operating import Operators
from proxy.io.scaling_news import ScalingNews
from proxy.io.tasks import Tasks
from proxy.io.telemetry import Sample
from proxy.io.viewing import Viewing
from proxy.roster import Roster
from tests.fakes.plane import Answer
from tests.fakes.talk import ask


class Standing:
    """What the supervisor has, with nothing behind it but a roster."""

    def __init__(self, *replica_ids: str, manager_url: str | None = None) -> None:
        self.roster = Roster()
        self.manager = manager_url
        replicas = tuple(ReplicaRecord(replica_id=name, url="http://a:1") for name in replica_ids)
        self.roster.take(FleetSnapshot(epoch="static", version=1, replicas=replicas))
        self.counters: list[Sample] = []
        self.gauges: list[Sample] = []
        self.states: list[RemoteState] = []
        self.prefixes: list[HotPrefix] = []
        self.recounts = 0

    def ready(self) -> str | None:
        return None

    def fleet(self) -> FleetSnapshot | None:
        return self.roster.fleet

    def suspects(self) -> frozenset[str]:
        return frozenset()

    def manager_url(self) -> str | None:
        return self.manager

    def held(self) -> frozenset[str]:
        return self.roster.held

    def hold(self, held: frozenset[str]) -> None:
        self.roster.hold(held)

    def remotes(self) -> list[RemoteState]:
        return self.states

    def proxy(self) -> ProxyView:
        return ProxyView(version="1", policy="prefix", region="here", workers=1)

    def take_lag_s(self) -> float:
        return 0.0

    def hot(self) -> list[HotPrefix]:
        return self.prefixes

    async def recount(self) -> None:
        self.recounts += 1

    def counted(self) -> tuple[list[Sample], list[Sample]]:
        return self.counters, self.gauges

    async def samples(self) -> tuple[list[Sample], list[Sample]]:
        return self.counters, self.gauges

    async def explain(
        self, path: bytes, fields: list[tuple[bytes, bytes]], body: bytes
    ) -> tuple[int, bytes] | None:
        return 200, orjson.dumps({"path": path.decode()})


class ViewsByHand(Viewing):
    """Views that a test tells."""

    def tell(self, body: bytes) -> None:
        self.body = body
        self.number += 1
        self._news.set()
        self._news.clear()

    @override
    async def newest(self) -> bytes:
        return self.body


class Admin:
    """The listener."""

    def __init__(self, standing: Standing, viewing: Viewing, port: int) -> None:
        self.standing = standing
        self.viewing = viewing
        self.port = port

    async def get(self, path: str, *fields: str) -> Answer:
        head = "".join(f"{field}\r\n" for field in fields or ("host: localhost",))
        return await ask(self.port, f"GET {path} HTTP/1.1\r\n{head}\r\n".encode(), "GET")

    async def post(self, path: str, *fields: str) -> Answer:
        return await post(self.port, path, *fields)


@asynccontextmanager
async def admin(
    standing: Standing,
    *,
    key: str | None = None,
    local: bool = True,
    by_hand: bool = False,
    dashboard: Dashboard | None = None,
    patience_s: float = limits.CLIENT_KEEP_ALIVE_S,
) -> AsyncIterator[Admin]:
    """Serve it; `by_hand`: its views are those that the test tells. `patience_s`: for the rest of
    heads and bodies.
    """
    tasks = Tasks()
    async with aiohttp.ClientSession() as session:
        kind = ViewsByHand if by_hand else Viewing
        scaling = ScalingNews(lambda: session, standing.manager_url)
        viewing = kind(standing, scaling, tasks)
        operators = Operators(standing, lambda: session)
        guard = Guard(key, local=local)
        app = make_app(standing, guard, viewing, operators, dashboard, body_s=patience_s)
        runner = admin_runner(app, patience_s=patience_s)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            yield Admin(standing, viewing, runner.addresses[0][1])
        finally:
            await runner.cleanup()
            await tasks.close()


async def post(port: int, path: str, *fields: str) -> Answer:
    """POST without a body."""
    head = "".join(f"{field}\r\n" for field in fields or ("host: localhost",))
    return await ask(port, f"POST {path} HTTP/1.1\r\n{head}content-length: 0\r\n\r\n".encode())


def error_of(answer: Answer) -> dict[str, str]:
    """Return the error in a body of OpenAI's shape."""
    error: dict[str, str] = orjson.loads(answer.body)["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error
