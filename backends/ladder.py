"""The rungs between serving and nothing, what each has cost, and which of them to use.

awake → asleep → suspended → snapshotted → cold: each lower rung holds less and takes longer to
come back from. Awake and asleep hold GPUs; suspended holds the host's memory only; of a replica
that is snapshotted or cold there is no process.

**What a rung costs** is measured, for each launch (command, environment and adapters) on its own,
and smoothed: one turn that was slow because the disk was busy is no reason to stay awake. Until it
has been measured an engine's own figures stand in.

**A rung that failed** is left out for a time that doubles with each failure in a row, so that the
next rung below is used instead, by itself; one turn that works clears it. Cold cannot fail into
anything, so it is never left out.

**Where to rest** (`best_rest`). What nobody wants costs nothing to hold, so a replica goes no
deeper than it must: past a rung that keeps a GPU when another model wants that, and past one that
keeps more of the host's memory than is left. Among what remains the first that is back within the
time that its pool's class waits for; if none is, the one that is back soonest.

**What comes up** (`ways_up`): the quickest, but a new replica only where it is quicker by a fifth.
One that rests holds memory for exactly this moment and has its cache, and measured seconds scatter
by more than a tie: with no margin a pool would start new ones beside those that it keeps.

Pure: no clock, no I/O; every table is bounded.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Final, TypeVar

import msgspec

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


class Rung(enum.StrEnum):
    """How much of a replica there is, the most first."""

    AWAKE = "awake"
    ASLEEP = "asleep"  # the engine has let go of its GPU memory, by its own calls
    SUSPENDED = "suspended"  # the driver has moved the process's GPU memory to the host's
    SNAPSHOTTED = "snapshotted"  # no process; an image of one on disk
    COLD = "cold"  # no process, no image

    @property
    def depth(self) -> int:
        return _DEPTHS[self]

    @property
    def holds_gpus(self) -> bool:
        """Whether a replica on it keeps its cards' lease: an engine asleep keeps a context."""
        return self in {Rung.AWAKE, Rung.ASLEEP}

    @property
    def has_process(self) -> bool:
        return self not in {Rung.SNAPSHOTTED, Rung.COLD}


_DEPTHS: Final[Mapping[Rung, int]] = MappingProxyType({rung: i for i, rung in enumerate(Rung)})


class RungCost(msgspec.Struct, frozen=True):
    """What a rung has cost, as measured: seconds down to it and up from it, and what it holds."""

    up_s: float
    down_s: float = 0.0
    host_bytes: int = 0
    gpu_bytes: int = 0


class Rungs(msgspec.Struct, frozen=True, kw_only=True):
    """The ladder of one pool: by its configuration, and by what works on this machine."""

    launch_hash: str
    engine: str
    allowed: frozenset[Rung] = frozenset()  # to rest on, beside cold, which always is
    imaged: bool = False  # there is an image to restore


class Rest(msgspec.Struct, frozen=True):
    """A rung that a replica could be lowered to, and what that would cost."""

    rung: Rung
    up_s: float
    down_s: float = 0.0
    host_bytes: int = 0


class WayUp(msgspec.Struct, frozen=True):
    """How one more replica could come: one that rests, or a new one (`replica_id` None)."""

    rung: Rung  # that it comes from
    up_s: float
    replica_id: str | None = None


class Resting(msgspec.Struct, frozen=True):
    """A replica that could be brought up again."""

    replica_id: str
    rung: Rung


SMOOTHING: Final = 0.3  # weight of the newest turn: the last three make two thirds of the value
OUT_S_MIN: Final = 30.0  # a rung that failed once; doubled with each failure in a row
OUT_S_MAX: Final = 3600.0
NEW_MARGIN: Final = 1.25  # a new replica's seconds count so much more than one's that rests
ENTRIES_MAX: Final = 1024  # launches, and turns of each, that are remembered; the oldest go

MIB: Final = 1 << 20

# Seconds and bytes until they are measured. One H200, the 8B shape in 16 bits, engines' releases
# vLLM 0.26.0 and SGLang 0.5.17, caches of compilation warm: sleep level 1 (release with a copy of
# the weights on the host) as it is from the second time on; suspended after its sleep; restored
# from an image that the page cache held. Of SGLang restored nothing is known, nor what it
# holds suspended: vLLM's figures stand for it.
_VLLM: Final = {
    Rung.ASLEEP: RungCost(0.47, 0.36, 16_000 * MIB, 1_957 * MIB),
    Rung.SUSPENDED: RungCost(1.8, 1.7, 18_000 * MIB),
    Rung.SNAPSHOTTED: RungCost(15.7),
    Rung.COLD: RungCost(46.0),
}
_SGLANG: Final = {
    **_VLLM,
    Rung.ASLEEP: RungCost(0.34, 0.39, 16_000 * MIB, 2_654 * MIB),
    Rung.SUSPENDED: RungCost(2.1, 2.4, 18_000 * MIB),
    Rung.COLD: RungCost(80.0),
}
# The simulator holds nothing; it starts in about a second of imports.
_SIMULATOR: Final = {
    Rung.ASLEEP: RungCost(0.05, 0.05),
    Rung.SUSPENDED: RungCost(0.1, 0.1, 64 * MIB),
    Rung.SNAPSHOTTED: RungCost(0.5, 0.0),
    Rung.COLD: RungCost(1.0),
}
DEFAULTS: Final[Mapping[str, Mapping[Rung, RungCost]]] = MappingProxyType(
    {
        "vllm": _VLLM,
        "vllm-jobs": _VLLM,  # what loads is the same
        "sglang": _SGLANG,
        "simulator": _SIMULATOR,
        "simulator-jobs": _SIMULATOR,
    }
)


class Outage(msgspec.Struct):
    """For how long a rung is left out: of one replica, or of all of a launch."""

    in_a_row: int = 0
    until_s: float = -math.inf

    def begin(self, now_s: float) -> float:
        """It has failed once more; return for how many seconds it is left out."""
        out_s = min(OUT_S_MAX, OUT_S_MIN * 2.0 ** min(self.in_a_row, 32))
        self.in_a_row += 1
        self.until_s = now_s + out_s
        return out_s

    def left_s(self, now_s: float) -> float:
        return max(0.0, self.until_s - now_s)


class _Known(msgspec.Struct):
    """What has been learnt of one launch."""

    costs: dict[Rung, RungCost] = {}
    outages: dict[Rung, Outage] = {}
    told: dict[tuple[str, Rung], RungCost] = {}  # the last turn that a replica told of


class Ladder:
    """What has been learnt of the rungs, by launch."""

    def __init__(self) -> None:
        self._known: dict[str, _Known] = {}

    def learn(self, launch_hash: str, replica_id: str, turns: Mapping[Rung, RungCost]) -> None:
        """Take what a replica's last turns have cost. Telling the same turn again changes nothing.

        A turn that worked clears the failures of its rung.
        """
        known = self._of(launch_hash)
        for rung, cost in turns.items():
            if known.told.get((replica_id, rung)) == cost:
                continue
            _bounded(known.told, (replica_id, rung), cost)
            before = known.costs.get(rung)
            known.costs[rung] = cost if before is None else _smoothed(before, cost)
            known.outages.pop(rung, None)

    def failed(self, launch_hash: str, rung: Rung, now_s: float) -> float:
        """Note that `rung` did not work; return for how many seconds it is left out."""
        if rung in {Rung.AWAKE, Rung.COLD}:
            return 0.0
        return self._of(launch_hash).outages.setdefault(rung, Outage()).begin(now_s)

    def out_for_s(self, launch_hash: str, rung: Rung, now_s: float) -> float:
        """Return for how long this rung is still left out; 0: it may be used."""
        known = self._known.get(launch_hash)
        outage = known.outages.get(rung) if known else None
        return outage.left_s(now_s) if outage else 0.0

    def cost(self, launch_hash: str, rung: Rung, engine: str) -> RungCost:
        """Return what a rung costs: as measured, or as its engine is known to."""
        if rung is Rung.AWAKE:
            return RungCost(0.0)
        known = self._known.get(launch_hash)
        measured = known.costs.get(rung) if known else None
        return measured or DEFAULTS.get(engine, _VLLM)[rung]

    def rests(self, rungs: Rungs, now_s: float) -> tuple[Rest, ...]:
        """Return the rungs that a replica of this pool may be lowered to, the least deep first."""
        return tuple(
            Rest(rung, cost.up_s, cost.down_s, cost.host_bytes)
            for rung in self._usable(rungs, now_s)
            for cost in (self.cost(rungs.launch_hash, rung, rungs.engine),)
        )

    def ways_up(self, rungs: Rungs, resting: Iterable[Resting], now_s: float) -> tuple[WayUp, ...]:
        """Return how one more could come up, the best first. A new one is always among them."""
        usable = self._usable(rungs, now_s)
        ways = [self._way(rungs, replica.rung, replica.replica_id) for replica in resting]
        new = Rung.SNAPSHOTTED if Rung.SNAPSHOTTED in usable else Rung.COLD
        ways.append(self._way(rungs, new, None))
        return tuple(sorted(ways, key=_best_first))

    def _way(self, rungs: Rungs, rung: Rung, replica_id: str | None) -> WayUp:
        return WayUp(rung, self.cost(rungs.launch_hash, rung, rungs.engine).up_s, replica_id)

    def _usable(self, rungs: Rungs, now_s: float) -> tuple[Rung, ...]:
        def may(rung: Rung) -> bool:
            if rung is Rung.COLD:
                return True
            imaged = rung is not Rung.SNAPSHOTTED or rungs.imaged
            return (
                rung in rungs.allowed
                and imaged
                and rung is not Rung.AWAKE
                and not self.out_for_s(rungs.launch_hash, rung, now_s)
            )

        return tuple(rung for rung in Rung if may(rung))

    def _of(self, launch_hash: str) -> _Known:
        known = self._known.pop(launch_hash, None) or _Known()
        _bounded(self._known, launch_hash, known)
        return known


def best_rest(
    rests: Sequence[Rest],
    *,
    gpu_wanted: bool = False,
    host_bytes_free: int | None = None,
    up_s_max: float = math.inf,
) -> Rest:
    """Return where to rest, by the rule above. `rests` are the least deep first, cold at the end.

    `host_bytes_free`: None where the host's memory is not counted.
    """
    fitting = [
        rest
        for rest in rests
        if not (gpu_wanted and rest.rung.holds_gpus)
        and (host_bytes_free is None or rest.host_bytes <= host_bytes_free)
    ] or [rests[-1]]
    in_time = (rest for rest in fitting if rest.up_s <= up_s_max)
    return next(in_time, None) or min(fitting, key=lambda rest: rest.up_s)


def _smoothed(before: RungCost, now: RungCost) -> RungCost:
    def mix(a: float, b: float) -> float:
        return a + SMOOTHING * (b - a)

    return RungCost(
        mix(before.up_s, now.up_s),
        mix(before.down_s, now.down_s),
        now.host_bytes,  # what it holds now is a fact, not a sample
        now.gpu_bytes,
    )


def _best_first(way: WayUp) -> tuple[float, int, str]:
    """Order ways: by seconds, a new one's counted dearer; then the least deep, then by name."""
    margin = NEW_MARGIN if way.replica_id is None else 1.0
    return way.up_s * margin, way.rung.depth, way.replica_id or "\U0010ffff"


def _bounded(table: dict[_Key, _Value], key: _Key, value: _Value) -> None:
    """Put a value at the end of the table, and let the oldest go when that is too many."""
    table.pop(key, None)
    table[key] = value
    if len(table) > ENTRIES_MAX:
        del table[next(iter(table))]
