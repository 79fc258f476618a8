"""A process of our own that is kept running: the manager and the proxy under `doherty up`.

Each has a session of its own, so that Ctrl-C reaches only `up`, which ends them in the right order,
and so that one of them can be killed without the other noticing. A service that dies is started
again after a pause that doubles while it keeps dying young.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from backends.logfile import open_log
from proxy import systemd
from proxy.secret_files import SUFFIX

PAUSE_S = 0.5
PAUSE_S_MAX = 10.0
SETTLED_S = 30.0


class Command(msgspec.Struct, frozen=True):
    """What a service runs and where its output goes."""

    name: str
    argv: tuple[str, ...]
    env: dict[str, str]
    log_path: Path


class Service:
    """One process, as often as it takes."""

    def __init__(
        self,
        command: Command,
        told: Callable[[str], None],
        started: Callable[[int], None] = lambda _pid: None,
    ) -> None:
        self.command = command
        self.process: asyncio.subprocess.Process | None = None
        self.ended_early = asyncio.Event()  # it died before `settle`
        self._told = told
        self._started = started
        self._settled = False
        self._stop = asyncio.Event()
        self._successor: asyncio.subprocess.Process | None = None

    def settle(self) -> None:
        """From now on a death is followed by a restart; until now it is a failure to start."""
        self._settled = True

    async def run(self) -> None:
        """Keep it running until it is stopped."""
        loop = asyncio.get_running_loop()
        pause_s = PAUSE_S
        while not self._stop.is_set():
            started_s = loop.time()
            process = await self._spawn()
            status = await process.wait()
            while (successor := self._take_successor()) is not None:
                started_s = loop.time()
                self._told(f"{self.command.name} was upgraded (pid {successor.pid})")
                status = await successor.wait()
            if self._stop.is_set():
                return
            if not self._settled:
                self.ended_early.set()
                return
            if loop.time() - started_s >= SETTLED_S:
                pause_s = PAUSE_S
            self._told(
                f"{self.command.name} {_ending(status)}; starting it again in {pause_s:g} s "
                f"(log: {self.command.log_path})"
            )
            with suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._stop.wait()
            pause_s = min(pause_s * 2, PAUSE_S_MAX)

    async def upgrade(self) -> None:
        """Start a second process, which takes over; the first leaves, and is not missed."""
        if self._successor is not None and self._successor.returncode is None:
            self._told(f"an upgrade of the {self.command.name} is under way already")
            return
        self._successor = process = await self._start()
        await process.wait()
        if process is self._successor:
            self._told(
                f"the new {self.command.name} {_ending(process.returncode or 0)} before it took "
                f"over; the old one goes on (log: {self.command.log_path})"
            )

    def _take_successor(self) -> asyncio.subprocess.Process | None:
        """The process has ended: go on with the one that has taken over, if there is one."""
        successor, self._successor = self._successor, None
        if successor is None or successor.returncode is not None:
            return None
        self.process = successor
        self._started(successor.pid)
        return successor

    def signal(self, number: int) -> None:
        for process in (self.process, self._successor):
            if process is not None and process.returncode is None:
                process.send_signal(number)

    def stop(self) -> None:
        """Ask it to end; it is not started again."""
        self._stop.set()
        self.signal(signal.SIGTERM)

    def kill(self) -> None:
        self._stop.set()
        for process in (self.process, self._successor):
            if process is not None and process.returncode is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)

    async def _spawn(self) -> asyncio.subprocess.Process:
        self.process = await self._start()
        self._started(self.process.pid)
        if self._stop.is_set():
            self.signal(signal.SIGTERM)
        return self.process

    async def _start(self) -> asyncio.subprocess.Process:
        log_fd = open_log(self.command.log_path)
        try:
            return await asyncio.create_subprocess_exec(
                *self.command.argv,
                env=self.command.env,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log_fd,
                stderr=log_fd,
                start_new_session=True,
            )
        finally:
            os.close(log_fd)


def environment(environ: Mapping[str, str], secrets: Mapping[str, str]) -> dict[str, str]:
    """Return what a service inherits. Keys go by the environment: argument lists are public.

    A key that stands in a file is left there, unless another is said now.
    """
    kept = {k: v for k, v in environ.items() if k.removesuffix(SUFFIX) not in secrets}
    return {**systemd.without(kept), "PYTHONUNBUFFERED": "1", **secrets}


def flags_of(values: Mapping[str, object]) -> tuple[str, ...]:
    """Write settings as flags."""
    flags: list[str] = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, Sequence) and not isinstance(value, str):
            flags.extend([f"--{flag}", *map(str, value)])
        else:
            flags.append(f"--{flag}={value}")
    return tuple(flags)


def _ending(status: int) -> str:
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return f"exited with status {status}"
