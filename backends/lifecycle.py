"""The states of one engine process, as a table: phase and event give next phase and commands.

Everything that decides whether an engine is started, stopped or killed lives in this file; the
shell (`keeper.py`) performs the commands and reports what happened. A pair that the table lacks
changes nothing, so an event that comes too late is harmless.

Three things are remembered beside the phase. `wanted` says whether a replica at rest is started
again; only a person, the configuration or the end of the manager changes it. `held` is an
operator's drain: the process runs on, and takes no new requests. `faulted` says that the life which
just ended ended badly, and then the next start waits: the back-off doubles with every bad life and
starts afresh once a life has been ready for `SETTLED_S`. A replica that was stopped on purpose is
started again at once. One that finds no GPU has not begun a life, so nothing is counted: it waits
for the longest back-off, or until somebody gives one back.

The way down is always the same: draining (published, so that the proxies look elsewhere), SIGTERM,
a grace period, SIGKILL of the whole group. It is entered in the middle where there is nobody to
wait for: a replica that was never ready, or that sleeps, is not drained.

Sleep frees the GPU's memory and keeps the process. The way there begins like the way down: the
replica is published as draining, its requests may finish, and only one that is idle, or out of
time, is told to sleep. What may follow from that is three things. It sleeps; or it would not and is
as it was; or nobody knows what it has let go of, and then only a new start helps, because an engine
that is asked to give or take what it has not may die of it. One that sleeps takes no requests and
owes nothing: its exit is a fault, a stop needs no waking, and it wakes by a wish alone.

A suspended one stands still besides, and its GPU may be another's: there is nothing to ask it and
nobody who would hear a SIGTERM, so it is killed where others are terminated. One that is to come
back and finds no GPU stays as it is and tries again, like a start that finds none.
"""

from __future__ import annotations

import enum
from types import MappingProxyType

import msgspec

from proxy.contract import ReplicaState

SETTLED_S = 60.0  # a life that was ready this long owes nothing to the failures before it
KILL_AGAIN_S = 5.0  # a killed process may sit in the kernel (a driver call); ask again
TURN_S_MAX = 900.0  # to fall asleep or to wake, where a start may take as long as it likes
DOUBLINGS_MAX = 32  # keeps the power of two finite


class Phase(enum.StrEnum):
    """Finer than the published state: what the manager waits for next."""

    STOPPED = "stopped"  # at rest; no process, none coming
    BACKOFF = "backoff"  # no process; the deadline starts one
    STARTING = "starting"  # a process that does not answer yet
    READY = "ready"
    HELD = "held"  # ready, and drained by an operator
    DRAINING = "draining"  # on its way down; its requests may finish
    STOPPING = "stopping"  # SIGTERM is out
    KILLING = "killing"  # SIGKILL is out
    EMPTYING = "emptying"  # is to sleep; its requests may finish
    FALLING_ASLEEP = "falling_asleep"  # the calls that free its memory are out
    ASLEEP = "asleep"
    SUSPENDED = "suspended"  # stands still, with what its GPU held in the host's memory
    WAKING = "waking"  # the calls that take it back are out

    @property
    def words(self) -> str:
        """What a replica in it is, to a person: it is ..."""
        going = {Phase.BACKOFF: "in backoff", Phase.HELD: "drained"}
        going |= dict.fromkeys((Phase.EMPTYING, Phase.FALLING_ASLEEP), "going to sleep")
        return going.get(self, self.value)


class Event(enum.StrEnum):
    """What can happen to a replica: wishes, and facts."""

    START = "start"
    STOP = "stop"
    RESTART = "restart"
    HOLD = "hold"
    RELEASE = "release"
    SLEEP = "sleep"  # down: to sleep, or from there to where even less is held
    WAKE = "wake"
    HURRY = "hurry"  # do not wait any longer: kill
    ANSWERED = "answered"  # the readiness probe was answered
    RIPE = "ripe"  # it would be ready; an image of it is made first
    UNRESTORED = "unrestored"  # it ended before the image that it was made from had served
    SPAWN_FAILED = "spawn_failed"
    CROWDED = "crowded"  # there was no GPU for it
    EXITED = "exited"
    IDLE = "idle"  # its own metrics say that nothing runs and nothing waits
    UNRESPONSIVE = "unresponsive"  # silent for longer than any work takes
    SLEPT = "slept"  # its memory is free
    SUSPENDED = "suspended"  # it stands still, and its memory is free
    BALKED = "balked"  # it would not sleep, and serves as before
    BROKE = "broke"  # it stopped half-way between awake and asleep
    DEADLINE = "deadline"  # the time of this phase is over


class Command(enum.StrEnum):
    """What the shell is to do."""

    SPAWN = "spawn"
    TERMINATE = "terminate"
    KILL = "kill"
    LULL = "lull"  # have it free its memory
    ROUSE = "rouse"  # have it take its memory back


PUBLISHED = MappingProxyType(
    {
        Phase.STOPPED: ReplicaState.STOPPED,
        Phase.BACKOFF: ReplicaState.BACKOFF,
        Phase.STARTING: ReplicaState.STARTING,
        Phase.READY: ReplicaState.READY,
        Phase.HELD: ReplicaState.DRAINING,
        Phase.DRAINING: ReplicaState.DRAINING,
        Phase.STOPPING: ReplicaState.STOPPING,
        Phase.KILLING: ReplicaState.STOPPING,
        Phase.EMPTYING: ReplicaState.DRAINING,
        Phase.FALLING_ASLEEP: ReplicaState.DRAINING,
        # With the record's `asleep`, by which proxies of any release send it nothing.
        Phase.ASLEEP: ReplicaState.READY,
        Phase.SUSPENDED: ReplicaState.READY,
        Phase.WAKING: ReplicaState.READY,
    }
)
ALIVE = frozenset(Phase) - {Phase.STOPPED, Phase.BACKOFF}  # phases in which a process may exist
# Phases in which it may be asked anything; in the others a question may do harm, or is in vain.
SERVING = frozenset({Phase.READY, Phase.HELD, Phase.DRAINING, Phase.EMPTYING})
SLEEPING = frozenset({Phase.ASLEEP, Phase.SUSPENDED, Phase.WAKING})  # its memory is away


class Timing(msgspec.Struct, frozen=True):
    """The waits that a configuration sets."""

    start_timeout_s: float  # 0: no limit
    stop_grace_s: float
    backoff_s: float
    backoff_s_max: float


class Lifecycle(msgspec.Struct, frozen=True, kw_only=True):
    """Where one replica stands."""

    phase: Phase = Phase.STOPPED
    wanted: bool = False
    held: bool = False
    faulted: bool = False
    failures: int = 0  # bad lives in a row
    starts: int = 0  # lives begun, of any manager
    deadline_s: float | None = None  # when the event `deadline` is due
    reason: str = ""  # for people

    @property
    def restarts(self) -> int:
        return max(0, self.starts - 1)

    @property
    def alive(self) -> bool:
        return self.phase in ALIVE


class Rule(msgspec.Struct, frozen=True):
    """One cell of the table. `faulted` marks a life that ended, or is about to end, badly."""

    phase: Phase
    commands: tuple[Command, ...] = ()
    faulted: bool = False


_TERMINATE = Rule(Phase.STOPPING, (Command.TERMINATE,))
_TERMINATE_FAULTED = Rule(Phase.STOPPING, (Command.TERMINATE,), faulted=True)
_KILL = Rule(Phase.KILLING, (Command.KILL,))
_REST = Rule(Phase.STOPPED)  # `_settle` decides whether it stays there
_FAULT = Rule(Phase.STOPPED, faulted=True)
_DRAIN = Rule(Phase.DRAINING)
_CROWDED = Rule(Phase.BACKOFF)
_LULL = Rule(Phase.FALLING_ASLEEP, (Command.LULL,))
_ROUSE = Rule(Phase.WAKING, (Command.ROUSE,))

_SERVING_RULES: dict[Event, Rule] = {
    Event.STOP: _DRAIN,
    Event.RESTART: _DRAIN,
    Event.EXITED: _FAULT,
    Event.UNRESPONSIVE: _TERMINATE_FAULTED,
    Event.HURRY: _KILL,
}

# Nobody is served, so nobody is waited for.
_UNSERVING_RULES: dict[Event, Rule] = {
    Event.STOP: _TERMINATE,
    Event.RESTART: _TERMINATE,
    Event.EXITED: _FAULT,
    Event.HURRY: _KILL,
}

TABLE: MappingProxyType[Phase, dict[Event, Rule]] = MappingProxyType(
    {
        Phase.STOPPED: {Event.START: _REST, Event.RESTART: _REST},
        Phase.BACKOFF: {
            Event.STOP: _REST,
            Event.RESTART: _REST,
            Event.DEADLINE: _REST,
        },
        Phase.STARTING: {
            **_UNSERVING_RULES,
            Event.ANSWERED: Rule(Phase.READY),
            Event.RIPE: Rule(Phase.STARTING),
            Event.UNRESTORED: _REST,  # not its fault: the next start is a cold one, at once
            Event.SPAWN_FAILED: _FAULT,
            Event.CROWDED: _CROWDED,
            Event.DEADLINE: _TERMINATE_FAULTED,
        },
        Phase.READY: {
            **_SERVING_RULES,
            Event.HOLD: Rule(Phase.HELD),
            Event.SLEEP: Rule(Phase.EMPTYING),
            Event.DEADLINE: Rule(Phase.READY),
        },
        Phase.HELD: {
            **_SERVING_RULES,
            Event.RELEASE: Rule(Phase.READY),
            Event.SLEEP: Rule(Phase.EMPTYING),
            Event.DEADLINE: Rule(Phase.HELD),
        },
        Phase.DRAINING: {
            Event.START: Rule(Phase.READY),  # wanted after all
            Event.IDLE: _TERMINATE,
            Event.DEADLINE: _TERMINATE,
            Event.UNRESPONSIVE: _TERMINATE,
            Event.EXITED: _REST,
            Event.HURRY: _KILL,
        },
        Phase.STOPPING: {
            Event.DEADLINE: _KILL,
            Event.HURRY: _KILL,
            Event.EXITED: _REST,
        },
        Phase.KILLING: {
            Event.DEADLINE: _KILL,
            Event.EXITED: _REST,
        },
        Phase.EMPTYING: {
            **_SERVING_RULES,
            Event.WAKE: Rule(Phase.READY),  # awake after all
            Event.IDLE: _LULL,
            Event.DEADLINE: _LULL,
        },
        Phase.FALLING_ASLEEP: {
            **_UNSERVING_RULES,
            Event.SLEPT: Rule(Phase.ASLEEP),
            Event.SUSPENDED: Rule(Phase.SUSPENDED),
            Event.BALKED: Rule(Phase.READY),
            Event.BROKE: _TERMINATE_FAULTED,
            Event.DEADLINE: _TERMINATE_FAULTED,
        },
        Phase.ASLEEP: {
            **_UNSERVING_RULES,
            Event.SLEEP: _LULL,
            Event.WAKE: _ROUSE,
            Event.UNRESPONSIVE: _TERMINATE_FAULTED,
        },
        Phase.SUSPENDED: {
            Event.STOP: _KILL,
            Event.RESTART: _KILL,
            Event.HURRY: _KILL,
            Event.EXITED: _FAULT,
            Event.SLEEP: Rule(Phase.SUSPENDED),  # not to come back after all
            Event.WAKE: _ROUSE,
            Event.DEADLINE: _ROUSE,  # it waited for a GPU
        },
        Phase.WAKING: {
            **_UNSERVING_RULES,
            Event.ANSWERED: Rule(Phase.READY),
            Event.CROWDED: Rule(Phase.SUSPENDED),
            Event.BROKE: _TERMINATE_FAULTED,
            Event.DEADLINE: _TERMINATE_FAULTED,
        },
    }
)
_WISHES = {Event.START: True, Event.RESTART: True, Event.STOP: False}
_HOLDS = {Event.HOLD: True, Event.RELEASE: False}
_FORGIVING = frozenset({Event.RESTART, Event.DEADLINE})  # these end a back-off


def adopted(
    *, ready: bool, held: bool, rest: Phase | None, starts: int, now_s: float, timing: Timing
) -> Lifecycle:
    """Return the state of a process that a former manager started, and perhaps put to `rest`."""
    phase = (Phase.HELD if held else Phase.READY) if ready else Phase.STARTING
    phase = rest or phase
    return Lifecycle(
        phase=phase,
        wanted=True,
        held=held,
        starts=starts,
        deadline_s=_deadline_s(phase, 0, now_s, timing),
        reason="adopted from the manager before",
    )


def step(
    state: Lifecycle, event: Event, now_s: float, timing: Timing, reason: str = ""
) -> tuple[Lifecycle, tuple[Command, ...]]:
    """Return the state after `event` and what to do about it, in order."""
    state = msgspec.structs.replace(
        state,
        wanted=_WISHES.get(event, state.wanted),
        held=_HOLDS.get(event, state.held),
    )
    rule = TABLE[state.phase].get(event)
    if rule is None:
        return state, ()
    faulted = rule.faulted or (state.faulted and event not in _FORGIVING)
    ends = event is Event.EXITED and state.phase in {Phase.STOPPING, Phase.KILLING}
    if ends or (event is Event.IDLE and not reason):
        reason = state.reason  # why it was stopped says more than how it ended
    state, commands = _settle(state, rule.phase, faulted, reason)
    failures = state.failures + rule.faulted
    if event is Event.DEADLINE and state.phase in {Phase.READY, Phase.HELD}:
        return msgspec.structs.replace(state, failures=0, deadline_s=None), ()
    deadline_s = _deadline_s(state.phase, failures, now_s, timing)
    if event is Event.CROWDED:
        begun = int(state.phase is Phase.BACKOFF)
        state = msgspec.structs.replace(state, starts=state.starts - begun)
        deadline_s = now_s + timing.backoff_s_max
    state = msgspec.structs.replace(state, failures=failures, deadline_s=deadline_s)
    return state, rule.commands + commands


def overdue(phase: Phase, timing: Timing) -> str | None:
    """Say what a deadline that is over means; None: nothing new."""
    match phase:
        case Phase.STARTING:
            return f"not ready after {timing.start_timeout_s:g} s"
        case Phase.DRAINING:
            return "drain took too long"
        case Phase.EMPTYING:
            return "drain took too long; told to sleep all the same"
        case Phase.FALLING_ASLEEP:
            return "it did not fall asleep in time"
        case Phase.WAKING:
            return "it did not wake in time"
        case _:
            return None


def backoff_s(failures: int, timing: Timing) -> float:
    """Return the wait before the start that follows `failures` bad lives in a row."""
    doublings = min(max(failures - 1, 0), DOUBLINGS_MAX)
    return min(timing.backoff_s * 2.0**doublings, timing.backoff_s_max)


def _settle(
    state: Lifecycle, phase: Phase, faulted: bool, reason: str
) -> tuple[Lifecycle, tuple[Command, ...]]:
    """Decide what a phase really means: at rest but wanted is a start, ready but held is held."""
    commands: tuple[Command, ...] = ()
    starts = state.starts
    if phase is Phase.STOPPED and state.wanted:
        phase = Phase.BACKOFF if faulted else Phase.STARTING
        if phase is Phase.STARTING:
            starts += 1
            commands = (Command.SPAWN,)
    elif phase is Phase.READY and state.held:
        phase = Phase.HELD
    if phase in {Phase.STOPPED, Phase.READY, Phase.HELD} or commands:
        faulted = False
    state = msgspec.structs.replace(
        state, phase=phase, faulted=faulted, starts=starts, reason=reason
    )
    return state, commands


def _deadline_s(phase: Phase, failures: int, now_s: float, timing: Timing) -> float | None:
    match phase:
        case Phase.STOPPED | Phase.ASLEEP | Phase.SUSPENDED:
            return None
        case Phase.BACKOFF:
            return now_s + backoff_s(failures, timing)
        case Phase.STARTING:
            return now_s + timing.start_timeout_s if timing.start_timeout_s else None
        case Phase.READY | Phase.HELD:
            return now_s + SETTLED_S
        case Phase.DRAINING | Phase.STOPPING | Phase.EMPTYING:
            return now_s + timing.stop_grace_s
        case Phase.FALLING_ASLEEP | Phase.WAKING:
            return now_s + (timing.start_timeout_s or TURN_S_MAX)
        case Phase.KILLING:
            return now_s + KILL_AGAIN_S
