"""An engine worker as a process, against a desk in memory: lines in, results out, and its ends."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from backends.clock import SystemClock
from backends.log import Log
from backends.offline import worker_loop
from backends.offline.desk_client import RemoteDesk
from backends.offline.line_engine import Gauges
from backends.offline.work import Line, Result
from backends.offline.worker_loop import Worker
from tests.fakes.desk import MemoryDesk
from tests.fakes.worker_process import WorkerProcess

FAST = ("--profile", "fast", "--kv-cache-tokens", "400000")
SLOW = ("--profile", "fast", "--time-scale", "0.02", "--max-num-seqs", "4")
Scene = Callable[[MemoryDesk, WorkerProcess], Awaitable[None]]


def chat(number: int, text: str = "say something", **fields: object) -> Line:
    """Return a line that asks for a chat."""
    body = {"model": "m", "messages": [{"role": "user", "content": text}], "max_tokens": 8}
    return Line(
        "job", number, "/v1/chat/completions", msgspec.Raw(json.dumps(body | fields).encode())
    )


def play(lines: list[Line], flags: tuple[str, ...], scene: Scene, **rest: object) -> MemoryDesk:
    """Run a scene with a desk and a worker."""
    hold_s = rest.pop("hold_s", 60.0)
    desk_key = rest.pop("desk_key", "")

    async def run() -> MemoryDesk:
        desk = MemoryDesk(lines, hold_s=float(str(hold_s)), work_key=str(desk_key))
        url = await desk.start()
        worker = await WorkerProcess.start(url, *flags, **rest)  # type: ignore[arg-type]
        try:
            await scene(desk, worker)
        finally:
            await worker.kill()
            await desk.close()
        return desk

    return asyncio.run(run())


def test_every_line_has_one_result_whatever_it_asks_for() -> None:
    raw = {
        1: ("/v1/completions", {"model": "m", "prompt": ["a b", "c d"], "max_tokens": 3}),
        2: ("/v1/responses", {"model": "m", "input": "hello", "max_output_tokens": 4}),
        3: ("/v1/chat/completions", {"model": "other", "messages": [{"role": "user"}]}),
        4: ("/v1/chat/completions", {"model": "m"}),
        5: ("/v1/embeddings", {"model": "m", "input": "hello"}),
        6: ("/v1/completions", {"model": "m", "prompt": "word " * 40_000}),
    }
    lines = [chat(0, stream=True)]
    lines += [
        Line("job", number, url, msgspec.Raw(json.dumps(body).encode()))
        for number, (url, body) in raw.items()
    ]

    async def scene(desk: MemoryDesk, worker: WorkerProcess) -> None:
        await desk.until(7)
        _, page = await worker.get("/metrics")
        assert 'doherty_worker_lines_total{outcome="done"} 3' in page
        assert 'doherty_worker_lines_total{outcome="failed"} 4' in page

    desk = play(lines, FAST, scene)
    results = {number: result for (_, number), result in desk.results.items()}
    bodies = {number: json.loads(bytes(result.body)) for number, result in results.items()}
    assert {number: result.status for number, result in results.items()} == {
        0: 200, 1: 200, 2: 200, 3: 404, 4: 400, 5: 400, 6: 400,
    }  # fmt: skip
    assert bodies[0]["choices"][0]["finish_reason"] == "length"
    assert bodies[0]["id"] == results[0].request_id
    assert results[0].completion_tokens == bodies[0]["usage"]["completion_tokens"] == 8
    assert [choice["index"] for choice in bodies[1]["choices"]] == [0, 1]
    assert results[2].completion_tokens == bodies[2]["usage"]["output_tokens"] == 4
    assert bodies[3]["error"]["code"] == "model_not_found"
    assert bodies[6]["error"]["code"] == "context_length_exceeded"
    assert {body["error"]["type"] for n, body in bodies.items() if n > 2} == {
        "invalid_request_error"
    }


def test_embeddings_where_the_model_makes_them() -> None:
    body = {"model": "m", "input": ["a", "b"], "dimensions": 4, "encoding_format": "base64"}
    line = Line("job", 0, "/v1/embeddings", msgspec.Raw(json.dumps(body).encode()))

    async def scene(desk: MemoryDesk, worker: WorkerProcess) -> None:
        await desk.until(1)

    desk = play([line], (*FAST, "--task", "embed"), scene)
    (result,) = desk.results.values()
    assert result.status == 200
    assert len(json.loads(bytes(result.body))["data"]) == 2
    assert desk.asks[0].urls == ("/v1/embeddings",)


def test_the_next_chunk_is_there_before_the_last_one_ends() -> None:
    lines = [chat(number) for number in range(120)]

    async def scene(desk: MemoryDesk, worker: WorkerProcess) -> None:
        await desk.until(120)
        first = next(report for report in desk.reports if report.done)
        assert len(desk.asks) >= 3, "it asked again while lines of the first chunk were undone"
        assert first.chunk_id == "chunk-1"

    desk = play(lines, (*FAST, "--max-num-seqs", "40"), scene, chunk_lines=40)
    assert set(desk.repeated.values()) == {1}
    assert sum(report.busy_s for report in desk.reports) > 0


def test_health_is_503_until_the_model_is_there() -> None:
    async def scene(desk: MemoryDesk, worker: WorkerProcess) -> None:
        assert (await worker.get("/health"))[0] == 503
        await desk.until(1)
        assert (await worker.get("/health"))[0] == 200

    play([chat(0)], (*FAST, "--startup-seconds", "1"), scene)


@pytest.mark.faults
def test_told_to_stop_it_gives_back_what_is_undone_and_leaves_with_0() -> None:
    lines = [chat(number, max_tokens=4 if number < 4 else 5000) for number in range(50)]

    async def scene(desk: MemoryDesk, worker: WorkerProcess) -> None:
        await desk.until(4)
        assert desk.held == 46
        worker.signal(signal.SIGTERM)
        code, _ = await worker.wait(timeout_s=10.0)
        assert code == 0
        assert desk.held == 0
        assert desk.reports[-1].done

    desk = play(lines, SLOW, scene)
    assert len(desk.results) == 4


@pytest.mark.faults
def test_an_engine_that_dies_is_an_exit_of_1_and_keeps_its_lines_held() -> None:
    async def scene(desk: MemoryDesk, worker: WorkerProcess) -> None:
        code, said = await worker.wait()
        assert code == 1
        assert "engine_died" in said
        assert desk.held == 3, "the desk must see that they were not done"

    play([chat(number) for number in range(3)], (*FAST, "--fault", "exit"), scene)


@pytest.mark.faults
def test_lines_of_a_chunk_that_was_given_to_another_are_dropped() -> None:
    lines = [chat(number, max_tokens=5000) for number in range(8)]

    async def scene(desk: MemoryDesk, worker: WorkerProcess) -> None:
        async with asyncio.timeout(20):
            while desk.held < 8:
                await asyncio.sleep(0.02)
            desk.take_away()
            while desk.repeated.total() < 16:
                await asyncio.sleep(0.02)
        _, page = await worker.get("/metrics")
        assert 'doherty_worker_lines_total{outcome="lost"} 8' in page

    play(lines, SLOW, scene, hold_s=1.5)


@pytest.mark.faults
def test_lines_of_an_ended_job_are_dropped() -> None:
    lines = [chat(number, max_tokens=5000) for number in range(8)]

    async def scene(desk: MemoryDesk, worker: WorkerProcess) -> None:
        async with asyncio.timeout(20):
            while desk.held < 8:
                await asyncio.sleep(0.02)
            desk.ended = {"job"}
            while not any(report.done for report in desk.reports):
                await asyncio.sleep(0.02)

    desk = play(lines, SLOW, scene, hold_s=1.0)
    assert desk.results == {}


@pytest.mark.faults
def test_a_lost_desk_hears_everything_once_it_is_back() -> None:
    lines = [chat(number) for number in range(20)]

    async def scene(desk: MemoryDesk, worker: WorkerProcess) -> None:
        async with asyncio.timeout(20):
            while desk.held < 20:
                await asyncio.sleep(0.01)
            desk.down = True
            page = ""
            while 'outcome="done"} 20' not in page:
                _, page = await worker.get("/metrics")
            desk.down = False
        await desk.until(20)

    desk = play(lines, ("--profile", "fast", "--time-scale", "0.2"), scene)
    assert set(desk.repeated.values()) == {1}


def test_a_wrong_key_is_said_and_is_an_exit_of_1() -> None:
    async def scene(desk: MemoryDesk, worker: WorkerProcess) -> None:
        code, said = await worker.wait()
        assert code == 1
        assert "wrong work key" in said

    play([chat(0)], FAST, scene, desk_key="right", work_key="wrong")


class HandEngine:
    """Answers lines when the test says so, those below `answered`."""

    models, urls, gpus, sequences_max = ("m",), ("/v1/chat/completions",), 1, 4

    def __init__(self) -> None:
        self.dead: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.answered = 0

    async def start(self) -> None: ...

    async def do(self, line: Line) -> Result:
        while line.number >= self.answered:
            await asyncio.sleep(0.01)
        return Result(job_id=line.job_id, number=line.number, status=200, body=msgspec.Raw(b"{}"))

    def gauges(self) -> Gauges:
        return Gauges(0, 0)

    async def close(self) -> None: ...


def test_what_is_done_while_the_desk_is_away_counts_though_the_hold_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker_loop, "REPORT_PATIENCE_S", 0.1)
    monkeypatch.setattr(worker_loop, "LOOK_S", 0.05)

    async def run() -> MemoryDesk:
        desk, engine, stop = (
            MemoryDesk([chat(n) for n in range(4)], 0.3),
            HandEngine(),
            asyncio.Event(),
        )
        remote = RemoteDesk(await desk.start())
        worker = Worker(engine, remote, "w", 10, SystemClock(), Log())
        running = asyncio.ensure_future(worker.run(stop))
        while not desk.held:
            await asyncio.sleep(0.01)
        desk.down = True
        engine.answered = 2
        await asyncio.sleep(1.0)  # three holds, and as many looks at what they became
        engine.answered = 4
        desk.hold_s = 60.0
        desk.come_back()
        await desk.until(4)
        stop.set()
        assert await running == 0
        await remote.close()
        await desk.close()
        return desk

    desk = asyncio.run(run())
    assert set(desk.repeated.values()) == {1}
    assert desk.refused == 0


def test_a_hold_is_renewed_in_time_though_it_came_after_the_last_look(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker_loop, "LOOK_S", 3600.0)

    async def run() -> MemoryDesk:
        desk, engine, stop = MemoryDesk([], 0.9), HandEngine(), asyncio.Event()
        remote = RemoteDesk(await desk.start())
        worker = Worker(engine, remote, "w", 10, SystemClock(), Log())
        running = asyncio.ensure_future(worker.run(stop))
        while not desk.asks:  # it has looked, and nothing was due
            await asyncio.sleep(0.01)
        desk.add([chat(0)])
        async with asyncio.timeout(20):  # only so that this ends if the claim is false
            await desk.on_report.wait()
        stop.set()
        assert await running == 0
        await remote.close()
        await desk.close()
        return desk

    desk = asyncio.run(run())
    assert not desk.reports[0].done


def test_a_stop_that_ends_the_engine_as_well_is_a_stop() -> None:
    """Who kills a group ends the engine's processes at once: its death is no line's fault."""

    async def run(*, stopped: bool) -> tuple[int, int]:
        desk, engine, stop = MemoryDesk([chat(0)]), HandEngine(), asyncio.Event()
        remote = RemoteDesk(await desk.start())
        worker = Worker(engine, remote, "w", 10, SystemClock(), Log())
        running = asyncio.ensure_future(worker.run(stop))
        while not desk.held:
            await asyncio.sleep(0.01)
        engine.dead.set_result("EngineDeadError")
        if stopped:
            asyncio.get_running_loop().call_later(0.05, stop.set)
        code = await running
        await remote.close()
        await desk.close()
        return code, desk.held

    assert asyncio.run(run(stopped=True)) == (0, 0)
    assert asyncio.run(run(stopped=False)) == (1, 1)


@pytest.mark.faults
def test_told_to_stop_while_the_model_is_loading_it_leaves_at_once(tmp_path: Path) -> None:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("import time; time.sleep(300)\n")
    command = ["-m", "backends.offline.worker", "--engine", "vllm", "--model", "m", "--port", "0"]
    command += ["--desk", "http://127.0.0.1:9", "--worker-id", "w"]

    async def run() -> int:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *command,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": f"{Path.cwd()}:{tmp_path}"},
        )
        assert process.stdout is not None
        assert (await process.stdout.readline()).startswith(b"listening on")
        await asyncio.sleep(0.3)  # so that it is loading, as it will be for minutes
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(20):
            return await process.wait()

    assert asyncio.run(run()) == 0
