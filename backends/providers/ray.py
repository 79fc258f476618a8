"""Engines as actors of a Ray cluster, on whichever of its nodes has room.

Ray's scheduler owns the GPUs: it names the devices, and chooses the node where no lease has done so
(`cluster_cards`); the process has an address once it has a node.
Engines are told to listen on all addresses of their node, for the proxies that are elsewhere.

All that is asked of Ray goes through a process of our own (`ray_bridge`). When that ends, because
the cluster is gone or out of reach, nothing is said of the engines: they serve, and are watched
over HTTP as before. Another one is started until the cluster answers, and goes on with what is
there. What its cluster has forgotten by then has ended.

What runs is known to Ray by the launch, so a manager that comes up adopts what the journal knows
and ends the rest of its namespace, which is its alone.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec

from backends.cluster_cards import Node, host_of
from backends.engines.base import UNPLACED, Engine, Ports
from backends.engines.probe import Program
from backends.engines.release import UNKNOWN_RELEASE
from backends.failure import StartError
from backends.journal import Journal, Launch
from backends.log import Log
from backends.logfile import last_lines, open_log
from backends.providers.base import Process
from backends.providers.process import boot_id, describe_status, kill_remains
from backends.providers.ray_local import local_cluster
from backends.providers.ray_words import (
    LINE_BYTES_MAX,
    Cluster,
    Connected,
    Exited,
    Failed,
    Follow,
    Keep,
    Need,
    News,
    Nodes,
    Order,
    Runs,
    Said,
    Signal,
    Start,
    Waits,
)
from backends.spec import ReplicaSpec
from backends.tasks import cancel_all, spawn
from proxy.config import RayConfig
from proxy.contract.extras import install_command

ANSWER_S_MAX = 60.0  # Ray's own patience with a head that does not answer is half of it
# The head starts a server for each client of a `ray://` address, and gives the first one 30 s.
ATTEMPTS, CLIENT_ATTEMPTS = 1, 3
KNOCK_S_MAX = 5.0
PAUSE_S, PAUSE_S_MAX = 0.5, 10.0
LOST_KILL_S_MAX = 20.0  # whose cluster does not answer, it is not waited for longer
TOKEN_VARIABLE = "RAY_AUTH_TOKEN"  # noqa: S105  # its name


class RayProcess:
    """An engine somewhere in the cluster."""

    def __init__(self, order: Start | Follow, log_path: Path, provider: RayProvider) -> None:
        loop = asyncio.get_running_loop()
        self.pid = self.start_ticks = 0  # none of this machine
        self.exited: asyncio.Future[str] = loop.create_future()
        self.placed: asyncio.Future[str] = loop.create_future()
        self.waits = ""
        self.order = order  # that is repeated to a new bridge
        self.signalled = 0  # the strongest signal that it was sent
        self._log_path = log_path
        self._log_fd = -1
        self._provider = provider

    def signal_group(self, number: int) -> None:
        if not self.exited.done():
            self.signalled = number if self.signalled != signal.SIGKILL else self.signalled
            self._provider.signal(self, number)

    def release(self) -> None:
        self._provider.leave(self)
        self.close()

    def runs(self, host: str) -> None:
        """It has a place; what began it must not begin it again."""
        self.waits = ""
        self.order = Follow(self.order.launch_id, self.order.need)
        if not self.placed.done():
            self.placed.set_result(host)

    def said(self, text: str, lost: int) -> None:
        """Append to its log; on a full disk it is lost, as an engine's own would be."""
        with suppress(OSError):
            if self._log_fd < 0:
                self._log_fd = open_log(self._log_path)
            if lost:
                os.write(self._log_fd, b"[%d octets lost]\n" % lost)
            os.write(self._log_fd, text.encode("latin-1"))

    def ended(self, how: str) -> None:
        self.close()
        if not self.placed.done():
            self.placed.cancel()
        if not self.exited.done():
            self.exited.set_result(how)

    def close(self) -> None:
        if self._log_fd >= 0:
            with suppress(OSError):
                os.close(self._log_fd)
            self._log_fd = -1


class RayProvider:
    """Starts engines in a cluster and adopts those of a manager before."""

    def __init__(
        self,
        config: RayConfig,
        namespace: str,
        address: str,
        run_folder: Path,
        launches: Mapping[str, Launch],
        log: Log,
    ) -> None:
        """`address`: of the cluster; `launches`: those that the journal knows, by id."""
        self.boot_id = boot_id()
        self._config = config
        self._cluster = Cluster(
            address=address, namespace=namespace, runtime_env=config.runtime_env
        )
        self._attempts = CLIENT_ATTEMPTS if address.startswith("ray://") else ATTEMPTS
        self._launches = launches
        self._log = log
        self._log_folder = run_folder / "logs"
        self._processes: dict[str, RayProcess] = {}
        self._left: set[str] = set()  # that nobody watches any more
        self._found: frozenset[str] = frozenset()
        self.nodes: tuple[Node, ...] = ()
        self.on_nodes: Callable[[], None] = lambda: None  # when they have changed
        self._recovered = False
        self._bridge: asyncio.subprocess.Process | None = None  # that has been answered by Ray
        self._problem = ""
        self._keeping: asyncio.Task[None] | None = None
        self._chores: set[asyncio.Task[None]] = set()

    @property
    def empty(self) -> bool:
        """Say whether nothing runs of what was started or adopted, watched or not."""
        return not self._processes and not self._left

    async def open(self) -> None:
        """Reach the cluster. Raises `StartError`."""
        await self._knock()
        connected = asyncio.get_running_loop().create_future()
        self._keeping = spawn(self._keep_bridge(connected), "keep the bridge to Ray", self._log)
        try:
            async with asyncio.timeout(ANSWER_S_MAX * self._attempts):
                await connected
        except TimeoutError:
            raise StartError(
                f"the Ray cluster at {self._cluster.address} does not answer; start it, or set "
                "manager.ray.address"
            ) from None

    async def _knock(self) -> None:
        """See that somebody listens: Ray itself tries for a minute before it says that nobody does.

        Raises `StartError`.
        """
        host, colon, port = self._cluster.address.removeprefix("ray://").rpartition(":")
        if not colon:
            return
        try:
            async with asyncio.timeout(KNOCK_S_MAX):
                _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
        except (OSError, TimeoutError) as error:
            raise StartError(self._failure(str(error) or "nobody answers")) from error
        writer.close()

    def program(self, engine: Engine, spec: ReplicaSpec) -> Program:
        """Return the engine's own words: the nodes have what they name."""
        head = engine.command(spec, Ports(0), UNKNOWN_RELEASE).argv[:1]
        head = ("python3",) if head == (sys.executable,) else head
        return Program(head, version=spec.release, inherits=tuple(self._config.env.items()))

    def spawn(
        self, argv: Sequence[str], env: Mapping[str, str], launch_id: str, log_path: Path
    ) -> Process:
        """Begin to start an actor; it tells by itself what becomes of it."""
        launch = self._launches[launch_id]
        runs = launch.ports.values()
        order = Start(
            launch_id=launch_id,
            argv=tuple(argv),
            env=dict(env),
            ports=(launch.port, *(first + i for first, count in runs for i in range(count))),
            need=_need(launch),
        )
        return self._begin(order, log_path)

    def recover(self, launches: Iterable[Launch]) -> Mapping[str, Process]:
        """Adopt what the cluster has of `launches`; all else of the namespace is ended.

        So are processes: the manager before may have had them as such.
        """
        launches = list(launches)
        adopted: dict[str, Process] = {}
        for launch in launches:
            if launch.launch_id in self._found:
                log_path = self._log_folder / f"{launch.replica_id}.log"
                process = self._begin(Follow(launch.launch_id, _need(launch)), log_path)
                if launch.host != UNPLACED:
                    process.placed.set_result(launch.host)
                adopted[launch.launch_id] = process
        self._recovered = True
        self._send(Keep(tuple(adopted)))
        kill_remains({launch.launch_id for launch in launches} - adopted.keys())
        return adopted

    async def close(self) -> None:
        """Let go of what runs: the bridge ends with its input, and no engine with the bridge."""
        for process in self._processes.values():
            process.close()
        await cancel_all([*filter(None, [self._keeping]), *self._chores])

    def signal(self, process: RayProcess, number: int) -> None:
        self._send(Signal(process.order.launch_id, number))
        if number == signal.SIGKILL:
            self._own(self._give_up(process), f"give up {process.order.launch_id}")

    def leave(self, process: RayProcess) -> None:
        """Watch it no longer; it runs on, if it has not ended."""
        if self._processes.pop(process.order.launch_id, None) is not None:
            self._left.add(process.order.launch_id)

    def _begin(self, order: Start | Follow, log_path: Path) -> RayProcess:
        process = RayProcess(order, log_path, self)
        process.waits = self._problem
        self._processes[order.launch_id] = process
        self._send(order)
        return process

    async def _give_up(self, process: RayProcess) -> None:
        """Where nobody can be asked, nobody says that it has ended: believe it after a while."""
        await asyncio.wait({process.exited}, timeout=LOST_KILL_S_MAX)
        while not process.exited.done() and self._bridge is not None:
            await asyncio.wait({process.exited}, timeout=PAUSE_S_MAX)
        if not process.exited.done():
            self._end(process, "given up: its cluster does not answer")

    def _end(self, process: RayProcess, how: str) -> None:
        self._processes.pop(process.order.launch_id, None)
        process.ended(how)

    # --- the bridge -----------------------------------------------------------------------------

    def _send(self, order: Order) -> None:
        if self._bridge is not None and self._bridge.stdin is not None:
            self._bridge.stdin.write(msgspec.json.encode(order) + b"\n")

    async def _keep_bridge(self, connected: asyncio.Future[None]) -> None:
        """Have a bridge as long as this provider is open; none, where the first ones fail."""
        pause_s, attempts = PAUSE_S, self._attempts
        while True:
            began_s = asyncio.get_running_loop().time()
            problem = await self._cross(connected)
            attempts -= 1
            if not connected.done() and not attempts:
                connected.set_exception(StartError(self._failure(problem)))
                return
            if asyncio.get_running_loop().time() - began_s > ANSWER_S_MAX:
                pause_s = PAUSE_S
            self._lost(problem)
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, PAUSE_S_MAX)

    async def _cross(self, connected: asyncio.Future[None]) -> str:
        """Run one bridge to its end; return why it ended."""
        log_path = self._log_folder / "ray.log"
        log_fd = open_log(log_path)
        try:
            bridge = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "backends.providers.ray_bridge"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log_fd,
                env=bridge_environment(os.environ, self._config.auth),
                limit=LINE_BYTES_MAX,
                start_new_session=True,  # a terminal's Ctrl-C is the manager's to hear
            )
        finally:
            os.close(log_fd)
        assert bridge.stdin is not None
        assert bridge.stdout is not None
        problem = ""
        try:
            bridge.stdin.write(msgspec.json.encode(self._cluster) + b"\n")
            decoder: msgspec.json.Decoder[News] = msgspec.json.Decoder(News)
            async for line in bridge.stdout:
                news = decoder.decode(line)
                if isinstance(news, Failed):
                    problem = news.problem
                elif isinstance(news, Connected):
                    self._reached(bridge, news, connected)
                elif isinstance(news, Nodes):
                    self._see(news.nodes)
                else:
                    self._take(news)
        finally:
            self._bridge = None
            with suppress(ProcessLookupError):
                bridge.kill()
            await bridge.wait()
        return problem or " | ".join(last_lines(log_path, 1)) or "its process ended"

    def _reached(
        self, bridge: asyncio.subprocess.Process, news: Connected, connected: asyncio.Future[None]
    ) -> None:
        """Ray answers: go on with all that was under way."""
        self._bridge, self._problem = bridge, ""
        self._found = frozenset(news.launch_ids)
        self._log.tell("ray_cluster", address=self._cluster.address)
        self._see(news.nodes)
        for process in list(self._processes.values()):
            process.waits = ""
            self._send(process.order)
            if process.signalled:
                self._send(Signal(process.order.launch_id, process.signalled))
        if self._recovered:
            self._send(Keep(tuple(self._processes.keys() | self._left)))
        if not connected.done():
            connected.set_result(None)

    def _see(self, nodes: tuple[Node, ...]) -> None:
        self.nodes = nodes
        told = {node.host: f"{node.ours} of {node.gpus} GPUs" for node in nodes}
        self._log.tell("ray_nodes", free_or_leased=told)
        self.on_nodes()

    def _lost(self, problem: str) -> None:
        self._log.fault("ray_lost", address=self._cluster.address, problem=problem)
        self._problem = f"the Ray cluster does not answer ({problem})"
        for process in self._processes.values():
            if not process.placed.done():
                process.waits = self._problem

    def _take(self, news: Waits | Runs | Said | Exited) -> None:
        process = self._processes.get(news.launch_id)
        if process is None:
            if isinstance(news, Exited):
                self._left.discard(news.launch_id)
            return
        match news:
            case Waits():
                process.waits = news.words
            case Runs():
                process.runs(news.host)
                what = {"launch": news.launch_id, "host": news.host, "pid": news.pid}
                self._log.tell("ray_placed", **what, node=news.node)
            case Said():
                process.said(news.text, news.lost)
            case Exited():
                self._end(process, _how(news))

    def _failure(self, problem: str) -> str:
        address = self._cluster.address
        return f"the Ray cluster at {address} cannot be used: {problem}; set manager.ray.address"

    def _own(self, coroutine: Coroutine[Any, Any, None], name: str) -> None:
        task = spawn(coroutine, name, self._log)
        self._chores.add(task)
        task.add_done_callback(self._chores.discard)


def _need(launch: Launch) -> Need:
    return Need(launch.gpus_wanted, launch.resources, host_of(launch.gpus))


def _how(news: Exited) -> str:
    return news.problem or describe_status(news.status or 0)


@asynccontextmanager
async def ray_provider(
    config: RayConfig, region: str, run_folder: Path, journal: Journal, log: Log
) -> AsyncIterator[RayProvider]:
    """Yield a provider that has reached its cluster. Raises `StartError`."""
    if find_spec("ray") is None:
        raise StartError(
            "provider ray needs the Python package ray; install it with: " + install_command("ray")
        )
    if config.auth == "token" and not os.environ.get(TOKEN_VARIABLE):
        raise StartError(f"manager.ray.auth is token; set {TOKEN_VARIABLE} in the environment")
    async with local_cluster(config, run_folder, log) as local:
        address = local.address if local else config.address
        provider = RayProvider(
            config, config.namespace or f"doherty-{region}", address, run_folder, journal.live, log
        )
        try:
            await provider.open()
            yield provider
        finally:
            if local is not None:
                local.kept = not provider.empty
            await provider.close()


def bridge_environment(environ: Mapping[str, str], auth: str) -> dict[str, str]:
    """Return what Ray is told by the environment: nothing is left to its own defaults.

    A token in a file of the user's would turn authentication on without anybody's asking.
    """
    own = {k: v for k, v in environ.items() if not k.startswith("DOHERTY_")}
    own |= {"RAY_AUTH_MODE": auth, "RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}
    if auth != "token":
        own.pop(TOKEN_VARIABLE, None)
    return own
