"""The places of the workers: each filled by one process, and again when that has died."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import sys
from collections.abc import Callable, Sequence

import msgspec

from proxy.compile import worker_environment
from proxy.config import ProxyConfig
from proxy.core.admission import allowances
from proxy.core.headcount import Columns
from proxy.io import control
from proxy.io.exposition import sum_samples
from proxy.io.hub import Hub
from proxy.io.quota_memory import QuotaMemory
from proxy.io.shared_cells import SharedCells, SharedNonces
from proxy.io.tasks import Tasks, beat
from proxy.io.telemetry import Sample
from proxy.io.teller import Teller

_log = logging.getLogger("doherty.proxy")

LAG = "event_loop_lag_seconds"
COUNT_INTERVAL_S = 1.0
COUNT_TIMEOUT_S = 1.0
RESTART_PAUSE_FIRST_S = 0.05
RESTART_PAUSE_MAX_S = 5.0
EXPLAIN_TIMEOUT_S = 5.0
EXPLAINED_AT_ONCE_MAX = 4  # each may hold up the worker for some ten milliseconds
END_TIMEOUT_S = 5.0  # the channel is the last thing that a worker closes
# A worker that never became ready this many times in a row will not become ready.
FAILED_STARTS_MAX = 5


class Place:
    """The supervisor's end of one worker place. It outlives the processes that fill it."""

    def __init__(self, index: int, listeners: Sequence[socket.socket]) -> None:
        self.index = index
        self.listeners = listeners
        self.process: asyncio.subprocess.Process | None = None
        self.channel: control.Channel | None = None
        self.ready = False
        self.failed_starts = 0
        self.origin = 0  # of its notes; another for each process
        self.counters: list[Sample] = []
        self.gauges: list[Sample] = []
        self.hot: list[control.HotPrefix] = []  # as it told last
        self.lag_s_max = 0.0  # longest lateness of its timers that nobody has been told yet
        self.counted = asyncio.Event()
        self.silent = asyncio.Event()  # nothing more comes from the process that filled it


class Places:
    """All workers of one proxy."""

    def __init__(
        self,
        hands: Sequence[Sequence[socket.socket]],
        tasks: Tasks,
        hub: Hub,
        teller: Teller,
        *,
        on_message: Callable[[control.Message], None],
        on_failure: Callable[[str], None],
    ) -> None:
        """Each place gets one hand of sockets. `hub` passes on what workers tell each other, and
        `teller` what they tell the manager.

        `on_failure` hears why no worker can serve.
        """
        self._places = [Place(index, hand) for index, hand in enumerate(hands)]
        self._tasks = tasks
        self._hub = hub
        self._teller = teller
        self._on_message = on_message
        self._on_failure = on_failure
        self._config = ProxyConfig()
        self._told: dict[type, control.Message] = {}  # what later workers must know, too
        self._columns = Columns()
        # One worker alone knows what it has.
        self._cells = SharedCells(len(hands)) if len(hands) > 1 else None
        self._nonces = SharedNonces(len(hands))
        self.quotas = QuotaMemory(len(hands))
        self._departed: list[Sample] = []  # what dead workers had counted
        self._restarts = 0
        self._explanations: dict[int, asyncio.Future[tuple[int, bytes]]] = {}  # asked for
        self._number = 0  # of the last one
        self._order: control.Drain | None = None  # the last; none is started after one
        self._lag_s_max = 0.0  # the longest lateness that no viewer has been told yet
        self.on_counted: Callable[[], None] = lambda: None  # after each regular count
        self.viewed: Callable[[], bool] = lambda: False  # whether it is to tell what is hot
        self.accepting = True  # whether a worker that is ready takes connections at once
        self.all_ready = asyncio.Event()

    def __len__(self) -> int:
        return len(self._places)

    @property
    def ready_count(self) -> int:
        return sum(place.ready for place in self._places)

    def pids(self) -> dict[int, int]:
        """Return the processes of the workers that serve, by place."""
        return {p.index: p.process.pid for p in self._places if p.ready and p.process is not None}

    def start(self, config: ProxyConfig) -> None:
        self._config = config
        self._quota_rows()  # there are some before the first worker counts
        for place in self._places:
            self._tasks.start(f"worker {place.index}", self._keep_running(place))
        self._tasks.start("count", self._count_regularly())

    def tell(self, message: control.Message) -> None:
        """Tell all workers; what later ones must know, too, is kept for them."""
        match message:
            case control.FleetIs(snapshot):
                columns = self._columns.assign(snapshot) if self._cells is not None else {}
                message = self._told[control.FleetIs] = control.FleetIs(snapshot, columns)
            case control.KeysAre() | control.JwtKeysAre() | control.RemotesAre():
                self._told[type(message)] = message
            case control.Reconfigure(config):
                self._config = config
                message = control.Reconfigure(config, self._quota_rows())
            case control.Accept():
                self.accepting = True
            case _:
                pass
        for place in self._places:
            if place.channel is not None:
                place.channel.send(message)

    # --- one place ---------------------------------------------------------------------------

    async def _keep_running(self, place: Place) -> None:
        pause_s = RESTART_PAUSE_FIRST_S
        while not self._draining():
            try:
                await self._run_once(place)
            except OSError as error:  # no memory, descriptors or processes now; perhaps later
                place.failed_starts += 1
                _log.error("worker %d cannot be started: %s", place.index, error)
            if self._draining():
                return
            self._restarts += 1
            if place.failed_starts >= FAILED_STARTS_MAX:
                # Even if others serve: this one's sockets go on taking their share of the clients.
                self._on_failure("a worker fails as soon as it starts; its reason stands above")
                return
            pause_s = RESTART_PAUSE_FIRST_S if not place.failed_starts else pause_s * 2
            await asyncio.sleep(min(pause_s, RESTART_PAUSE_MAX_S))

    def _quota_rows(self) -> dict[str, int]:
        return self.quotas.assign(allowances(self._config.access))

    def _draining(self) -> bool:
        return self._order is not None

    async def _run_once(self, place: Place) -> None:
        """Fill a place with one process until it ends."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            fds = (theirs.fileno(), *(listener.fileno() for listener in place.listeners))
            shared = (self.quotas.fd, *((self._cells.fd,) if self._cells is not None else ()))
            # Without -P the working folder would come first, and it may hold another `proxy`.
            command = (sys.executable, "-P", "-m", "proxy.worker", *map(str, fds))
            place.process = process = await asyncio.create_subprocess_exec(
                *command,
                pass_fds=(*fds, *shared, self._nonces.fd, self._hub.notes.fd),
                env=worker_environment(),
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        place.failed_starts += 1
        place.silent.clear()
        place.channel = channel = await control.Channel.open(ours)
        try:
            await self._serve(place, channel, process)
            status = await _end_of(process)
        finally:
            self._hub.leave(place.origin)  # from now on it says nothing more
        if self._cells is not None:
            self._cells.clear(place.index)
        self.quotas.forget_flight(place.index)
        if not self._draining():
            _log.error("worker %d (pid %d) ended with %d", place.index, process.pid, status)

    async def _serve(
        self, place: Place, channel: control.Channel, process: asyncio.subprocess.Process
    ) -> None:
        """Serve a worker's channel until it ends."""
        try:
            self._greet(place.index, channel)
            place.origin = self._hub.join(channel)
            self._teller.join(place.origin)
            await channel.follow(lambda message: self._hear(place, message))
        except msgspec.MsgspecError as error:
            _log.error("worker %d cannot be understood, ending it: %s", place.index, error)
            _kill(process)
        finally:
            place.ready = False
            place.channel = None
            self._teller.leave(place.origin)
            channel.close()
            self._departed = sum_samples([*self._departed, *place.counters])
            place.counters, place.gauges, place.hot = [], [], []
            place.silent.set()

    def _greet(self, place: int, channel: control.Channel) -> None:
        """Tell a new worker what the others know."""
        cells_fd = self._cells.fd if self._cells is not None else -1
        channel.send(
            control.Start(
                self._config,
                self.accepting,
                place,
                cells_fd,
                len(self._places),
                self.quotas.fd,
                self._quota_rows(),
                self._nonces.fd,
                self._hub.notes.fd,
                self._hub.notes.ends(),
            )
        )
        # Keys before the fleet: before there is anybody to ask.
        for told in sorted(self._told.values(), key=lambda told: isinstance(told, control.FleetIs)):
            channel.send(told)
        if self._order is not None:  # given while the process was being started
            channel.send(self._order)

    def _hear(self, place: Place, message: control.Message) -> None:
        match message:
            case (
                control.Noted()
                | control.Missed()
                | control.Page()
                | control.Garbled()
                | control.GiveWay()
            ):
                self._hub.hear(place.origin, message)
            case control.Demanded() | control.Summarised():
                self._teller.hear(place.origin, message)
            case control.Ready():
                place.ready = True
                place.failed_starts = 0
                if all(other.ready for other in self._places):
                    self.all_ready.set()
                    self._on_message(message)
            case control.Counted(counters, gauges, hot):
                place.counters = counters
                place.hot = hot
                place.gauges = [sample for sample in gauges if sample.name != LAG]
                for sample in gauges:
                    if sample.name == LAG:
                        place.lag_s_max = max(place.lag_s_max, sample.value)
                        self._lag_s_max = max(self._lag_s_max, sample.value)
                place.counted.set()
            case control.Explained(number, status, body):
                answer = self._explanations.get(number)
                if answer is not None and not answer.done():
                    answer.set_result((status, body))
            case _:
                self._on_message(message)

    # --- counts ------------------------------------------------------------------------------

    async def samples(self) -> tuple[list[Sample], list[Sample]]:
        """Return counters and gauges of all workers, unsummed."""
        await self.count()
        counters, gauges = self.counted()
        counters.append(Sample("worker_restarts_total", (), self._restarts))
        gauges.append(Sample("workers", (), self.ready_count))
        for place in self._places:
            gauges.append(Sample(LAG, (), place.lag_s_max))
            place.lag_s_max = 0.0
        return counters, gauges

    def counted(self) -> tuple[list[Sample], list[Sample]]:
        """Return counters and gauges of all workers as they told them last, unsummed."""
        counters, gauges = [*self._departed], list[Sample]()
        for place in self._places:
            counters += place.counters
            gauges += place.gauges
        return counters, gauges

    def take_lag_s(self) -> float:
        """Return the longest lateness of a worker's timers since a viewer asked last."""
        lag_s, self._lag_s_max = self._lag_s_max, 0.0
        return lag_s

    def hot(self) -> list[control.HotPrefix]:
        """Return what is hot in the workers as they told it last, each for itself."""
        return [prefix for place in self._places for prefix in place.hot]

    async def count(self, *, hot: bool = False) -> None:
        """Ask every worker for its counts; one that is too busy to say keeps its last."""
        asked = [place for place in self._places if place.channel is not None and place.ready]
        for place in asked:
            place.counted.clear()
            assert place.channel is not None
            place.channel.send(control.Count(hot))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(COUNT_TIMEOUT_S):
                for place in asked:
                    await place.counted.wait()

    async def _count_regularly(self) -> None:
        while True:
            await beat(COUNT_INTERVAL_S)
            await self.count(hot=self.viewed())
            self.on_counted()

    # --- explanations ------------------------------------------------------------------------

    async def explain(
        self, path: bytes, fields: list[tuple[bytes, bytes]], body: bytes
    ) -> tuple[int, bytes] | None:
        """Return the status and JSON of a worker's dry run, or None when none says it in time."""
        ready = [place.channel for place in self._places if place.ready and place.channel]
        if not ready or len(self._explanations) >= EXPLAINED_AT_ONCE_MAX:
            return None
        self._number += 1
        number = self._number
        answer: asyncio.Future[tuple[int, bytes]] = asyncio.get_running_loop().create_future()
        self._explanations[number] = answer
        ready[0].send(control.Explain(number, path, fields, body))
        try:
            async with asyncio.timeout(EXPLAIN_TIMEOUT_S):
                return await answer
        except TimeoutError:
            return None
        finally:
            del self._explanations[number]

    # --- the end -----------------------------------------------------------------------------

    def drain(self, order: control.Drain) -> None:
        """Have the workers end as `order` says; none is started again."""
        self._order = order
        if not order.keep_port:
            self.close_listeners()
        self.tell(order)

    def close_listeners(self) -> None:
        for place in self._places:
            for listener in place.listeners:
                listener.close()

    async def ended(self) -> None:
        """Wait until every worker has ended, and all that it said has been heard."""
        for place in self._places:
            if place.process is not None:
                await place.process.wait()
                await place.silent.wait()

    async def kill(self) -> None:
        self.close_listeners()
        for place in self._places:
            if place.process is not None and place.process.returncode is None:
                _kill(place.process)
                await place.process.wait()
        if self._cells is not None:
            self._cells.close()
        self._nonces.close()
        self._hub.notes.close()
        self.quotas.close()


def _kill(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()


async def _end_of(process: asyncio.subprocess.Process) -> int:
    """Wait for a worker whose channel has ended; it cannot be told anything any more."""
    with contextlib.suppress(TimeoutError):
        return await asyncio.wait_for(process.wait(), END_TIMEOUT_S)
    _kill(process)
    return await process.wait()
