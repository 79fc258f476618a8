"""What is to be wanted while a machine, or some of its GPUs, will be taken away.

A notice names an end. What runs on what goes is brought elsewhere before it, in this order:

1. One that can be suspended and resumed on other cards is moved, where as many are free: that takes
   seconds and keeps its process.
2. Any other that serves gets a stand-in under a new name, on cards that stay; the classes come one
   after another, online first, for there may not be enough. It serves on until the stand-in does.
3. By then, or so long before the end that it can still drain, it is not wanted any more, and goes
   the way of all: draining, SIGTERM, SIGKILL; the last two at the end at the latest.
4. Work of the class offline is given up at once: it waits for nobody, and its lines are put back
   into the queue of whoever sent them.

What does not serve (it starts, rests, or waits to start) is stopped at once and starts elsewhere
by itself. When the whole machine goes there is no elsewhere for this manager: nothing is started
any more, and what serves does so until it must drain.

Like `reconcile`, by which all this is done, it looks at the whole each time and may be asked any
number of times. What it remembers is who stands in for whom and who is being moved.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise

import msgspec

from backends.ladder import Rung
from backends.lifecycle import Event, Phase
from backends.reconcile import Wanted

TERM_S = 2.0  # before the end comes SIGTERM, if it has not come: engines end within a second or so
KILL_S = 0.5  # and SIGKILL, so that the log's last lines are still written
# A move that may take half of what is left is begun: if it fails there is time for the other way.
MOVE_SHARE = 0.5
DRAIN_SHARE = 0.5  # of the time that a notice leaves; the other half is for the stand-in to come up

_CLASSES = ("online", "semi-online", "offline")
_SERVES = frozenset({Phase.READY})
_RESTS = frozenset({Phase.EMPTYING, Phase.FALLING_ASLEEP, Phase.ASLEEP})
_GONE = frozenset({Phase.STOPPED, Phase.BACKOFF})


class Notice(msgspec.Struct, frozen=True):
    """What goes, and when. `devices`: None is the whole machine."""

    told_s: float
    ends_s: float
    devices: frozenset[str] | None = None

    def concerns(self, seen: Seen) -> bool:
        return self.devices is None or not self.devices.isdisjoint(seen.devices)


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """A replica that the manager keeps."""

    replica_id: str
    phase: Phase
    work_class: str
    devices: tuple[str, ...] = ()  # leased to it
    stop_grace_s: float = 0.0
    move_s: float | None = None  # to suspend and resume it; None: it cannot be moved
    pinned: bool = False  # its pool names the cards: it would start on these again


class Fate(enum.StrEnum):
    """What becomes of a replica on what goes."""

    MOVES = "moves"  # to other cards
    SERVES_ON = "serves on"  # until it is stood in for, or must drain
    LEAVES = "leaves"
    IS_REQUEUED = "is requeued"  # leaves at once: its work is done again elsewhere


class Memory(msgspec.Struct, frozen=True):
    """What is remembered between two looks."""

    stand_ins: dict[str, str] = {}  # by the name of whom they stand in for
    moving: frozenset[str] = frozenset()


class Outcome(msgspec.Struct, frozen=True):
    """What follows from notices."""

    wanted: tuple[Wanted, ...]
    fates: dict[str, Fate]
    pushes: tuple[tuple[str, Event], ...]  # whose time is up
    memory: Memory
    next_s: float | None  # when to look again at the latest


def outcome(
    wanted: Sequence[Wanted],
    seen: Mapping[str, Seen],
    notices: Sequence[Notice],
    memory: Memory,
    free: int,
    now_s: float,
) -> Outcome:
    """Return what is to be wanted in place of `wanted`; `free`: cards that nobody has, and stay."""
    look = _Look(seen, notices, memory, free, now_s)
    kept: list[Wanted] = []
    new: list[Wanted] = []
    names = {want.spec.replica_id for want in wanted}
    for want in wanted:
        for each in look.of(want, names):
            (kept if each.spec.replica_id in seen else new).append(each)
    machine_goes = any(notice.devices is None for notice in notices)
    new.sort(key=lambda want: _CLASSES.index(want.spec.work_class))
    told = (*([] if machine_goes else new), *kept)
    return Outcome(
        wanted=tuple({want.spec.replica_id: want for want in told}.values()),
        fates=look.fates,
        pushes=tuple(look.pushes()),
        memory=Memory(look.stand_ins, frozenset(look.moving)),
        next_s=min((s for s in look.times() if s > now_s), default=None),
    )


class _Look:
    """One look at everything."""

    def __init__(
        self,
        seen: Mapping[str, Seen],
        notices: Sequence[Notice],
        memory: Memory,
        free: int,
        now_s: float,
    ) -> None:
        self.seen = seen
        self.now_s = now_s
        self.free = free
        self.stand_ins: dict[str, str] = {}
        self._before = memory.stand_ins
        self.moving = {name for name in memory.moving if name in seen}
        self.fates: dict[str, Fate] = {}
        self.notices: dict[str, Notice] = {}  # the first to end, by whom it concerns
        for notice in sorted(notices, key=lambda notice: notice.ends_s, reverse=True):
            concerned = [name for name, each in seen.items() if notice.concerns(each)]
            self.notices |= dict.fromkeys(concerned, notice)

    def of(self, want: Wanted, names: set[str]) -> Iterator[Wanted]:
        """Yield what is wanted where `want` was: itself, who stands in for it, or both."""
        *past, name = self._chain(want.spec.replica_id)
        for each in past:
            if each in self.notices and self._still_serves(each, name):
                yield _named(want, each)
        notice = self.notices.get(name)
        if notice is None:
            yield self._returned(_named(want, name))
            return
        seen = self.seen[name]
        fate = self.fates[name] = self._fate(seen, notice)
        if fate is Fate.MOVES:
            if seen.phase in _SERVES:
                self.moving.add(name)
            yield msgspec.structs.replace(_named(want, name), rung=Rung.SUSPENDED)
        elif fate is Fate.SERVES_ON:
            yield _named(want, name)
            if notice.devices is not None and not seen.pinned:
                fresh = self.stand_ins[name] = self._fresh(name, names)
                yield _named(want, fresh)

    def _chain(self, name: str) -> list[str]:
        """Return a wanted replica and who stands in for whom, without those that are gone."""
        chain = [name]
        while chain[-1] in self._before:
            chain.append(self._before[chain[-1]])
        chain = [chain[0], *(each for each in chain[1:-1] if each in self.seen), *chain[1:][-1:]]
        for at, (each, stand_in) in enumerate(pairwise(chain)):
            if self._stays(each, stand_in):
                del chain[at + 1 :]
                break
        self.stand_ins |= dict(pairwise(chain))
        return chain

    def _stays(self, name: str, stand_in: str) -> bool:
        """Say whether one is not taken away any more, and serves while its stand-in does not."""
        seen, other = self.seen.get(name), self.seen.get(stand_in)
        serves = seen is not None and seen.phase in _SERVES and name not in self.notices
        return serves and (other is None or other.phase not in _SERVES)

    def pushes(self) -> Iterator[tuple[str, Event]]:
        """Yield whose drain, or whose SIGTERM, has taken all the time there is."""
        for name, notice in self.notices.items():
            left_s = notice.ends_s - self.now_s
            phase = self.seen[name].phase
            draining = phase is Phase.DRAINING and left_s <= TERM_S
            if draining or (phase is Phase.STOPPING and left_s <= KILL_S):
                yield name, Event.DEADLINE

    def times(self) -> Iterable[float]:
        for name, notice in self.notices.items():
            yield _leave_s(self.seen[name], notice)
            yield notice.ends_s - TERM_S
            yield notice.ends_s - KILL_S

    def _still_serves(self, name: str, stand_in: str) -> bool:
        """Say whether one that is stood in for serves meanwhile."""
        other, seen = self.seen.get(stand_in), self.seen[name]
        relieved = other is not None and other.phase in _SERVES and stand_in not in self.notices
        leaves = relieved or self._must_leave(seen, self.notices[name])
        self.fates[name] = Fate.LEAVES if leaves else Fate.SERVES_ON
        return not leaves

    def _fate(self, seen: Seen, notice: Notice) -> Fate:
        if seen.work_class == "offline":
            return Fate.IS_REQUEUED
        if notice.devices is not None and self._moves(seen, notice):
            return Fate.MOVES
        return Fate.LEAVES if self._must_leave(seen, notice) else Fate.SERVES_ON

    def _must_leave(self, seen: Seen, notice: Notice) -> bool:
        return seen.phase not in _SERVES or self.now_s >= _leave_s(seen, notice)

    def _moves(self, seen: Seen, notice: Notice) -> bool:
        if seen.move_s is None or seen.pinned or seen.phase not in _SERVES | _RESTS:
            return False
        left_s = notice.ends_s - TERM_S - self.now_s
        if seen.replica_id in self.moving:
            return left_s > 0
        if seen.move_s > MOVE_SHARE * left_s:
            return False
        if seen.phase in _RESTS:
            return True  # it rests on, where it needs no card
        fits = len(seen.devices) <= self.free
        self.free -= len(seen.devices) if fits else 0
        return fits

    def _returned(self, want: Wanted) -> Wanted:
        """One that was suspended to be moved is wanted awake until it is."""
        name = want.spec.replica_id
        if name not in self.moving:
            return want
        if self.seen[name].phase in _SERVES | _GONE:
            self.moving.discard(name)
            return want
        return msgspec.structs.replace(want, rung=Rung.AWAKE)

    def _fresh(self, name: str, names: set[str]) -> str:
        """Return a name of the same pool that nobody has."""
        stem = name.rpartition("-")[0]
        taken = {*names, *self.seen, *self._before.values(), *self.stand_ins.values()}
        number = 0
        while f"{stem}-{number}" in taken:
            number += 1
        return f"{stem}-{number}"


def _leave_s(seen: Seen, notice: Notice) -> float:
    """Return when it must begin to drain."""
    drain_s = min(seen.stop_grace_s, DRAIN_SHARE * (notice.ends_s - notice.told_s))
    return notice.ends_s - TERM_S - drain_s


def _named(want: Wanted, name: str) -> Wanted:
    if want.spec.replica_id == name:
        return want
    return msgspec.structs.replace(want, spec=msgspec.structs.replace(want.spec, replica_id=name))
