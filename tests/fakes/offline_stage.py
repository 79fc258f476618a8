"""An offline service in the test's own loop, and a worker that does its lines over HTTP.

The store is a real SQLite file, the sockets are real; only the clock can be put forward, and the
worker answers by rule instead of by model.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from openai import AsyncOpenAI

from backends.clock import SystemClock
from backends.log import Log
from backends.offline.service import OfflineService, listen, open_store
from backends.offline.setting import Setting
from backends.offline.work import Ask, Chunk, Line, LineError, Receipt, Report, Result
from backends.serve import Orders
from proxy.config import parse_config

CHAT = "/v1/chat/completions"
CONFIG = """
models:
- name: demo
  pools:
  - {engine: simulator, adapters: {tuned: /models/tuned}}
  - {engine: simulator, name: jobs, serves: jobs, gpu_price_per_hour: 3.6}
"""
LONG = "too long"  # a prompt with these words gets 400
PATIENCE_S = 30.0


class MovedClock(SystemClock):
    """The machine's clock, `ahead_s` later."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def unix_s(self) -> float:
        return super().unix_s() + self.ahead_s


class Stage:
    """A running service."""

    def __init__(self, url: str, clock: MovedClock, orders: Orders) -> None:
        self.url = url
        self.clock = clock
        self.orders = orders

    def client(self, key: str = "key", **options: Any) -> AsyncOpenAI:
        return AsyncOpenAI(base_url=self.url + "/v1", api_key=key, max_retries=0, **options)


@asynccontextmanager
async def offline_stage(
    folder: Path, offline: Mapping[str, object] | None = None, **setting: Any
) -> AsyncIterator[Stage]:
    """Run a service over the store in `folder`, with these keys of its configuration."""
    config = parse_config(setting.pop("config", CONFIG), "the test")
    given = msgspec.structs.asdict(config.offline) | {"hold_secs": 2.0} | dict(offline or {})
    given["store"] = setting.pop("store", str(folder / "offline.db"))
    config = msgspec.structs.replace(
        config,
        offline=msgspec.convert(given, type(config.offline)),
        proxy=msgspec.structs.replace(config.proxy, api_key=setting.pop("api_key", None)),
    )
    values = {"config_path": None, "manager_url": None, "proxy_url": None} | setting
    whole = Setting(config=config, **values)
    clock, orders = MovedClock(), Orders()
    store = await open_store(whole, clock)
    service = OfflineService(whole, store, clock, Log())
    listener = listen("127.0.0.1", 0)
    running = asyncio.ensure_future(service.run(listener, orders))
    try:
        yield Stage(f"http://127.0.0.1:{listener.getsockname()[1]}", clock, orders)
    finally:
        orders.stop.set()
        assert await asyncio.wait_for(running, PATIENCE_S) == 0
        await store.close()


class HttpWorker:
    """Does lines: echoes the last word of the prompt, and refuses what is too long."""

    def __init__(self, url: str, key: str = "", worker_id: str = "w") -> None:
        self._url = url
        self._headers = {"authorization": f"Bearer {key}"} if key else {}
        self._worker_id = worker_id
        self.urls: tuple[str, ...] = (CHAT, "/v1/embeddings", "/v1/completions", "/v1/responses")
        self.done: list[tuple[str, int]] = []

    async def ask(
        self, session: aiohttp.ClientSession, lines_max: int = 1000, wait_s: float = 0.0
    ) -> Chunk | None:
        ask = Ask(
            worker_id=self._worker_id,
            models=("demo",),
            urls=self.urls,
            lines_max=lines_max,
            wait_s=wait_s,
        )
        body = await self._post(session, "/desk/ask", ask)
        return msgspec.json.decode(body, type=Chunk) if body else None

    async def report(
        self,
        session: aiohttp.ClientSession,
        chunk: Chunk,
        results: list[Result],
        *,
        done: bool = False,
        busy_s: float = 0.0,
    ) -> Receipt:
        report = Report(
            worker_id=self._worker_id,
            chunk_id=chunk.chunk_id,
            fence=chunk.fence,
            results=tuple(results),
            done=done,
            busy_s=busy_s,
        )
        return msgspec.json.decode(await self._post(session, "/desk/report", report), type=Receipt)

    async def work(self, lines: int = 10**9, lines_max: int = 1000) -> None:
        """Do lines until there are none, or so many are done."""
        async with aiohttp.ClientSession() as session:
            while len(self.done) < lines:
                room = min(lines_max, lines - len(self.done))
                chunk = await self.ask(session, room)
                if chunk is None:
                    return
                results = [answer(line) for line in chunk.lines]
                await self.report(session, chunk, results, done=True, busy_s=1.0)
                self.done += [(line.job_id, line.number) for line in chunk.lines]

    async def _post(self, session: aiohttp.ClientSession, path: str, what: msgspec.Struct) -> bytes:
        body = msgspec.json.encode(what)
        async with asyncio.timeout(PATIENCE_S):
            while True:
                url = self._url + path
                async with session.post(url, data=body, headers=self._headers) as response:
                    assert response.status in {200, 204, 503}, await response.text()
                    if response.status != 503:
                        return await response.read()
                await asyncio.sleep(0.05)


def answer(line: Line) -> Result:
    """Return what came of a line."""
    body = json.loads(bytes(line.body))
    words = body["messages"][-1]["content"]
    if words == "nobody":
        error = LineError("worker_died", "The workers died.")
        return Result(job_id=line.job_id, number=line.number, error=error)
    if LONG in words:
        problem = {"error": {"message": "too long", "code": "context_length_exceeded"}}
        return Result(
            job_id=line.job_id,
            number=line.number,
            status=400,
            body=msgspec.Raw(json.dumps(problem).encode()),
        )
    told = {"choices": [{"message": {"content": words.split()[-1]}}]}
    return Result(
        job_id=line.job_id,
        number=line.number,
        status=200,
        request_id=f"req-{line.number}",
        body=msgspec.Raw(json.dumps(told).encode()),
        prompt_tokens=10,
        cached_tokens=4,
        completion_tokens=3,
    )


def request(n: int, content: str | None = None, **changes: Any) -> dict[str, Any]:
    """Return line `n` of an input file."""
    messages = [{"role": "user", "content": content or f"say {n}"}]
    line = {
        "custom_id": f"id-{n}",
        "method": "POST",
        "url": CHAT,
        "body": {"model": "demo", "messages": messages, "max_tokens": 4},
    }
    return line | changes


def jsonl(lines: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


async def until_state(client: AsyncOpenAI, batch_id: str, *states: str) -> Any:
    """Wait for a batch to be in one of these states; return it."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            batch = await client.batches.retrieve(batch_id)
            if batch.status in states:
                return batch
            await asyncio.sleep(0.02)
