"""Takes one replica down the rungs below serving and up again, and measures both.

A replica is asleep by its engine's own calls (`naps`), suspended by the driver (`snapshots`), or
both: what has let go of its memory first is small, and is suspended and resumed in a third of the
time. So the way to SUSPENDED leads through sleep where the pool allows it, and a suspension that
fails leaves it asleep rather than awake: that is the next rung up, not the start.

What comes of a turn is an event for the lifecycle. Every turn is noted before it begins and after
it is done. Of one that a manager did not see to its end, a suspension can be taken back, because
the driver tells what is suspended; an engine does not tell what it has let go of.

A rung that failed is left out for a time that doubles with each failure in a row, by the rule of
the ladder: whoever wants it takes the next one meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from backends.engines.base import Engine, FlagError
from backends.journal import Launch, Suspension
from backends.ladder import Outage, Rung, RungCost
from backends.lifecycle import Event, Phase
from backends.naps import Naps
from backends.reconcile import Observed
from backends.snapshots.base import Snapshot, Suspender, SuspendError
from backends.spec import ReplicaSpec
from backends.surroundings import Surroundings

# Only against what hangs: a suspender has limits of its own for each of its steps (`suspend`), of
# which the longest is for 140 GB into host memory that nobody has touched yet.
SUSPEND_S_MAX = 600.0
RESUMES_MAX = 3  # failed ones in a row, after which only a new start helps
_OVER = Event.BROKE, "it is not to go on"  # the life is over: nothing here is of the next one
_GOING_DOWN = frozenset({Phase.EMPTYING, Phase.FALLING_ASLEEP, Phase.ASLEEP})


class RefusedError(Exception):
    """What is wished cannot be had now; the text says why."""


class Life(NamedTuple):
    """What a turn is done to, and whether it is to go on."""

    launch_id: str
    spec: ReplicaSpec
    url: str
    pid: int
    go_on: Callable[[], bool]


class Turns:
    """The rungs of one replica: where it is, or on its way to, and what they have cost."""

    def __init__(self, engine: Engine, around: Surroundings) -> None:
        self.aim = Rung.AWAKE  # where it is, or goes down to
        self.suspended = False
        self.gpus: tuple[str, ...] = ()  # that it runs on; suspended, none
        self.naps = Naps(engine, around)
        self.costs: dict[Rung, RungCost] = {}  # 0.0: not measured yet
        self._around = around
        self._engine = engine
        self._outages: dict[Rung, Outage] = {}
        self._resumes_failed = 0
        self._rising: tuple[Rung, float] | None = None  # from where, since when
        self._moved: dict[str, str] | None = None  # cards of a copy by those of its image
        self.down_s = 0.0  # the last turns
        self.up_s = 0.0

    @property
    def suspender(self) -> Suspender:
        return self._around.suspender_of(self._engine)

    @property
    def rung(self) -> Rung:
        """Return where a process stands: on the way, where it came from."""
        if self.suspended:
            return Rung.SUSPENDED
        return Rung.ASLEEP if self.naps.asleep else Rung.AWAKE

    @property
    def rest(self) -> Phase | None:
        """Return where it rests; None: it does not."""
        return {Rung.ASLEEP: Phase.ASLEEP, Rung.SUSPENDED: Phase.SUSPENDED}.get(self.rung)

    def adopt(self, launch: Launch) -> None:
        """Take over what a manager before has noted.

        One that it suspended or resumed and did not see to the end counts as suspended: to resume
        what runs changes nothing.
        """
        self.naps.asleep = launch.nap_level is not None
        self.naps.level = launch.nap_level or 0
        self.suspended = launch.suspended or launch.suspending
        self.aim = self.rung
        cards, owner = self._around.cards, launch.replica_id
        if launch.suspended and not launch.suspending:
            cards.lend(owner, launch.gpus)
        else:
            self.gpus = launch.gpus
            cards.claim(owner, launch.gpus)

    def take_aim(self, rung: Rung, level: int | None, seen: Observed, *, stale: bool) -> bool:
        """Aim at `rung`; say whether that wants a turn to be begun. Raises `RefusedError`.

        `level` None: nobody says how deep it should sleep.
        """
        if seen.posing:
            raise RefusedError("an image of it is being made; ask again when that is done")
        if seen.phase in _GOING_DOWN | {Phase.SUSPENDED}:
            return self._aim_on(rung, level, seen)
        if seen.phase not in {Phase.READY, Phase.HELD}:
            raise RefusedError(f"it is {seen.phase.words}; only what is ready can be put to sleep")
        if stale:
            raise RefusedError("it is about to be started anew with a changed command")
        if seen.adapting:
            raise RefusedError("its adapters are being changed; ask again when that is done")
        depth = level or self._engine.sleep_level(seen.spec)
        self._check(rung, depth, seen.spec)
        self.aim, self.naps.level = rung, depth
        return True

    def _aim_on(self, rung: Rung, level: int | None, seen: Observed) -> bool:
        """Aim at `rung` from the way down, or from a rest."""
        if rung is self.aim:
            if rung is Rung.ASLEEP and level not in {None, self.naps.level}:
                raise RefusedError(f"it sleeps at level {self.naps.level}; wake it first")
            return False
        if rung is Rung.ASLEEP and seen.phase is not Phase.EMPTYING:
            raise RefusedError(f"it is {self.rung} already, or on its way there; wake it first")
        self._check(rung, self.naps.level, seen.spec)
        self.aim = rung
        return seen.phase is Phase.ASLEEP

    def _check(self, rung: Rung, level: int, spec: ReplicaSpec) -> None:
        try:
            if rung is Rung.ASLEEP or spec.sleep:
                self._engine.sleep_calls(spec, level)
        except FlagError as error:
            self.failed(rung)
            raise RefusedError(str(error)) from error
        capability = self.suspender.probe()
        if rung is Rung.SUSPENDED and not capability.works:
            self.failed(rung)
            raise RefusedError(f"it cannot be suspended here: {capability.reason}")

    def begin(self, gpus: tuple[str, ...], rung: Rung) -> None:
        """A new life begins on `gpus`, from COLD or SNAPSHOTTED, and is awake."""
        self.aim, self.suspended, self.naps.asleep = Rung.AWAKE, False, False
        self.gpus, self._moved = gpus, None
        self._rising = rung, self._around.clock.now_s()
        self._resumes_failed = 0

    @property
    def out(self) -> frozenset[Rung]:
        """Return the rungs that failed lately."""
        now_s = self._around.clock.now_s()
        return frozenset(rung for rung, outage in self._outages.items() if outage.left_s(now_s))

    def failed(self, rung: Rung) -> None:
        """Leave `rung` out for a time."""
        self._outages.setdefault(rung, Outage()).begin(self._around.clock.now_s())

    def measured(self, rung: Rung, **figures: float) -> None:
        """Take a cost of `rung` as just measured; it works."""
        self._outages.pop(rung, None)
        known = self.costs.get(rung, RungCost(up_s=0.0))
        self.costs[rung] = msgspec.structs.replace(known, **figures)

    def revived(self, image: Snapshot) -> None:
        """It is a copy: it rests as the one rested that was dumped."""
        self.suspended = image.suspended
        self.naps.asleep, self.naps.level = image.nap_level > 0, image.nap_level
        cards = self._around.cards.uuids(self.gpus)
        if len(cards) == len(image.devices) and cards != image.devices:
            self._moved = dict(zip(image.devices, cards, strict=True))

    async def lower(self, life: Life) -> tuple[Event, str]:
        """Take it down to `aim`; return what came of it, and why. Suspended, it lends its cards."""
        sleeps = self.aim is Rung.ASLEEP or life.spec.sleep
        event, reason = await self._lower(life, sleeps=sleeps)
        if event is Event.SUSPENDED:
            self.gpus = ()
            self._around.cards.lend(life.spec.replica_id)
        return event, reason

    async def lower_for_image(self, life: Life) -> tuple[Event, str]:
        """Take it down as far as makes its image small, for a moment: its cards stay its own.

        What holds memory of a card has to let go of it, or it cannot be dumped. What that costs
        says nothing of the rungs: it holds less here than one that has served.
        """
        costs = dict(self.costs)
        self.naps.level = self._engine.dump_level(life.spec)
        self.aim = Rung.SUSPENDED if self._engine.uses_gpu else Rung.ASLEEP
        event, reason = await self._lower(life, sleeps=True)
        self.costs, self.aim = costs, Rung.AWAKE
        fell_short = event is Event.SLEPT and self._engine.uses_gpu
        return (Event.BALKED, reason) if fell_short else (event, reason)

    async def _lower(self, life: Life, *, sleeps: bool) -> tuple[Event, str]:
        began_s = self._around.clock.now_s()
        if sleeps and not self.naps.asleep:
            event, reason = await self.naps.fall_asleep(*life[:3], life.go_on)
            if event is not Event.SLEPT:
                self.failed(self.aim)
                self.aim = Rung.AWAKE
                return event, reason
            self.down_s = self.naps.sleep_s
            self.measured(Rung.ASLEEP, down_s=self.naps.sleep_s)
            if self.aim is Rung.ASLEEP:
                return event, reason
        return await self._suspend(life, began_s)

    async def _suspend(self, life: Life, began_s: float) -> tuple[Event, str]:
        around = self._around
        if not life.go_on():
            return _OVER
        try:
            around.journal.append(Suspension(life.launch_id, suspended=False, turning=True))
        except OSError as error:
            return self._not_suspended(error)
        await around.fetch.drop(life.url)  # connections that nobody would answer on
        try:
            async with asyncio.timeout(SUSPEND_S_MAX):
                moved = await self.suspender.suspend(life.pid)
        except (SuspendError, TimeoutError) as error:
            if not _intact(error):
                self.failed(Rung.SUSPENDED)
                return Event.BROKE, f"it broke while it was suspended: {_words(error)}"
            around.note(Suspension(life.launch_id, suspended=False, turning=False))
            return self._not_suspended(error)
        if not life.go_on():
            return _OVER
        self.suspended = True
        around.note(Suspension(life.launch_id, suspended=True, turning=False))
        self.down_s = down_s = around.clock.now_s() - began_s
        self.measured(Rung.SUSPENDED, down_s=down_s, host_bytes=moved)
        return Event.SUSPENDED, f"suspended, after {down_s:.2f} s"

    def _not_suspended(self, error: Exception) -> tuple[Event, str]:
        self.failed(Rung.SUSPENDED)
        reason = f"it could not be suspended: {_words(error)}"
        if self.naps.asleep:
            self.aim = Rung.ASLEEP
            return Event.SLEPT, f"asleep at level {self.naps.level}; {reason}"
        self.aim = Rung.AWAKE
        return Event.BALKED, f"{reason}; it serves on"

    async def rise(self, life: Life, room: Callable[[], None]) -> tuple[Event, str] | None:
        """Bring it back; return what went wrong, if anything did. Raises `NoGpuError`.

        `room` is called when cards have been given back and it had found none.
        """
        self._rising = self.rung, self._around.clock.now_s()
        return await self.up(life, room)

    async def up(
        self, life: Life, room: Callable[[], None] = lambda: None
    ) -> tuple[Event, str] | None:
        """Do the same with what is no rest of its own: a copy, or one that has been dumped."""
        if not life.go_on():
            return _OVER
        if self.suspended and (problem := await self._resume(life, room)) is not None:
            return problem
        if self.naps.asleep:
            trouble = await self.naps.wake(*life[:3], life.go_on)
            return None if trouble is None else (Event.BROKE, trouble)
        return None

    async def _resume(self, life: Life, room: Callable[[], None]) -> tuple[Event, str] | None:
        around, owner = self._around, life.spec.replica_id
        env, args = life.spec.env, life.spec.args
        moves = self.suspender.probe().moves
        back = around.cards.take_back(owner, env, args, room, moves=moves)
        moving = back.moved is not None
        turn = Suspension(life.launch_id, suspended=True, turning=True, gpus=back.devices)
        around.note(msgspec.structs.replace(turn, moving=moving))
        try:
            async with asyncio.timeout(SUSPEND_S_MAX):
                await self.suspender.resume(life.pid, back.moved or self._moved)
        except (SuspendError, TimeoutError) as error:
            if not life.go_on():
                return _OVER
            self._resumes_failed += 1
            if not _intact(error) or self._resumes_failed >= RESUMES_MAX:
                self.failed(Rung.SUSPENDED)
                return Event.BROKE, f"it could not be resumed: {_words(error)}"
            stays = back.before or back.devices  # on other cards it is only once it has moved
            around.note(msgspec.structs.replace(turn, turning=False, gpus=stays))
            around.cards.lend(owner, back.before)
            return Event.CROWDED, f"not resumed, and tried again: {_words(error)}"
        if not life.go_on():
            return _OVER
        self.suspended, self.gpus, self._resumes_failed = False, back.devices, 0
        around.note(Suspension(life.launch_id, suspended=False, turning=False))
        return None

    def risen(self) -> str:
        """It is ready; return the words for what that took, unless it was an ordinary start."""
        rising, self._rising, self.aim = self._rising, None, Rung.AWAKE
        if rising is None:
            return ""
        rung, since_s = rising
        took_s = self._around.clock.now_s() - since_s
        self.measured(rung, up_s=took_s)
        if rung is Rung.COLD:
            return ""
        self.up_s = took_s
        return f"{'restored' if rung is Rung.SNAPSHOTTED else 'awake'}, after {took_s:.2f} s"


def broken_off(launch: Launch) -> tuple[Event, str] | None:
    """Return what follows for one in whose midst a manager died; None: it died elsewhere."""
    if launch.staged:
        return Event.HURRY, "the manager died while an image was restored or made"
    if launch.turning or launch.moving:
        turn = "fell asleep or woke" if launch.turning else "was moved to other cards"
        return Event.RESTART, f"the manager died while it {turn}: nobody knows how far"
    if launch.suspending:
        return Event.WAKE, "the manager died while it was suspended or resumed"
    return None


def _intact(error: Exception) -> bool:
    return isinstance(error, SuspendError) and error.intact


def _words(error: Exception) -> str:
    return str(error) or f"no end after {SUSPEND_S_MAX:g} s"
