"""`doherty up`: everything in one command, and everything gone again after Ctrl-C.

It starts nothing before it knows that the configuration is good and that the ports are free, says
what comes up while it comes up, prints lines that work when they are pasted, and keeps manager and
proxy running. Neither needs the other to live: a proxy whose manager is gone serves the fleet that
it knows, and a manager that comes back adopts its replicas. On the way down the proxy goes first
and finishes what it has; then the manager stops the replicas.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import random
import signal
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import aiohttp
import msgspec

from backends.failure import StartError
from backends.log import Log
from backends.logfile import bound, last_lines
from backends.ports import PortLeases, bind_problem
from backends.providers.process import read_stat
from backends.serve import lock_run_folder
from backends.service import Command, Service, environment, flags_of
from backends.tasks import cancel_all, spawn
from proxy.config import Config, ManagerConfig, ProxyConfig
from proxy.contract import (
    FLEET_PATH,
    FLEET_WATCH_PATH,
    SNAPSHOT_BYTES_MAX,
    ReplicaRecord,
    ReplicaState,
    decode_snapshot,
)
from proxy.terminal import has_terminal

POLL_S = 0.1
RECONNECT_S = 0.5
HURRY_S_MAX = 10.0
LOG_CHECK_INTERVAL_S = 30.0
STOP_MARGIN_S = 10.0  # beyond the grace that a service grants its own work
SECRETS = ("api_key", "admin_api_key", "peer_key")
SOCKET_PATH_BYTES_MAX = 90  # 107 (unix(7)), less what the proxy adds until it has its name
ACCESS_LOG_NAME = "access.log"


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that is settled before anything is started."""

    config_path: str | None
    config: Config
    proxy: ProxyConfig  # effective
    proxy_flags: dict[str, object]  # those given to `up`, and those that it decides
    manager: ManagerConfig  # effective

    @property
    def run_folder(self) -> Path:
        return Path(self.manager.run_dir)

    @property
    def logs(self) -> Path:
        return self.run_folder / "logs"

    @property
    def own_logs(self) -> tuple[Path, ...]:
        """The logs that nobody else keeps bounded; an access log of the user's choice is theirs."""
        names = ("manager.log", "proxy.log", ACCESS_LOG_NAME)
        return tuple(self.logs / name for name in names)

    @property
    def url(self) -> str:
        url = _url(self.proxy.host, self.proxy.port)
        return url.replace("http:", "https:", 1) if self.proxy.tls_cert_path else url

    @property
    def manager_url(self) -> str:
        return _url(self.manager.host, self.manager.port)

    @property
    def admin_url(self) -> str:
        return _url(self.proxy.admin_host, self.proxy.admin_port)


def with_ports(plan: Plan) -> Plan:
    """Choose the ports that were left open, and check all. Raises `StartError`."""
    leases = PortLeases(random.Random())  # noqa: S311  # spreads, hides nothing
    proxy, manager = plan.proxy, plan.manager
    proxy = msgspec.structs.replace(
        proxy,
        port=proxy.port or leases.lease(),
        admin_port=proxy.admin_port or leases.lease(),
    )
    manager = msgspec.structs.replace(manager, port=manager.port or leases.lease())
    listeners = (
        (proxy.host, proxy.port, "--port"),
        (proxy.admin_host, proxy.admin_port, "--admin-port"),
        (manager.host, manager.port, "--manager-port"),
    )
    for host, port, flag in listeners:
        problem = bind_problem(host, port)
        if problem is not None:
            raise StartError(_port_problem(host, port, flag, problem))
    if len({port for _, port, _ in listeners}) < len(listeners):
        raise StartError("the proxy, its admin listener and the manager need three different ports")
    proxy_flags = plan.proxy_flags | {"port": proxy.port, "admin_port": proxy.admin_port}
    return msgspec.structs.replace(plan, proxy=proxy, manager=manager, proxy_flags=proxy_flags)


def _port_problem(host: str, port: int, flag: str, problem: OSError) -> str:
    if problem.errno != errno.EADDRINUSE:
        return f"port {port} on {host} cannot be used: {problem.strerror or problem}"
    return f"port {port} on {host} is in use; stop what listens there or choose another with {flag}"


def refuse_left_proxy(run_folder: Path) -> None:
    """Raise `StartError` when a proxy of this folder serves on without the `up` that started it.

    Whatever port is asked for now: a second proxy would make an orphan of the first.
    """
    with suppress(OSError, ValueError):
        pid, ticks = map(int, (run_folder / "proxy.pid").read_text().split())
        stat = read_stat(pid)
        if stat is not None and stat.alive and stat.start_ticks == ticks:
            raise StartError(
                f"an earlier `doherty up` of {run_folder} left its proxy running (pid {pid}); "
                f"end it first: kill {pid}"
            )


def upgrade_socket(plan: Plan) -> str | None:
    """Return where the proxy can be taken over from."""
    if plan.proxy.upgrade_socket is not None:
        return plan.proxy.upgrade_socket
    path = str(plan.run_folder / "proxy.sock")
    return path if len(os.fsencode(path)) <= SOCKET_PATH_BYTES_MAX else None


def services(plan: Plan, environ: Mapping[str, str]) -> tuple[Command, Command]:
    """Return the commands of the manager and of the proxy."""
    config = ("--config", plan.config_path) if plan.config_path else ()
    manager_flags = {
        "host": plan.manager.host,
        "port": plan.manager.port,
        "run_dir": plan.manager.run_dir,
    }
    plain = {k: v for k, v in plan.proxy_flags.items() if k not in SECRETS}
    if (path := upgrade_socket(plan)) is not None:
        plain["upgrade_socket"] = path
    secrets = {f"DOHERTY_{k.upper()}": str(v) for k, v in plan.proxy_flags.items() if k in SECRETS}
    manager = Command(
        "manager",
        (sys.executable, "-m", "backends.cli", "manager", *config, *flags_of(manager_flags)),
        environment(environ, {}),
        plan.logs / "manager.log",
    )
    proxy = Command(
        "proxy",
        (
            *(sys.executable, "-m", "proxy", *config),
            *("--manager-url", plan.manager_url, *flags_of(plain)),
        ),
        environment(environ, secrets),
        plan.logs / "proxy.log",
    )
    return manager, proxy


class Up:
    """One run of `doherty up`."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        manager, proxy = services(plan, os.environ)
        self._manager = Service(manager, self._say)
        self._proxy = Service(proxy, self._say, self._note_proxy)
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
        self._say(f"starting manager and proxy (logs: {self._plan.logs})")
        manager = spawn(self._manager.run(), "manager", self._log)
        proxy = spawn(self._proxy.run(), "proxy", self._log)
        self._chores += [
            spawn(self._follow(), "follow", self._log),
            spawn(self._bound_logs(), "logs", self._log),
        ]
        ready = await self._until_ready()
        if ready:
            self._manager.settle()
            self._proxy.settle()
            self._say(banner(self._plan, await self._models_down()))
            await self._stop.wait()
        await cancel_all(self._chores)
        await self._stop_all(proxy, manager)
        return 0 if ready or self._stop.is_set() else 1

    async def _until_ready(self) -> bool:
        """Wait for the endpoint; False when a service ended or a signal came before."""
        checks = {
            spawn(self._poll(), "poll", self._log),
            spawn(_wait(self._manager.ended_early), "manager ended", self._log),
            spawn(_wait(self._proxy.ended_early), "proxy ended", self._log),
            spawn(_wait(self._stop), "stop", self._log),
        }
        await asyncio.wait(checks, return_when=asyncio.FIRST_COMPLETED)
        await cancel_all(checks)
        for service in (self._manager, self._proxy):
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
        timeout = aiohttp.ClientTimeout(total=2.0)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            while True:
                with suppress(aiohttp.ClientError, TimeoutError, OSError):
                    async with session.get(self._plan.admin_url + "/readyz") as response:
                        if response.status == 200:
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
                for replica in decode_snapshot(line).replicas:
                    text = describe(replica)
                    if text and told.get(replica.replica_id) != text:
                        told[replica.replica_id] = text
                        self._say(text)

    async def _bound_logs(self) -> None:
        while True:
            await asyncio.sleep(LOG_CHECK_INTERVAL_S)
            for path in self._plan.own_logs:
                bound(path)

    async def _stop_all(self, proxy: asyncio.Task[None], manager: asyncio.Task[None]) -> None:
        self._say("stopping: the proxy finishes its requests, then the replicas stop")
        grace_s = self._plan.proxy.shutdown_grace_period_secs
        settle_s = self._plan.proxy.drain_settle_secs
        await self._end_service(self._proxy, proxy, grace_s + settle_s + STOP_MARGIN_S)
        pools = [pool for model in self._plan.config.models for pool in model.pools]
        grace_s = max((pool.stop_grace_secs for pool in pools), default=0.0)
        await self._end_service(self._manager, manager, 2 * grace_s + 2 * STOP_MARGIN_S)
        (self._plan.run_folder / "proxy.pid").unlink(missing_ok=True)
        self._say("stopped")

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
            self._manager.signal(signal.SIGHUP)
            self._proxy.signal(signal.SIGHUP)

    def _upgrade(self) -> None:
        """Replace the proxy by a new process, as its code is installed now, losing no request."""
        if self._stop.is_set():
            return
        path = upgrade_socket(self._plan)
        if path is None:
            self._say("no upgrade: the path of the run folder is too long for a unix socket")
        else:
            work = self._proxy.upgrade("--takeover", path)
            self._chores.append(spawn(work, "upgrade", self._log))

    def _note_proxy(self, pid: int) -> None:
        """Leave a note for the next `up`, should this one be killed."""
        stat = read_stat(pid)
        if stat is not None:
            note = self._plan.run_folder / "proxy.pid"
            note.write_text(f"{stat.pid} {stat.start_ticks}\n")

    def _say(self, text: str) -> None:
        with suppress(OSError):  # a terminal that is gone stops nothing
            sys.stdout.write(text + "\n")
            sys.stdout.flush()


def describe(replica: ReplicaRecord) -> str:
    """Return the line that tells of a replica's state; empty where there is nothing to tell yet."""
    match replica.state:
        case ReplicaState.READY if replica.asleep:
            return f"  {replica.replica_id}: {replica.reason}"
        case ReplicaState.READY:
            again = f", restart {replica.restarts}" if replica.restarts else ""
            engine = f"{replica.engine} {replica.engine_version}".rstrip()
            return f"  {replica.replica_id} is ready ({engine}, {replica.url}{again})"
        case ReplicaState.BACKOFF:
            return f"  {replica.replica_id} waits to start again: {replica.reason}"
        case ReplicaState.STARTING if not replica.restarts:
            return f"  {replica.replica_id} is starting"
        case _:
            return ""


def models_down(config: Config, replicas: Iterable[ReplicaRecord]) -> tuple[str, ...]:
    """Return the configured models that no replica serves now, nor will when one is asked for."""
    able = [r for r in replicas if r.state is ReplicaState.READY and not r.asleep]
    served = {name for replica in able for name in replica.models}
    served |= {model.name for model in config.models if any(p.autoscale for p in model.pools)}
    return tuple(model.name for model in config.models if model.name not in served)


def banner(plan: Plan, down: Sequence[str] = ()) -> str:
    """Return what to do with a running endpoint, ready to be pasted; models `down` are told."""
    names = [model.name for model in plan.config.models]
    model = next((name for name in names if name not in down), (*names, "MODEL")[0])
    without = f", without {', '.join(down)}" if down else ""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "Say hello."}],
        "stream": True,
    }
    key, auth = '"none"', ""
    if plan.proxy.api_key is not None:
        key, auth = 'os.environ["DOHERTY_API_KEY"]', ' -H "authorization: Bearer $DOHERTY_API_KEY"'
    lines = [
        "",
        f"Ready{without}: {plan.url}/v1",
        "",
        f"curl -N {plan.url}/v1/chat/completions -H 'content-type: application/json'{auth} \\",
        f"  -d '{json.dumps(body)}'",
        "",
        *(["import os"] if auth else []),
        "from openai import OpenAI",
        f'client = OpenAI(base_url="{plan.url}/v1", api_key={key})',
        "answer = client.chat.completions.create(",
        f'    model="{model}", messages=[{{"role": "user", "content": "Say hello."}}])',
        "print(answer.choices[0].message.content)",
        "",
        f"  admin    {plan.admin_url}  (metrics, replicas)",
        f"  replicas doherty status --manager-url {plan.manager_url}",
        f"  logs     {plan.logs}",
        "  stop     Ctrl-C (twice to hurry)",
        "",
    ]
    return "\n".join(lines)


async def up(plan: Plan) -> int:
    """Run until a signal. Raises `StartError` before anything has been started."""
    os.close(lock_run_folder(plan.run_folder))  # says so when a manager runs there already
    refuse_left_proxy(plan.run_folder)
    return await Up(with_ports(plan)).run()


async def _wait(event: asyncio.Event) -> None:
    await event.wait()


def _url(host: str, port: int) -> str:
    shown = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)  # noqa: S104
    return f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"
