"""One engine in a container, from the request that makes it until its remains are gone.

A start takes the Docker engine from a tenth of a second to the minutes of a pull, so it goes on by
itself: what comes to nothing is told by `exited`, in words, as the end of a process is.

The Docker engine may restart or stop answering, and containers live on without it. So silence says
nothing of a container: every question is asked again until it is answered, and the end of one is
believed only when the engine says so. For the same reason a start whose outcome nobody saw is first
undone, however long that takes, and then told: a container that nobody knows of would hold a GPU
that is given to the next.

Its output is what `docker logs` shows, and is appended to the replica's log file as well, so that
what reads an engine's last words reads them here. Lines carry the time at which the Docker engine
took them; after a pause it is asked for what came later than the last one. The log file's own time
is that of its last line, so that a manager after a killed one knows it, too.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import aiohttp
from aiodocker import Docker, DockerError
from aiodocker.containers import DockerContainer

from backends.log import Log
from backends.logfile import open_log
from backends.providers.process import read_stat
from backends.tasks import cancel_all, spawn

PAUSE_S, PAUSE_S_MAX = 0.1, 2.0
LAST_LINES_S_MAX = 2.0  # what was written before the end is there by then
REMOVED_S_MAX = 5.0

AWAY = (aiohttp.ClientError, TimeoutError, OSError)
STATUS_UNREACHED = 900  # aiodocker's own, where there was no answer
_STAMP = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)\.(\d{9})Z ")
_SHELL_SIGNAL = 128  # tini tells a child's death by a signal as shells do


class NotStartedError(Exception):
    """A container could not be made or started; the text says why, and what would help.

    `made`: it may be there nevertheless.
    """

    def __init__(self, text: str, *, made: bool) -> None:
        super().__init__(text)
        self.made = made


# Makes the container and starts it; returns its id. Raises `NotStartedError` or one of `AWAY`.
Maker = Callable[[], Awaitable[str]]


class Container:
    """A container that is watched until it ends, as a process is."""

    def __init__(
        self, docker: Docker, name: str, log_path: Path, log: Log, retire: Callable[[], object]
    ) -> None:
        self.pid = 0
        self.start_ticks = 0
        self.placed = None
        self.waits = ""
        self.exited: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._container: DockerContainer = docker.containers.container(name)
        self._name = name
        self._log_path = log_path
        self._log = log
        self._retire = retire  # nothing of it is left
        self._started = asyncio.Event()
        self._ended = asyncio.Event()
        self._starting: asyncio.Task[None] | None = None
        self._problem = ""
        self._made = True  # for all that is known
        self._tasks: set[asyncio.Task[None]] = set()
        self._signals: set[asyncio.Task[None]] = set()  # what was sent arrives, whoever watches
        self._last_ns = 0  # Unix time of the last line of its output that the log has

    def begin(self, make: Maker) -> None:
        """Start it, and watch it."""
        self._starting = self._own(self._start(make), "start")
        _ = self._own(self._live(self._starting), "watch")

    def adopt(self, pid: int) -> None:
        """Go on with one that runs."""
        with suppress(OSError):
            self._last_ns = self._log_path.stat().st_mtime_ns
        self._runs(pid)
        _ = self._own(self._live(None), "watch")

    def signal_group(self, number: int) -> None:
        """Signal its init, which passes it on; with the init the kernel kills the rest."""
        if self.exited.done() or self._ended.is_set():
            return
        if self._starting is not None and not self._started.is_set():
            self._problem = "ended before its container was started"
            self._starting.cancel()
        else:
            task = self._own(self._signal(signal.Signals(number).name), "signal")
            self._signals.add(task)
            task.add_done_callback(self._signals.discard)

    def release(self) -> None:
        for task in self._tasks - self._signals:
            task.cancel()

    async def close(self) -> None:
        await cancel_all(list(self._tasks))

    async def remove(self, *, certain: bool) -> None:
        """Have nothing left of it: asked until it is so where that must be `certain`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(None if certain else REMOVED_S_MAX):
                await self._asked(self._delete)

    async def _delete(self) -> None:
        try:
            await self._container.delete(force=True, v=True)
        except DockerError as error:
            if error.status < 500 or (await self._container.show())["State"]["Running"]:
                raise
            # It holds nothing any more; what cannot be removed now, the next manager finds.

    async def _start(self, make: Maker) -> None:
        try:
            container_id = await make()
            self._container = self._container.docker.containers.container(container_id)
            told = await self._container.show()
            self._runs(told["State"]["Pid"])
        except NotStartedError as error:
            self._problem, self._made = str(error), error.made
        except DockerError as error:
            self._problem = f"its container was not started: {error.message}"
        except AWAY as error:
            self._problem = f"the Docker engine went away while it was started ({error})"

    def _runs(self, pid: int) -> None:
        stat = read_stat(pid) if pid else None
        self.pid, self.start_ticks = (stat.pid, stat.start_ticks) if stat else (0, 0)
        self._started.set()

    async def _live(self, starting: asyncio.Task[None] | None) -> None:
        if starting is not None:
            await asyncio.wait({starting})
            if not self._started.is_set():
                if self._made:
                    await self.remove(certain=True)
                self._tell(self._problem)
                return
        lines = self._own(self._copy_lines(), "log")
        how = await self._until_ended()
        self._ended.set()
        await asyncio.wait({lines}, timeout=LAST_LINES_S_MAX)
        lines.cancel()
        await self.remove(certain=False)
        self._tell(how)

    def _tell(self, how: str) -> None:
        if not self.exited.done():
            self.exited.set_result(how)
        self._retire()

    async def _until_ended(self) -> str:
        """Return how it ended, as soon as the Docker engine says that it has."""
        state: Mapping[str, Any] = {}
        while True:
            try:
                await self._asked(self._container.wait)
                state = (await self._container.show())["State"]
            except DockerError as error:
                if error.status == 404:
                    return "its container was removed by somebody else"
            except AWAY:
                pass
            else:
                if not state["Running"]:
                    return describe_end(state)
            await asyncio.sleep(PAUSE_S)

    async def _signal(self, name: str) -> None:
        await self._asked(lambda: self._container.kill(signal=name))

    async def _asked(self, ask: Callable[[], Awaitable[object]]) -> None:
        """Ask until the Docker engine answers; that there is no such container is an answer."""
        pause_s = PAUSE_S
        while not self.exited.done():
            try:
                await ask()
            except DockerError as error:
                if error.status < 500:
                    return
            except AWAY:
                pass
            else:
                return
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, PAUSE_S_MAX)

    async def _copy_lines(self) -> None:
        """Append its output to the log until it has ended and all is here."""
        fd = open_log(self._log_path)
        try:
            while True:
                ended = self._ended.is_set()
                with suppress(DockerError, *AWAY):
                    await self._copy_stream(fd)
                if ended:
                    return
                with suppress(TimeoutError):
                    async with asyncio.timeout(PAUSE_S):
                        await self._ended.wait()
        finally:
            os.close(fd)

    async def _copy_stream(self, fd: int) -> None:
        since = "{}.{:09}".format(*divmod(self._last_ns, 10**9))
        stream = self._container.log(
            stdout=True, stderr=True, follow=True, timestamps=True, since=since
        )
        async for text in stream:
            at_ns, line = stamped(text)
            if at_ns and at_ns == self._last_ns:
                continue  # the answer begins with what was asked from
            self._last_ns = at_ns or self._last_ns
            with suppress(OSError):  # a full disk: the line is lost, as an engine's own would be
                os.write(fd, line.encode())
                os.utime(fd, ns=(self._last_ns, self._last_ns))

    def _own(self, coroutine: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = spawn(coroutine, f"{name} {self._name}", self._log)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def stamped(text: str) -> tuple[int, str]:
    """Return when the Docker engine took a line, as Unix time in ns, and the line; 0: not told."""
    match = _STAMP.search(text[:40])  # what was cut from the line before may stand in front
    if match is None:
        return 0, text
    seconds = int(datetime.fromisoformat(match[1] + "+00:00").timestamp())
    return seconds * 10**9 + int(match[2]), text[: match.start()] + text[match.end() :]


def describe_end(state: Mapping[str, Any]) -> str:
    """Put the end of a container into words, those of a process where they fit."""
    code = int(state.get("ExitCode", 0))
    if state.get("OOMKilled"):
        return "killed by SIGKILL: its container had no memory left"
    number = code - _SHELL_SIGNAL
    names = {member.value: member.name for member in signal.Signals}
    if number in names:
        return f"killed by {names[number]}"
    problem = state.get("Error") or ""
    return f"exited with status {code}" + (f" ({problem})" if problem else "")
