"""The proxy as processes: workers that die, signals, ports, what the admin listener sums up."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.fakes.engine import Connection, ScriptedEngine, streaming
from tests.fakes.plane import CHAT_BODY, chat_request, until
from tests.fakes.proxy_process import ProxyProcess, alive
from tests.fakes.talk import Talk, ask, on_uvloop

EVENT = b"data: 1\n\n"


class HeldStreams:
    """A script: streams an event, waits for `release`, then ends well."""

    def __init__(self) -> None:
        self.release = asyncio.Event()
        self.script = streaming(EVENT, then=self._rest)

    async def _rest(self, connection: Connection) -> None:
        await self.release.wait()
        await connection.send(b"9\r\ndata: 2\n\n\r\n0\r\n\r\n")


@contextlib.asynccontextmanager
async def opened(port: int, count: int) -> AsyncIterator[list[Talk]]:
    """Open `count` streams and wait for the first event of each."""
    async with contextlib.AsyncExitStack() as stack:
        talks = [await stack.enter_async_context(Talk(port)) for _ in range(count)]
        for talk in talks:
            await talk.send(chat_request(fields=["connection: close"]))
        for talk in talks:
            await talk.read_until(EVENT)
        yield talks


async def test_a_killed_worker_takes_only_its_own_streams_with_it() -> None:
    async with (
        ScriptedEngine() as engine,
        ProxyProcess("--workers", "2", "--worker-urls", engine.url) as proxy,
    ):
        for _ in range(10):
            assert (await ask(proxy.port, chat_request())).status == 200
        before = await proxy.metric("doherty_requests_total")
        assert before == 10
        held = HeldStreams()
        engine.script = held.script
        async with opened(proxy.port, 16) as talks:
            victim, survivor = proxy.workers()
            doomed = proxy.client_ports_of(victim)
            assert doomed
            assert proxy.client_ports_of(survivor)
            said = len(proxy.lines)
            os.kill(victim, signal.SIGKILL)
            await proxy.until_said(rf"worker \d \(pid {victim}\) ended with -9", said)
            assert await proxy.metric("doherty_requests_total") >= before
            # The port never closes: what falls to the dead worker waits for its successor.
            engine.script = streaming(EVENT)
            fresh = [ask(proxy.port, chat_request()) for _ in range(16)]
            assert {got.status for got in await asyncio.gather(*fresh)} == {200}
            held.release.set()
            for talk in talks:
                is_doomed = talk.writer.get_extra_info("sockname")[1] in doomed
                await talk.read_to_end()
                assert talk.received.endswith(b"0\r\n\r\n") != is_doomed
            await proxy.until_said("listening on", said)
            assert len(proxy.workers()) == 2
            assert victim not in proxy.workers()
            assert await proxy.metric("doherty_requests_total") == before + 32 - len(doomed)
            assert await proxy.metric("doherty_worker_restarts_total") == 1
            assert await proxy.metric("doherty_workers") == 2
            assert await proxy.metric("doherty_requests_in_flight") == 0
            assert await proxy.metric("doherty_replica_inflight") == 0


async def test_a_connection_in_a_dead_workers_queue_is_served_by_the_next() -> None:
    async with (
        ScriptedEngine() as engine,
        ProxyProcess("--worker-urls", engine.url) as proxy,
        Talk(proxy.port) as warm,
    ):
        await warm.send(chat_request())
        assert (await warm.answer()).status == 200
        (worker,) = proxy.workers()
        os.kill(worker, signal.SIGSTOP)
        async with Talk(proxy.port) as waiting:
            await waiting.send(chat_request())
            os.kill(worker, signal.SIGKILL)
            assert (await waiting.answer()).status == 200
        assert len(engine.requests) == 2


async def test_sigterm_lets_streams_end_and_takes_no_new_connections() -> None:
    async with (
        ScriptedEngine() as engine,
        ProxyProcess("--workers", "2", "--worker-urls", engine.url) as proxy,
        Talk(proxy.port) as idle,
    ):
        held = HeldStreams()
        engine.script = held.script
        async with opened(proxy.port, 6) as talks:
            workers = proxy.workers()
            proxy.signal(signal.SIGTERM)
            await proxy.until_said("draining")
            await idle.read_to_end()
            assert idle.ended == "eof"

            async def refused() -> bool:
                try:
                    async with Talk(proxy.port):
                        return False
                except ConnectionRefusedError:
                    return True

            while not await refused():
                await asyncio.sleep(0.005)
            assert (await proxy.admin("/readyz")).status == 503
            assert (await proxy.admin("/livez")).status == 200
            assert proxy.process.returncode is None
            held.release.set()
            for talk in talks:
                await talk.read_to_end()
                assert talk.received.endswith(b"data: 2\n\n\r\n0\r\n\r\n")
            assert await proxy.ended() == 0
            assert not any(map(alive, workers))


async def test_while_the_proxy_settles_it_serves_whoever_does_not_know_yet() -> None:
    async with (
        ScriptedEngine() as engine,
        ProxyProcess("--worker-urls", engine.url, "--drain-settle-secs", "60") as proxy,
        Talk(proxy.port) as kept,
    ):
        await kept.send(chat_request())
        assert (await kept.answer()).fields.get("connection") is None
        proxy.signal(signal.SIGTERM)
        await proxy.until_said("settling")
        ready = b"GET /readyz HTTP/1.1\r\nhost: p\r\n\r\n"
        while (await ask(proxy.port, ready, "GET")).status != 503:
            await asyncio.sleep(0.01)
        async with Talk(proxy.port) as fresh:
            for talk in (kept, fresh):
                await talk.send(chat_request())
                got = await talk.answer()
                assert (got.status, got.fields["connection"]) == (200, "close")
        proxy.signal(signal.SIGTERM)
        assert await proxy.ended() == 0


@pytest.mark.parametrize("how", ["second signal", "grace over"])
async def test_a_drain_can_be_ended(how: str) -> None:
    grace = ("--shutdown-grace-period-secs", "0.2") if how == "grace over" else ()
    async with (
        ScriptedEngine() as engine,
        ProxyProcess("--worker-urls", engine.url, *grace) as proxy,
    ):
        engine.script = HeldStreams().script
        async with opened(proxy.port, 1) as (talk,):
            workers = proxy.workers()
            proxy.signal(signal.SIGTERM)
            await proxy.until_said("draining")
            if how == "second signal":
                proxy.signal(signal.SIGINT)
            await talk.read_to_end()
            assert not talk.received.endswith(b"0\r\n\r\n")
            assert await proxy.ended() == 0
            assert not any(map(alive, workers))


async def test_workers_outlive_their_supervisor_only_to_finish() -> None:
    async with (
        ScriptedEngine() as engine,
        ProxyProcess("--workers", "2", "--worker-urls", engine.url) as proxy,
    ):
        held = HeldStreams()
        engine.script = held.script
        async with opened(proxy.port, 6) as talks:
            workers = proxy.workers()
            proxy.signal(signal.SIGKILL)
            await until(lambda: not alive(proxy.process.pid))
            held.release.set()
            for talk in talks:
                await talk.read_to_end()
                assert talk.received.endswith(b"0\r\n\r\n")
            await until(lambda: not any(map(alive, workers)))
            with pytest.raises(ConnectionRefusedError):
                await Talk(proxy.port).__aenter__()


async def test_a_worker_that_cannot_start_ends_the_proxy(tmp_path: Path) -> None:
    """With the reason, rather than starting it for ever."""
    missing = str(tmp_path / "no" / "such" / "folder" / "log")
    proxy = await ProxyProcess(
        "--worker-urls", "http://127.0.0.1:9", "--access-log", missing
    ).start()
    assert await proxy.ended() == 1
    text = "\n".join(proxy.lines)
    assert "FileNotFoundError" in text
    assert "a worker fails as soon as it starts" in text
    await proxy.__aexit__()


# --- what the admin listener sums up -------------------------------------------------------------


async def test_metrics_are_exact_sums_over_workers() -> None:
    usage = b'{"usage":{"prompt_tokens":7,"completion_tokens":3}}'

    async def answer(connection: Connection, _: object) -> None:
        await connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 51\r\n\r\n" + usage)

    async with (
        ScriptedEngine(answer) as one,
        ScriptedEngine(answer) as two,
        ProxyProcess("--workers", "3", "--worker-urls", one.url, two.url) as proxy,
    ):
        bodies = [CHAT_BODY.replace(b"hello", b"%d" % n) for n in range(60)]
        for start in range(0, 60, 20):
            requests = bodies[start : start + 20]
            got = await asyncio.gather(*(ask(proxy.port, chat_request(b)) for b in requests))
            assert {a.status for a in got} == {200}
        await ask(proxy.port, b"GET /nope HTTP/1.1\r\nhost: p\r\n\r\n", "GET")
        assert await proxy.metric("doherty_requests_total", code="200", model="m") == 60
        assert await proxy.metric("doherty_requests_total", outcome="unknown_path") == 1
        assert await proxy.metric("doherty_request_duration_seconds_count", model="m") == 60
        assert await proxy.metric("doherty_request_duration_seconds_bucket", le="+Inf") == 61
        assert await proxy.metric("doherty_overhead_seconds_count") == 60
        assert await proxy.metric("doherty_prompt_tokens_total") == 60 * 7
        assert await proxy.metric("doherty_generation_tokens_total") == 60 * 3
        by_replica = await proxy.metric("doherty_replica_requests_total")
        assert by_replica == len(one.requests) + len(two.requests) == 60
        assert await proxy.metric("doherty_replica_state", state="ready") == 2
        assert await proxy.metric("doherty_workers") == 3
        assert await proxy.metric("doherty_build_info") == 1
        page = await proxy.replicas()
        assert {entry["url"] for entry in page.values()} == {one.url, two.url}
        assert all(entry["models"] == ["m"] and not entry["suspect"] for entry in page.values())


async def test_the_admin_key_guards_all_but_health() -> None:
    async with (
        ScriptedEngine() as engine,
        ProxyProcess("--worker-urls", engine.url, "--admin-api-key", "s3cret") as proxy,
    ):
        for path in ("/livez", "/healthz", "/readyz"):
            assert (await proxy.admin(path)).status == 200
        for path in ("/metrics", "/replicas", "/nope"):
            assert (await proxy.admin(path)).status == 401
            assert (await proxy.admin(path, "wrong")).status == 401
            assert (await proxy.admin(path, "wr\u00f6ng")).status == 401
            assert (await proxy.admin(path, "s3cret")).status == (404 if path == "/nope" else 200)


# --- passive health ------------------------------------------------------------------------------


@on_uvloop
async def test_an_engine_that_died_leaves_at_once_and_comes_back_when_it_answers() -> None:
    async with (
        ScriptedEngine() as stays,
        ScriptedEngine() as dies,
        ProxyProcess(
            "--workers", "2", "--policy", "round_robin", "--worker-urls", stays.url, dies.url
        ) as proxy,
    ):
        names = {
            "stays": stays.url.removeprefix("http://"),
            "dies": dies.url.removeprefix("http://"),
        }

        async def burst(count: int) -> set[int]:
            answers = [await ask(proxy.port, chat_request()) for _ in range(count)]
            return {got.status for got in answers}

        assert await burst(8) == {200}
        assert dies.requests
        port = dies.port
        await dies.stop()
        assert await burst(12) == {200}  # refused connections are tried elsewhere, unseen
        page = await proxy.replicas()
        assert page[names["dies"]]["suspect"]
        assert not page[names["stays"]]["suspect"]
        assert await proxy.metric("doherty_retries_total", reason="connect") <= 2
        async with ScriptedEngine() as back:
            await back.stop()
            back.port = port
            await back.__aenter__()
            await proxy.until_said("answers again")
            while (await proxy.replicas())[names["dies"]]["suspect"]:
                await asyncio.sleep(0.01)
            assert back.probes >= 1
            assert await burst(8) == {200}
            assert back.requests
