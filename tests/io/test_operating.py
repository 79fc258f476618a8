"""Replicas drained and brought back by operators: by a manager, and without one."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import orjson
import pytest
from aiohttp import web

from proxy import takeover
from proxy.io.operating import shown_url
from proxy.io.telemetry import Sample
from proxy.listeners import Listeners
from tests.fakes.admin import Standing, admin, error_of, post
from tests.fakes.engine import ScriptedEngine
from tests.fakes.plane import chat_request
from tests.fakes.proxy_process import ProxyProcess
from tests.fakes.talk import Talk, ask
from tests.io.test_supervisor import HeldStreams, opened
from tests.io.test_view import view_of


async def test_a_drained_replica_finishes_its_stream_and_is_sent_nothing_until_undrained(
    tmp_path: Path,
) -> None:
    config = tmp_path / "doherty.yaml"
    async with ScriptedEngine() as one, ScriptedEngine() as two:
        config.write_text(f"proxy:\n  worker_urls: ['{one.url}', '{two.url}']\n  workers: 2\n")
        async with ProxyProcess("--config", str(config)) as proxy:
            held = HeldStreams()
            one.script = two.script = held.script
            async with opened(proxy.port, 6) as talks:
                replica_id = one.url.removeprefix("http://")
                path = f"/replicas/{replica_id}"
                granted = await post(
                    proxy.admin_port, f"{path}/drain", "host: localhost", "x-request-id: q1"
                )
                assert orjson.loads(granted.body) == {
                    "replica_id": replica_id,
                    "state": "draining",
                    "held": True,
                }
                await proxy.until_said(rf"drain of replica '{replica_id}', asked by 127.0.0.1.*q1")
                seen = len(one.requests)
                # It survives a reload and an upgrade, and everybody is told.
                config.write_text(config.read_text() + "  max_payload_size: 4000000\n")
                await proxy.until_said("reloaded")
                async with Talk(proxy.admin_port) as watcher, Talk(proxy.admin_port) as scraper:
                    await watcher.send(b"GET /view/watch HTTP/1.1\r\nhost: localhost\r\n\r\n")
                    await watcher.read_until(b"event: view")
                    await scraper.send(b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n")
                    assert (await scraper.answer("GET")).status == 200
                    await proxy.upgrade()
                    # The one that leaves has streams to finish, and is asked nothing meanwhile.
                    await watcher.read_to_end()
                    assert watcher.received.endswith(b"\r\n0\r\n\r\n")
                    assert await scraper.read_to_end() == b""
                    assert len(talks) == 6
                shown = (await proxy.replicas())[replica_id]
                assert (shown["state"], shown["reason"]) == ("draining", "drained by an operator")
                by_id = {entry.replica_id: entry for entry in (await view_of(proxy)).replicas}
                assert by_id[replica_id].held
                held.release.set()
                for talk in talks:
                    assert (await talk.read_to_end()).endswith(b"0\r\n\r\n")
            for _ in range(12):
                assert (await ask(proxy.port, chat_request())).status == 200
            assert len(one.requests) == seen
            assert (await post(proxy.admin_port, f"{path}/undrain")).status == 200
            while len(one.requests) == seen:
                assert (await ask(proxy.port, chat_request())).status == 200
            assert not any(entry.held for entry in (await view_of(proxy)).replicas)


async def test_what_is_held_is_handed_over_as_far_as_it_fits(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for count in (3, 1000):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            ours.setblocking(False)
            held = frozenset(f"10.0.0.1:{30000 + number}" for number in range(count))
            await takeover._send(ours, Listeners([], [], frozenset(), held))
            got = takeover.Predecessor(theirs).receive().held
        assert got == held if count == 3 else 100 < len(got) < count
        assert got <= held
        assert ("drain it again" in caplog.text) == (count == 1000)


# --- by a manager --------------------------------------------------------------------------------


class FakeManager:
    """A manager's wishes and nothing else: what it is asked, and what it answers."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.status = 200
        self.body: object = {"replica_id": "a", "state": "draining"}
        self.url = ""

    async def wish(self, request: web.Request) -> web.Response:
        assert "Origin" not in request.headers
        self.asked.append(request.rel_url.raw_path)
        return web.json_response(self.body, status=self.status)


@asynccontextmanager
async def managed() -> AsyncIterator[FakeManager]:
    manager = FakeManager()
    app = web.Application()
    app.router.add_post("/v1/replicas/{replica_id}/{wish}", manager.wish)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    manager.url = "http://{}:{}".format(*runner.addresses[0][:2])
    try:
        yield manager
    finally:
        await runner.cleanup()


async def test_a_manager_is_asked_where_there_is_one() -> None:
    async with (
        managed() as manager,
        admin(Standing("a", manager_url=f"{manager.url}/")) as listener,
    ):
        granted = await listener.post("/replicas/a%3A1/drain")
        assert orjson.loads(granted.body) == {"replica_id": "a", "state": "draining", "held": True}
        granted = await listener.post("/replicas/a%2F..%2Fb/undrain")
        assert not orjson.loads(granted.body)["held"]
        assert manager.asked == ["/v1/replicas/a%3A1/drain", "/v1/replicas/a%2F..%2Fb/undrain"]
        assert (await listener.post("/replicas/%2E%2E/drain")).status == 404
        assert len(manager.asked) == 2
        assert not listener.standing.held()  # the manager remembers, and nobody else


@pytest.mark.parametrize(
    ("status", "body", "expected", "words"),
    [
        (404, {}, (404, "unknown_replica"), "there are a"),
        (409, {"error": {"message": "it is a worker"}}, (409, "refused_by_manager"), "a worker"),
        (500, "nonsense", (502, "manager_failed"), "answers 500"),
        (200, ["no record"], (502, "manager_failed"), "answers 200"),
    ],
)
async def test_what_a_manager_refuses_is_passed_on_in_words(
    status: int, body: object, expected: tuple[int, str], words: str
) -> None:
    async with managed() as manager, admin(Standing("a", manager_url=manager.url)) as listener:
        manager.status, manager.body = status, body
        answer = await listener.post("/replicas/b/undrain")
        assert (answer.status, error_of(answer)["code"]) == expected
        assert words in error_of(answer)["message"]


async def test_a_manager_is_heard_to_the_end_however_its_answer_is_cut() -> None:
    body = b'{"replica_id":"a","state":"draining"}'

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body))
        for at in range(len(body)):
            writer.write(body[at : at + 1])
            await writer.drain()
            await asyncio.sleep(0.001)
        writer.close()
        await writer.wait_closed()
        answered.set()

    answered = asyncio.Event()
    manager = await asyncio.start_server(answer, "127.0.0.1", 0)
    url = "http://{}:{}".format(*manager.sockets[0].getsockname())
    async with manager, admin(Standing("a", manager_url=url)) as listener:
        assert (await listener.post("/replicas/a/drain")).status == 200
        await answered.wait()


async def test_a_manager_that_is_gone_is_said_to_be() -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    async with admin(Standing("a", manager_url=f"http://127.0.0.1:{port}")) as listener:
        answer = await listener.post("/replicas/a/drain")
        assert (answer.status, error_of(answer)["code"]) == (503, "manager_unreachable")
        assert f":{port} does not answer" in error_of(answer)["message"]


async def test_a_manager_is_named_without_the_secret_in_its_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    secret = f"http://user:hush@127.0.0.1:{port}"
    async with admin(Standing("a", manager_url=secret)) as listener:
        answer = await listener.post("/replicas/a/drain")
        assert b"hush" not in answer.body
        assert f"http://127.0.0.1:{port} " in error_of(answer)["message"]
    for odd in ("http://u:hush@[", "http://u:hush@h:x"):
        assert "hush" not in shown_url(odd)


# --- without one ---------------------------------------------------------------------------------


async def test_what_cannot_be_granted_is_refused_in_words(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "doherty.admin")
    many = [f"replica-{number}" for number in range(20)]
    async with admin(Standing(*many)) as listener:
        answer = await listener.post("/replicas/nobody/drain")
        error = error_of(answer)
        assert (answer.status, error["code"]) == (404, "unknown_replica")
        assert error["type"] == "not_found_error"
        assert "'nobody'; there are replica-0, " in error["message"]
        assert len(error["message"]) < 200
        assert (await listener.post("/replicas/replica-1/explode")).status == 404
        # A line of the log is one line, whatever the name and whatever the request's.
        named = "host: localhost", "x-request-id: a b\t{}"
        assert (await listener.post("/replicas/x%0d%0a2026%20forged/drain", *named)).status == 404
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 3
    assert not any("\n" in line or "a b" in line for line in said)
    assert r"'x\r\n2026 forged' refused (unknown_replica), asked by 127.0.0.1" in said[2]


async def test_who_asks_for_replicas_takes_no_lateness_from_the_metrics() -> None:
    class Counting(Standing):
        async def samples(self) -> tuple[list[Sample], list[Sample]]:
            raise AssertionError("these are for /metrics: reading them begins the lateness anew")

    standing = Counting("a")
    standing.gauges = [Sample("replica_inflight", (("replica", "a"),), 3.0)]
    async with admin(standing) as listener:
        answer = await listener.get("/replicas")
    (replica,) = orjson.loads(answer.body)["replicas"]
    assert (replica["replica_id"], replica["inflight"], standing.recounts) == ("a", 3, 1)


@pytest.mark.parametrize(("wish", "state"), [("drain", "draining"), ("undrain", "ready")])
async def test_a_wish_may_be_repeated(wish: str, state: str) -> None:
    async with admin(Standing("a", "b")) as listener:
        for _ in range(2):
            answer = await listener.post(f"/replicas/a/{wish}")
            assert orjson.loads(answer.body)["state"] == state
        fleet = listener.standing.fleet()
        assert fleet is not None
        assert [str(record.state) for record in fleet.replicas] == [state, "ready"]
