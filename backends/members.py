"""What the replicas of a pool are to whoever scales it, and what is remembered of them.

Where a replica stands follows from its lifecycle alone, so nothing has to be written down: a
manager that was killed half-way through a change reads from what it adopts what had been meant.
What serves or comes up is wanted awake; what rests or goes to rest is wanted where it rests; what
is on its way out, or waits for a GPU that it cannot have, is not wanted.

That is also how an operator's wishes are respected on a pool that is scaled. One that was put to
sleep by hand rests until demand needs one more; one that was woken by hand counts, and rests again
when the law finds it dispensable; one that was drained by hand is left alone, counts for nothing,
and another takes its place while there is demand.

What no state tells is remembered here from look to look: since when it stands so, how long it has
been idle, and how warm its cache is. Prompt tokens that a cache answered are worth keeping, the
more so the more recent they are; of what is cached and never asked for no engine tells.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

import msgspec

from backends.claims import Holder, Transit
from backends.ladder import Rest, Rung
from backends.lifecycle import Lifecycle, Phase
from proxy.contract import LoadSample

HEAT_HALF_LIFE_S = 60.0


class Standing(enum.StrEnum):
    """What a replica is good for now, or will be."""

    SERVES = "serves"
    COMING = "coming"  # will serve without anybody doing more for it
    GOING = "going"  # to rest, or out
    RESTS = "rests"
    HELD = "held"  # serves nobody, because an operator drained it
    GONE = "gone"  # has no process, and will have none


_BY_PHASE = {
    Phase.STOPPED: Standing.GONE,
    Phase.STARTING: Standing.COMING,
    Phase.READY: Standing.SERVES,
    Phase.HELD: Standing.HELD,
    Phase.EMPTYING: Standing.GOING,
    Phase.FALLING_ASLEEP: Standing.GOING,
    Phase.ASLEEP: Standing.RESTS,
    Phase.SUSPENDED: Standing.RESTS,
    Phase.WAKING: Standing.COMING,
}


def standing_of(state: Lifecycle, *, rested: bool = False) -> Standing:
    """Say what a replica is good for.

    `rested`: it was at rest, or on its way there, when last seen. One that ends there is not
    needed, so its end is no restart.
    """
    comes = state.wanted and not rested
    if state.phase is Phase.BACKOFF:  # it failed and tries again, or found no GPU
        return Standing.COMING if comes and state.faulted else Standing.GONE
    if state.phase in {Phase.DRAINING, Phase.STOPPING, Phase.KILLING}:
        return Standing.COMING if comes else Standing.GOING  # a restart, or the end
    return _BY_PHASE[state.phase]


def wanted_on(standing: Standing, state: Lifecycle, aim: Rung) -> Rung | None:
    """Return the rung on which a replica is to be if nobody decides otherwise; None: on none."""
    match standing:
        case Standing.SERVES | Standing.COMING | Standing.HELD:
            return Rung.AWAKE
        case Standing.RESTS:
            return aim
        case Standing.GOING:
            ends = state.phase in {Phase.DRAINING, Phase.STOPPING, Phase.KILLING}
            return None if ends else aim
        case Standing.GONE:
            return None


class Look(NamedTuple):
    """What is seen of a replica at one moment."""

    replica_id: str
    launch_hash: str
    state: Lifecycle
    aim: Rung  # where it is, or goes down to
    load: LoadSample | None
    devices: tuple[str, ...]
    in_flight: int | None  # by the proxies; None: they do not tell
    tokens: int
    names: tuple[str, ...] = ()  # that it answers to
    restored_s: float = 0.0  # what its last start from an image took; 0: it had none
    bound: tuple[str, ...] = ()  # suspended, it can only come back on these cards
    posing: bool = False  # an image of it is made, and then it serves on
    spare: int = 0  # of the requests in flight, those that may have only what is spare


class Rise(NamedTuple):
    """A replica has come up."""

    replica_id: str
    launch_hash: str
    rung: Rung  # that it came from
    up_s: float


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """A replica with what is remembered of it."""

    replica_id: str
    launch_hash: str
    standing: Standing
    rung: Rung  # where it stands, or will when it is down
    keep_on: Rung | None  # see `wanted_on`
    load: LoadSample | None = None
    devices: tuple[str, ...] = ()
    in_flight: int = 0
    tokens: int = 0
    names: tuple[str, ...] = ()  # that it answers to
    for_s: float = 0.0  # it has stood so
    came_from: Rung = Rung.COLD
    start_s: float = 0.0  # what its last coming up took
    idle_s: float = 0.0
    heat: int = 0
    preemptions: int = 0  # since it was first seen
    recallable: bool = False  # on its way down, and still able to serve
    bound: tuple[str, ...] = ()
    failing: bool = False  # on its way up by a start, and starts before it have failed

    def holder(self, rests: tuple[Rest, ...]) -> Holder:
        """Return what the arbiter is to know of it; `rests`: where it could be lowered to."""
        transit = {Standing.COMING: Transit.COMING, Standing.GOING: Transit.GOING}
        return Holder(
            replica_id=self.replica_id,
            rung=self.rung,
            transit=transit.get(self.standing, Transit.NONE),
            devices=self.devices,
            bound=self.bound,
            in_flight=self.in_flight,
            idle_s=self.idle_s,
            up_for_s=self.for_s if self.standing is Standing.SERVES else 0.0,
            start_s=self.start_s,
            heat=self.heat,
            come_back_s=min((rest.up_s for rest in rests), default=0.0),
            rests=rests,
            from_nothing=not self.came_from.has_process,
            failing=self.failing,
            kept=self.standing is Standing.HELD,
        )


class _Remembered(msgspec.Struct):
    standing: Standing
    since_s: float
    seen_s: float
    rests: bool = False
    posed: bool = False  # when it was seen last
    rested_on: Rung = Rung.COLD  # before it last came up
    start_s: float = 0.0
    restored_s: float = 0.0  # as it was told last
    busy_s: float = 0.0  # when it last had work
    heat: float = 0.0
    cached_total: int = 0
    preempted_total: int = 0
    preemptions: int = 0


class Memory:
    """What is remembered of replicas; of as many as there are."""

    def __init__(self) -> None:
        self._of: dict[str, _Remembered] = {}

    def keep(self, replica_ids: set[str]) -> None:
        """Forget all others."""
        for gone in self._of.keys() - replica_ids:
            del self._of[gone]

    def see(self, look: Look, now_s: float) -> tuple[Member, Rise | None]:
        """Return a replica with what is remembered, and whether it has just come up."""
        known = self._of.get(look.replica_id)
        standing = standing_of(look.state, rested=known is not None and known.rests)
        if look.posing:
            standing = Standing.HELD if look.state.held else Standing.COMING
        if known is None:
            known = _Remembered(standing, now_s, now_s, busy_s=now_s)
            self._of[look.replica_id] = known
        if standing is Standing.RESTS:
            known.rested_on = look.aim
        known.rests = standing in {Standing.RESTS, Standing.GOING}
        rise = _turn(known, standing, look, now_s)
        known.posed = look.posing
        in_flight = _in_flight(look)
        if in_flight or standing is not Standing.SERVES:
            known.busy_s = now_s
        _warm(known, look.load, now_s)
        return self._member(look, standing, known, in_flight, now_s), rise

    def _member(
        self, look: Look, standing: Standing, known: _Remembered, in_flight: int, now_s: float
    ) -> Member:
        keep_on = wanted_on(standing, look.state, look.aim)
        rests = standing in {Standing.GOING, Standing.RESTS}
        starts = standing is Standing.COMING and look.state.phase is not Phase.WAKING
        return Member(
            replica_id=look.replica_id,
            launch_hash=look.launch_hash,
            standing=standing,
            rung=(keep_on or Rung.COLD) if rests else Rung.AWAKE,
            keep_on=keep_on,
            load=look.load,
            devices=look.devices,
            in_flight=in_flight,
            tokens=look.tokens,
            names=look.names,
            for_s=now_s - known.since_s,
            came_from=known.rested_on,
            start_s=known.start_s,
            idle_s=now_s - known.busy_s,
            heat=int(known.heat) + (look.load.used_tokens if look.load else 0),
            preemptions=known.preemptions,
            recallable=look.state.phase in {Phase.DRAINING, Phase.EMPTYING}
            and standing is Standing.GOING,
            bound=look.bound,
            failing=starts and look.state.failures > 0,
        )


def _turn(known: _Remembered, standing: Standing, look: Look, now_s: float) -> Rise | None:
    """Note that it stands otherwise than before."""
    before, since_s = known.standing, known.since_s
    if standing is before:
        return None
    known.standing, known.since_s = standing, now_s
    if look.posing or (known.posed and standing is Standing.SERVES):
        return None  # it has not been away
    if standing is Standing.COMING and before is not Standing.RESTS:
        known.rested_on = Rung.COLD
    if before is not Standing.COMING or standing is not Standing.SERVES:
        return None
    if look.restored_s != known.restored_s:
        known.rested_on, known.restored_s = Rung.SNAPSHOTTED, look.restored_s
    known.start_s = now_s - since_s
    return Rise(look.replica_id, look.launch_hash, known.rested_on, known.start_s)


def _in_flight(look: Look) -> int:
    """Return the requests on it: by the proxies, or by itself, whoever knows of more.

    What may have only what is spare keeps nobody busy; an engine cannot tell it from the rest.
    """
    if look.spare:
        return max(0, (look.in_flight or 0) - look.spare)
    own = look.load.running + look.load.waiting if look.load else 0
    return max(own, look.in_flight or 0)


def _warm(known: _Remembered, load: LoadSample | None, now_s: float) -> None:
    """Let the cache cool, and warm it by what has been read from it."""
    known.heat *= 0.5 ** ((now_s - known.seen_s) / HEAT_HALF_LIFE_S)
    known.seen_s = now_s
    if load is None:
        if known.standing in {Standing.GONE, Standing.COMING}:
            known.heat, known.cached_total, known.preempted_total = 0.0, 0, 0
        return
    # A counter that fell is that of a new process.
    cached, preempted = load.cached_tokens_total, load.preemptions_total
    known.heat += cached - known.cached_total if cached >= known.cached_total else cached
    fell = preempted < known.preempted_total
    known.preemptions += preempted if fell else preempted - known.preempted_total
    known.cached_total, known.preempted_total = cached, preempted
