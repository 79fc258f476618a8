"""Replicas drained and brought back by operators, and who may wish it."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

import orjson
import pytest
from aiohttp import web

from tests.fakes.engine import ScriptedEngine
from tests.fakes.plane import Answer, chat_request, until
from tests.fakes.proxy_process import ProxyProcess
from tests.fakes.talk import ask
from tests.io.test_supervisor import HeldStreams, opened
from tests.io.test_view import view_of

LOCAL = "host: localhost"


async def post(port: int, replica_id: str, wish: str, fields: Iterable[str] = (LOCAL,)) -> Answer:
    head = "".join(f"{field}\r\n" for field in fields)
    request = f"POST /replicas/{replica_id}/{wish} HTTP/1.1\r\n{head}content-length: 0\r\n\r\n"
    return await ask(port, request.encode())


def error_of(answer: Answer) -> dict[str, str]:
    error: dict[str, str] = orjson.loads(answer.body)["error"]
    return error


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
                granted = await post(
                    proxy.admin_port, replica_id, "drain", (LOCAL, "x-request-id: q1")
                )
                assert granted.status == 200
                assert orjson.loads(granted.body) == {
                    "replica_id": replica_id,
                    "state": "draining",
                    "held": True,
                }
                await proxy.until_said(rf"drain of replica '{replica_id}', asked by 127.0.0.1.*q1")
                seen = len(one.requests)
                # It survives a reload, and everybody is told.
                config.write_text(config.read_text() + "  max_payload_size: 4000000\n")
                await proxy.until_said("reloaded")
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
                assert (await post(proxy.admin_port, replica_id, "undrain")).status == 200
                while len(one.requests) == seen:
                    assert (await ask(proxy.port, chat_request())).status == 200
                assert not (await view_of(proxy)).replicas[0].held


async def test_a_successor_knows_what_is_drained(tmp_path: Path) -> None:
    async with (
        ScriptedEngine() as one,
        ScriptedEngine() as two,
        ProxyProcess("--worker-urls", one.url, two.url) as proxy,
    ):
        replica_id = one.url.removeprefix("http://")
        assert (await post(proxy.admin_port, replica_id, "drain")).status == 200
        await proxy.upgrade()
        assert (await proxy.replicas())[replica_id]["state"] == "draining"
        assert (await post(proxy.admin_port, replica_id, "undrain")).status == 200
        assert (await proxy.replicas())[replica_id]["state"] == "ready"


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
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    manager.url = "http://{}:{}".format(*runner.addresses[0][:2])
    try:
        yield manager
    finally:
        await runner.cleanup()


async def test_a_manager_is_asked_where_there_is_one() -> None:
    async with managed() as manager, ProxyProcess("--manager-url", manager.url) as proxy:
        granted = await post(proxy.admin_port, "a%3A1", "drain")
        assert orjson.loads(granted.body) == {"replica_id": "a", "state": "draining", "held": True}
        await post(proxy.admin_port, "a%2F..%2Fb", "undrain")
        assert manager.asked == ["/v1/replicas/a%3A1/drain", "/v1/replicas/a%2F..%2Fb/undrain"]
        assert (await post(proxy.admin_port, "%2E%2E", "drain")).status == 404
        assert len(manager.asked) == 2
        for status, body, expected in (
            (404, {}, (404, "unknown_replica")),
            (409, {"error": {"message": "it is an engine worker"}}, (409, "refused_by_manager")),
            (500, "nonsense", (502, "manager_failed")),
            (200, ["no record"], (502, "manager_failed")),
        ):
            manager.status, manager.body = status, body
            answer = await post(proxy.admin_port, "a", "undrain")
            assert (answer.status, error_of(answer)["code"]) == expected
        assert "it is an engine worker" in (await _refused_words(proxy, manager))


async def _refused_words(proxy: ProxyProcess, manager: FakeManager) -> str:
    manager.status, manager.body = 409, {"error": {"message": "it is an engine worker"}}
    return error_of(await post(proxy.admin_port, "a", "drain"))["message"]


async def test_a_manager_that_is_gone_is_said_to_be() -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    async with ProxyProcess("--manager-url", f"http://127.0.0.1:{port}") as proxy:
        answer = await post(proxy.admin_port, "a", "drain")
        assert (answer.status, error_of(answer)["code"]) == (503, "manager_unreachable")
        assert f":{port} does not answer" in error_of(answer)["message"]


async def test_what_cannot_be_granted_is_refused_in_words() -> None:
    async with ScriptedEngine() as engine, ProxyProcess("--worker-urls", engine.url) as proxy:
        known = engine.url.removeprefix("http://")
        answer = await post(proxy.admin_port, "nobody", "drain")
        assert answer.status == 404
        error = error_of(answer)
        assert (error["code"], error["type"]) == ("unknown_replica", "not_found_error")
        assert known in error["message"]
        assert (await post(proxy.admin_port, known, "explode")).status == 404
        await proxy.until_said("drain of replica 'nobody' refused")
        # A line of the log is one line, whatever the name.
        said = len(proxy.lines)
        assert (await post(proxy.admin_port, "x%0d%0a2026%20forged", "drain")).status == 404
        await proxy.until_said(r"drain of replica 'x\\r\\n2026 forged' refused", said)


FOREIGN_HEADS = (
    ("host: localhost", "origin: http://evil.example"),
    ("host: localhost", "origin: null"),
    ("host: localhost", "origin: http://localhost:3000"),
    ("host: localhost", "origin: http://["),
    ("host: localhost", "sec-fetch-site: cross-site"),
    ("host: localhost", "sec-fetch-site: same-site"),
    ("host: evil.example",),  # its name points to 127.0.0.1 now
    ("host: evil.example", "origin: http://evil.example", "sec-fetch-site: same-origin"),
    ("host: 127.0.0.1.evil.example",),
    ("host: localhost.evil.example",),
)


async def test_no_other_page_may_have_a_browser_drain_or_read() -> None:
    async with ScriptedEngine() as engine, ProxyProcess("--worker-urls", engine.url) as proxy:
        known = engine.url.removeprefix("http://")
        for fields in FOREIGN_HEADS:
            answer = await post(proxy.admin_port, known, "drain", fields)
            assert answer.status == 403, fields
        for name in (
            "localhost",
            f"127.0.0.1:{proxy.admin_port}",
            "[::1]:1",
            "LOCALHOST.",
            "a.localhost",
        ):
            fields = (f"host: {name}", f"origin: http://{name}", "sec-fetch-site: same-origin")
            assert (await post(proxy.admin_port, known, "undrain", fields)).status == 200, name
        for path in ("/view", "/view/watch", "/replicas", "/metrics"):
            request = f"GET {path} HTTP/1.1\r\nhost: evil.example\r\n\r\n"
            answer = await ask(proxy.admin_port, request.encode(), "GET")
            assert (answer.status, error_of(answer)["code"]) == (403, "host_not_allowed")
        # Whoever watches over it may call it what he likes.
        probe = b"GET /livez HTTP/1.1\r\nhost: proxy.internal\r\n\r\n"
        assert (await ask(proxy.admin_port, probe, "GET")).status == 200
        assert (await proxy.replicas())[known]["state"] == "ready"


async def test_with_a_key_only_the_key_counts_and_the_page_is_open() -> None:
    async with (
        ScriptedEngine() as engine,
        ProxyProcess("--admin-api-key", "s3cret", "--worker-urls", engine.url) as proxy,
    ):
        known = engine.url.removeprefix("http://")
        away = "host: proxy.example"
        for fields in ((away,), (away, "authorization: Bearer s3cre"), (LOCAL,)):
            answer = await post(proxy.admin_port, known, "drain", fields)
            assert (answer.status, error_of(answer)["code"]) == (401, "invalid_api_key")
        key = "authorization: Bearer s3cret"
        foreign = (away, key, "origin: http://evil.example")
        assert (await post(proxy.admin_port, known, "drain", foreign)).status == 403
        assert (await post(proxy.admin_port, known, "drain", (away, key))).status == 200
        assert (await proxy.admin("/view")).status == 401
        assert (await view_of(proxy, "s3cret")).proxy.can_drain is None
        assert (await proxy.admin("/")).status in (200, 404)  # and not 401


async def test_without_a_key_nobody_on_a_network_may_drain() -> None:
    async with (
        ScriptedEngine() as engine,
        ProxyProcess("--admin-host", "0.0.0.0", "--worker-urls", engine.url) as proxy,
    ):
        known = engine.url.removeprefix("http://")
        answer = await post(proxy.admin_port, known, "drain")
        assert (answer.status, error_of(answer)["code"]) == (403, "admin_key_required")
        assert "admin_api_key" in error_of(answer)["message"]
        assert (await view_of(proxy)).proxy.can_drain == error_of(answer)["message"]
        request = b"GET /view HTTP/1.1\r\nhost: proxy.example\r\n\r\n"
        assert (await ask(proxy.admin_port, request, "GET")).status == 200


@pytest.mark.parametrize("wish", ["drain", "undrain"])
async def test_a_wish_may_be_repeated(wish: str) -> None:
    async with ScriptedEngine() as engine, ProxyProcess("--worker-urls", engine.url) as proxy:
        known = engine.url.removeprefix("http://")
        await until(lambda: any("serves" in line for line in proxy.lines))
        answers = [await post(proxy.admin_port, known, wish) for _ in range(2)]
        assert {answer.status for answer in answers} == {200}
        expected = "draining" if wish == "drain" else "ready"
        assert {orjson.loads(answer.body)["state"] for answer in answers} == {expected}
