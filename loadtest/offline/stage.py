"""A service and its workers as processes, and a job in them from its first octet to its last.

Everything is a command line and HTTP, as for any stranger.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import orjson

from loadtest.offline.lines import CHAT
from loadtest.run import RunError

POLL_S = 0.05
STOP_S = 20.0
SAID_CHARACTERS_MAX = 3000
STALL_S = 60.0  # without one line done, on any machine, nothing is being computed
LOG_HEAD_BYTES, LOG_TAIL_BYTES = 1024 * 1024, 4 * 1024 * 1024  # of a log, once its program ended
ENDED = ("completed", "failed", "expired", "cancelled")
DOHERTY = (sys.executable, "-m", "backends.cli")


class Course(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a job. Seconds count from when the batch was asked for."""

    lines: int  # in its files
    failed: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    running_s: float  # until it was validated
    answered_s: float  # until the last line was answered
    ended_s: float

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    @property
    def tokens_per_s(self) -> float:
        """Of the time in which lines were done."""
        return self.tokens / (self.answered_s - self.running_s)


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        return int(holder.getsockname()[1])


@contextlib.asynccontextmanager
async def program(
    command: Sequence[str], log: Path, environ: Mapping[str, str] | None = None
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process in a session of its own; ended with all its children. Raises `RunError`.

    Then its log is cut in the middle, if it is long: one reads how it began and how it ended.
    """
    with open(log, "wb") as output:  # noqa: ASYNC230 - once, before anything is measured
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **(environ or {})},
            )
        except OSError as error:
            raise RunError(f"{command[0]}: cannot be started: {error.strerror}") from error
    try:
        yield process
    finally:
        await _stop(process)
        cut(log)


def cut(log: Path) -> None:
    """Leave out the middle of a long log."""
    left_out = log.stat().st_size - LOG_HEAD_BYTES - LOG_TAIL_BYTES
    if left_out <= 0:
        return
    with log.open("r+b") as file:
        file.seek(-LOG_TAIL_BYTES, os.SEEK_END)
        tail = file.read()
        file.seek(LOG_HEAD_BYTES)
        file.write(b"\n... %d bytes are left out ...\n" % left_out + tail)
        file.truncate()


@contextlib.asynccontextmanager
async def alive(process: asyncio.subprocess.Process, log: Path) -> AsyncIterator[None]:
    """Break the body off as soon as the process ends; say its last words with any failure.

    Who waits for an engine's answers would wait in vain for one that has died. Raises `RunError`.
    """

    async def until_ended() -> None:
        raise RunError(f"it ended with {await process.wait()} before its work was done")

    try:
        async with asyncio.TaskGroup() as group:
            watch = group.create_task(until_ended())
            yield
            watch.cancel()
    except BaseExceptionGroup as errors:
        first = errors.exceptions[0]
        if isinstance(first, RunError):
            raise RunError(f"{first}; the end of {log.name}: {said(log)}") from None
        raise first from None


async def _stop(process: asyncio.subprocess.Process) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_S):
                await process.wait()
                return


async def until_healthy(
    url: str, process: asyncio.subprocess.Process, log: Path, limit_s: float
) -> float:
    """Wait until GET /health answers 200; return the seconds. Raises `RunError`."""
    begun_s = time.monotonic()
    async with aiohttp.ClientSession() as session:
        while (waited_s := time.monotonic() - begun_s) < limit_s:
            if process.returncode is not None:
                raise RunError(f"it ended with {process.returncode}: {said(log)}")
            with contextlib.suppress(aiohttp.ClientError, OSError):
                async with session.get(url + "/health") as answer:
                    if answer.status == 200:
                        return waited_s
            await asyncio.sleep(POLL_S)
    raise RunError(f"not ready in {limit_s:g} s: {said(log)}")


def said(log: Path) -> str:
    """Return the end of a log."""
    return log.read_text("utf-8", "replace")[-SAID_CHARACTERS_MAX:].strip() or "it said nothing"


@contextlib.asynccontextmanager
async def service(
    folder: Path, offline: Mapping[str, object], doherty: Sequence[str] = DOHERTY
) -> AsyncIterator[str]:
    """A standalone offline service; its URL."""
    port = free_port()
    store = str(folder / "offline.db")
    config = {"offline": {"port": port, "store": store, **offline}}
    path, log = folder / "doherty.yaml", folder / "service.log"
    path.write_bytes(orjson.dumps(config, option=orjson.OPT_INDENT_2))  # JSON is YAML
    url = f"http://127.0.0.1:{port}"
    async with program([*doherty, "offline", str(path)], log) as process:
        await until_healthy(url, process, log, 60.0)
        yield url


@contextlib.asynccontextmanager
async def whole(value: dict[str, Any], folder: Path) -> AsyncIterator[tuple[dict[str, str], int]]:
    """A `doherty up` of this configuration; its URLs and its process."""
    path, log = folder / "doherty.yaml", folder / "up.log"
    path.write_bytes(orjson.dumps(value, option=orjson.OPT_INDENT_2))  # JSON is YAML
    urls = {
        name: f"http://127.0.0.1:{value[name]['port']}" for name in ("proxy", "manager", "offline")
    }
    async with program([*DOHERTY, "up", str(path)], log) as process:
        await until_healthy(urls["offline"], process, log, 60.0)
        await _until_said("Ready:", log, 60.0)  # from then on what dies is started again
        yield urls, process.pid


async def _until_said(words: str, log: Path, limit_s: float) -> None:
    end_s = time.monotonic() + limit_s
    while words not in said(log):
        if time.monotonic() > end_s:
            raise RunError(f"not {words!r} in {limit_s:g} s: {said(log)}")
        await asyncio.sleep(POLL_S)


async def do_job(
    url: str, content: bytes, limit_s: float, endpoint: str = CHAT, stall_s: float = STALL_S
) -> Course:
    """Upload a file, have it done, read all of its answers. Raises `RunError`."""
    try:
        async with asyncio.timeout(limit_s), aiohttp.ClientSession(url) as session:
            file_id = await upload(session, content)
            begun_s = time.monotonic()
            batch = await begin(session, file_id, endpoint)
            running_s, answered_s, now_s, moved_s, done = 0.0, 0.0, 0.0, 0.0, -1
            while batch["status"] not in ENDED:
                await asyncio.sleep(POLL_S)
                batch = await answer_json(session.get(f"/v1/batches/{batch['id']}"))
                now_s = time.monotonic() - begun_s
                counts = batch["request_counts"]
                before, done = done, counts["completed"] + counts["failed"]
                moved_s = now_s if done != before else moved_s
                if now_s - moved_s > stall_s:
                    raise RunError(f"for {stall_s:g} s no line was done, of {counts['total']}")
                if not running_s and batch["status"] != "validating":
                    running_s = now_s
                if not answered_s and 0 < counts["total"] == done:
                    answered_s = now_s
            return await _course(session, batch, running_s, answered_s, now_s)
    except (aiohttp.ClientError, OSError) as error:
        raise RunError(f"the service does not answer: {error}") from error
    except TimeoutError:
        raise RunError(f"the job was not done in {limit_s:g} s") from None


async def upload(session: aiohttp.ClientSession, content: bytes) -> str:
    """Upload an input file; return its id. Raises `RunError`."""
    form = aiohttp.FormData()
    form.add_field("purpose", "batch")
    form.add_field("file", content, filename="job.jsonl")
    file = await answer_json(session.post("/v1/files", data=form))
    return str(file["id"])


async def begin(session: aiohttp.ClientSession, file_id: str, endpoint: str) -> dict[str, Any]:
    """Ask for a batch; return it. Raises `RunError`."""
    asked = {"input_file_id": file_id, "endpoint": endpoint, "completion_window": "24h"}
    return await answer_json(session.post("/v1/batches", json=asked))


async def rows(session: aiohttp.ClientSession, batch: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the lines of both files of an ended batch."""
    found: list[dict[str, Any]] = []
    for file_id in (batch.get("output_file_id"), batch.get("error_file_id")):
        if file_id is not None:
            async with session.get(f"/v1/files/{file_id}/content") as answer:
                found += map(orjson.loads, (await answer.read()).splitlines())
    return found


async def answer_json(asking: Any) -> dict[str, Any]:
    async with asking as answer:
        body = await answer.read()
        if answer.status != 200:
            raise RunError(f"{answer.method} {answer.url.path}: {answer.status} {body[:300]!r}")
        value: dict[str, Any] = orjson.loads(body)
        return value


async def _course(
    session: aiohttp.ClientSession,
    batch: dict[str, Any],
    running_s: float,
    answered_s: float,
    ended_s: float,
) -> Course:
    """Read both files; every line must be there once."""
    if batch["status"] != "completed":
        raise RunError(f"the job ended as {batch['status']}: {batch.get('errors')}")
    seen: set[str] = set()
    sums = {"prompt_tokens": 0, "completion_tokens": 0, "cached_tokens": 0}
    failed = 0
    for line in await rows(session, batch):
        if line["custom_id"] in seen:
            raise RunError(f"{line['custom_id']} is there twice")
        seen.add(line["custom_id"])
        response = line["response"]
        if response is None or response["status_code"] != 200:
            failed += 1
            continue
        usage = response["body"]["usage"]
        sums["prompt_tokens"] += usage["prompt_tokens"]
        sums["completion_tokens"] += usage["completion_tokens"]
        details = usage.get("prompt_tokens_details") or {}
        sums["cached_tokens"] += details.get("cached_tokens") or 0
    if len(seen) != batch["request_counts"]["total"]:
        raise RunError(f"{batch['request_counts']['total'] - len(seen)} lines are in no file")
    return Course(
        lines=len(seen),
        failed=failed,
        running_s=round(running_s, 3),
        answered_s=round(answered_s, 3),
        ended_s=round(ended_s, 3),
        **sums,
    )
