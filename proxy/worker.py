"""One worker process: builds the data plane, serves the shared port, obeys the supervisor.

Started by the supervisor with inherited descriptors: one end of the control channel, and its
listening sockets, which stay open in the supervisor too (so connections that wait in their queues
outlive a worker that dies). A worker whose supervisor is gone drains and ends.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Sequence
from functools import partial

import msgspec
import uvloop

from proxy import dumps, tls
from proxy.config import ConfigError, ProxyConfig
from proxy.core import limits
from proxy.core.memory import bodies_bytes_max
from proxy.io import control
from proxy.io.access_log import close_all, open_logs
from proxy.io.clock import Clock
from proxy.io.entrance import Entrance
from proxy.io.explain import explain
from proxy.io.hot import hot_prefixes
from proxy.io.memory import rooms_bytes
from proxy.io.plane import Plane
from proxy.io.quota_memory import quota_cells_at
from proxy.io.shared_cells import headcount_at, nonces_at, rings_at, shares_at
from proxy.io.tally import Tally, summarise_regularly
from proxy.io.tasks import Tasks, next_beat_s
from proxy.io.tracing import close_tracer, tracer_of
from proxy.logs import set_up_logging

_log = logging.getLogger("doherty.worker")

DESCRIPTORS_RESERVED = 32  # the listener, logs, the channel, libraries
DRAIN_POLL_S = 0.02
FLEET_WAIT_S = 0.5
# A request leaves no cycles behind, so looking for them after every 700 objects finds nothing.
GC_ALLOCATIONS_MAX = 20_000
GRACE_WITHOUT_SUPERVISOR_S = 60.0


class Worker:
    """The shell around one plane."""

    def __init__(self, channel: control.Channel, listeners: Sequence[socket.socket]) -> None:
        self._channel = channel
        self._listeners = listeners
        self._tasks = Tasks()
        self._status = 0
        self._drain_asked = asyncio.Event()
        self._drain_order = control.Drain(GRACE_WITHOUT_SUPERVISOR_S)

    async def run(self) -> int:
        """Serve until told to drain or left alone; return the exit status."""
        start = await self._channel.receive()
        if not isinstance(start, control.Start):
            return 1
        set_up_logging(start.config.log_level, as_json=start.config.log_json)
        clock = Clock()
        access_log, usage_log = open_logs(start.config)
        plane = Plane(
            start.config, clock, self._tasks, access_log, self._on_suspect, self._on_doubt
        )
        plane.connections_max = min(plane.connections_max, _connections_possible())
        plane.bodies_bytes_max = _bodies_possible(start.config)
        plane.make_room()
        _share(plane, start, self._channel)
        plane.metering.change_log(usage_log)
        plane.tracer = tracer_of(start.config, os.environ, plane.span_counts)
        plane.authentication.on_unknown_key = partial(self._channel.send, control.JwtKeysWanted())
        plane.outbox.on = True
        entrance = Entrance(plane, self._listeners)
        self._tasks.start("obey", self._obey(plane, entrance))
        await self._fleet_or_first_silence(plane)
        if start.accept:
            await entrance.open(tls.server_context(plane.config))
        # What start-up made will live as long as the process: keep the collector off it.
        gc.collect()
        gc.freeze()
        gc.set_threshold(GC_ALLOCATIONS_MAX, 20, 50)
        self._tasks.start("sweep", self._sweep(plane, entrance))
        self._tasks.start("notes", plane.sharing.read_regularly())
        self._tasks.start("minute", plane.metering.run())
        self._tasks.start("tally", Tally(plane, self._channel).run())
        self._tasks.start("summary", summarise_regularly(plane, self._channel))
        self._channel.send(control.Ready())
        await self._drain_asked.wait()
        await self._drain(plane, entrance)
        plane.noting.close()
        await self._tasks.close()
        plane.upstreams.close()
        plane.offline_links.close()
        close_all((plane.access_log, plane.metering.log))
        close_tracer(plane.tracer)
        self._channel.send(_answer(plane, entrance, control.Count()))  # what came to be since
        self._channel.close()
        return self._status

    async def _fleet_or_first_silence(self, plane: Plane) -> None:
        """Do not answer before it is known whom to ask and who may, unless that takes too long.

        The supervisor sends the fleet right after the start, and again once engines have said what
        they serve.
        """
        until_s = plane.clock.now_s() + FLEET_WAIT_S
        while plane.clock.now_s() < until_s:
            served = plane.fleet_known and (plane.ready or not plane.fleet.replicas)
            if served and plane.authentication.complete:
                return
            await asyncio.sleep(0.001)

    def _on_suspect(self, replica_id: str, reason: str) -> None:
        self._channel.send(control.Suspect(replica_id, reason))

    def _on_doubt(self, replica_id: str) -> None:
        self._channel.send(control.Doubt(replica_id))

    async def _obey(self, plane: Plane, entrance: Entrance) -> None:
        """An order that fails is no reason to be deaf to the next; deaf for good, it drains."""
        try:
            while (message := await self._next_order(plane)) is not None:
                try:
                    await self._do(plane, entrance, message)
                except Exception:  # noqa: BLE001 - one order, and not those that follow
                    _fault(plane, f"obeying {type(message).__name__}")
        finally:
            if not self._drain_asked.is_set():
                _log.warning("the supervisor is gone; draining")
                self._drain_asked.set()

    async def _next_order(self, plane: Plane) -> control.Message | None:
        """Return the next one that can be read, or None when the supervisor is gone."""
        while True:
            try:
                return await self._channel.receive()
            except msgspec.MsgspecError:
                _fault(plane, "reading an order")

    async def _do(self, plane: Plane, entrance: Entrance, message: control.Message) -> None:
        match message:
            case (
                control.FleetIs()
                | control.KeysAre()
                | control.JwtKeysAre()
                | control.RemotesAre()
                | control.Cleared()
                | control.Accused()
            ):
                _tell(plane, message)
            case control.Count() | control.Explain():
                self._channel.send(_answer(plane, entrance, message))
            case control.Accept():
                await self._accept(plane, entrance)
            case control.Reconfigure(config, rows):
                await self._reconfigure(plane, entrance, config, rows)
            case (
                control.Heard()
                | control.Gone()
                | control.Listen()
                | control.Whole()
                | control.Recite()
                | control.GiveWay()
            ):
                plane.sharing.obey(self._channel, message)
                plane.work_done()
                if self._channel.has_more:
                    await asyncio.sleep(0)  # between two pages others have their turn
            case control.Drain():
                self._drain_order = message
                self._drain_asked.set()
            case _:
                _log.error("the supervisor said %s", type(message).__name__)

    async def _accept(self, plane: Plane, entrance: Entrance) -> None:
        """Take connections, or end: others would wait for ever at sockets that nobody serves."""
        try:
            await entrance.open(tls.server_context(plane.config))
        except (ConfigError, OSError) as error:
            _log.error("cannot take connections, ending: %s", error)
            self._status = 1
            self._drain_asked.set()

    async def _reconfigure(
        self, plane: Plane, entrance: Entrance, config: ProxyConfig, rows: dict[str, int]
    ) -> None:
        """All of it or nothing: what fails here leaves the worker as it was."""
        try:
            context = tls.server_context(config)
            access_log, usage_log = open_logs(config)
        except (ConfigError, OSError) as error:
            _log.error("not reloaded, going on as before: %s", error)
            return
        try:
            await entrance.change(context)
        except OSError as error:
            _log.error("not reloaded, going on as before: %s", error)
            await asyncio.to_thread(close_all, (access_log, usage_log))
            return
        set_up_logging(config.log_level, as_json=config.log_json)
        plane.metering.know_rows(rows)
        tracer = plane.tracer
        plane.tracer = tracer_of(config, os.environ, plane.span_counts)
        before = plane.reconfigure(config, access_log), plane.metering.change_log(usage_log)
        await asyncio.to_thread(close_all, before)  # they write what waits; it may take a moment
        await asyncio.to_thread(close_tracer, tracer)

    async def _sweep(self, plane: Plane, entrance: Entrance) -> None:
        """One timer for all deadlines; its lateness is the loop's lag."""
        loop = asyncio.get_running_loop()
        while True:
            due_s = next_beat_s(limits.SWEEP_INTERVAL_S)
            await asyncio.sleep(due_s - loop.time())
            lag_s = loop.time() - due_s
            plane.telemetry.late_by(lag_s)
            now_s = plane.clock.now_s()
            for connection in list(entrance.connections):
                connection.check_deadline(now_s)
            plane.upstreams.sweep(now_s)
            plane.picture.sweep(now_s)

    async def _drain(self, plane: Plane, entrance: Entrance) -> None:
        """Answers under way are finished, within the grace; see `control.Drain`."""
        plane.draining = True
        loop = asyncio.get_running_loop()
        order, until_s = None, 0.0
        while True:
            if order is not self._drain_order:
                order = self._drain_order
                plane.relieved = order.gentle and not order.keep_port
                until_s = loop.time() + order.grace_s
                if not order.keep_port:
                    entrance.close()
            if not order.gentle:
                for connection in list(entrance.connections):
                    connection.drain()
            over = not len(entrance) and not order.keep_port and not order.stay
            if over or loop.time() >= until_s:
                break
            await asyncio.sleep(DRAIN_POLL_S)
        if len(entrance):
            _log.warning("grace is over; cutting %d connections", len(entrance))
        entrance.close()
        entrance.kill()


def _share(plane: Plane, start: control.Start, channel: control.Channel) -> None:
    """Have the plane use the memory that it has with other workers, as far as there is any."""
    if start.notes_fd >= 0:
        ring, others = rings_at(start.notes_fd, start.place, start.notes_read)
        plane.noting.connect(channel, ring)
        plane.sharing.connect(channel, others)
        plane.waiting.hears = True
    if start.cells_fd >= 0:
        counted = headcount_at(start.cells_fd, start.place, start.workers)
        plane.picture.loads.count_with(counted)
        plane.waiting.shares.cells = shares_at(start.cells_fd, start.place, start.workers)
    if start.quota_fd >= 0:
        cells = quota_cells_at(start.quota_fd, start.workers)
        plane.metering.connect(cells, start.place, start.workers, start.rows)
    if start.nonces_fd >= 0:
        plane.hops.share(nonces_at(start.nonces_fd, start.place, start.workers))


def _fault(plane: Plane, doing: str) -> None:
    plane.telemetry.internal_errors_total += 1
    _log.exception("%s", doing)


def _tell(plane: Plane, message: control.News) -> None:
    """Have the plane know what the supervisor has heard."""
    match message:
        case control.FleetIs(snapshot, columns):
            plane.take_snapshot(snapshot, columns)
        case control.KeysAre(keys):
            plane.know_keys(keys)
        case control.JwtKeysAre(document):
            plane.authentication.know_jwt_keys(document)
        case control.RemotesAre(remotes, ours):
            plane.know_remotes(remotes, ours)
        case control.Cleared(replica_id):
            plane.clear(replica_id)
        case control.Accused(replica_id):
            plane.accuse(replica_id)


def _answer(
    plane: Plane, entrance: Entrance, asked: control.Count | control.Explain
) -> control.Message:
    plane.catch_up()
    match asked:
        case control.Count(hot):
            return control.Counted(
                plane.counters(), plane.gauges(len(entrance)), hot_prefixes(plane) if hot else []
            )
        case control.Explain(number, path, fields, body):
            return control.Explained(number, *explain(plane, path, fields, body))


def _connections_possible() -> int:
    """Take all the descriptors that we may have; a client needs two, its own and its replica's."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard == resource.RLIM_INFINITY:
        return limits.CLIENT_CONNECTIONS_MAX
    possible = max(1, (hard - DESCRIPTORS_RESERVED) // 2)
    if possible < limits.CLIENT_CONNECTIONS_MAX:
        _log.info(
            "room for %d client connections; raise the limit of open files for more", possible
        )
    return possible


def _bodies_possible(config: ProxyConfig) -> int:
    """Find out how many octets of request bodies fit into the memory that we may use."""
    possible = bodies_bytes_max(rooms_bytes(), config.workers, config.max_payload_size)
    if possible < limits.BODIES_BYTES_MAX:
        _log.info("room for %d MiB of request bodies", possible // limits.MIB)
    return possible


def main(argv: list[str]) -> int:
    """`python -m proxy.worker CONTROL_FD LISTENER_FD…`, as the supervisor calls it."""
    dumps.leave_none()
    end, *listeners = (socket.socket(fileno=int(fd)) for fd in argv)
    # The terminal's signals reach the whole group; the supervisor decides what they mean.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)

    async def run() -> int:
        channel = await control.Channel.open(end)
        return await Worker(channel, listeners).run()

    return uvloop.run(run())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
