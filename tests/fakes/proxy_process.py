"""The proxy as people run it: `python -m proxy`, on free ports, watched by its log."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any, Self

import orjson
from prometheus_client.parser import text_string_to_metric_families

from tests.fakes.plane import Answer
from tests.fakes.talk import ask

ROOT = Path(__file__).parents[2]


def alive(pid: int) -> bool:
    """Whether a process runs; one that waits for its parent to look does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


class ProxyProcess:
    """Use as `async with ProxyProcess("--worker-urls", url) as proxy`."""

    def __init__(
        self, *flags: str, environment: dict[str, str] | None = None, folder: Path = ROOT
    ) -> None:
        ports = ("--port", "0", "--admin-port", "0", "--access-log", "off")
        self.flags = flags
        self._argv = (sys.executable, "-m", "proxy", *ports, *flags)
        self._folder = folder
        self._environment = {**os.environ, **(environment or {})}
        self.lines: list[str] = []  # of its standard error
        self.output = b""
        self.port = self.admin_port = 0
        self.process: asyncio.subprocess.Process
        self.pid = 0  # of the supervisor; another's after an upgrade
        self._workers_met: set[int] = set()
        self._readers: list[asyncio.Task[None]] = []
        self._heard = asyncio.Condition()

    async def start(self) -> Self:
        """Start it; come back at once, whether or not it will serve."""
        self.process = await asyncio.create_subprocess_exec(
            *self._argv,
            cwd=self._folder,
            env=self._environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        self.pid = self.process.pid
        loop = asyncio.get_running_loop()
        self._readers = [loop.create_task(self._read_log()), loop.create_task(self._read_output())]
        return self

    async def __aenter__(self) -> Self:
        await self.start()
        try:
            self.admin_port = int((await self.until_said(r"admin listener on http://\S+:(\d+)"))[1])
            self.port = int((await self.until_said(r"listening on https?://\S+?:(\d+), \d+ w"))[1])
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self.workers()
        if self.process.returncode is None:
            self.process.kill()
        if self.pid != self.process.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        for pid in self._workers_met:
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                if b"proxy.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)
        await asyncio.gather(*self._readers)  # until nobody has its end of the pipes
        await self.process.wait()
        self.process._transport.close()  # type: ignore[attr-defined]  # else closed by the collector

    async def _read_log(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            async with self._heard:
                self.lines.append(line.decode().rstrip("\n"))
                self._heard.notify_all()
        async with self._heard:
            self._heard.notify_all()

    async def _read_output(self) -> None:
        assert self.process.stdout is not None
        while piece := await self.process.stdout.read(65536):
            self.output += piece

    async def until_said(self, pattern: str, after: int = 0) -> re.Match[str]:
        """Wait for a line of the log, from the line `after` on."""
        async with self._heard:
            while True:
                for line in self.lines[after:]:
                    if (match := re.search(pattern, line)) is not None:
                        return match
                ended = self._readers[0].done() or self.process.returncode is not None
                ended = ended and not alive(self.pid)
                assert not ended, f"it ended without {pattern!r}: {self.lines}"
                await self._heard.wait()

    async def ended(self) -> int:
        status = await self.process.wait()
        await asyncio.gather(*self._readers)
        return status

    def workers(self) -> list[int]:
        """Return the worker processes, by process id."""
        pid = self.pid
        try:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        except (FileNotFoundError, ProcessLookupError):
            return []
        self._workers_met.update(map(int, children))
        return list(map(int, children))

    def client_ports_of(self, pid: int) -> set[int]:
        """Return the ports of the clients whose connections a worker holds."""
        inodes = set()
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                inodes.add(os.readlink(entry))
        ports = set()
        for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
            columns = line.split()
            local, remote = (int(columns[n].rpartition(":")[2], 16) for n in (1, 2))
            if local == self.port and f"socket:[{columns[9]}]" in inodes and remote:
                ports.add(remote)
        return ports

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    async def upgrade(self) -> int:
        """Have it replaced by a new process; return the process id of the one that leaves."""
        said = len(self.lines)
        self.signal(signal.SIGUSR2)
        match = await self.until_said(
            r"\[(\d+)\] (took over from the proxy|the new proxy ended)", said
        )
        assert match[2].startswith("took over"), self.lines[said:]
        self.workers()
        left, self.pid = self.pid, int(match[1])
        await self.until_said(rf"\[{self.pid}\] admin listener", said)
        return left

    async def admin(self, path: str, key: str | None = None) -> Answer:
        field = f"authorization: Bearer {key}\r\n" if key else ""
        request = f"GET {path} HTTP/1.1\r\nhost: localhost\r\n{field}connection: close\r\n\r\n"
        return await ask(self.admin_port, request.encode(), "GET")

    async def replicas(self) -> dict[str, dict[str, Any]]:
        """Return what `/replicas` says, by replica."""
        page = orjson.loads((await self.admin("/replicas")).body)
        return {entry["replica_id"]: entry for entry in page["replicas"]}

    async def metric(self, name: str, **labels: str) -> float:
        """Return a series of `/metrics`, summed over the labels that are not given."""
        text = (await self.admin("/metrics")).body.decode()
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )
