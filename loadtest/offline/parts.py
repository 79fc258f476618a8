"""Clients that outlive what they ask: the API while its processes are killed, workers' counters."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp
import msgspec
import orjson

from loadtest.offline import stage
from loadtest.run import RunError

AGAIN = (429, 502, 503, 504)
AGAIN_S = 0.2
PATIENCE_S = 60.0
LOOK_S = 0.2
ENDING_S = 20.0
_DONE = re.compile(r'^doherty_worker_lines_total\{outcome="(?:done|failed)"\} (\S+)$', re.MULTILINE)


class Patient:
    """The public API; whatever cannot be answered now is asked again."""

    def __init__(self, url: str, endpoint: str = "/v1/chat/completions") -> None:
        self._session = aiohttp.ClientSession(url, timeout=aiohttp.ClientTimeout(total=60.0))
        self._endpoint = endpoint

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._session.close()

    async def submit(self, content: bytes, name: str = "job") -> str:
        """Upload a file and have it done, once by each name; return the batch's id."""
        sent = await self._asked(
            "POST", "/v1/files", lambda: {"data": _form(content)}, f"file of {name}"
        )
        wish = {
            "input_file_id": orjson.loads(sent)["id"],
            "endpoint": self._endpoint,
            "completion_window": "24h",
        }
        made = await self._asked("POST", "/v1/batches", lambda: {"json": wish}, name)
        return str(orjson.loads(made)["id"])

    async def batch(self, batch_id: str) -> dict[str, Any]:
        """Return a batch."""
        value: dict[str, Any] = orjson.loads(await self._asked("GET", f"/v1/batches/{batch_id}"))
        return value

    async def until_ended(self, batch_id: str) -> dict[str, Any]:
        """Return the batch when it has ended."""
        while True:
            batch = await self.batch(batch_id)
            if batch["status"] in stage.ENDED:
                return batch
            await asyncio.sleep(AGAIN_S)

    async def rows(self, file_id: str | None) -> list[dict[str, Any]]:
        """Return the lines of an output or error file; none of a file that there is not."""
        if file_id is None:
            return []
        content = await self._asked("GET", f"/v1/files/{file_id}/content")
        return [orjson.loads(row) for row in content.splitlines()]

    async def _asked(
        self,
        method: str,
        path: str,
        sent: Callable[[], dict[str, Any]] = dict,
        once: str = "",
    ) -> bytes:
        """`once`: a key under which this client makes a thing only once."""
        headers = {"idempotency-key": f"{os.getpid()}-{id(self)}-{once}"} if once else {}
        end_s = time.monotonic() + PATIENCE_S
        while True:
            problem: object
            try:
                async with self._session.request(method, path, headers=headers, **sent()) as answer:
                    body = await answer.read()
                    if answer.status in (200, 206):
                        return body
                    problem = f"{answer.status} {body[:300]!r}"
                    if answer.status not in AGAIN:
                        raise RunError(f"{method} {path}: {problem}")
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                problem = error
            if time.monotonic() > end_s:
                raise RunError(f"{method} {path}: no answer in {PATIENCE_S:g} s: {problem}")
            await asyncio.sleep(AGAIN_S)


def _form(content: bytes) -> aiohttp.FormData:
    form = aiohttp.FormData()
    form.add_field("purpose", "batch")
    form.add_field("file", content, filename="job.jsonl")
    return form


class _Worker(msgspec.Struct):
    url: str
    pid: int = 0


class _Fleet(msgspec.Struct):
    workers: list[_Worker] = []


class Computed:
    """How many lines each engine worker has computed in its life, as far as it could tell."""

    def __init__(self, manager_url: str) -> None:
        self._url = manager_url
        self._lines: dict[int, int] = {}  # by process
        self._known: list[_Worker] = []
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2.0))
        self._looking: asyncio.Future[None] | None = None

    async def __aenter__(self) -> Self:
        self._looking = asyncio.ensure_future(self._look_on())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._looking is not None
        self._looking.cancel()
        await asyncio.gather(self._looking, return_exceptions=True)
        await self._session.close()

    @property
    def total(self) -> int:
        return sum(self._lines.values())

    @property
    def pids(self) -> set[int]:
        return set(self._lines)

    async def last_look(self) -> None:
        """Ask once more, when there is a manager: only that can end those it has started."""
        end_s = time.monotonic() + PATIENCE_S
        while not await self.look():
            if time.monotonic() > end_s:
                raise RunError("the manager did not come back")
            await asyncio.sleep(AGAIN_S)

    async def look(self) -> bool:
        """Ask the manager who there is, and all of these; return whether it answered."""
        answered = False
        with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError, msgspec.MsgspecError):
            fleet = msgspec.json.decode(await self._get(self._url + "/v1/fleet"), type=_Fleet)
            self._known = [worker for worker in fleet.workers if worker.pid]
            answered = True
        await asyncio.gather(*map(self._ask, self._known))
        return answered

    async def busiest(self, number: int) -> int:
        """Return the process of a worker that was asked right now, in turns; 0: there is none."""
        await self.look()
        alive = sorted(w.pid for w in self._known if w.pid in self._lines and _runs(w.pid))
        if not alive:
            return 0
        pid = alive[number % len(alive)]
        await asyncio.gather(*(self._ask(worker) for worker in self._known if worker.pid == pid))
        return pid

    async def _look_on(self) -> None:
        while True:
            await self.look()
            await asyncio.sleep(LOOK_S)

    async def _ask(self, worker: _Worker) -> None:
        with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
            page = (await self._get(worker.url + "/metrics")).decode()
            lines = int(sum(map(float, _DONE.findall(page))))
            self._lines[worker.pid] = max(lines, self._lines.get(worker.pid, 0))

    async def _get(self, url: str) -> bytes:
        async with self._session.get(url) as answer:
            return await answer.read()


def _runs(pid: int) -> bool:
    """Say whether a process is there and no mere entry of one that ended (proc(5))."""
    with contextlib.suppress(OSError):
        stat = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
        return stat.rpartition(")")[2].split()[0] not in {"Z", "X"}
    return False


async def ended_workers(pids: set[int]) -> int:
    """Wait until none of these processes runs; return how many still do after a while."""
    end_s = time.monotonic() + ENDING_S
    while left := sum(map(_runs, pids)):
        if time.monotonic() > end_s:
            return left
        await asyncio.sleep(0.1)
    return 0
