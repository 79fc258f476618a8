"""A simulated engine in this process, on a free port of 127.0.0.1, for tests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import msgspec

from backends.simulator.app import Process
from backends.simulator.profiles import PROFILES
from backends.simulator.settings import Settings

FAST = Settings(profile=PROFILES["fast"], time_scale=4.0, drain_poll_s=0.05)


class Simulated:
    """A running engine and a client session to it."""

    def __init__(self, process: Process, session: aiohttp.ClientSession, port: int) -> None:
        self.process = process
        self.session = session
        self.port = port
        self.url = f"http://127.0.0.1:{port}"

    async def post(
        self, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        """Return status and JSON value (text where it is none)."""
        data = body if isinstance(body, bytes | None) else msgspec.json.encode(body)
        async with self.session.post(self.url + path, data=data, headers=headers) as response:
            return response.status, _value(await response.read())

    async def get(self, path: str) -> tuple[int, Any]:
        """Return status and JSON value (text where it is none)."""
        async with self.session.get(self.url + path) as response:
            return response.status, _value(await response.read())

    async def stream(self, path: str, body: Any) -> list[str]:
        """Return the payloads of all `data:` lines of an event stream."""
        async with self.session.post(self.url + path, data=msgspec.json.encode(body)) as response:
            assert response.status == 200
            assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
            text = (await response.read()).decode()
        return [line[6:] for line in text.split("\n") if line.startswith("data: ")]

    async def state(self) -> dict[str, Any]:
        """Return the internals."""
        status, value = await self.get("/simulator/state")
        assert status == 200
        return dict(value)

    async def until(self, claim: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Wait until `claim` holds of the internals; return them."""
        async with asyncio.timeout(20):
            while True:
                state = await self.state()
                if claim(state):
                    return state
                await asyncio.sleep(0.005)


def _value(data: bytes) -> Any:
    try:
        return msgspec.json.decode(data)
    except msgspec.DecodeError:
        return data.decode()


@asynccontextmanager
async def simulator(**changes: Any) -> AsyncIterator[Simulated]:
    """Run an engine with `FAST` settings and `changes`."""
    process = Process(msgspec.structs.replace(FAST, **changes))
    try:
        port = await process.start()
        async with aiohttp.ClientSession() as session:
            yield Simulated(process, session, port)
    finally:
        await process.close()
