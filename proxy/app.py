"""The proxy as a whole: the supervisor that opens the port, starts workers and tells them things.

It owns everything that is not the data path: the listening sockets, the fleet's source, probes of
suspects, the admin listener, signals. It may die without cutting a stream; a worker may die without
the port closing, because the supervisor holds the same listening socket and starts another.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import aiohttp
import msgspec
from aiohttp import web

from proxy import flags
from proxy.config import ConfigError, ProxyConfig
from proxy.contract import FleetSnapshot, ReplicaState
from proxy.core import limits
from proxy.core.replica import replica_of
from proxy.io import control
from proxy.io.admin import make_app, sum_samples
from proxy.io.health import Prober
from proxy.io.registry import ManagerWatch, StaticList, check_urls
from proxy.io.tasks import Tasks
from proxy.io.telemetry import Sample
from proxy.logs import set_up_logging

_log = logging.getLogger("doherty.proxy")

LAG = "event_loop_lag_seconds"
COUNT_INTERVAL_S = 1.0
COUNT_TIMEOUT_S = 1.0
RESTART_PAUSE_FIRST_S = 0.05
RESTART_PAUSE_MAX_S = 5.0
# A worker that never became ready this many times in a row will not become ready.
FAILED_STARTS_MAX = 5


class StartError(Exception):
    """The proxy cannot start; the text says what to do."""


class WorkerHandle:
    """The supervisor's end of one worker place. The place outlives the processes that fill it."""

    def __init__(self, index: int, listener: socket.socket) -> None:
        self.index = index
        self.listener = listener
        self.process: asyncio.subprocess.Process | None = None
        self.channel: control.Channel | None = None
        self.ready = False
        self.failed_starts = 0
        self.counters: list[Sample] = []
        self.gauges: list[Sample] = []
        self.lag_s_max = 0.0  # longest lateness of its timers that nobody has been told yet
        self.counted = asyncio.Event()


class Supervisor:
    """One proxy: N workers and what they share."""

    def __init__(self, config: ProxyConfig, listeners: Sequence[socket.socket]) -> None:
        self._config = config
        self._tasks = Tasks()
        self._places = [WorkerHandle(index, sock) for index, sock in enumerate(listeners)]
        self._fleet: FleetSnapshot | None = None
        self._unusable: frozenset[str] = frozenset()
        self._fleet_at_s = time.monotonic()
        self._departed: list[Sample] = []  # what dead workers had counted
        self._worker_restarts = 0
        self._draining = False
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._failure: str | None = None
        self._prober: Prober | None = None

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        async with aiohttp.ClientSession() as session:
            self._prober = Prober(
                session,
                self._tasks,
                on_cleared=lambda replica_id: self._tell(control.Cleared(replica_id)),
                on_silent=lambda replica_id: self._tell(control.Accused(replica_id)),
                endpoint=self._config.health_check_endpoint,
                interval_s=self._config.health_check_interval_secs,
                timeout_s=self._config.health_check_timeout_secs,
            )
            admin = web.AppRunner(make_app(self, self._config.admin_api_key), access_log=None)
            try:
                await self._open_admin(admin)
                self._tasks.start("fleet", self._source(session).run(self._on_snapshot))
                for place in self._places:
                    self._tasks.start(f"worker {place.index}", self._keep_running(place))
                self._tasks.start("count", self._count_regularly())
                await self._stop.wait()
                await self._drain()
            finally:
                await self._tasks.close()
                await admin.cleanup()
                await self._end_workers()
        if self._failure:
            print(f"doherty proxy: {self._failure}", file=sys.stderr)  # noqa: T201
        return 1 if self._failure else 0

    def _source(self, session: aiohttp.ClientSession) -> StaticList | ManagerWatch:
        if self._config.manager_url:
            return ManagerWatch(self._config.manager_url, session)
        return StaticList(self._config.worker_urls, session, self._config.api_key)

    async def _open_admin(self, runner: web.AppRunner) -> None:
        await runner.setup()
        site = web.TCPSite(runner, self._config.admin_host, self._config.admin_port)
        try:
            await site.start()
        except OSError as error:
            where = f"{self._config.admin_host}:{self._config.admin_port}"
            raise StartError(_port_problem("admin listener", where, error)) from error
        host, port = site._server.sockets[0].getsockname()[:2]  # type: ignore[union-attr]  # noqa: SLF001
        _log.info("admin listener on http://%s:%s", host, port)

    def _on_signal(self) -> None:
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()

    # --- workers ---------------------------------------------------------------------------

    async def _keep_running(self, place: WorkerHandle) -> None:
        pause_s = RESTART_PAUSE_FIRST_S
        while True:
            try:
                await self._run_once(place)
            except OSError as error:  # no memory, descriptors or processes now; perhaps later
                place.failed_starts += 1
                _log.error("worker %d cannot be started: %s", place.index, error)
            if self._draining:
                return
            self._worker_restarts += 1
            others_serve = any(other.ready for other in self._places)
            if place.failed_starts >= FAILED_STARTS_MAX and not others_serve:
                self._failure = "a worker fails as soon as it starts; its reason stands above"
                self._stop.set()
                return
            pause_s = RESTART_PAUSE_FIRST_S if not place.failed_starts else pause_s * 2
            await asyncio.sleep(min(pause_s, RESTART_PAUSE_MAX_S))

    async def _run_once(self, place: WorkerHandle) -> None:
        """Fill a place with one process and serve its channel until it ends."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            fds = (place.listener.fileno(), theirs.fileno())
            place.process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "proxy.worker", *map(str, fds), pass_fds=fds
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        place.failed_starts += 1
        place.channel = channel = await control.Channel.open(ours)
        channel.send(control.Start(self._config))
        if self._fleet is not None:
            channel.send(control.FleetIs(self._fleet))
        try:
            async for message in channel:
                self._hear(place, message)
            status = await place.process.wait()
        finally:
            place.ready = False
            place.channel = None
            channel.close()
            self._departed = sum_samples([*self._departed, *place.counters])
            place.counters, place.gauges = [], []
        if not self._draining:
            _log.error("worker %d (pid %d) ended with %d", place.index, place.process.pid, status)

    def _hear(self, place: WorkerHandle, message: control.Message) -> None:
        match message:
            case control.Ready():
                place.ready = True
                place.failed_starts = 0
                if all(other.ready for other in self._places):
                    host, port = place.listener.getsockname()[:2]
                    _log.info(
                        "listening on http://%s:%s, %d workers", host, port, len(self._places)
                    )
            case control.Suspect(replica_id, reason):
                assert self._prober is not None
                self._prober.suspect(replica_id, reason)
            case control.Doubt(replica_id):
                assert self._prober is not None
                self._prober.doubt(replica_id)
            case control.Counted(counters, gauges):
                place.counters = counters
                place.gauges = [sample for sample in gauges if sample.name != LAG]
                for sample in gauges:
                    if sample.name == LAG:
                        place.lag_s_max = max(place.lag_s_max, sample.value)
                place.counted.set()
            case _:
                _log.error("worker %d said %s", place.index, type(message).__name__)

    def _tell(self, message: control.Message) -> None:
        for place in self._places:
            if place.channel is not None:
                place.channel.send(message)

    # --- the fleet -------------------------------------------------------------------------

    def _on_snapshot(self, snapshot: FleetSnapshot) -> None:
        known = self._fleet
        if known is not None and snapshot.epoch == known.epoch:
            if snapshot.version < known.version:
                return  # older than what we hold
        elif known is not None:
            _log.info("a new manager speaks for the fleet")
        snapshot = self._usable(snapshot)
        self._fleet = snapshot
        self._fleet_at_s = time.monotonic()
        if self._prober is not None:
            self._prober.know({r.replica_id: r.url for r in snapshot.replicas})
        self._tell(control.FleetIs(snapshot))

    def _usable(self, snapshot: FleetSnapshot) -> FleetSnapshot:
        """Leave out records that nobody can connect to, so that one cannot spoil the rest."""
        kept, unusable = [], {}
        for record in snapshot.replicas:
            try:
                replica_of(record)
                kept.append(record)
            except ValueError as error:
                unusable[record.replica_id] = str(error)
        for replica_id in unusable.keys() - self._unusable:
            _log.error("replica %s is left out: %s", replica_id, unusable[replica_id])
        self._unusable = frozenset(unusable)
        return msgspec.structs.replace(snapshot, replicas=tuple(kept))

    # --- what the admin listener asks --------------------------------------------------------

    def ready(self) -> str | None:
        if self._draining:
            return "draining"
        if not any(place.ready for place in self._places):
            return "no worker is up yet"
        suspects = self.suspects()
        replicas = self._fleet.replicas if self._fleet else ()
        able = [r for r in replicas if r.state is ReplicaState.READY]
        if not [r for r in able if r.replica_id not in suspects]:
            return "no replica can take a request"
        return None

    def fleet(self) -> FleetSnapshot | None:
        return self._fleet

    def suspects(self) -> frozenset[str]:
        return self._prober.suspects if self._prober else frozenset()

    async def samples(self) -> tuple[list[Sample], list[Sample]]:
        await self._count()
        counters = [
            *self._departed,
            Sample("worker_restarts_total", (), self._worker_restarts),
        ]
        gauges = [
            Sample("workers", (), sum(place.ready for place in self._places)),
            Sample("fleet_age_seconds", (), time.monotonic() - self._fleet_at_s),
        ]
        for place in self._places:
            counters += place.counters
            gauges += [*place.gauges, Sample(LAG, (), place.lag_s_max)]
            place.lag_s_max = 0.0
        return counters, gauges

    async def _count(self) -> None:
        """Ask every worker for its counts; one that is too busy to say keeps its last."""
        asked = [place for place in self._places if place.channel is not None and place.ready]
        for place in asked:
            place.counted.clear()
            assert place.channel is not None
            place.channel.send(control.Count())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(COUNT_TIMEOUT_S):
                for place in asked:
                    await place.counted.wait()

    async def _count_regularly(self) -> None:
        while True:
            await asyncio.sleep(COUNT_INTERVAL_S)
            await self._count()

    # --- the end -----------------------------------------------------------------------------

    async def _drain(self) -> None:
        self._draining = True
        if self._failure is None and self._config.drain_settle_secs:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._hurry.wait(), self._config.drain_settle_secs)
        _log.info("draining")
        for place in self._places:
            place.listener.close()
        grace_s = 0.0 if self._failure else self._config.shutdown_grace_period_secs
        self._tell(control.Drain(grace_s))
        ends = [place.process.wait() for place in self._places if place.process is not None]
        hurry = self._tasks.spawn("hurry", self._hurry.wait())
        all_ended = self._tasks.spawn("ends", _all(ends))
        await asyncio.wait(
            (hurry, all_ended), timeout=grace_s + 2.0, return_when=asyncio.FIRST_COMPLETED
        )

    async def _end_workers(self) -> None:
        for place in self._places:
            place.listener.close()
            if place.process is not None and place.process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    place.process.kill()
                await place.process.wait()


async def _all(waits: Sequence[Any]) -> None:
    await asyncio.gather(*waits)


def open_listeners(host: str, port: int, count: int) -> list[socket.socket]:
    """Open one socket per worker on the same port. Raises `StartError`.

    SO_REUSEPORT would let us share the port with any other program of the same user that sets it;
    so it is first asked for without, to find out whether somebody listens there.
    """
    where = f"{host}:{port}"
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            probe.listen(1)
            port = port or probe.getsockname()[1]
        listeners = []
        for _ in range(count):
            listener = socket.socket(family, socket.SOCK_STREAM)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            # Accepted sockets inherit it. Else the kernel takes megabytes for a slow reader before
            # we, and so its replica, notice that it is slow.
            listener.setsockopt(
                socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, limits.UNSENT_BYTES_MAX
            )
            listener.bind((host, port))
            listeners.append(listener)
    except OSError as error:
        raise StartError(_port_problem("proxy", where, error)) from error
    return listeners


def _port_problem(what: str, where: str, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"{what}: {where} is in use; stop what listens there or choose another port"
    return f"{what}: cannot listen on {where}: {error.strerror or error}"


def serve(config: ProxyConfig) -> int:
    """Run the proxy until it is told to stop; return the exit status."""
    set_up_logging(config.log_level)
    try:
        _check_source(config)
        listeners = open_listeners(config.host, config.port, config.workers)
        return asyncio.run(_run(config, listeners))
    except (StartError, ValueError) as error:
        print(f"doherty proxy: {error}", file=sys.stderr)  # noqa: T201
        return 1


def _check_source(config: ProxyConfig) -> None:
    check_urls(config.worker_urls)
    if not config.worker_urls and not config.manager_url:
        raise StartError(
            "the replica list is empty: pass --worker-urls http://HOST:PORT … or --manager-url"
        )
    if config.worker_urls and config.manager_url:
        raise StartError("--worker-urls and --manager-url exclude each other: one names the fleet")


async def _run(config: ProxyConfig, listeners: Sequence[socket.socket]) -> int:
    return await Supervisor(config, listeners).run()


def main(argv: Sequence[str] | None = None, environment: Mapping[str, str] | None = None) -> int:
    """The command `doherty proxy`."""
    try:
        config = flags.read(
            sys.argv[1:] if argv is None else argv,
            os.environ if environment is None else environment,
        )
    except ConfigError as error:
        print(f"doherty proxy: {error}", file=sys.stderr)  # noqa: T201
        return 2
    return serve(config)
