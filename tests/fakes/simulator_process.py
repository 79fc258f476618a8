"""A simulated engine as a process of its own, as a manager would start it."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import msgspec

PATIENCE_S = 30.0
ASK = {"model": "demo", "prompt": "p" * 40, "max_tokens": 20_000}


class Started:
    """A simulator process and a client session."""

    def __init__(self, process: asyncio.subprocess.Process, url: str) -> None:
        self.process = process
        self.url = url
        self.session = aiohttp.ClientSession()

    async def get(self, path: str) -> int:
        """Return the status."""
        async with self.session.get(self.url + path) as response:
            return response.status

    async def post(self, path: str, body: object) -> tuple[int, Any]:
        """Return status and JSON value."""
        async with self.session.post(self.url + path, data=msgspec.json.encode(body)) as response:
            return response.status, msgspec.json.decode(await response.read())

    async def until_running(self, count: int) -> None:
        """Wait until so many requests are computed."""
        while True:
            async with self.session.get(self.url + "/simulator/state") as response:
                if (await response.json())["running"] == count:
                    return
            await asyncio.sleep(0.01)

    async def begin(self) -> asyncio.Task[tuple[int, Any]]:
        """Start a request that lasts some twenty seconds and wait until it is computed."""
        task = asyncio.ensure_future(self.post("/v1/completions", ASK))
        await self.until_running(1)
        return task


@asynccontextmanager
async def started(*flags: str) -> AsyncIterator[Started]:
    """Run `python -m backends.simulator` until it says where it listens."""
    command = [sys.executable, "-m", "backends.simulator", "--port", "0", "--profile", "fast"]
    process = await asyncio.create_subprocess_exec(
        *command, *flags, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(30):
            line = (await process.stdout.readline()).decode()
            match = re.fullmatch(r"listening on (http://127\.0\.0\.1:\d+)\n", line)
            assert match, line
            running = Started(process, match[1])
            try:
                yield running
            finally:
                await running.session.close()
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()
