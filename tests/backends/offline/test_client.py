"""Requests done offline from Python: against a service on the wire, and against one that fails."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from backends.offline.client import (
    AsyncClient,
    Client,
    InputError,
    Job,
    JobFailedError,
    LineFailedError,
    RefusedError,
    UnreachableError,
    agather,
    gather,
)
from backends.offline.client.spool import Spool
from tests.fakes.offline_stage import CHAT, LONG, HttpWorker, Stage, offline_stage
from tests.fakes.programs import ROOT, environment, free_port

LINES = 450  # more than two pages


def body(words: str, **changes: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": words}]
    return {"model": "demo", "messages": messages, "max_tokens": 4} | changes


def said(answer: Any) -> str:
    return str(answer["choices"][0]["message"]["content"])


@asynccontextmanager
async def stage_and_client(folder: Path) -> AsyncIterator[tuple[Stage, AsyncClient]]:
    async with offline_stage(folder) as stage, AsyncClient(stage.url + "/v1", "key") as client:
        yield stage, client


@asynccontextmanager
async def worker_at(stage: Stage) -> AsyncIterator[None]:
    """A worker that does lines as long as the block, wherever they come from."""
    worker = HttpWorker(stage.url)

    async def work() -> None:
        while True:
            await worker.work(lines_max=100)
            await asyncio.sleep(0.01)

    task = asyncio.ensure_future(work())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_call_is_spawned_and_its_answer_fetched_by_id(tmp_path: Path) -> None:
    async with stage_and_client(tmp_path) as (stage, client):
        call = await client.spawn(body("say hello"))
        with pytest.raises(TimeoutError):
            await call.get(timeout=0)
        with pytest.raises(TimeoutError):
            await call.get(timeout=0.05)
        async with worker_at(stage), AsyncClient(stage.url, "key") as other:
            assert said(await other.call(call.id).get(timeout=20)) == "hello"
            assert (await call.result()).number == 0
            with pytest.raises(RefusedError, match="has no request 'line-7'"):
                await other.job(call.job_id).call(7).get()
        async with AsyncClient(stage.url, "another key") as stranger:
            with pytest.raises(RefusedError) as refused:
                await stranger.call(call.id).get()
            assert refused.value.status == 404
        with pytest.raises(ValueError, match="is no call's id"):
            client.call("batch_1")


async def test_calls_of_a_moment_are_one_job(tmp_path: Path) -> None:
    async with stage_and_client(tmp_path) as (stage, client):
        spawning = [client.spawn(body(f"say {n}")) for n in range(30)]
        bad = client.spawn({"messages": []})
        *calls, wrong = await asyncio.gather(*spawning, bad, return_exceptions=True)
        assert isinstance(wrong, InputError), "and its neighbours are none the worse"
        assert len({call.job_id for call in calls}) == 1
        async with worker_at(stage):
            answers = await agather(calls, timeout=20)
        assert [said(answer) for answer in answers] == [str(n) for n in range(30)]


async def test_results_come_lazily_in_both_orders_while_the_job_runs(tmp_path: Path) -> None:
    async with stage_and_client(tmp_path) as (stage, client):

        async def requests() -> AsyncIterator[dict[str, Any]]:
            for n in range(LINES):
                yield body(f"say {n}")

        job = await client.spawn_map(requests(), metadata={"of": "test"})
        assert job.lines == LINES
        ordered = asyncio.ensure_future(_collected(job.results(ordered=True)))
        as_they_come = asyncio.ensure_future(_collected(job.results()))
        async with worker_at(stage):
            assert [r.number for r in await ordered] == list(range(LINES))
            results = await as_they_come
        assert [r.sequence for r in results] == list(range(1, LINES + 1))
        assert sorted(r.number for r in results) == list(range(LINES))
        assert all(said(r.value()) == str(r.number) for r in results)
        progress = await job.wait(20)
        assert (progress.done, progress.total, progress.succeeded) == (LINES, LINES, True)
        assert progress.metadata == {"of": "test"}
        assert progress.tokens == LINES * 13
        assert progress.cost is not None
        assert progress.cost > 0
        assert [p.job_id async for p in client.jobs()] == [job.id]


async def _collected(results: AsyncIterator[Any]) -> list[Any]:
    return [result async for result in results]


async def test_lines_that_fail_do_not_hide_the_others(tmp_path: Path) -> None:
    async with stage_and_client(tmp_path) as (stage, client), worker_at(stage):
        job = await client.spawn_map([body("say a"), body(LONG), body("nobody"), body("say b")])
        calls = job.calls()
        results = [r async for r in job.results(ordered=True)]
        assert [r.status for r in results] == [200, 400, 0, 200]
        with pytest.raises(LineFailedError, match="too long") as failed:
            await calls[1].get()
        assert (failed.value.status, failed.value.code) == (400, "context_length_exceeded")
        assert failed.value.call_id == calls[1].id
        with pytest.raises(LineFailedError) as failed:
            await agather(calls)
        answers = await agather(calls, return_errors=True)
        assert [isinstance(a, LineFailedError) for a in answers] == [False, True, True, False]
        assert answers[2].code == "worker_died"


@pytest.mark.parametrize(
    "name", ["a/b", "..", ".", "50%", "%2e", "a b?c#d&e", "\u00fc\u2603", "'\"", "\u2603" * 512]
)
async def test_a_line_is_found_by_whatever_id_it_has(tmp_path: Path, name: str) -> None:
    row = {"custom_id": name, "method": "POST", "url": CHAT, "body": body("say it")}
    async with stage_and_client(tmp_path) as (stage, client), worker_at(stage):
        with Spool(CHAT) as spool:
            spool.add_text(1, json.dumps(row).encode())
            job = await client.submit(spool)
        call = client.call(job.call(name).id)
        assert call.custom_id == name
        assert said(await call.get(20)) == "it"
        assert said(await call.get()) == "it"


async def test_a_job_that_is_cancelled_ends_with_what_there_is(tmp_path: Path) -> None:
    async with stage_and_client(tmp_path) as (stage, client):
        job = await client.spawn_map(body(f"say {n}") for n in range(10))
        while (await job.progress()).state == "validating":
            await asyncio.sleep(0.01)
        await HttpWorker(stage.url).work(lines=4, lines_max=2)
        assert [r.ok async for r in job.results(follow=False)] == [True] * 4
        await job.cancel()
        assert (await job.wait(20)).state == "cancelled"
        results = [r async for r in job.results(ordered=True)]
        assert [r.number for r in results] == list(range(10))
        assert sum(r.ok for r in results) == 4
        left = next(r for r in results if not r.ok)
        with pytest.raises(LineFailedError, match="cancelled"):
            await job.call(left.number).get()


async def test_what_is_wrong_is_told_as_what_it_is(tmp_path: Path) -> None:
    async with stage_and_client(tmp_path) as (_, client):
        for wrong, why in (
            ({"messages": []}, r"line 2: .*body.model"),
            (body("x", stream=True), "line 2: .*cannot be streamed"),
            (body("x", model="tuned"), "line 2: .*one model"),
            (body("x", odd={1, 2}), "line 2: this is no JSON object"),
        ):
            with pytest.raises(InputError, match=why):
                await client.spawn_map([body("good"), wrong])
        with pytest.raises(InputError, match="there is no request"):
            await client.spawn_map([])
        with pytest.raises(ValueError, match="is none of /v1/chat"):
            await client.spawn_map([], endpoint="/v1/images")
        assert [p async for p in client.jobs()] == [], "nothing of that came to the service"
        job = await client.spawn_map([body("x", model="nobody's")])
        with pytest.raises(JobFailedError, match="No replica or pool serves") as failed:
            await job.call(0).get()
        assert failed.value.errors[0].code == "model_not_found"
        with pytest.raises(JobFailedError):
            await _collected(job.results())
        with pytest.raises(RefusedError, match="completion_window"):
            await client.spawn_map([body("x")], window="soon")
    for url in ("ftp://host", "localhost:8000", ""):
        with pytest.raises(ValueError, match="is no address"):
            AsyncClient(url)


async def test_without_a_loop_it_is_the_same(tmp_path: Path) -> None:
    def program(url: str) -> tuple[list[str], list[int], int]:
        with Client(url, "key") as client:
            job = client.spawn_map(body(f"say {n}") for n in range(LINES))
            call = client.spawn(body("say once"))
            answers = gather([*job.calls()[:20], call], timeout=30)
            numbers = [r.number for r in job.results(ordered=True)]
            abandoned = job.results()
            next(abandoned)
            assert job.wait(20).succeeded
            assert [p.job_id for p in client.jobs()] == [call.job_id, job.id]
            assert said(client.call(job.call(3).id).get()) == "3"
            assert gather([]) == []
        client.close()  # once more does no harm
        with pytest.raises(RuntimeError, match="closed"):
            job.progress()
        abandoned.close()
        names = [t.name for t in threading.enumerate() if t.name.startswith("doherty")]
        return [said(a) for a in answers], numbers, len(names)

    async with offline_stage(tmp_path) as stage, worker_at(stage):
        told, numbers, threads = await asyncio.to_thread(program, stage.url)
    assert told == [*map(str, range(20)), "once"]
    assert numbers == list(range(LINES))
    assert threads == 0


async def test_the_requests_of_a_generator_are_made_in_its_own_thread(tmp_path: Path) -> None:
    seen: set[int] = set()

    def requests() -> Iterator[dict[str, Any]]:
        for n in range(3):
            seen.add(threading.get_ident())
            yield body(f"say {n}")

    def program(url: str) -> tuple[int, Job]:
        with Client(url, "key") as client:
            return threading.get_ident(), client.spawn_map(requests())

    async with offline_stage(tmp_path) as stage:
        ident, _ = await asyncio.to_thread(program, stage.url)
    assert seen == {ident}


async def test_another_process_reads_what_this_one_spawned(tmp_path: Path) -> None:
    code = (
        "import sys; from backends.offline.client import Client\n"
        "with Client(sys.argv[1], 'key') as client:\n"
        "    print(client.call(sys.argv[2]).get(20)['choices'][0]['message']['content'])\n"
    )
    async with stage_and_client(tmp_path) as (stage, client), worker_at(stage):
        call = await client.spawn(body("say again"))
        argv = [sys.executable, "-c", code, stage.url, call.id]
        run = await asyncio.to_thread(
            subprocess.run, argv, capture_output=True, text=True, cwd=ROOT, env=environment()
        )
    assert (run.stdout, run.stderr) == ("again\n", "")


# --- a service that fails ------------------------------------------------------------------------


class Flaky:
    """Fails as it is told, request after request, and then is as it should be."""

    def __init__(self, *failures: Callable[[web.Request], web.Response]) -> None:
        self._failures = list(failures)
        self.seen: list[tuple[str, str, str, bytes]] = []

    async def answer(self, request: web.Request) -> web.StreamResponse:
        key = request.headers.get("idempotency-key", "")
        self.seen.append((request.method, request.path, key, await request.read()))
        if self._failures:
            return self._failures.pop(0)(request)
        if request.path == "/v1/files":
            return web.json_response({"id": "file-1"})
        return web.json_response({"id": "batch_1", "status": "validating"})


def cut(request: web.Request) -> web.Response:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


def status(number: int) -> Callable[[web.Request], web.Response]:
    return lambda _: web.Response(status=number, headers={"retry-after": "0"}, text="not now")


@contextlib.asynccontextmanager
async def serving(flaky: Flaky) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", flaky.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def test_what_breaks_is_sent_again_whole_and_under_the_same_key() -> None:
    flaky = Flaky(cut, status(503), status(502))
    async with serving(flaky) as url, AsyncClient(url) as client:
        job = await client.spawn_map(body(f"say {n}") for n in range(2000))
    assert job.id == "batch_1"
    uploads = [seen for seen in flaky.seen if seen[1] == "/v1/files"]
    assert len(uploads) == 4
    assert len(set(uploads)) == 1, "the same octets, the same key"
    assert uploads[0][3].count(b'"custom_id"') == 2000
    keys = {(path, key) for _, path, key, _ in flaky.seen}
    assert len(keys) == len({key for _, key in keys}) == 2
    assert all(key for _, key in keys)


async def test_patience_has_an_end_and_a_refusal_is_final() -> None:
    flaky = Flaky(*[status(503)] * 1000)
    async with serving(flaky) as url, AsyncClient(url, patience_s=0.3) as client:
        with pytest.raises(UnreachableError, match="does not answer: not now"):
            await client.job("batch_1").progress()
    flaky = Flaky(status(401))
    async with serving(flaky) as url, AsyncClient(url) as client:
        with pytest.raises(RefusedError, match=r"not now \(401\)"):
            await client.job("batch_1").progress()
    assert len(flaky.seen) == 1


async def test_who_finds_nobody_is_told_so_in_plain_words() -> None:
    async with AsyncClient(f"http://127.0.0.1:{free_port()}", patience_s=0.0) as client:
        with pytest.raises(UnreachableError) as error:
            await client.job("batch_1").progress()
    assert "does not answer: connection refused; does Doherty run there" in str(error.value)
    assert "ssl" not in str(error.value)


async def test_a_timeout_is_kept_where_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backends.offline.client.aio.SILENCE_S", 0.1)
    async with AsyncClient(f"http://127.0.0.1:{free_port()}") as client:
        with pytest.raises(TimeoutError):
            await client.call("batch_1/line-0").get(timeout=0.1)


async def test_calls_of_a_client_that_is_closed_are_not_left_waiting(tmp_path: Path) -> None:
    async with offline_stage(tmp_path) as stage:
        client = AsyncClient(stage.url)
        spawning = asyncio.ensure_future(client.spawn(body("x"), endpoint=CHAT))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await client.close()
        with pytest.raises(Exception, match="closed before"):
            await asyncio.wait_for(spawning, 5)
