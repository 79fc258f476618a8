"""`doherty up`: everything in one command, and everything gone again after Ctrl-C.

It starts nothing before it knows that the configuration is good and that the ports are free, says
what comes up while it comes up, prints lines that work when they are pasted, and keeps manager and
proxy running, and between them the service that keeps jobs. None needs the others to live: a proxy
whose manager is gone serves the fleet that it knows, a manager that comes back adopts its replicas,
and jobs go on where they were. On the way down the proxy goes first and finishes what it has; then
the manager stops the replicas. One that died before it could (it may have been killed a moment ago,
and was to be started again) is started once more for that alone: nothing outlives this command.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import aiohttp
import msgspec

from backends.checking import none_can_start
from backends.failure import StartError
from backends.journal import Launch, replay
from backends.log import Log
from backends.logfile import bound, last_lines
from backends.providers.process import read_stat
from backends.serve import lock_run_folder
from backends.service import Service
from backends.tasks import cancel_all, spawn
from backends.up_plan import Plan, services, upgrade_socket, with_ports
from backends.up_words import banner, describe, models_down, takes_requests
from proxy import systemd
from proxy.contract import (
    FLEET_PATH,
    FLEET_WATCH_PATH,
    SNAPSHOT_BYTES_MAX,
    decode_snapshot,
)
from proxy.terminal import has_terminal

POLL_S = 0.1
RECONNECT_S = 0.5
HURRY_S_MAX = 10.0
LOG_CHECK_INTERVAL_S = 30.0
STOP_MARGIN_S = 10.0  # beyond the grace that a service grants its own work
_NOTED = {"proxy": "proxy", "offline": "offline service"}  # whose pids stand in the run folder


def refuse_left(run_folder: Path) -> None:
    """Raise `StartError` when a process of this folder serves on without the `up` that started it.

    Whatever port is asked for now: a second proxy would make an orphan of the first.
    """
    for name, words in _NOTED.items():
        with suppress(OSError, ValueError):
            pid, ticks = map(int, (run_folder / f"{name}.pid").read_text().split())
            stat = read_stat(pid)
            if stat is not None and stat.alive and stat.start_ticks == ticks:
                raise StartError(
                    f"an earlier `doherty up` of {run_folder} left its {words} running "
                    f"(pid {pid}); end it first: kill {pid}"
                )


def left_running(run_folder: Path) -> list[Launch]:
    """Return what a manager of this folder has started and not ended, as its journal has it."""
    try:
        content = (run_folder / "journal").read_bytes()
    except OSError:
        return []
    live, _ = replay(content.split(b"\n"))
    return list(live.values())


class Up:
    """One run of `doherty up`."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._about_keys = plan.about_keys()
        commands = services(plan, os.environ)
        self._manager = Service(commands.manager, self._say)
        self._proxy = Service(commands.proxy, self._say, partial(self._note, "proxy"))
        self._offline: Service | None = None
        if commands.offline is not None:
            self._offline = Service(commands.offline, self._say, partial(self._note, "offline"))
        self._log = Log()
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._terminal = has_terminal()
        self._chores: list[asyncio.Task[None]] = []

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._end)
        loop.add_signal_handler(signal.SIGHUP, self._hang_up)
        loop.add_signal_handler(signal.SIGUSR2, self._upgrade)
        self._plan.logs.mkdir(parents=True, exist_ok=True)
        names = _listed([service.command.name for service in self._services])
        self._say(f"starting {names} (logs: {self._plan.logs})")
        if (reason := self._plan.locked_out) is not None:
            self._say(reason)
        if self._about_keys is not None:
            self._say(self._about_keys)
        running = {s: spawn(s.run(), s.command.name, self._log) for s in self._services}
        self._chores += [
            spawn(self._follow(), "follow", self._log),
            spawn(self._bound_logs(), "logs", self._log),
        ]
        ready = await self._until_ready()
        if ready:
            for service in self._services:
                service.settle()
            self._say(banner(self._plan, await self._models_down()))
            systemd.serving(f"serving at {self._plan.url}")
            await self._stop.wait()
        await cancel_all(self._chores)
        clean = await self._stop_all(running)
        return 0 if clean and (ready or self._stop.is_set()) else 1

    @property
    def _services(self) -> tuple[Service, ...]:
        """All of them, in the order in which they are needed."""
        offline = () if self._offline is None else (self._offline,)
        return (self._manager, *offline, self._proxy)

    async def _until_ready(self) -> bool:
        """Wait for the endpoint; False when a service ended or a signal came before."""
        checks = {
            spawn(self._poll(), "poll", self._log),
            spawn(_wait(self._stop), "stop", self._log),
            *(spawn(_wait(s.ended_early), "ended early", self._log) for s in self._services),
        }
        await asyncio.wait(checks, return_when=asyncio.FIRST_COMPLETED)
        await cancel_all(checks)
        for service in self._services:
            if service.ended_early.is_set():
                path = service.command.log_path
                end = "\n  ".join(last_lines(path, 12))
                sys.stderr.write(
                    f"the {service.command.name} ended before it was ready; "
                    f"the end of {path}:\n  {end}\n"
                )
                return False
        return not self._stop.is_set()

    async def _poll(self) -> None:
        # Where no model takes requests no request could be answered, however long one waits.
        page = "/readyz" if takes_requests(self._plan.config) else "/livez"
        urls = [self._plan.admin_url + page]
        if self._offline is not None:
            urls.append(self._plan.offline_url + "/health")
        timeout = aiohttp.ClientTimeout(total=2.0)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            while True:
                with suppress(aiohttp.ClientError, TimeoutError, OSError):
                    for url in urls:
                        async with session.get(url) as response:
                            response.raise_for_status()
                    return
                await asyncio.sleep(POLL_S)

    async def _models_down(self) -> Sequence[str]:
        """Return the models that nobody serves although the endpoint is ready, if they are told."""
        with suppress(aiohttp.ClientError, TimeoutError, OSError, msgspec.MsgspecError):
            async with (
                aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2.0)) as session,
                session.get(self._plan.manager_url + FLEET_PATH) as response,
            ):
                return models_down(
                    self._plan.config, decode_snapshot(await response.read()).replicas
                )
        return ()

    async def _follow(self) -> None:
        """Tell of each replica that comes up or cannot; a manager that is away is waited for."""
        told: dict[str, str] = {}
        while True:
            with suppress(aiohttp.ClientError, TimeoutError, OSError, msgspec.MsgspecError):
                await self._follow_once(told)
            await asyncio.sleep(RECONNECT_S if told else POLL_S)

    async def _follow_once(self, told: dict[str, str]) -> None:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=2.0, sock_read=30.0)
        async with (
            aiohttp.ClientSession(timeout=timeout, read_bufsize=SNAPSHOT_BYTES_MAX) as session,
            session.get(self._plan.manager_url + FLEET_WATCH_PATH) as response,
        ):
            async for line in response.content:
                if not line.strip():
                    continue
                fleet = decode_snapshot(line)
                for replica in (*fleet.replicas, *fleet.workers):
                    text = describe(replica)
                    if text and told.get(replica.replica_id) != text:
                        told[replica.replica_id] = text
                        self._say(text)

    async def _bound_logs(self) -> None:
        while True:
            await asyncio.sleep(LOG_CHECK_INTERVAL_S)
            for path in self._plan.own_logs:
                bound(path)

    async def _stop_all(self, running: Mapping[Service, asyncio.Task[None]]) -> bool:
        """Stop everything; say whether nothing was left."""
        self._say("stopping: the proxy finishes its requests, then the replicas stop")
        systemd.stopping("the proxy finishes its requests, then the replicas stop")
        grace_s = self._plan.proxy.shutdown_grace_period_secs
        settle_s = self._plan.proxy.drain_settle_secs
        # The offline service ends beside the proxy: what it sends is the last that others wait for.
        proxied = [s for s in self._services if s is not self._manager]
        async with asyncio.TaskGroup() as ends:
            for service in proxied:
                most_s = grace_s + settle_s + STOP_MARGIN_S
                ends.create_task(self._end_service(service, running[service], most_s))
        pools = [pool for model in self._plan.config.models for pool in model.pools]
        grace_s = max((pool.stop_grace_secs for pool in pools), default=0.0)
        most_s = 2 * grace_s + 2 * STOP_MARGIN_S
        await self._end_service(self._manager, running[self._manager], most_s)
        clean = await self._sweep(most_s)
        for name in _NOTED:
            (self._plan.run_folder / f"{name}.pid").unlink(missing_ok=True)
        self._say("stopped" if clean else "stopped, but for what is named above")
        return clean

    async def _sweep(self, most_s: float) -> bool:
        """Have what a manager that died left running stopped; say whether nothing is left."""
        if not (left := left_running(self._plan.run_folder)):
            return True
        names = _listed([launch.replica_id for launch in left])
        self._say(f"the manager ended without stopping {names}: it is started once more for that")
        command = self._manager.command
        command = msgspec.structs.replace(command, argv=(*command.argv, "--sweep"))
        sweep = Service(command, self._say)
        task = spawn(sweep.run(), "sweep", self._log)
        # Not told to hurry before it listens to signals: one that comes sooner would end it.
        hurried = spawn(_wait(self._hurry), "hurry", self._log)
        await asyncio.wait({task, hurried}, timeout=most_s, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait({task}, timeout=HURRY_S_MAX)
        await cancel_all([hurried])
        await self._end_service(sweep, task, HURRY_S_MAX)
        for launch in left_running(self._plan.run_folder):
            what = f"pid {launch.pid}" if launch.pid else f"launch {launch.launch_id}"
            self._say(f"  {launch.replica_id} was not stopped ({what}; log: {command.log_path})")
        return not left_running(self._plan.run_folder)

    async def _end_service(
        self, service: Service, task: asyncio.Task[None], grace_s: float
    ) -> None:
        """SIGTERM; once more when hurried (both then stop waiting); at last SIGKILL."""
        service.stop()
        hurry = spawn(_wait(self._hurry), "hurry", self._log)
        await asyncio.wait({task, hurry}, timeout=grace_s, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            service.signal(signal.SIGTERM)
            await asyncio.wait({task}, timeout=HURRY_S_MAX)
        if not task.done():
            service.kill()
            await asyncio.wait({task}, timeout=HURRY_S_MAX)
        await cancel_all([hurry, task])

    def _end(self) -> None:
        if self._stop.is_set():
            self._say("in a hurry: requests are cut")
            self._hurry.set()
        self._stop.set()

    def _hang_up(self) -> None:
        """The terminal is gone, and this goes with it; otherwise SIGHUP means: read again."""
        if self._terminal and not has_terminal():
            self._end()
        else:
            for service in self._services:
                service.signal(signal.SIGHUP)

    def _upgrade(self) -> None:
        """Replace the proxy by a new process, as its code is installed now, losing no request."""
        if self._stop.is_set():
            return
        if upgrade_socket(self._plan) is None:
            self._say("no upgrade: the path of the run folder is too long for a unix socket")
        else:
            self._chores.append(spawn(self._proxy.upgrade(), "upgrade", self._log))

    def _note(self, name: str, pid: int) -> None:
        """Leave a note for the next `up`, should this one be killed."""
        stat = read_stat(pid)
        if stat is not None:
            note = self._plan.run_folder / f"{name}.pid"
            note.write_text(f"{stat.pid} {stat.start_ticks}\n")

    def _say(self, text: str) -> None:
        with suppress(OSError):  # a terminal that is gone stops nothing
            sys.stdout.write(text + "\n")
            sys.stdout.flush()


async def up(plan: Plan) -> int:
    """Run until a signal. Raises `StartError` before anything has been started."""
    os.close(lock_run_folder(plan.run_folder))  # says so when a manager runs there already
    refuse_left(plan.run_folder)
    why = None if plan.proxy.worker_urls else none_can_start(plan.config, os.environ)
    if why is not None:
        raise StartError(f"no model could be served:\n{why}")
    return await Up(with_ports(plan)).run()


def _listed(names: Sequence[str]) -> str:
    """Write names as one does in a sentence."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


async def _wait(event: asyncio.Event) -> None:
    await event.wait()
