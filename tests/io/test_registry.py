"""Where the fleet comes from: a static list that is asked, or a manager's watch that breaks."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable

import aiohttp
import pytest

from proxy.contract import (
    FLEET_WATCH_PATH,
    FleetSnapshot,
    PoolRecord,
    ReplicaRecord,
    ReplicaState,
    encode_snapshot,
)
from proxy.contract.engines import Listing
from proxy.contract.keys import KEYS_WATCH_PATH
from proxy.io import newest_lines, registry
from proxy.io.registry import ManagerWatch, StaticList
from tests.fakes.engine import Connection, ScriptedEngine
from tests.fakes.plane import chat_request, until
from tests.fakes.proxy_process import ProxyProcess
from tests.fakes.talk import ask

NO_KEYS = b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
WATCH_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/x-ndjson\r\n\r\n"


def line(version: int, *ids: str, epoch: str = "e1", url: str = "http://127.0.0.1:9") -> bytes:
    records = tuple(ReplicaRecord(replica_id=name, url=url, models=("m",)) for name in ids)
    snapshot = FleetSnapshot(epoch=epoch, version=version, replicas=records)
    return encode_snapshot(snapshot) + b"\n"


class ScriptedManager:
    """Answers each watch with the next script; the last one serves all that follow."""

    def __init__(self, *scripts: Callable[[Connection], Awaitable[None]]) -> None:
        self._scripts = scripts
        self.watches = 0
        self.paths: list[str] = []
        self.url = ""
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.open: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> ScriptedManager:  # noqa: PYI034 - as it is used
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.die()

    async def die(self) -> None:
        if self._server is not None:
            self._server.close()
            for writer in list(self.open):
                writer.transport.abort()
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await self._server.wait_closed()
            self._server = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.open.add(writer)
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            self.paths.append(head.split(b" ")[1].decode())
            if self.paths[-1] == KEYS_WATCH_PATH:
                writer.write(NO_KEYS)
                return
            script = self._scripts[min(self.watches, len(self._scripts) - 1)]
            self.watches += 1
            await script(Connection(writer))
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # cancelled by `die`, and by nobody else
        finally:
            self._tasks.discard(task)
            self.open.discard(writer)
            writer.transport.abort()


def says(
    *lines: bytes, then: asyncio.Event | None = None
) -> Callable[[Connection], Awaitable[None]]:
    """Send lines, then keep the watch open until `then` is set."""

    async def script(connection: Connection) -> None:
        await connection.send(WATCH_HEAD)
        for octets in lines:
            await connection.send(octets)
            await asyncio.sleep(0.001)
        await (then or asyncio.Event()).wait()

    return script


@contextlib.asynccontextmanager
async def watching(manager: ScriptedManager) -> AsyncIterator[list[FleetSnapshot]]:
    seen: list[FleetSnapshot] = []
    async with aiohttp.ClientSession() as session:
        watch = ManagerWatch(manager.url, session)
        task = asyncio.get_running_loop().create_task(watch.run(seen.append))
        try:
            yield seen
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


def ids(snapshot: FleetSnapshot) -> str:
    return "".join(record.replica_id for record in snapshot.replicas)


async def test_snapshots_come_as_they_are_sent() -> None:
    change = asyncio.Event()

    async def script(connection: Connection) -> None:
        whole = line(1, "a")
        await connection.send(WATCH_HEAD + whole[:20])
        await asyncio.sleep(0.002)
        await connection.send(whole[20:] + b"\n\n")
        await change.wait()
        await connection.send(line(2, "a", "b") + line(3, "a", "b", "c") + b"\n")
        await asyncio.Event().wait()

    async with ScriptedManager(script) as manager, watching(manager) as seen:
        await until(lambda: len(seen) == 1)
        assert ids(seen[0]) == "a"
        change.set()
        await until(lambda: len(seen) == 2)
        assert ids(seen[1]) == "abc"  # of several at once only the last is news
        assert manager.paths == [FLEET_WATCH_PATH]


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param(b"{not json}\n", id="garbage"),
        pytest.param(b'{"epoch":1}\n', id="another shape"),
        pytest.param(b'"\xff"\n', id="not UTF-8"),
        pytest.param(b"", id="the end"),
    ],
)
async def test_a_watch_that_breaks_is_taken_up_again(
    broken: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    ended = asyncio.Event()
    ended.set()
    scripts = says(line(1, "a"), broken, then=ended), says(line(1, "b", epoch="e2"))
    async with ScriptedManager(*scripts) as manager, watching(manager) as seen:
        await until(lambda: len(seen) == 2)
        assert [ids(snapshot) for snapshot in seen] == ["a", "b"]
        assert manager.watches == 2
    assert caplog.text.count("manager lost") == 1
    assert caplog.text.count("the manager is back") == 1


async def test_an_error_status_is_no_fleet() -> None:
    async def refuse(connection: Connection) -> None:
        await connection.send(b"HTTP/1.1 503 No\r\ncontent-length: 0\r\n\r\n")

    async with ScriptedManager(refuse, says(line(1, "a"))) as manager, watching(manager) as seen:
        await until(lambda: bool(seen))
        assert [ids(snapshot) for snapshot in seen] == ["a"]


async def test_a_silent_manager_is_asked_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heartbeats keep a watch; without them the connection may be dead on the other side."""
    monkeypatch.setattr(newest_lines, "HEARTBEAT_INTERVAL_S", 0.03)
    beats = 0

    async def beating(connection: Connection) -> None:
        nonlocal beats
        await connection.send(WATCH_HEAD + line(1, "a"))
        for beats in range(1, 11):  # noqa: B007 - counted for the test
            await asyncio.sleep(0.02)
            await connection.send(b"\n")
        await asyncio.Event().wait()

    async with ScriptedManager(beating, says(line(2, "b"))) as manager, watching(manager) as seen:
        await until(lambda: len(seen) == 2)
        assert beats == 10
        assert manager.watches == 2


async def test_a_snapshot_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "SNAPSHOT_BYTES_MAX", 1000)
    scripts = says(line(1, "a"), b"x" * 2000), says(line(1, "b"))
    async with ScriptedManager(*scripts) as manager, watching(manager) as seen:
        await until(lambda: len(seen) == 2)
        assert ids(seen[1]) == "b"


async def test_requests_go_on_when_the_manager_dies() -> None:
    async with (
        ScriptedEngine() as engine,
        ScriptedManager(says(line(1, "r1", url=engine.url))) as manager,
        ProxyProcess("--manager-url", manager.url, "--workers", "2") as proxy,
    ):
        while (await proxy.admin("/readyz")).status != 200:
            await asyncio.sleep(0.005)
        assert (await ask(proxy.port, chat_request())).status == 200
        await manager.die()
        await proxy.until_said("manager lost")
        for _ in range(8):
            assert (await ask(proxy.port, chat_request())).status == 200
        assert (await proxy.admin("/readyz")).status == 200
        assert list(await proxy.replicas()) == ["r1"]


async def test_a_region_without_pools_for_requests_is_ready_where_jobs_are_served() -> None:
    pools = (PoolRecord(model="m", pool="m"),)
    snapshot = FleetSnapshot(epoch="e", version=2, pools=pools)
    release = asyncio.Event()

    async def tell(connection: Connection) -> None:
        await connection.send(WATCH_HEAD + line(1))
        await release.wait()
        await connection.send(encode_snapshot(snapshot) + b"\n")
        await asyncio.Event().wait()

    async with (
        ScriptedManager(tell) as manager,
        ProxyProcess(
            *("--manager-url", manager.url, "--offline-url", "http://127.0.0.1:9")
        ) as proxy,
    ):
        while (await proxy.admin("/readyz")).status != 200:
            await asyncio.sleep(0.005)
        release.set()
        while (await proxy.admin("/readyz")).status != 503:
            await asyncio.sleep(0.005)


async def test_a_record_that_cannot_be_reached_does_not_spoil_the_others() -> None:
    async with ScriptedEngine() as engine:
        good, bad = (
            ReplicaRecord(replica_id="good", url=engine.url, models=("m",)),
            ReplicaRecord(replica_id="bad", url="unix:/run/engine", models=("m",)),
        )
        whole = encode_snapshot(FleetSnapshot(epoch="e", version=1, replicas=(bad, good))) + b"\n"
        async with (
            ScriptedManager(says(whole)) as manager,
            ProxyProcess("--manager-url", manager.url) as proxy,
        ):
            await proxy.until_said("replica bad is left out: .*unix:/run/engine")
            while (await proxy.admin("/readyz")).status != 200:
                await asyncio.sleep(0.005)
            assert (await ask(proxy.port, chat_request())).status == 200


# --- a static list -------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def listing(*urls: str, key: str | None = None) -> AsyncIterator[list[FleetSnapshot]]:
    seen: list[FleetSnapshot] = []
    async with aiohttp.ClientSession() as session:
        run = StaticList(urls, session, key).run(seen.append)
        task = asyncio.get_running_loop().create_task(run)
        try:
            yield seen
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


def ready(snapshot: FleetSnapshot) -> dict[str, tuple[str, ...]]:
    return {
        record.replica_id: record.models
        for record in snapshot.replicas
        if record.state is ReplicaState.READY
    }


async def test_a_listed_engine_is_ready_once_it_has_said_what_it_serves() -> None:
    async with ScriptedEngine(models=("b", "a")) as up, ScriptedEngine() as later:
        port = later.port
        await later.stop()
        async with listing(up.url, later.url + "/") as seen:
            await until(lambda: bool(seen) and bool(ready(seen[-1])))
            assert not ready(seen[0])
            assert ready(seen[-1]) == {f"127.0.0.1:{up.port}": ("a", "b")}
            async with ScriptedEngine(models=("c",)) as again:
                await again.stop()
                again.port = port
                await again.__aenter__()
                await until(lambda: len(ready(seen[-1])) == 2)
                assert ready(seen[-1])[f"127.0.0.1:{port}"] == ("c",)
        versions = [snapshot.version for snapshot in seen]
        assert versions == sorted(set(versions))


@pytest.mark.parametrize(
    ("pieces", "models"),
    [
        pytest.param(
            [
                b"HTTP/1.1 200 OK\r\ncontent-length: 29\r\n\r\n",
                b'{"data":[{"id"',
                b':"m","x":1}]}  ',
            ],
            ("m",),
            id="in pieces",
        ),
        pytest.param([b"HTTP/1.1 404 No\r\ncontent-length: 0\r\n\r\n"], (), id="no such page"),
    ],
)
async def test_a_model_list_may_come_in_pieces_or_not_at_all(
    pieces: list[bytes], models: tuple[str, ...]
) -> None:
    async def script(connection: Connection) -> None:
        for piece in pieces:
            await connection.send(piece)
            await asyncio.sleep(0.005)
        await asyncio.Event().wait()

    async with ScriptedManager(script) as engine, listing(engine.url) as seen:
        await until(lambda: bool(seen) and bool(ready(seen[-1])))
        assert list(ready(seen[-1]).values()) == [models]
        assert engine.paths == ["/v1/models"]


async def test_what_shows_no_load_is_asked_for_its_models_whenever_that_is_due(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loop, turn = asyncio.get_running_loop(), asyncio.sleep
    now_s = loop.time()
    asked_s: list[float] = []

    async def pass_by(seconds: float) -> None:
        nonlocal now_s
        now_s += seconds
        await turn(0)

    async def answer(_list: StaticList, _url: str) -> Listing:
        asked_s.append(now_s)
        await pass_by(0.01)
        return Listing(("m",), None, "vllm")

    monkeypatch.setattr(loop, "time", lambda: now_s)
    monkeypatch.setattr(asyncio, "sleep", pass_by)
    monkeypatch.setattr(StaticList, "_list", answer)
    async with aiohttp.ClientSession() as session:
        seen: list[FleetSnapshot] = []
        task = loop.create_task(StaticList(["http://a:1"], session, None).run(seen.append))
        while len(asked_s) < 9:
            await turn(0)
        task.cancel()
    gaps_s = [after - before for before, after in itertools.pairwise(asked_s)]
    assert gaps_s == pytest.approx([registry.MODELS_REFRESH_S + 0.01] * 8)
