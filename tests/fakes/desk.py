"""A desk in memory behind real HTTP: chunks in the order of the lines, holds, fences, counts.

Its rules are those of `backends.offline.work`, in their shortest form; time is the test's.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import NamedTuple

import msgspec
from aiohttp import web

from backends.offline.work import (
    ASK_PATH,
    REPORT_PATH,
    WORK_BYTES_MAX,
    Ask,
    Chunk,
    Line,
    Receipt,
    Report,
    Result,
)

Key = tuple[str, int]


class _Held(NamedTuple):
    fence: int
    worker_id: str
    until_s: float
    keys: frozenset[Key]


class MemoryDesk:
    """Gives out `lines`, collects results."""

    def __init__(self, lines: list[Line], hold_s: float = 60.0, work_key: str = "") -> None:
        self.hold_s = hold_s
        self.work_key = work_key
        self.results: dict[Key, Result] = {}
        self.refused = 0  # results that came too late
        self.repeated: Counter[Key] = Counter()  # how often a line was given out
        self.reports: list[Report] = []
        self.asks: list[Ask] = []
        self.ended: set[str] = set()  # jobs
        self.down = False  # answers 503
        self.on_report = asyncio.Event()
        self._lines: dict[Key, Line] = {}
        self._waiting: list[Key] = []
        self.add(lines)
        self._held: dict[str, _Held] = {}
        self._fence = 0
        self._runner: web.AppRunner | None = None

    def add(self, lines: list[Line]) -> None:
        """Have more to give out."""
        more = {(line.job_id, line.number): line for line in lines}
        self._lines |= more
        self._waiting += more

    async def start(self) -> str:
        """Listen; return the URL."""
        app = web.Application(client_max_size=WORK_BYTES_MAX)
        app.router.add_post(ASK_PATH, self._serve_ask)
        app.router.add_post(REPORT_PATH, self._serve_report)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def close(self) -> None:
        """Stop listening."""
        if self._runner is not None:
            await self._runner.cleanup()

    @property
    def held(self) -> int:
        """Lines that workers hold."""
        return sum(len(held.keys) for held in self._held.values())

    async def until(self, count: int, timeout_s: float = 60.0) -> None:
        """Wait until so many lines have results."""
        async with asyncio.timeout(timeout_s):
            while len(self.results) < count:
                self.on_report.clear()
                await self.on_report.wait()

    def take_away(self) -> None:
        """Let all holds be over at once: the next reports are too late."""
        self._held = {key: held._replace(until_s=0.0) for key, held in self._held.items()}

    def come_back(self) -> None:
        """Answer again, as one that was started anew: the holds count from now."""
        until_s = time.monotonic() + self.hold_s
        self._held = {key: held._replace(until_s=until_s) for key, held in self._held.items()}
        self.down = False

    def ask(self, ask: Ask) -> Chunk | None:
        """Give out lines."""
        self._expire()
        keys = self._waiting[: ask.lines_max]
        if not keys:
            return None
        del self._waiting[: len(keys)]
        self.repeated.update(keys)
        self._fence += 1
        chunk_id = f"chunk-{self._fence}"
        until_s = time.monotonic() + self.hold_s
        self._held[chunk_id] = _Held(self._fence, ask.worker_id, until_s, frozenset(keys))
        return Chunk(
            chunk_id=chunk_id,
            fence=self._fence,
            hold_s=self.hold_s,
            due_in_s=3600.0,
            lines=tuple(self._lines[key] for key in keys),
        )

    def report(self, report: Report) -> Receipt:
        """Take results."""
        self._expire()
        self.reports.append(report)
        self.on_report.set()
        held = self._held.get(report.chunk_id)
        if held is None or held.fence != report.fence:
            self.refused += len(report.results)
            return Receipt(held=False)
        keys = set(held.keys)
        accepted = 0
        for result in report.results:
            key = (result.job_id, result.number)
            if key in keys:
                keys.discard(key)
                self.results[key] = result
                accepted += 1
        back = keys if report.done else keys & set(report.back)
        self._waiting[:0] = sorted(back)
        keys -= back
        del self._held[report.chunk_id]
        if keys:
            until_s = time.monotonic() + self.hold_s
            self._held[report.chunk_id] = held._replace(until_s=until_s, keys=frozenset(keys))
        return Receipt(
            held=True, accepted=accepted, hold_s=self.hold_s, dropped=tuple(sorted(self.ended))
        )

    def _expire(self) -> None:
        now_s = time.monotonic()
        for chunk_id, held in list(self._held.items()):
            if held.until_s <= now_s:
                del self._held[chunk_id]
                self._waiting[:0] = sorted(held.keys)

    def _refusal(self, request: web.Request) -> web.Response | None:
        if self.down:
            return web.Response(status=503, text="down")
        wanted = f"Bearer {self.work_key}" if self.work_key else ""
        if self.work_key and request.headers.get("authorization") != wanted:
            return web.Response(status=401, text="wrong work key")
        return None

    async def _serve_ask(self, request: web.Request) -> web.Response:
        ask = msgspec.json.decode(await request.read(), type=Ask)
        self.asks.append(ask)
        end_s = time.monotonic() + min(ask.wait_s, 1.0)
        while (refusal := self._refusal(request)) is None:
            chunk = self.ask(ask)
            if chunk is not None:
                return web.Response(body=msgspec.json.encode(chunk))
            if time.monotonic() >= end_s:
                return web.Response(status=204)
            await asyncio.sleep(0.02)
        return refusal

    async def _serve_report(self, request: web.Request) -> web.Response:
        refusal = self._refusal(request)
        if refusal is not None:
            return refusal
        report = msgspec.json.decode(await request.read(), type=Report)
        return web.Response(body=msgspec.json.encode(self.report(report)))
