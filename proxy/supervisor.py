"""The supervisor: keeps the workers running, tells them things, and is told what to do by signals.

It owns everything that is not the data path: the listening sockets, the fleet's source, probes of
suspects, the admin listener, signals. It may die without cutting a stream; a worker may die without
the port closing, because the supervisor holds the same listening socket and starts another.

    SIGTERM, SIGINT   drain and end; once more: at once
    SIGHUP            read the configuration again, open logs and certificates anew
    SIGUSR2           start this command again, as it is installed now, and hand over to it
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from datetime import UTC, datetime

from aiohttp import web

from proxy import settings, systemd, takeover, tls
from proxy.config import ConfigError, ProxyConfig
from proxy.contract import FleetSnapshot
from proxy.figures import Figures
from proxy.flags import Invocation
from proxy.io import control
from proxy.io.admin import make_app
from proxy.io.admin_door import admin_runner
from proxy.io.admin_guard import Guard, is_local
from proxy.io.entrance import LISTEN_BACKLOG
from proxy.io.hub import Hub
from proxy.io.lookout import Lookout
from proxy.io.operating import Operators
from proxy.io.peers import Peers
from proxy.io.quota_keeper import QuotaKeeper
from proxy.io.regions import Regions
from proxy.io.scaling_news import ScalingNews
from proxy.io.sharing import recital_s
from proxy.io.tasks import Tasks, beat
from proxy.io.teller import Teller
from proxy.io.tracing import check_tracing
from proxy.io.viewing import Viewing
from proxy.io.wanting import Wanting
from proxy.io.witness import Witness
from proxy.listeners import Listeners, StartError, deal
from proxy.logs import set_up_logging
from proxy.places import Places
from proxy.roster import Roster
from proxy.sources import check_source
from proxy.standing import Standing
from proxy.terminal import has_terminal

_log = logging.getLogger("doherty.proxy")

WATCH_INTERVAL_S = 1.0
TELL_MARGIN_S = 1.0  # for asking, beyond what a worker takes to tell what is cached where
ADMIN_END_S = 5.0  # for what was asked before a successor was there
END_MARGIN_S = 2.0  # beyond the grace that workers were given


class Supervisor:
    """One proxy: N workers and what they share."""

    def __init__(
        self,
        invocation: Invocation,
        config: ProxyConfig,
        listeners: Listeners,
        predecessor: takeover.Predecessor | None = None,
    ) -> None:
        self._invocation = invocation
        self._config = config
        self._listeners = listeners
        self._predecessor = predecessor
        self._tasks = Tasks()
        self._figures = Figures()
        self.hub = Hub(config.workers)
        self._witness = Witness(self._tasks, self.hub)
        self._teller = Teller(lambda: self._lookout.session)
        self._places = Places(
            deal(listeners.public, config.workers),
            self._tasks,
            self.hub,
            self._teller,
            on_message=self._hear,
            on_failure=self._fail,
        )
        self._regions = Regions(self._places.tell, self._teller.summary)
        self._peers = Peers(self._tasks, self.hub, self._regions)
        self._wanting = Wanting(self._peers, self._regions, self._teller)
        self._quotas = QuotaKeeper(
            self._places.quotas, self._peers, takes_over=predecessor is not None
        )
        self._lookout = Lookout(
            self._tasks,
            on_snapshot=self._on_snapshot,
            on_cleared=lambda replica_id: self._places.tell(control.Cleared(replica_id)),
            on_silent=lambda replica_id: self._places.tell(control.Accused(replica_id)),
            on_keys=lambda keys: self._places.tell(control.KeysAre(keys)),
            on_jwt_keys=lambda document: self._places.tell(control.JwtKeysAre(document)),
        )
        self._roster = Roster(listeners.held)
        self._standing = Standing(
            config,
            places=self._places,
            roster=self._roster,
            lookout=self._lookout,
            regions=self._regions,
            hub=self.hub,
            figures=self._figures,
            others=(self._peers, self._teller, self._wanting, self._witness, self._quotas),
            on_fleet=self._tell_fleet,
        )
        asked = ScalingNews(lambda: self._lookout.session, self._standing.manager_url)
        self._viewing = Viewing(self._standing, asked, self._tasks)
        self._admin = admin_runner(self._make_admin())
        self._door: takeover.Door | None = None
        self._door_task: asyncio.Task[None] | None = None
        self._fingerprint = settings.fingerprint(invocation.path, config)
        self._terminal = has_terminal()
        self._relieved = False  # a successor serves
        self._linked_successor = False  # and hears what runs here until it ends
        self._successor: asyncio.subprocess.Process | None = None
        self._stop, self._hurry = asyncio.Event(), asyncio.Event()
        self._failure: str | None = None

    def _make_admin(self) -> web.Application:
        guard = Guard(self._config.admin_api_key, local=is_local(self._listeners.admin))
        self._standing.can_drain = guard.can_drain
        self._places.on_counted = self._viewing.count
        self._places.viewed = self._viewing.viewed
        operators = Operators(self._standing, lambda: self._lookout.session)
        return make_app(self._standing, guard, self._viewing, operators)

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        loop.add_signal_handler(signal.SIGUSR2, self._upgrade)
        loop.add_signal_handler(signal.SIGHUP, self._on_hang_up)
        try:
            await self._admin.setup()
            self._look()
            if self._predecessor is None:
                await self._open_doors()
            else:
                self._places.accepting = False
                self._tasks.start("takeover", self._take_over(self._predecessor))
            self._places.start(self._config)
            self._tasks.start("hub", self.hub.run())
            self._tasks.start("demand", self._teller.run())
            self._tasks.start("regions", self._regions.run())
            self._tasks.start("wanted", self._wanting.run())
            self._quotas.know(self._config)
            self._tasks.start("quotas", self._quotas.run())
            self._peers.start(self._config, listen=self._predecessor is None)
            self._tasks.start("watch", self._watch())
            await self._stop.wait()
            await self._drain()
            await self._standing.estate.farewell()
            await self._quotas.farewell()
            await self._teller.farewell()
        finally:
            self._close_door()
            await self._witness.close()
            await self._tasks.close()
            await self._lookout.close()
            await self._admin.cleanup()
            await self._places.kill()
        if self._failure:
            print(f"doherty proxy: {self._failure}", file=sys.stderr)  # noqa: T201
        return 1 if self._failure else 0

    async def _open_doors(self) -> None:
        """Open what operators and successors come in by."""
        for listener in self._listeners.admin:
            await web.SockSite(self._admin, listener).start()
        host, port = self._listeners.admin[0].getsockname()[:2]
        _log.info("admin listener on http://%s:%s", host, port)
        if self._config.upgrade_socket is not None:
            self._door = takeover.Door(self._config.upgrade_socket)
            self._door_task = self._tasks.spawn("door", self._keep_door(self._door))

    def _look(self) -> None:
        self._figures.know(self._config)
        self._lookout.look(self._config)
        self._witness.look(self._lookout.session, self._config)
        self._teller.tell(self._config.manager_url)
        self._wanting.look(self._config)

    def _on_signal(self) -> None:
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()

    def _on_hang_up(self) -> None:
        """The terminal is gone, and this goes with it; otherwise SIGHUP means: read again."""
        if self._terminal and not has_terminal():
            self._on_signal()
        else:
            self._reload(ordered=True)

    def _fail(self, reason: str) -> None:
        _log.error("stopping: %s", reason)
        self._failure = reason
        self._stop.set()

    def _hear(self, message: control.Message) -> None:
        match message:
            case control.Ready():
                if self._places.accepting:
                    self._say_where()
            case control.Suspect(replica_id, reason):
                self._lookout.prober.suspect(replica_id, reason)
            case control.Doubt(replica_id):
                self._lookout.prober.doubt(replica_id)
            case control.JwtKeysWanted():
                self._lookout.jwt_keys.want()
            case _:
                _log.error("a worker said %s", type(message).__name__)

    def _say_where(self) -> None:
        host, port = self._listeners.public[0].getsockname()[:2]
        scheme = "https" if self._config.tls_cert_path else "http"
        where = f"listening on {scheme}://{host}:{port}, {len(self._places)} workers"
        _log.info(where)
        systemd.serving(where)

    # --- the fleet -------------------------------------------------------------------------

    def _on_snapshot(self, snapshot: FleetSnapshot) -> None:
        self._tell_fleet(self._roster.take(snapshot))

    def _tell_fleet(self, fleet: FleetSnapshot | None) -> None:
        if fleet is None:
            return
        self._lookout.prober.know({r.replica_id: r.url for r in fleet.replicas})
        self._places.tell(control.FleetIs(fleet))
        self.hub.know_fleet()
        self._witness.know(fleet)
        self._wanting.know(fleet)

    # --- the configuration changes -----------------------------------------------------------

    async def _watch(self) -> None:
        while True:
            await beat(WATCH_INTERVAL_S)
            if not self._relieved:  # else it would hide that the successor hangs
                systemd.alive()
            if settings.fingerprint(self._invocation.path, self._config) != self._fingerprint:
                self._reload(ordered=False)

    def _reload(self, *, ordered: bool) -> None:
        """Read everything again. What cannot be used changes nothing."""
        if self._standing.draining:
            return
        self._fingerprint = settings.fingerprint(self._invocation.path, self._config)
        try:
            read = self._invocation.settings()
            check_source(read)
            settings.check_tenants(read)
            warnings = [*tls.check(read, datetime.now(UTC)), *check_tracing(read, os.environ)]
        except (ConfigError, StartError, ValueError) as error:
            _log.error("not reloaded, going on as before: %s", error)
            self._figures.reloaded(good=False)
            return
        for warning in warnings:
            _log.warning("%s", warning)
        change = settings.change(self._config, read)
        if change.waiting:
            names = ", ".join(change.waiting)
            _log.warning("%s: a change of this needs an upgrade (SIGUSR2)", names)
        self._config = self._standing.config = change.config
        self._figures.reloaded(good=True)
        self._fingerprint = settings.fingerprint(self._invocation.path, self._config)
        set_up_logging(self._config.log_level, as_json=self._config.log_json)
        if change.changed or tls.files(self._config):
            self._look()
        self._peers.reconfigure(self._config)
        self._quotas.know(self._config)
        if change.changed or tls.files(self._config) or ordered:
            self._places.tell(control.Reconfigure(self._config))
            _log.info("reloaded; changed: %s", ", ".join(change.changed) or "nothing")

    # --- another takes over ------------------------------------------------------------------

    async def _take_over(self, predecessor: takeover.Predecessor) -> None:
        await self._places.all_ready.wait()
        for listener in self._listeners.public:  # those that are new queue from now on, too
            listener.listen(LISTEN_BACKLOG)
        self._places.tell(control.Accept())
        self._say_where()
        left, link = await predecessor.relieve()
        self._peers.adopt(link, dialled=True)
        self._peers.start_listening(self._config)
        await self._standing.estate.wait()
        if left:
            _log.info("took over from the proxy that ran before")
        else:
            _log.warning("the proxy that ran before did not say that it leaves")
        try:
            await self._open_doors()
        except (StartError, OSError) as error:
            _log.error("serving without: %s", error)

    async def _keep_door(self, door: takeover.Door) -> None:
        while not self._relieved:
            await self._serve_successor(await door.knock())

    async def _serve_successor(self, end: socket.socket) -> None:
        _log.info("a new proxy comes up beside this one")
        self._listeners.held = self._roster.held
        if not await takeover.hand_over(end, self._listeners, self._leave):
            _log.error("the new proxy did not come up; going on")

    def _close_door(self) -> None:
        if self._door is not None and self._door_task is not None:
            self._door_task.cancel()
            self._door.close()
            self._door = None

    async def _leave(self, link: socket.socket | None) -> None:
        await self._quotas.leave()
        self._peers.stop_listening()
        if link is not None:
            self._linked_successor = True
            self.hub.told.clear()
            self._peers.adopt(link, dialled=False)
            self._tasks.start("estate", self._standing.estate.run())
        self._relieved = self._standing.draining = True
        self._stop.set()

    def _upgrade(self) -> None:
        if self._successor is not None or self._standing.draining:
            _log.error("an upgrade or the end is under way already")
            return
        self._tasks.start("upgrade", self._start_successor())

    async def _start_successor(self) -> None:
        """Start the command again, with the other end of a socket pair in place of a path."""
        try:
            await self._try_successor()
        finally:
            if not self._relieved:
                self._successor = None  # the next signal may start another

    async def _try_successor(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        fd = theirs.fileno()
        try:
            self._successor = await asyncio.create_subprocess_exec(
                # Without -P another `proxy` in the working folder would be given our sockets.
                *(sys.executable, "-P", "-m", "proxy", *self._invocation.argv),
                env=takeover.successor_environment(fd),
                pass_fds=(fd,),
            )
        except OSError as error:
            _log.error("the new proxy cannot be started: %s", error)
            ours.close()
            return
        finally:
            theirs.close()
        await self._serve_successor(ours)
        if not self._relieved:
            status = await takeover.end_of(self._successor)
            _log.error("the new proxy ended with %d", status)

    # --- the end -----------------------------------------------------------------------------

    async def _drain(self) -> None:
        self._standing.draining = True
        self._regions.draining = not self._relieved  # else those who call find the successor
        self._regions.say_now()
        if self._relieved:
            _log.info("a new proxy has taken over; finishing what runs")
            self._close_door()
            self._tasks.start("leave admin", self._leave_admin())
            grace_s = self._config.upgrade_grace_period_secs
            await self._tell_successor(grace_s)
            if await self._ended(control.Drain(grace_s, gentle=True)):
                return
            self._hurry.clear()
        # Workers that serve finish what they have, though one place cannot be filled.
        alone = self._failure is not None and not self._places.ready_count
        grace_s = 0.0 if alone else self._config.shutdown_grace_period_secs
        if not self._relieved:  # else it is another's unit by now
            systemd.stopping("draining")
        settle_s = 0.0 if self._failure or self._relieved else self._config.drain_settle_secs
        if settle_s:
            _log.info("settling")
            self._places.drain(control.Drain(settle_s + grace_s, gentle=True, keep_port=True))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._hurry.wait(), settle_s)
        _log.info("draining")
        await self._ended(control.Drain(grace_s))

    async def _leave_admin(self) -> None:
        """Have whoever asks or watches come to the successor: by a connection kept alive it would
        be this one who is scraped and drained, for as long as its last stream takes.
        """
        for site in list(self._admin.sites):
            await site.stop()
        self._viewing.close()
        if self._admin.server is not None:
            self._admin.server.pre_shutdown()
            await self._admin.server.shutdown(ADMIN_END_S)

    async def _tell_successor(self, grace_s: float) -> None:
        """Idle workers, too, stay until they have told what is cached where."""
        if self._linked_successor:
            self._places.drain(control.Drain(grace_s, gentle=True, stay=True))
            replicas = self._roster.fleet.replicas if self._roster.fleet else ()
            timeout_s = recital_s(sum([r.dp_size for r in replicas])) + TELL_MARGIN_S
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.hub.told.wait(), timeout_s)

    async def _ended(self, order: control.Drain) -> bool:
        """Give the order; return whether the workers have ended before anybody is in a hurry."""
        self._places.drain(order)
        hurry = self._tasks.spawn("hurry", self._hurry.wait())
        ended = self._tasks.spawn("ends", self._places.ended())
        timeout_s = order.grace_s + END_MARGIN_S
        await asyncio.wait((hurry, ended), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        return ended.done()
