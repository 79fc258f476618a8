"""The locustfile as people start it, against engines that do as the test says."""

import asyncio
import importlib.util
import itertools
import os
import re
import shutil
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from typing_extensions import override

from tests.fakes.programs import ROOT, free_port
from tests.fakes.sse_engine import SseEngine, chunk, send
from tests.fakes.whole import Whole

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("locust") is None, reason="no Locust; install the extra `locust`"
)
LOCUSTFILE = ROOT / "loadtest" / "locustfile.py"
QUICK = (
    "--think-s",
    "0.03",
    "--prompt-tokens",
    "5",
    "--system-tokens",
    "5",
    "--output-tokens",
    "8",
)


class PacedEngine(SseEngine):
    """Streams at a known pace, and writes down what it came to."""

    FIRST_S, GAP_S = 0.3, 0.03

    def __init__(self) -> None:
        super().__init__()
        self.first_ms: list[float] = []
        self.gaps_ms: list[float] = []

    @override
    async def _stream(
        self, request: web.Request, response: web.StreamResponse, body: dict[str, Any]
    ) -> None:
        begun_s = time.perf_counter()
        await asyncio.sleep(self.FIRST_S)
        first_s = time.perf_counter()
        for place in range(body["max_tokens"]):
            if place:
                await asyncio.sleep(self.GAP_S)
            await send(response, chunk({"content": " abc"}))
        self.first_ms.append((first_s - begun_s) * 1000)
        self.gaps_ms.append((time.perf_counter() - first_s) * 1000 / (body["max_tokens"] - 1))
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()


async def locust(*argv: str, cwd: Path = ROOT, key: str = "") -> tuple[int, str]:
    """Run Locust; return its exit status and all that it said."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), *argv),
        cwd=cwd,
        env={**os.environ, "OPENAI_API_KEY": key},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode()


def headless(url: str, *argv: str, users: int = 2, run_time: str = "1s") -> tuple[str, ...]:
    load = ("--headless", "--only-summary", "-u", str(users), "-r", "10", "-t", run_time)
    return ("--host", url, *load, *argv)


def row(output: str, kind: str, name: str) -> dict[str, float]:
    """Return a row of the first table."""
    match = re.search(
        rf"^ *{kind} +{re.escape(name)} +(\d+) +(\d+)\(\S+\) \| +(\d+) +(\d+) +(\d+)",
        output,
        re.MULTILINE,
    )
    assert match, output
    names = ("count", "failed", "average", "least", "most")
    return dict(zip(names, map(float, match.groups()), strict=True))


async def test_times_are_those_of_the_engine_and_limits_decide_the_status() -> None:
    async with PacedEngine() as engine:
        argv = headless(engine.url, *QUICK, "--fail-ttft-p99-ms", "299", users=3)
        status, output = await locust(*argv)
    chat = "/v1/chat/completions"
    first, gap, whole = (row(output, kind, chat) for kind in ("TTFT", "TPOT", "POST"))
    assert first["count"] == gap["count"] == whole["count"] == len(engine.first_ms) >= 3
    assert first["least"] >= engine.FIRST_S * 1000 - 1
    # By ratio to what the engine itself came to: a busy machine slows both. A first token that is
    # read late is further from the request and nearer to the last one; the sum stays.
    mean_first = sum(engine.first_ms) / len(engine.first_ms)
    mean_gap = sum(engine.gaps_ms) / len(engine.gaps_ms)
    assert 0.95 < first["average"] / mean_first < 2
    assert gap["average"] / mean_gap < 1.3
    seen, told = first["average"] + 7 * (gap["average"] + 0.5), mean_first + 7 * mean_gap
    assert 0.95 < seen / told < 2  # the table cuts parts of milliseconds off
    assert whole["average"] >= first["average"] + 7 * gap["average"]
    assert row(output, "Aggregated", "")["count"] == whole["count"]
    assert status == 1
    assert "over the limit: TTFT p99" in output


async def test_every_way_to_fail_is_a_row_of_its_own() -> None:
    wanted = {
        "http_500": "500 server_error",
        "cut": "cut: ",
        "no_done": r"cut: the stream ended without \[DONE\]",
        "error_event": "in stream: engine lost",
        "garbage": "event is not a JSON object of the API",
        "not_a_stream": "answered without an event stream",
    }
    engine, modes = SseEngine(), itertools.cycle(wanted)

    @web.middleware
    async def turn(request: web.Request, handler: Any) -> Any:
        if request.method == "POST":
            engine.mode = next(modes)
        return await handler(request)

    engine.app.middlewares.append(turn)
    async with engine:
        # One user, so that a mode lasts for its request.
        load = (*QUICK, "--fail-error-ratio", "1")
        argv = headless(engine.url, *load, users=1, run_time="2s")
        named = ("--served-by-header", "x-doherty-replica")
        status, output = await locust(*argv, *named)
    for text in wanted.values():
        assert re.search(rf"^\d+ +POST /v1/chat/completions: {text}", output, re.MULTILINE), output
    assert "in stream: engine lost (served by demo-0)" in output
    total = row(output, "Aggregated", "")
    assert total["failed"] == total["count"]
    assert "goodput: 0 of" in output
    assert status == 0  # a limit was given, and holds


async def test_what_cannot_work_is_said_in_a_line() -> None:
    async with SseEngine() as engine:
        error = {"error": {"message": "no", "code": "invalid_api_key"}}
        engine.listing = web.json_response(error, status=401)
        wanted = {
            headless("http://127.0.0.1:9"): "refused; is the server up, and --host right?",
            headless(engine.url): "401 invalid_api_key; give the key by OPENAI_API_KEY",
            headless(engine.url, "--turns", "0"): "--turns 0: expected more than 0",
        }
        ended = await asyncio.gather(*(locust(*argv) for argv in wanted))
    for (status, output), said in zip(ended, wanted.values(), strict=True):
        lines = [line for line in output.splitlines() if not line.startswith("[")]
        assert status == 2
        assert len(lines) == 1
        assert lines[0].startswith("locustfile: ")
        assert lines[0].endswith(said)


async def test_three_files_can_be_copied_and_the_key_is_sent(tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere" / "loadtest"
    folder.mkdir(parents=True)
    for name in ("locustfile.py", "locust_answers.py", "locust_setting.py"):
        shutil.copy(ROOT / "loadtest" / name, folder)
    async with SseEngine() as engine:
        argv = headless(engine.url + "/v1", *QUICK, "--no-stream", "-f", "loadtest/locustfile.py")
        named = ("--session-header", "x-session-id", "--seed", "7", "CompletionUser", "ChatUser")
        status, output = await locust(*argv, *named, cwd=folder.parent, key="sk-test")
    # SseEngine answers what is not streamed without a text: a good answer all the same.
    assert row(output, "POST", "/v1/completions")["count"] > 0
    assert status == 0, output
    assert {head["authorization"] for head in engine.request_headers} == {"Bearer sk-test"}
    chats = [head for head in engine.request_headers if "x-session-id" in head]
    assert chats
    assert "messages" in engine.bodies[0] or "prompt" in engine.bodies[0]


@asynccontextmanager
async def page_of_locust(url: str, port: int) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--host", url),
        *("--web-host", "127.0.0.1", "--web-port", str(port)),
        cwd=ROOT,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        process.terminate()
        await process.wait()


async def until_answered(session: aiohttp.ClientSession, path: str) -> str:
    while True:
        try:
            async with session.get(path) as answer:
                return await answer.text()
        except aiohttp.ClientConnectionError:
            await asyncio.sleep(0.05)


async def test_the_page_starts_changes_and_stops_the_load() -> None:
    port = free_port()
    base = f"http://127.0.0.1:{port}"
    async with (
        SseEngine() as engine,
        page_of_locust(engine.url, port),
        aiohttp.ClientSession(base) as session,
    ):
        shown = await until_answered(session, "/")
        assert "slo_ttft_ms" in shown
        assert "api_key" not in shown
        form = {"user_count": "2", "spawn_rate": "10", "host": engine.url + "/v1"}
        given = {"think_s": "0", "turns": "2", "output_tokens": "3"}
        async with session.post("/swarm", data=form | given) as answer:
            assert (await answer.json())["success"]
        await engine.until_arrived(6)
        async with session.post("/stop") as answer:
            assert (await answer.json())["success"]
        async with session.get("/stats/requests") as answer:
            stats = (await answer.json())["stats"]
    counts = {entry["method"]: entry["num_requests"] for entry in stats}
    assert counts["POST"] == counts["TTFT"] == counts["TPOT"] >= 5
    assert {len(body["messages"]) for body in engine.bodies} == {2, 4}  # as the form said: 2 turns
    assert {body["max_tokens"] for body in engine.bodies} == {3}


def test_chats_and_jobs_against_all_of_doherty(tmp_path: Path) -> None:
    whole = Whole(tmp_path, "--offline-port=0")
    try:
        whole.start()
        brief = ("--think-s", "0.1", "--output-tokens", "10", "--batch-lines", "5")
        argv = headless(whole.url, *brief, run_time="3s")
        status, output = asyncio.run(locust(*argv, "ChatUser", "BatchUser"))
    finally:
        whole.up.end()
    assert status == 0, output
    assert row(output, "JOB", "/v1/batches")["count"] >= 1
    assert row(output, "GOOD", "/v1/chat/completions")["count"] >= 1
    tokens = re.search(
        r"^tokens: (\d+) of prompts, (\S+)% of them from a cache", output, re.MULTILINE
    )
    assert tokens
    assert int(tokens[1]) > 0
    assert float(tokens[2]) > 0
    assert "Error report" not in output
