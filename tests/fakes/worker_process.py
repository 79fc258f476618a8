"""An engine worker of the simulator as a real process."""

from __future__ import annotations

import asyncio
import os
import signal
import sys

import aiohttp


class WorkerProcess:
    """`python -m backends.offline.worker --engine simulator`."""

    def __init__(self, process: asyncio.subprocess.Process, url: str) -> None:
        self._process = process
        self.url = url
        self.pid = process.pid

    @classmethod
    async def start(
        cls,
        desk: str,
        *flags: str,
        model: str = "m",
        worker_id: str = "worker-1",
        work_key: str = "",
        chunk_lines: int = 2000,
    ) -> WorkerProcess:
        """Start one and wait until it listens, loaded or not; `flags` are the simulator's."""
        command = ["-m", "backends.offline.worker", "--engine", "simulator", "--model", model]
        command += ["--desk", desk, "--worker-id", worker_id, "--port", "0"]
        command += ["--chunk-lines", str(chunk_lines), "--", *flags]
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *command,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "DOHERTY_WORK_KEY": work_key},
        )
        assert process.stdout is not None
        line = (await process.stdout.readline()).decode()
        if not line.startswith("listening on "):
            raise AssertionError((await process.communicate())[1].decode())
        return cls(process, line.removeprefix("listening on ").strip())

    async def get(self, path: str) -> tuple[int, str]:
        """Return the status and the text of one of its pages."""
        async with aiohttp.ClientSession() as session, session.get(self.url + path) as answer:
            return answer.status, await answer.text()

    def signal(self, number: int) -> None:
        """Send a signal."""
        self._process.send_signal(number)

    async def wait(self, timeout_s: float = 20.0) -> tuple[int | None, str]:
        """Wait for its end; return the exit code and what it said."""
        async with asyncio.timeout(timeout_s):
            _, said = await self._process.communicate()
        return self._process.returncode, said.decode()

    async def kill(self) -> None:
        """End it, if it has not."""
        if self._process.returncode is None:
            self._process.send_signal(signal.SIGKILL)
            await self._process.communicate()
