"""Keeps one replica: performs what its lifecycle commands, and tells it what happened.

Events are applied one after another on the event loop, and their commands are performed before the
next one: a spawn is a few milliseconds of work here, so no state exists in which it is half done.
Only which release a program is of may have to be asked first, aside; what ends the start meanwhile
ends it as if there had been a process. The one lasting task asks the engine questions (`watch`),
one for each life, and every event of an older life is recognised by its launch id and dropped.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

from backends.cards import Placement
from backends.clock import Deadline
from backends.ending import end_in_words, terminate
from backends.engines.base import Engine, url_of
from backends.engines.probe import Program, known_release, probe_release
from backends.engines.release import Release
from backends.fetch import Silence
from backends.gpus import NoGpuError
from backends.images import Images
from backends.journal import Ended, Held, Launch, Ready
from backends.ladder import Rung, RungCost
from backends.lifecycle import SLEEPING, Command, Event, Lifecycle, Phase, overdue, step
from backends.logfile import length
from backends.loras import Loras, of_start
from backends.moves import Step
from backends.placing import as_left, meet, note_process
from backends.ports import ReplicaPorts
from backends.posing import Posing
from backends.providers.base import Process
from backends.questions import Questions
from backends.reconcile import Observed, Wanted
from backends.snapshots.base import Snapshot
from backends.starting import START_ERRORS, gpus_leased, intent, warm_up
from backends.surroundings import Surroundings
from backends.tasks import cancel_all, spawn
from backends.telling import record_of
from backends.turns import Life, RefusedError, Turns, broken_off
from backends.watch import Watch
from proxy.contract import ReplicaRecord

ADOPT_TIMEOUT_S = 2.0


class Keeper:
    """One replica and its process, when it has one."""

    def __init__(self, wanted: Wanted, engine: Engine, around: Surroundings) -> None:
        self.spec = wanted.spec
        self.state = Lifecycle()
        self._engine = engine
        self._around = around
        self._spec_hash = wanted.launch_hash
        self.questions = Questions(wanted.spec, engine, around.fetch, around.clock)
        self._ports = ReplicaPorts(around.ports)
        self._turns = Turns(engine, around)
        self.images = Images(engine, around, self._turns, wanted.spec.replica_id)
        self._posing = Posing(engine, around, self.images, self.questions)
        self._loras: Loras | None = None  # of the life under way
        self._launch: Launch | None = None  # the life under way
        self._process: Process | None = None
        self._log_bytes = 0  # its log's length when this life began
        self._timer = Deadline(around.clock, self._deadline)
        self._watch: Watch | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    # --- what the manager reads -----------------------------------------------------------------

    @property
    def observed(self) -> Observed:
        running = self._launch.launch_hash if self._launch else self._spec_hash
        loras = self._loras
        loaded = loras.loaded if loras else of_start(self._engine, self.spec)
        adapting = loras is not None and loras.changing
        state = self.state
        return Observed(
            spec=self.spec,
            launch_hash=running,
            phase=state.phase,
            wanted=state.wanted,
            loaded=loaded,
            adapting=adapting,
            aim=self._turns.aim,
            rising=state.phase is Phase.SUSPENDED and state.deadline_s is not None,
            out=self._turns.out,
            posing=self._posing.wished,
        )

    @property
    def rung(self) -> Rung:
        """Return where it stands; on its way down, that is where it came from."""
        if self.state.alive:
            return self._turns.rung
        return Rung.SNAPSHOTTED if self.images.known else Rung.COLD

    @property
    def turns(self) -> Mapping[Rung, RungCost]:
        """Return what the rungs have cost that it has been on; 0.0: not measured yet."""
        return self._turns.costs

    @property
    def url(self) -> str:
        launch = self._launch
        return url_of(launch.port, launch.host) if launch else url_of(self._ports.http)

    @property
    def log_path(self) -> Path:
        return self._around.log_folder / f"{self.spec.replica_id}.log"

    def record(self) -> ReplicaRecord:
        """Return what the fleet is told."""
        return record_of(
            self.questions,
            self.state,
            self._turns,
            self._launch,
            url=self.url,
            region=self._around.region,
            engine=self._engine.name,
            process=self._process,
        )

    # --- what the manager wishes ----------------------------------------------------------------

    def update(self, wanted: Wanted) -> None:
        """Take over a new specification; it is the command of the next start."""
        self.spec = self.questions.spec = wanted.spec
        self._spec_hash = wanted.launch_hash
        self._around.changed()

    def adapt(self) -> None:
        """Have it load and unload adapters, so that it has those of its specification."""
        if self._launch is not None and self._loras is not None:
            self._loras.changing = True
            self._own(self._adapt(self._loras, self._launch.launch_id), "change adapters of")

    async def adopt(self, launch: Launch, process: Process) -> None:
        """Go on with a process of the manager before.

        One that was ready stays ready unless nobody listens: it may be too busy to say so.
        """
        self._launch, self._process = launch, process
        self._ports.claim(launch.host, {"http": (launch.port, 1)} | launch.ports)
        self.questions.begin(self.url)
        self._turns.adopt(launch)
        self._posing.adopt(launch)
        if launch.pid != process.pid:  # the manager before died between the spawn and this note
            note_process(launch, process, self._around)
        left = launch, self.spec, self._turns.rest, self._around
        self.state = as_left(*left, ready=launch.ready)
        if self.state.phase not in SLEEPING:
            answer = await self.questions.probe(ADOPT_TIMEOUT_S)
            silent = answer.silence is not None and answer.silence is not Silence.REFUSED
            ready = answer.status == 200 or (launch.ready and silent)
            self.state = as_left(*left, ready=ready)
        name, phase = self.spec.replica_id, self.state.phase
        self._around.log.tell("replica_adopted", replica=name, pid=process.pid, phase=phase)
        self._follow(process, launch)
        self._timer.set(self.state.deadline_s)
        self._around.changed()
        if (broken := broken_off(launch)) is not None:
            self.apply(*broken)

    def lower(self, rung: Rung, reason: str, level: int | None = None) -> None:
        """Take it down to ASLEEP or SUSPENDED; `level`: of its engine's own sleep, if one is asked.

        Raises `RefusedError` when it cannot, or not now.
        """
        observed = self.observed
        if observed.rising and rung is Rung.SUSPENDED:
            self._around.cards.wait_no_more(self.spec.replica_id)
            self.apply(Event.SLEEP, reason)
        stale = observed.launch_hash != self._spec_hash  # so it may lack what a rung needs
        if self._turns.take_aim(rung, level, observed, stale=stale):
            self.apply(Event.SLEEP, reason)

    def pose(self, reason: str) -> None:
        """Have an image made of it; it serves nobody meanwhile. Raises `RefusedError`."""
        self._posing.wish(self.observed, self._spec_hash)
        self.apply(Event.SLEEP, reason)

    def raise_(self, reason: str) -> None:
        """Have it serve again. Raises `RefusedError` when it cannot, or not now."""
        if self.state.phase in {Phase.READY, Phase.HELD, Phase.WAKING}:
            return
        if self.state.phase not in {Phase.ASLEEP, Phase.SUSPENDED, Phase.EMPTYING}:
            raise RefusedError(f"it is {self.state.phase.words}; only what sleeps can be woken")
        if self.state.phase is Phase.EMPTYING:
            self._turns.aim = Rung.AWAKE
        self.apply(Event.WAKE, reason)

    def apply(self, event: Event, reason: str = "") -> None:
        """Let `event` happen and perform what follows from it."""
        before, rung = self.state, self.rung
        now_s = self._around.clock.now_s()
        self.state, commands = step(before, event, now_s, self._around.timing(self.spec), reason)
        self._posing.follow(self.state.phase)
        if self.state.phase is not before.phase or commands:
            told = {"was": before.phase, "cause": event, "reason": self.state.reason}
            name = self.spec.replica_id
            self._around.log.tell(f"replica_{self.state.phase}", replica=name, **told)
            phase, reason, at_s = self.state.phase, self.state.reason, self._around.clock.unix_s()
            self._around.moves.step(Step(self.spec, phase, event, reason, rung, at_s))
            self._ring()
        self._timer.set(self.state.deadline_s)
        if self.state.held != before.held and self._launch is not None:
            self._around.note(Held(self._launch.launch_id, self.state.held))
        for command in commands:
            self._perform(command)
        if self.state != before:
            self._around.changed()

    async def close(self) -> None:
        """Let go of everything here; the process, if there is one, runs on."""
        self._timer.set(None)
        if self._process is not None:
            self._process.release()
        await cancel_all(self._tasks)
        self._ports.release()
        self._around.cards.forget(self.spec.replica_id)

    # --- commands -------------------------------------------------------------------------------

    def _perform(self, command: Command) -> None:
        match command:
            case Command.SPAWN:
                self._start()
            case Command.TERMINATE:
                to = self._engine.facts(self.spec), self.url, self._around.fetch
                self._end_process(lambda process: self._own(terminate(process, *to), "terminate"))
            case Command.KILL:
                self._end_process(lambda process: process.signal_group(signal.SIGKILL))
            case Command.LULL:
                self._own(self._lull(self._life(Phase.FALLING_ASLEEP)), "lull")
            case Command.ROUSE:
                assert self._watch is not None
                self._own(self._rouse(self._life(Phase.WAKING), self._watch), "rouse")

    def _end_process(self, end: Callable[[Process], None]) -> None:
        if self._process is not None:
            return end(self._process)
        self._around.cards.ended(self.spec.replica_id)
        return self.apply(Event.EXITED, "it had not been started yet")

    def _start(self) -> None:
        """Spawn, as soon as it is known which release the program is of, and of which image."""
        try:
            self._ports.take_http()
            program = self._around.provider.program(self._engine, self.spec)
            release = known_release(program)
            if release is None or self.spec.snapshot:
                self._own(self._start_asked(program, release, self.state.starts), "prepare")
            else:
                self._spawn(program, release)
        except START_ERRORS as error:
            self._not_started(error)

    async def _start_asked(self, program: Program, release: Release | None, starts: int) -> None:
        spec, found = self.spec, None
        if release is None:
            release = await asyncio.to_thread(probe_release, program)
        try:
            if spec.snapshot and self._starts(starts):
                found = await self.images.find(spec, release, self._place().devices)
            if self._starts(starts) and self.spec is not spec:
                self._start()  # what was found is of its former command
            elif self._starts(starts):
                self._spawn(program, release, found)
        except START_ERRORS as error:
            if self._starts(starts):  # else it is another one's now that would end
                self._not_started(error)

    def _starts(self, starts: int) -> bool:
        """Say whether this start is still the one under way."""
        return self.state.phase is Phase.STARTING and self.state.starts == starts

    def _place(self) -> Placement:
        spec, wanted = self.spec, gpus_leased(self._engine, self.spec)
        return self._around.cards.take(spec.replica_id, wanted, spec.env, spec.args, self._room)

    def _not_started(self, error: Exception) -> None:
        event = Event.CROWDED if isinstance(error, NoGpuError) else Event.SPAWN_FAILED
        self._end(f"not started: {error}")
        self.apply(event, f"not started: {error}")

    def _room(self) -> None:
        """Cards have been given back: try again, if that is what this waits for."""
        if self.state.phase is Phase.BACKOFF or self.observed.rising:
            self.apply(Event.DEADLINE, self.state.reason)

    def _spawn(self, program: Program, release: Release, found: Snapshot | None = None) -> None:
        """Journal, spawn, journal: in this order a crash at any point leaves a trace."""
        around = self._around
        spec, place = self.spec, self._place()
        start = self.images.prepare(spec, self._ports, program, release, place, found)
        for warning in start.warnings:
            around.log.tell("replica_warning", replica=self.spec.replica_id, warning=warning)
        launch = intent(self._engine, self.spec, start, self.state, around.clock.unix_s())
        around.journal.append(launch)
        self._launch = launch
        self._turns.begin(launch.gpus, Rung.SNAPSHOTTED if start.restored else Rung.COLD)
        self.questions.begin(self.url)
        self._log_bytes = length(self.log_path)
        warm_up(around.warmer, spec, start)
        spawned = (start.argv, start.environ, launch.launch_id, self.log_path)
        self._process = around.provider.spawn(*spawned)
        # It lives, and nothing from here on may raise what `_start` takes for a failed spawn:
        # notes and log lines that cannot be written are lost.
        self._follow(self._process, launch)
        note_process(launch, self._process, around)
        told = {"pid": self._process.pid, "url": self.url, "version": launch.engine_version}
        told |= {"gpus": launch.gpus, "log": str(self.log_path)}
        around.log.tell("replica_spawned", replica=spec.replica_id, **told)

    async def _lull(self, life: Life) -> None:
        lower = self._posing.pose if self._posing.wished else self._turns.lower
        event, reason = await lower(life)
        if life.go_on():
            self.apply(event, reason)

    async def _rouse(self, life: Life, watch: Watch) -> None:
        try:
            problem = await self._turns.rise(life, self._room)
        except NoGpuError as error:
            problem = Event.CROWDED, f"not resumed: {error}"
        if problem is None:
            await watch.until_ready(Phase.WAKING)
        elif life.go_on():
            self.apply(*problem)

    async def _revive(self, life: Life, watch: Watch) -> None:
        problem = await self.images.revive(life)
        if not problem:
            await watch.follow()
        elif life.go_on():  # what follows is a cold start, at once
            self.apply(Event.HURRY, problem)

    async def ripen(self) -> bool:
        """Make an image of it, where that is due; say whether it was."""
        if not self.images.due:
            return False
        self.apply(Event.RIPE, "an image of it is made")
        life = self._life(Phase.STARTING)
        problem = await self.images.make(life)
        if problem is not None and life.go_on():
            self.apply(*problem)
        return True

    def _life(self, phase: Phase) -> Life:
        """Return the life under way, as long as it is in `phase`."""
        assert self._launch is not None
        assert self._process is not None
        launch_id = self._launch.launch_id
        go_on = self._while(launch_id, phase)
        return Life(launch_id, self.spec, self.url, self._process.pid, go_on)

    async def _adapt(self, loras: Loras, launch_id: str) -> None:
        go_on = self._while(launch_id, Phase.READY, Phase.HELD)
        await loras.change(self.spec, self.url, go_on)
        self.questions.outdate_listing()
        self._ring()
        self._around.changed()

    def _while(self, launch_id: str, *phases: Phase) -> Callable[[], bool]:
        return lambda: self._current(launch_id) and self.state.phase in phases

    def _follow(self, process: Process, launch: Launch) -> None:
        """Follow one life: its end by the process, its answers by a task."""
        launch_id = launch.launch_id
        self._loras = Loras(launch, self._engine, self._around)

        def ended(exited: asyncio.Future[str]) -> None:
            if exited.cancelled() or self._launch is None or self._launch.launch_id != launch_id:
                return
            phase, log, since_bytes = self.state.phase, self.log_path, self._log_bytes
            unrestored = self.images.ended() and phase is Phase.STARTING
            how = end_in_words(exited.result(), phase, self.spec, log, since_bytes)
            self._end(how)
            self.apply(Event.UNRESTORED if unrestored else Event.EXITED, how)

        process.exited.add_done_callback(ended)
        self._watch = Watch(self.questions, self._around, self, self._phase_of(launch_id))
        if self.images.restoring:
            self._own(self._revive(self._life(Phase.STARTING), self._watch), "revive")
        else:
            self._own(self._meet(process, launch, self._watch), "follow")

    async def _meet(self, process: Process, launch: Launch, watch: Watch) -> None:
        """Follow it as soon as it has a place."""
        placed = await meet(process, launch, self._around)
        if placed is not launch and self._current(launch.launch_id):
            self._launch = placed
            self.questions.begin(self.url)
            self._around.changed()
        await watch.follow()

    def _ring(self) -> None:
        if self._watch is not None:
            self._watch.ring()

    def _end(self, reason: str) -> None:
        if self._launch is not None:
            self._around.note(Ended(self._launch.launch_id, reason))
            self._own(self._around.fetch.drop(self.url), "drop connections to")
        self._launch = self._process = self._loras = None
        self.questions.end()
        self._around.cards.ended(self.spec.replica_id)
        self._ring()

    def answered(self) -> None:
        """It is ready."""
        if self._launch is not None:
            self._around.warmer.answered(self._process.pid if self._process else 0)
            self._around.note(Ready(self._launch.launch_id))
            self.images.ready()
            self.apply(Event.ANSWERED, self._turns.risen())
            current = self._phase_of(self._launch.launch_id)
            self._own(self._posing.later(current, self.pose), "make a later image of")

    def _phase_of(self, launch_id: str) -> Callable[[], Phase | None]:
        """Return what tells the phase of a life; None, once it is over."""
        return lambda: self.state.phase if self._current(launch_id) else None

    def _current(self, launch_id: str) -> bool:
        return self._launch is not None and self._launch.launch_id == launch_id

    def _deadline(self) -> None:
        reason = overdue(self.state.phase, self._around.timing(self.spec)) or self.state.reason
        self.apply(Event.DEADLINE, reason)

    def _own(self, coroutine: Coroutine[Any, Any, None], name: str) -> None:
        task = spawn(coroutine, f"{name} {self.spec.replica_id}", self._around.log)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
