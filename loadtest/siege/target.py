"""The proxy under siege: started as a user would, watched through /proc and its own metrics."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self

from loadtest.client import Client, RequestError, Target
from loadtest.run import RunError

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 15.0
POLL_S = 0.01
# What must be nothing once every request is over.
HELD = (
    "requests_in_flight",
    "leases",
    "request_bodies_bytes",
    'upstream_connections{state="busy"}',
)


class Proxy:
    """One proxy with one worker. Use as `async with Proxy(engine.url) as proxy`."""

    def __init__(
        self, *urls: str, flags: tuple[str, ...] = (), limit: Callable[[], None] | None = None
    ) -> None:
        ports = ("--port", "0", "--admin-port", "0", "--access-log", "off", "--workers", "1")
        self._argv = (sys.executable, "-m", "proxy", "--worker-urls", *urls, *ports, *flags)
        self._limit = limit  # called in the new process, before it becomes the proxy
        self._lines: list[str] = []
        self._reading: asyncio.Task[None] | None = None
        self.port = 0
        self.worker_pid = 0
        self.peak_bytes = 0
        self.process: asyncio.subprocess.Process
        self._admin: Client

    async def __aenter__(self) -> Self:
        self.process = await asyncio.create_subprocess_exec(
            *self._argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            preexec_fn=self._limit,
        )
        self._reading = asyncio.get_running_loop().create_task(self._read())
        try:
            admin_port = await self._told(r"admin listener on http://\S+:(\d+)")
            self.port = await self._told(r"listening on http://\S+?:(\d+), \d+ w")
        except BaseException:
            await self.__aexit__()
            raise
        self._admin = client_of(admin_port)
        self.worker_pid = self._workers()[0]
        return self

    async def __aexit__(self, *_: object) -> None:
        for stop in (self.process.terminate, self.process.terminate, self.process.kill):
            if self.process.returncode is None:
                stop()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.process.wait(), STOP_TIMEOUT_S / 3)
        if self._reading is not None:
            await self._reading

    async def _read(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            self._lines.append(line.decode(errors="replace").rstrip())

    async def _told(self, pattern: str) -> int:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline_s and self.process.returncode is None:
            for line in self._lines:
                if found := re.search(pattern, line):
                    return int(found[1])
            await asyncio.sleep(POLL_S)
        raise RunError("the proxy did not start:\n" + "\n".join(self._lines[-20:]))

    # --- what it is and holds ----------------------------------------------------------------

    @property
    def errors(self) -> list[str]:
        """Return what its log complains of."""
        return [line for line in self._lines if re.search(r"\b(ERROR|Traceback)\b", line)]

    @property
    def same_worker(self) -> bool:
        """Whether the worker that was there at the start is still there."""
        return self.process.returncode is None and self.worker_pid in self._workers()

    def _workers(self) -> list[int]:
        pid = self.process.pid
        try:
            return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
        except OSError:
            return []

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.worker_pid}/fd"))

    def rss_bytes(self) -> int:
        pages = int(Path(f"/proc/{self.worker_pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def cpu_s(self) -> float:
        """Processor time of the worker, all threads, from the scheduler's own account."""
        spent_ns = 0
        for path in Path(f"/proc/{self.worker_pid}/task").glob("*/schedstat"):
            with contextlib.suppress(OSError):
                spent_ns += int(path.read_text().split()[0])
        return spent_ns / 1e9

    async def metrics(self) -> Mapping[str, float]:
        """Return every series of `/metrics`, by its name without the prefix, labels included."""
        text = (await self._admin.get("/metrics")).body.decode()
        return {
            name: float(value) for name, value in re.findall(r"(?m)^doherty_(\S+) (\S+)$", text)
        }

    async def held(self, limit_s: float = 5.0) -> str:
        """Wait until nothing is held; return what still is after the limit, or nothing."""
        deadline_s = time.monotonic() + limit_s
        while True:
            metrics = await self.metrics()
            left = [f"{name} {metrics[name]:g}" for name in HELD if metrics[name]]
            if not left or time.monotonic() > deadline_s:
                return ", ".join(left)
            await asyncio.sleep(POLL_S)

    async def serves(self, body: bytes, limit_s: float) -> float | None:
        """Return after how many seconds a new client gets its answer; None within no limit."""
        begin_s = time.monotonic()
        while time.monotonic() - begin_s < limit_s:
            client = client_of(self.port)
            try:
                async with asyncio.timeout(limit_s):
                    answer = await client.post("/v1/chat/completions", body)
                if answer.status == 200:
                    return time.monotonic() - begin_s
            except (RequestError, TimeoutError):
                pass
            finally:
                client.close()
            await asyncio.sleep(POLL_S)
        return None


def client_of(port: int) -> Client:
    return Client(Target(host="127.0.0.1", port=port, tls=False, path_prefix=""), time.monotonic)
