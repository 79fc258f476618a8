"""The states of one engine process: cells of the table by name, and laws over every history."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.lifecycle import (
    KILL_AGAIN_S,
    PUBLISHED,
    SERVING,
    SETTLED_S,
    SLEEPING,
    TABLE,
    TURN_S_MAX,
    Command,
    Event,
    Lifecycle,
    Phase,
    Timing,
    adopted,
    backoff_s,
    step,
)
from proxy.contract import ReplicaState

TIMING = Timing(start_timeout_s=100.0, stop_grace_s=10.0, backoff_s=0.5, backoff_s_max=8.0)


def after(*events: Event, state: Lifecycle | None = None) -> tuple[Lifecycle, list[Command]]:
    """Return the state and the commands of all `events`, one second apart."""
    state = state or Lifecycle()
    commands: list[Command] = []
    for second, event in enumerate(events):
        state, more = step(state, event, float(second), TIMING, event.value)
        commands += more
    return state, commands


HISTORIES = [
    ("a wanted replica is spawned", [Event.START], Phase.STARTING, [Command.SPAWN]),
    ("an answer makes it ready", [Event.START, Event.ANSWERED], Phase.READY, [Command.SPAWN]),
    ("a death waits", [Event.START, Event.EXITED], Phase.BACKOFF, [Command.SPAWN]),
    (
        "and the wait ends in a start",
        [Event.START, Event.EXITED, Event.DEADLINE],
        Phase.STARTING,
        [Command.SPAWN, Command.SPAWN],
    ),
    ("a failed spawn waits", [Event.START, Event.SPAWN_FAILED], Phase.BACKOFF, [Command.SPAWN]),
    (
        "a start that takes too long is ended",
        [Event.START, Event.DEADLINE],
        Phase.STOPPING,
        [Command.SPAWN, Command.TERMINATE],
    ),
    (
        "and its end counts as a bad life",
        [Event.START, Event.DEADLINE, Event.EXITED],
        Phase.BACKOFF,
        [Command.SPAWN, Command.TERMINATE],
    ),
    (
        "a ready replica is drained before it is stopped",
        [Event.START, Event.ANSWERED, Event.STOP],
        Phase.DRAINING,
        [Command.SPAWN],
    ),
    (
        "a drained one is terminated",
        [Event.START, Event.ANSWERED, Event.STOP, Event.IDLE],
        Phase.STOPPING,
        [Command.SPAWN, Command.TERMINATE],
    ),
    (
        "one that does not drain is terminated all the same",
        [Event.START, Event.ANSWERED, Event.STOP, Event.DEADLINE],
        Phase.STOPPING,
        [Command.SPAWN, Command.TERMINATE],
    ),
    (
        "one that ignores SIGTERM is killed, and again",
        [Event.START, Event.STOP, Event.DEADLINE, Event.DEADLINE],
        Phase.KILLING,
        [Command.SPAWN, Command.TERMINATE, Command.KILL, Command.KILL],
    ),
    (
        "a stop ends at rest",
        [Event.START, Event.ANSWERED, Event.STOP, Event.IDLE, Event.EXITED],
        Phase.STOPPED,
        [Command.SPAWN, Command.TERMINATE],
    ),
    (
        "a restart starts again at once",
        [Event.START, Event.ANSWERED, Event.RESTART, Event.IDLE, Event.EXITED],
        Phase.STARTING,
        [Command.SPAWN, Command.TERMINATE, Command.SPAWN],
    ),
    (
        "a restart ends a back-off",
        [Event.START, Event.EXITED, Event.RESTART],
        Phase.STARTING,
        [Command.SPAWN, Command.SPAWN],
    ),
    (
        "a stop ends a back-off",
        [Event.START, Event.EXITED, Event.STOP],
        Phase.STOPPED,
        [Command.SPAWN],
    ),
    (
        "one that finds no card waits for a deadline",
        [Event.START, Event.CROWDED],
        Phase.BACKOFF,
        [Command.SPAWN],
    ),
    (
        "and tries again",
        [Event.START, Event.CROWDED, Event.DEADLINE],
        Phase.STARTING,
        [Command.SPAWN, Command.SPAWN],
    ),
    (
        "a stop ends that wait",
        [Event.START, Event.CROWDED, Event.STOP],
        Phase.STOPPED,
        [Command.SPAWN],
    ),
    (
        "a silent replica is not drained",
        [Event.START, Event.ANSWERED, Event.UNRESPONSIVE],
        Phase.STOPPING,
        [Command.SPAWN, Command.TERMINATE],
    ),
    (
        "a stop that is taken back ends in service",
        [Event.START, Event.ANSWERED, Event.STOP, Event.START],
        Phase.READY,
        [Command.SPAWN],
    ),
    (
        "too late for that, it starts again",
        [Event.START, Event.ANSWERED, Event.STOP, Event.IDLE, Event.START, Event.EXITED],
        Phase.STARTING,
        [Command.SPAWN, Command.TERMINATE, Command.SPAWN],
    ),
    (
        "an operator holds it",
        [Event.START, Event.ANSWERED, Event.HOLD],
        Phase.HELD,
        [Command.SPAWN],
    ),
    (
        "and releases it",
        [Event.START, Event.ANSWERED, Event.HOLD, Event.RELEASE],
        Phase.READY,
        [Command.SPAWN],
    ),
    (
        "held before it is ready, it is held then",
        [Event.START, Event.HOLD, Event.ANSWERED],
        Phase.HELD,
        [Command.SPAWN],
    ),
    (
        "a hurry kills what drains",
        [Event.START, Event.ANSWERED, Event.STOP, Event.HURRY],
        Phase.KILLING,
        [Command.SPAWN, Command.KILL],
    ),
]
UP = [Event.START, Event.ANSWERED]
LULLED = [*UP, Event.SLEEP, Event.IDLE]
ASLEEP = [*LULLED, Event.SLEPT]
S, L, R, T, K = Command.SPAWN, Command.LULL, Command.ROUSE, Command.TERMINATE, Command.KILL
NAPS = [
    ("it is emptied before it sleeps", [*UP, Event.SLEEP], Phase.EMPTYING, [S]),
    ("empty, it is told to sleep", LULLED, Phase.FALLING_ASLEEP, [S, L]),
    ("out of time, too", [*UP, Event.SLEEP, Event.DEADLINE], Phase.FALLING_ASLEEP, [S, L]),
    ("and sleeps", ASLEEP, Phase.ASLEEP, [S, L]),
    ("it stays so", [*ASLEEP, Event.START, Event.ANSWERED, Event.IDLE], Phase.ASLEEP, [S, L]),
    ("until it is woken", [*ASLEEP, Event.WAKE], Phase.WAKING, [S, L, R]),
    ("awake it serves", [*ASLEEP, Event.WAKE, Event.ANSWERED], Phase.READY, [S, L, R]),
    ("woken before it sleeps", [*UP, Event.SLEEP, Event.WAKE], Phase.READY, [S]),
    ("too late for that", [*LULLED, Event.WAKE], Phase.FALLING_ASLEEP, [S, L]),
    ("one that balks serves on", [*LULLED, Event.BALKED], Phase.READY, [S, L]),
    ("one that broke is started anew", [*LULLED, Event.BROKE], Phase.STOPPING, [S, L, T]),
    (
        "which counts as a bad life",
        [*LULLED, Event.BROKE, Event.EXITED],
        Phase.BACKOFF,
        [S, L, T],
    ),
    ("a lull too long", [*LULLED, Event.DEADLINE], Phase.STOPPING, [S, L, T]),
    ("a waking too long", [*ASLEEP, Event.WAKE, Event.DEADLINE], Phase.STOPPING, [S, L, R, T]),
    ("a waking that broke", [*ASLEEP, Event.WAKE, Event.BROKE], Phase.STOPPING, [S, L, R, T]),
    ("asleep it is stopped unwoken", [*ASLEEP, Event.STOP], Phase.STOPPING, [S, L, T]),
    (
        "and then is at rest",
        [*ASLEEP, Event.STOP, Event.EXITED],
        Phase.STOPPED,
        [S, L, T],
    ),
    ("a death asleep is a fault", [*ASLEEP, Event.EXITED], Phase.BACKOFF, [S, L]),
    (
        "a restart ends the sleep",
        [*ASLEEP, Event.RESTART, Event.EXITED],
        Phase.STARTING,
        [S, L, T, S],
    ),
    ("stopped while emptied", [*UP, Event.SLEEP, Event.STOP], Phase.DRAINING, [S]),
    ("a hurry kills what sleeps", [*ASLEEP, Event.HURRY], Phase.KILLING, [S, L, K]),
    ("one that starts cannot sleep", [Event.START, Event.SLEEP], Phase.STARTING, [S]),
    (
        "held before, it is held after",
        [*UP, Event.HOLD, Event.SLEEP, Event.IDLE, Event.SLEPT, Event.WAKE, Event.ANSWERED],
        Phase.HELD,
        [S, L, R],
    ),
    (
        "held while it sleeps, it is held when it wakes",
        [*ASLEEP, Event.HOLD, Event.WAKE, Event.ANSWERED],
        Phase.HELD,
        [S, L, R],
    ),
]


@pytest.mark.parametrize(
    ("events", "phase", "commands"),
    [case[1:] for case in HISTORIES + NAPS],
    ids=[case[0] for case in HISTORIES + NAPS],
)
def test_history(events: list[Event], phase: Phase, commands: list[Command]) -> None:
    state, performed = after(*events)
    assert (state.phase, performed) == (phase, commands)


def test_every_phase_is_in_the_table_and_is_published() -> None:
    assert set(TABLE) == set(Phase) == set(PUBLISHED)
    ready = [phase for phase in Phase if PUBLISHED[phase] is ReplicaState.READY]
    assert set(ready) == {Phase.READY} | SLEEPING
    assert not SLEEPING & SERVING


def test_back_off_doubles_up_to_its_limit() -> None:
    waits = [backoff_s(failures, TIMING) for failures in range(1, 8)]
    assert waits == [0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0]
    assert backoff_s(10_000, TIMING) == 8.0


def test_the_wait_grows_with_bad_lives_in_a_row() -> None:
    state, _ = after(Event.START, Event.EXITED, Event.DEADLINE, Event.EXITED)
    assert state.failures == 2
    assert state.deadline_s == pytest.approx(3.0 + 1.0)


def test_being_ready_alone_does_not_forgive_but_staying_so_does() -> None:
    state, _ = after(Event.START, Event.EXITED, Event.DEADLINE, Event.ANSWERED)
    assert (state.failures, state.deadline_s) == (1, 3.0 + SETTLED_S)
    state, commands = step(state, Event.DEADLINE, 3.0 + SETTLED_S, TIMING)
    assert (state.failures, state.deadline_s, commands) == (0, None, ())
    assert state.phase is Phase.READY


def test_an_end_that_was_ordered_keeps_its_reason() -> None:
    state, _ = step(after(Event.START)[0], Event.DEADLINE, 1.0, TIMING, "not ready after 100 s")
    state, _ = step(state, Event.EXITED, 2.0, TIMING, "killed by SIGTERM")
    assert (state.phase, state.reason) == (Phase.BACKOFF, "not ready after 100 s")


def test_one_that_nobody_waits_for_keeps_the_reason_for_which_it_ends() -> None:
    state, _ = after(Event.START, Event.ANSWERED)
    state, _ = step(state, Event.STOP, 0.0, TIMING, "its GPU is needed")
    state, commands = step(state, Event.IDLE, 0.0, TIMING)
    assert (state.phase, state.reason) == (Phase.STOPPING, "its GPU is needed")
    assert commands == (Command.TERMINATE,)


def test_no_start_timeout_means_no_deadline() -> None:
    endless = Timing(0.0, 10.0, 0.5, 8.0)
    state, _ = step(Lifecycle(), Event.START, 0.0, endless)
    assert (state.phase, state.deadline_s) == (Phase.STARTING, None)
    for event in ASLEEP[1:4]:
        state, _ = step(state, event, 1.0, endless)
    assert (state.phase, state.deadline_s) == (Phase.FALLING_ASLEEP, 1.0 + TURN_S_MAX)


@pytest.mark.parametrize(
    ("ready", "held", "phase"),
    [
        (True, False, Phase.READY),
        (True, True, Phase.HELD),
        (False, False, Phase.STARTING),
        (False, True, Phase.STARTING),
    ],
)
def test_an_adopted_life_goes_on_where_it_was(ready: bool, held: bool, phase: Phase) -> None:
    state = adopted(ready=ready, held=held, rest=None, starts=3, now_s=5.0, timing=TIMING)
    assert state.phase is phase
    assert (state.wanted, state.held, state.restarts) == (True, held, 2)
    assert state.deadline_s == 5.0 + (SETTLED_S if ready else TIMING.start_timeout_s)


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("rest", [Phase.ASLEEP, Phase.SUSPENDED])
def test_one_that_rests_is_adopted_at_rest(held: bool, rest: Phase) -> None:
    state = adopted(ready=True, held=held, rest=rest, starts=1, now_s=5.0, timing=TIMING)
    assert (state.phase, state.held, state.deadline_s) == (rest, held, None)


ENDS = {Event.EXITED, Event.UNRESTORED, Event.SPAWN_FAILED}
EVENTS = st.lists(st.sampled_from(list(Event)), max_size=40)


@settings(derandomize=True, max_examples=300, deadline=None)
@given(EVENTS)
def test_there_is_never_a_second_process(events: list[Event]) -> None:
    """Whatever happens, a process is spawned only when the last one has ended."""
    state, alive = Lifecycle(), False
    for now_s, event in enumerate(events):
        if event in ENDS and not alive:
            continue  # nothing there that could end
        if event in ENDS - {Event.EXITED} and state.phase is not Phase.STARTING:
            continue
        unborn = event is Event.CROWDED and state.phase is Phase.STARTING
        alive = alive and event not in ENDS and not unborn
        state, commands = step(state, event, float(now_s), TIMING)
        for command in commands:
            assert (command is Command.SPAWN) == (not alive)
            alive = alive or command is Command.SPAWN
        assert state.alive == alive


@settings(derandomize=True, max_examples=300, deadline=None)
@given(EVENTS)
def test_a_stop_always_ends_at_rest(events: list[Event]) -> None:
    """From any state, STOP and silence: deadlines bring it to a kill, the exit to rest."""
    state, _ = after(*events, Event.STOP)
    killed = False
    for _ in range(4):
        if not state.alive:
            break
        assert state.deadline_s is not None
        state, commands = step(state, Event.DEADLINE, state.deadline_s, TIMING)
        killed = killed or Command.KILL in commands or state.phase is Phase.KILLING
    if state.alive:
        assert killed
        state, _ = step(state, Event.EXITED, 1e6, TIMING)
    assert (state.phase, state.wanted, state.deadline_s) == (Phase.STOPPED, False, None)


@settings(derandomize=True, max_examples=300, deadline=None)
@given(EVENTS, st.sampled_from(list(Event)))
def test_what_waits_has_a_deadline(events: list[Event], last: Event) -> None:
    state, _ = after(*events, last)
    at_rest = {Phase.STOPPED, Phase.ASLEEP, Phase.SUSPENDED}
    forgiven = {Phase.READY, Phase.HELD}
    assert (state.deadline_s is not None) or state.phase in at_rest | forgiven
    assert state.failures >= 0
    assert state.restarts == max(0, state.starts - 1)
    assert not (state.phase is Phase.READY and state.held)
    assert state.phase not in SERVING or not state.faulted


@settings(derandomize=True, max_examples=300, deadline=None)
@given(EVENTS)
def test_only_what_sleeps_is_roused_and_only_what_was_emptied_is_lulled(
    events: list[Event],
) -> None:
    """An engine asked to take back what it has not let go of may die of it."""
    state = Lifecycle()
    for now_s, event in enumerate(events):
        before = state.phase
        state, commands = step(state, event, float(now_s), TIMING)
        assert Command.ROUSE not in commands or before in {Phase.ASLEEP, Phase.SUSPENDED}
        assert Command.LULL not in commands or before in {Phase.EMPTYING, Phase.ASLEEP}
        assert state.phase is not Phase.ASLEEP or before in {Phase.ASLEEP, Phase.FALLING_ASLEEP}
        resting = {Phase.SUSPENDED, Phase.FALLING_ASLEEP, Phase.WAKING}
        assert state.phase is not Phase.SUSPENDED or before in resting


def test_a_kill_is_repeated_soon() -> None:
    state, _ = after(Event.START, Event.STOP, Event.HURRY)
    assert state.phase is Phase.KILLING
    assert state.deadline_s == 2.0 + KILL_AGAIN_S
