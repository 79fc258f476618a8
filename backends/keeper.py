"""Keeps one replica: performs what its lifecycle commands, and tells it what happened.

Events are applied one after another on the event loop, and their commands are performed before the
next one: a spawn is a few milliseconds of work here, so no state exists in which it is half done.
The one lasting task asks the engine questions (`_follow`), one for each life, and every event of an
older life is recognised by its launch id and dropped.

Busy is not dead. A dead process is noticed at once, by its exit. A process that lives and gives no
answer is left alone for `SILENCE_S_MAX`: a long prefill, a compilation or a page of swap looks just
the same from outside, and a restart costs minutes and the whole cache.
"""

from __future__ import annotations

import asyncio
import os
import signal
import uuid
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec

from backends.clock import Alarm, Clock, Timer
from backends.engines.base import (
    Engine,
    EngineMissingError,
    FlagError,
    Ports,
    launch_hash,
    merged,
    resolve_program,
    url_of,
)
from backends.engines.release import UNKNOWN_RELEASE
from backends.fetch import Fetch, Silence
from backends.journal import Ended, Held, Journal, Launch, Ready, Started
from backends.lifecycle import (
    PUBLISHED,
    SERVING,
    Command,
    Event,
    Lifecycle,
    Phase,
    Timing,
    adopted,
    step,
)
from backends.log import Log
from backends.ports import NoPortError, PortLeases
from backends.providers.base import Process, Provider
from backends.questions import Questions
from backends.reconcile import Observed, Wanted
from backends.tasks import cancel_all, spawn
from proxy.contract import LoadSample, ReplicaRecord

SILENCE_S_MAX = 300.0
ADOPT_TIMEOUT_S = 2.0
READY_POLL_S = (0.05, 1.0)  # the first pause between readiness probes, and the longest
DRAIN_POLL_S = 0.25
IDLE_S = 0.2  # a request that left a proxy before it heard of the drain shows by then
ABORT_TIMEOUT_S = 2.0


class Surroundings(msgspec.Struct, frozen=True):
    """What every keeper of a manager shares."""

    clock: Clock
    provider: Provider
    fetch: Fetch
    journal: Journal
    ports: PortLeases
    log: Log
    log_folder: Path
    region: str
    scrape_interval_s: float
    backoff_s: float
    backoff_s_max: float
    changed: Callable[[], None]


class Keeper:
    """One replica and its process, when it has one."""

    def __init__(self, wanted: Wanted, engine: Engine, around: Surroundings) -> None:
        self.spec = wanted.spec
        self.state = Lifecycle()
        self._engine = engine
        self._around = around
        self._spec_hash = wanted.launch_hash
        self.questions = Questions(wanted.spec, engine, around.fetch, around.clock)
        self._port = 0
        self._launch: Launch | None = None  # the life under way
        self._process: Process | None = None
        self._timer: Timer | None = None
        self._alarm = Alarm(around.clock)
        self._tasks: set[asyncio.Task[None]] = set()

    # --- what the manager reads -----------------------------------------------------------------

    @property
    def observed(self) -> Observed:
        running = self._launch.launch_hash if self._launch else self._spec_hash
        return Observed(self.spec, running, self.state.phase, self.state.wanted)

    @property
    def log_path(self) -> Path:
        return self._around.log_folder / f"{self.spec.replica_id}.log"

    def record(self) -> ReplicaRecord:
        """Return what the fleet is told."""
        serving = self.state.phase in SERVING
        return msgspec.structs.replace(
            self.questions.told,
            url=url_of(self._port),
            models=self.questions.models,
            pool=self.spec.pool,
            region=self._around.region,
            engine=self._engine.name,
            state=PUBLISHED[self.state.phase],
            reason=self.state.reason,
            target_inputs=self.spec.target_inputs,
            max_inputs=self.spec.max_inputs,
            weight=self.spec.weight,
            restarts=self.state.restarts,
            pid=self._process.pid if self._process else 0,
            load=self.questions.load if serving else None,
            asleep=self.questions.told.asleep and serving,
        )

    # --- what the manager wishes ----------------------------------------------------------------

    def update(self, wanted: Wanted) -> None:
        """Take over a new specification; it is the command of the next start."""
        self.spec = self.questions.spec = wanted.spec
        self._spec_hash = wanted.launch_hash
        self._around.changed()

    async def adopt(self, launch: Launch, process: Process) -> None:
        """Go on with a process of the manager before.

        One that was ready stays ready unless nobody listens: it may be too busy to say so.
        """
        self._launch, self._process, self._port = launch, process, launch.port
        self._around.ports.claim(launch.port)
        self.questions.begin(launch.port)
        if launch.pid != process.pid:  # the manager before died between the spawn and this note
            self._note_process(launch, process)
        self.state = self._adopted(launch, ready=launch.ready)
        answer = await self.questions.probe(ADOPT_TIMEOUT_S)
        silent = answer.silence is not None and answer.silence is not Silence.REFUSED
        ready = answer.status == 200 or (launch.ready and silent)
        self.state = self._adopted(launch, ready=ready)
        self._around.log.tell(
            "replica_adopted", replica=self.spec.replica_id, pid=process.pid, ready=ready
        )
        self._watch(process, launch.launch_id)
        self._set_timer()
        self._around.changed()

    def apply(self, event: Event, reason: str = "") -> None:
        """Let `event` happen and perform what follows from it."""
        before = self.state
        now_s = self._around.clock.now_s()
        self.state, commands = step(before, event, now_s, self._timing(), reason)
        if self.state.phase is not before.phase or commands:
            self._around.log.tell(
                f"replica_{self.state.phase}",
                replica=self.spec.replica_id,
                was=before.phase,
                cause=event,
                reason=self.state.reason,
            )
            self._alarm.ring()
        self._set_timer()
        if self.state.held != before.held and self._launch is not None:
            self._journal(Held(self._launch.launch_id, self.state.held))
        for command in commands:
            self._perform(command)
        if self.state != before:
            self._around.changed()

    async def close(self) -> None:
        """Let go of everything here; the process, if there is one, runs on."""
        if self._timer is not None:
            self._timer.cancel()
        if self._process is not None:
            self._process.release()
        await cancel_all(self._tasks)
        if self._port:
            self._around.ports.release(self._port)
            self._port = 0

    # --- commands -------------------------------------------------------------------------------

    def _perform(self, command: Command) -> None:
        match command:
            case Command.SPAWN:
                try:
                    self._spawn()
                except (OSError, EngineMissingError, FlagError, NoPortError) as error:
                    self._end(f"not started: {error}")
                    self.apply(Event.SPAWN_FAILED, f"not started: {error}")
            case Command.TERMINATE:
                if self._process is not None:
                    self._own(self._terminate(self._process), "terminate")
            case Command.KILL:
                if self._process is not None:
                    self._process.signal_group(signal.SIGKILL)

    def _spawn(self) -> None:
        """Journal, spawn, journal: in this order a crash at any point leaves a trace."""
        around = self._around
        self._port = around.ports.keep_or_lease(self._port)
        command = self._engine.command(self.spec, Ports(self._port), UNKNOWN_RELEASE)
        extra = self._engine.name if self._engine.name != "simulator" else ""
        argv = resolve_program(command.argv, extra)
        launch = Launch(
            launch_id=uuid.uuid4().hex,
            replica_id=self.spec.replica_id,
            launch_hash=launch_hash(self._engine, self.spec),
            engine=self._engine.name,
            model=self.spec.model,
            pool=self.spec.pool,
            port=self._port,
            stop_grace_s=self.spec.stop_grace_s,
            starts=self.state.starts,
            at_s=around.clock.unix_s(),
            held=self.state.held,
        )
        around.journal.append(launch)
        self._launch = launch
        self.questions.begin(self._port)
        environ = merged(os.environ, command, self.spec)
        self._process = around.provider.spawn(argv, environ, launch.launch_id, self.log_path)
        self._watch(self._process, launch.launch_id)
        self._note_process(launch, self._process)
        around.log.tell(
            "replica_spawned",
            replica=self.spec.replica_id,
            pid=self._process.pid,
            url=url_of(self._port),
            log=str(self.log_path),
        )

    async def _terminate(self, process: Process) -> None:
        abort_path = self._engine.abort_path(self.spec)
        if abort_path is not None:
            url = url_of(self._port) + abort_path
            await self._around.fetch.post(url, b'{"abort_all":true}', ABORT_TIMEOUT_S)
        process.signal_group(signal.SIGTERM)

    def _watch(self, process: Process, launch_id: str) -> None:
        """Follow one life: its end by the process, its answers by a task."""

        def ended(exited: asyncio.Future[str]) -> None:
            if exited.cancelled() or self._launch is None or self._launch.launch_id != launch_id:
                return
            how = exited.result()
            if self.state.phase is Phase.STARTING:  # its own words say more than its status
                how += f" before it was ready; see {self.log_path}"
            self._end(how)
            self.apply(Event.EXITED, how)

        process.exited.add_done_callback(ended)
        self._alarm = Alarm(self._around.clock)
        self._own(self._follow(launch_id, self._alarm), "follow")

    def _end(self, reason: str) -> None:
        if self._launch is not None:
            self._journal(Ended(self._launch.launch_id, reason))
        self._launch = None
        self._process = None
        self.questions.end()
        self._alarm.ring()

    def _note_process(self, launch: Launch, process: Process) -> None:
        boot_id = self._around.provider.boot_id
        self._journal(Started(launch.launch_id, process.pid, process.start_ticks, boot_id))

    def _journal(self, entry: Started | Ready | Held | Ended) -> None:
        """Note what has happened; it has happened whether or not the disk takes the note."""
        try:
            self._around.journal.append(entry)
        except OSError as error:
            self._around.log.fault("journal_failed", error=str(error))

    # --- questions to the engine ----------------------------------------------------------------

    async def _follow(self, launch_id: str, alarm: Alarm) -> None:
        """Ask until this life is over: is it ready, how busy is it, does it answer at all."""
        await self._until_ready(launch_id, alarm)
        silent_since_s: float | None = None
        idle_since_s: float | None = None
        while self._current(launch_id):
            if self.state.phase not in SERVING:
                await alarm.wait(None)
                continue
            if self.questions.listing_due:
                await self.questions.list()
            answered, load = await self.questions.read()
            if not self._current(launch_id):
                return
            if load is not None:
                self._around.changed()
            silent_since_s = None if answered else self._silence(silent_since_s)
            draining = self.state.phase is Phase.DRAINING
            now_s = self._around.clock.now_s()
            if not (draining and _idle(load)):
                idle_since_s = None
            elif idle_since_s is None:
                idle_since_s = now_s
            elif now_s - idle_since_s >= IDLE_S:
                self.apply(Event.IDLE, "drained")
                continue
            await alarm.wait(DRAIN_POLL_S if draining else self._around.scrape_interval_s)

    async def _until_ready(self, launch_id: str, alarm: Alarm) -> None:
        poll_s, poll_s_max = READY_POLL_S
        while self._current(launch_id) and self.state.phase is Phase.STARTING:
            answer = await self.questions.probe()
            if answer.status == 200 and self._current(launch_id):
                await self._greet(launch_id)
                return
            await alarm.wait(poll_s)
            poll_s = min(poll_s * 1.5, poll_s_max)

    def _current(self, launch_id: str) -> bool:
        return self._launch is not None and self._launch.launch_id == launch_id

    async def _greet(self, launch_id: str) -> None:
        """It answers: learn its names and its load, so that it enters the fleet complete."""
        await self.questions.list()
        await self.questions.read()
        if not self._current(launch_id) or self.state.phase is not Phase.STARTING:
            return
        self._journal(Ready(launch_id))
        self.apply(Event.ANSWERED)

    def _silence(self, since_s: float | None) -> float:
        """Count the time without any answer; too much of it ends this life."""
        now_s = self._around.clock.now_s()
        since_s = now_s if since_s is None else since_s
        if now_s - since_s >= SILENCE_S_MAX:
            self.apply(Event.UNRESPONSIVE, f"no answer for {SILENCE_S_MAX:.0f} s")
        return since_s

    def _adopted(self, launch: Launch, *, ready: bool) -> Lifecycle:
        now_s = self._around.clock.now_s()
        return adopted(
            ready=ready,
            held=launch.held,
            starts=launch.starts,
            now_s=now_s,
            timing=self._timing(),
        )

    # --- time and tasks -------------------------------------------------------------------------

    def _timing(self) -> Timing:
        return Timing(
            start_timeout_s=self.spec.start_timeout_s,
            stop_grace_s=self.spec.stop_grace_s,
            backoff_s=self._around.backoff_s,
            backoff_s_max=self._around.backoff_s_max,
        )

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        deadline_s = self.state.deadline_s
        if deadline_s is not None:
            delay_s = max(0.0, deadline_s - self._around.clock.now_s())
            self._timer = self._around.clock.call_later(delay_s, self._deadline)

    def _deadline(self) -> None:
        reasons = {
            Phase.STARTING: f"not ready after {self.spec.start_timeout_s:g} s",
            Phase.DRAINING: "drain took too long",
        }
        self.apply(Event.DEADLINE, reasons.get(self.state.phase, self.state.reason))

    def _own(self, coroutine: Coroutine[Any, Any, None], name: str) -> None:
        task = spawn(coroutine, f"{name} {self.spec.replica_id}", self._around.log)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _idle(load: LoadSample | None) -> bool:
    return load is not None and load.running == 0 and load.waiting == 0
