"""What is to be done so that the replicas that run become the replicas that are wanted.

Level-triggered: it looks at the whole of both sides and may be called at any time, any number of
times; what is already on its way is not asked for again. So nothing depends on having seen every
event, and a manager that was killed half-way through a change goes on where it was.

A changed replica is restarted only while the rest of its pool serves, one of a pool at a time: a
configuration that cannot start takes down one replica, not the model. One that is to be of another
engine ends in the same turn, is forgotten and made anew. Where nothing is lost by it
(a replica that is not serving, or the only one of its pool) the restart is immediate. One that
sleeps is let be: it takes the new command once it has been woken, for a start would take the GPU
memory that somebody wanted free; nor does the rest of its pool wait for it.

Where somebody decides on which rung a replica is to be (`Wanted.rung`), it is lowered and raised to
it. One that is to be awake and waits for a GPU tries again by itself, and a rung that failed lately
(`Observed.out`) is not asked for: both would be asked for without end otherwise. What is not to be
awake is neither made nor started anew: a start would take the GPU that it is to leave alone.

Where only adapters changed and calls can give them (`adapters`), one that is ready is told and
serves on, all of a pool at once; one that starts is told once it is ready, for a start costs more.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from backends.adapters import Loaded, Way, way
from backends.ladder import Rung
from backends.lifecycle import ALIVE, Phase
from backends.spec import ReplicaSpec


class Wanted(msgspec.Struct, frozen=True):
    """A replica of the configuration; `launch_hash` names the command that it stands for."""

    spec: ReplicaSpec
    launch_hash: str
    rung: Rung | None = None  # AWAKE, ASLEEP or SUSPENDED; None: operators decide


class Observed(msgspec.Struct, frozen=True):
    """A replica that the manager keeps. `launch_hash` is that of the process, or of the spec."""

    spec: ReplicaSpec
    launch_hash: str
    phase: Phase
    wanted: bool
    loaded: Loaded = Loaded()  # adapters of the process, or of the spec
    adapting: bool = False  # they are being changed
    aim: Rung = Rung.AWAKE  # where it is, or goes down to
    rising: bool = False  # suspended, and waits for a GPU
    out: frozenset[Rung] = frozenset()  # failed lately
    posing: bool = False  # an image of it is made, and then it serves on


class Create(msgspec.Struct, frozen=True):
    """Keep a new replica and start it."""

    wanted: Wanted


class Update(msgspec.Struct, frozen=True):
    """Take over settings that need no restart, and the command for the next start."""

    wanted: Wanted


class Start(msgspec.Struct, frozen=True):
    replica_id: str


class Restart(msgspec.Struct, frozen=True):
    replica_id: str


class Adapt(msgspec.Struct, frozen=True):
    """Have it load and unload adapters while it runs."""

    replica_id: str


class Lower(msgspec.Struct, frozen=True):
    """Have it let go of what it holds, down to `rung`."""

    replica_id: str
    rung: Rung


class Raise(msgspec.Struct, frozen=True):
    """Have it serve again."""

    replica_id: str


class Stop(msgspec.Struct, frozen=True):
    replica_id: str


class Remove(msgspec.Struct, frozen=True):
    """Forget a replica that is gone and not wanted."""

    replica_id: str


Action = Create | Update | Start | Restart | Adapt | Lower | Raise | Stop | Remove

_AWAY = frozenset(Phase) - {Phase.READY, Phase.HELD, Phase.ASLEEP, Phase.SUSPENDED}
_DEPTHS = tuple(Rung)
_NO_PROCESS = frozenset(Phase) - ALIVE
# On its way somewhere, or at rest where it is: what changed is looked at when it gets there.
_LET_BE = frozenset(
    {
        *(Phase.STOPPING, Phase.KILLING, Phase.DRAINING),
        *(Phase.EMPTYING, Phase.FALLING_ASLEEP, Phase.ASLEEP, Phase.SUSPENDED, Phase.WAKING),
    }
)


def reconcile(wanted: Sequence[Wanted], observed: Sequence[Observed]) -> tuple[Action, ...]:
    """Return the actions, in the order in which to perform them.

    The gone are stopped first: what they hold (a GPU, a port) may be needed by the new.
    """
    wanted_ids = {w.spec.replica_id for w in wanted}
    observed_by_id = {o.spec.replica_id: o for o in observed}
    actions: list[Action] = []
    for replica in observed:
        if replica.spec.replica_id in wanted_ids:
            continue
        if replica.phase is Phase.STOPPED and not replica.wanted:
            actions.append(Remove(replica.spec.replica_id))
        elif replica.wanted:
            actions.append(Stop(replica.spec.replica_id))
    away = _away_by_pool(wanted, observed_by_id)
    for want in wanted:
        current = observed_by_id.get(want.spec.replica_id)
        if current is None:
            actions.extend([Create(want)] if _starts(want) else [])
        elif current.spec.engine != want.spec.engine:
            actions.extend(_replaced(want, current, away))
        else:
            actions.extend(_align(want, current, away))
    return tuple(actions)


def _align(want: Wanted, current: Observed, away: dict[tuple[str, str], int]) -> list[Action]:
    replica_id = want.spec.replica_id
    actions: list[Action] = []
    if current.spec != want.spec:
        actions.append(Update(want))
    if not _starts(want) and current.phase in _NO_PROCESS:
        return [*actions, Stop(replica_id)] if current.wanted else actions
    if not current.wanted and _starts(want):
        actions.append(Start(replica_id))
    change = _change(want, current)
    actions.extend(_turn(want, current, change))
    if change is Way.NONE or current.phase in _LET_BE:
        return actions
    if change is Way.CALLS and current.phase not in _NO_PROCESS:
        if current.phase is not Phase.STARTING and not current.adapting:
            actions.append(Adapt(replica_id))
        return actions
    pool = _pool(want)
    if current.phase in _AWAY:
        if current.phase is not Phase.STOPPED:
            actions.append(Restart(replica_id))
    elif not away[pool]:
        away[pool] += 1
        actions.append(Restart(replica_id))
    return actions


def _replaced(want: Wanted, current: Observed, away: dict[tuple[str, str], int]) -> list[Action]:
    """Return what makes room for one of another engine, in its turn: it is made once this is gone.

    Whoever keeps a replica knows its engine for good.
    """
    if current.phase is Phase.STOPPED and not current.wanted:
        return [Remove(want.spec.replica_id)]
    if not current.wanted or (current.phase not in _AWAY and away[_pool(want)]):
        return []
    away[_pool(want)] += current.phase not in _AWAY
    return [Stop(want.spec.replica_id)]


def _turn(want: Wanted, current: Observed, change: Way) -> list[Action]:
    """Return what brings it to its rung; one that is to be started anew is started first."""
    rung, phase, replica_id = want.rung, current.phase, want.spec.replica_id
    if rung is None or current.posing:
        return []
    if rung is Rung.AWAKE:
        rests = phase in {Phase.ASLEEP, Phase.EMPTYING, Phase.SUSPENDED} and not current.rising
        return [Raise(replica_id)] if rests else []
    if rung in current.out or change is not Way.NONE:
        return []
    serves = phase in {Phase.READY, Phase.HELD}
    deeper = phase in {Phase.EMPTYING, Phase.ASLEEP} and _DEPTHS.index(rung) > _DEPTHS.index(
        current.aim
    )
    return [Lower(replica_id, rung)] if serves or deeper or current.rising else []


def _starts(want: Wanted) -> bool:
    return want.rung in {None, Rung.AWAKE}


def _change(want: Wanted, current: Observed) -> Way:
    if current.launch_hash != want.launch_hash:
        return Way.START
    return way(current.loaded, want.spec.adapters)


def _away_by_pool(
    wanted: Sequence[Wanted], observed_by_id: dict[str, Observed]
) -> dict[tuple[str, str], int]:
    """Count the replicas of each pool that do not serve now; one that is yet to be made counts."""
    away: dict[tuple[str, str], int] = {}
    for want in wanted:
        current = observed_by_id.get(want.spec.replica_id)
        serves = current is not None and current.phase not in _AWAY
        away[_pool(want)] = away.get(_pool(want), 0) + (not serves)
    return away


def _pool(want: Wanted) -> tuple[str, str]:
    return want.spec.model, want.spec.pool


assert _AWAY & ALIVE  # a starting replica is alive and yet away
