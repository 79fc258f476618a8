"""What this manager has been told will be taken away, and the one place that knows it.

A notice comes from an operator or a scheduler (`POST /v1/reclaim`) or from the cloud
(`notice_watch`). What follows is decided by `reclaim` each time the manager looks at what is
wanted; here are the notices, the clock, and a file. The file makes that a manager which is killed
meanwhile is followed by one that goes on: who stands in for whom would be forgotten, and those who
stand in would be stopped. It holds for this life of the machine.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from backends.clock import Timer
from backends.engines.base import Engine
from backends.gpus import pinned
from backends.keeper import Keeper
from backends.ladder import Rung
from backends.reclaim import Fate, Memory, Notice, Seen, outcome
from backends.reconcile import Wanted
from backends.surroundings import Surroundings

NOTICES_MAX = 16
IN_S_MAX = 86_400.0
# Until it is measured: an 8 B model on an H200 served again after 3.5 s; most are larger.
MOVE_S = 10.0


class RefusedNoticeError(Exception):
    """A notice that cannot be taken; the text says why."""


class NoticeReport(msgspec.Struct, frozen=True):
    """One notice, for people."""

    ends_in_s: float
    gpus: list[str] | None  # None: the whole machine


class ReclaimReport(msgspec.Struct, frozen=True):
    """What will be taken away, and what becomes of whom."""

    notices: tuple[NoticeReport, ...] = ()
    fates: dict[str, Fate] = {}
    stand_ins: dict[str, str] = {}


class _Kept(msgspec.Struct):
    """The file. Times are Unix times."""

    boot_id: str
    notices: list[tuple[float, float, list[str] | None]] = []  # told, ends, cards
    memory: Memory = Memory()


class Reclaims:
    """The notices of one manager."""

    def __init__(
        self,
        around: Surroundings,
        engines: Mapping[str, Engine],
        keepers: Mapping[str, Keeper],
        path: Path,
        look: Callable[[], None],
    ) -> None:
        """`look` has the manager look at what is wanted."""
        self._around = around
        self._engines = engines
        self._keepers = keepers
        self._path = path
        self._look = look
        self._notices: dict[frozenset[str] | None, Notice] = {}
        self._memory = Memory()
        self._fates: dict[str, Fate] = {}
        self._timer: Timer | None = None
        self._read()
        self._withdraw()

    def take(self, in_s: float, gpus: Sequence[str] | None, source: str) -> None:
        """Take the notice that `gpus`, or the whole machine, will go. Raises `RefusedNoticeError`.

        Of two for the same the one that ends first holds: a cloud says it again and again.
        """
        devices = None if gpus is None else self._devices(gpus)
        now_s = self._around.clock.now_s()
        notice = Notice(told_s=now_s, ends_s=now_s + in_s, devices=devices)
        known = self._notices.get(devices)
        if known is not None and known.ends_s <= notice.ends_s:
            return
        if known is None and len(self._notices) >= NOTICES_MAX:
            raise RefusedNoticeError(f"there are {NOTICES_MAX} notices already")
        self._notices[devices] = notice
        told = "the machine" if devices is None else f"GPU {', '.join(sorted(devices))}"
        self._around.log.caution("reclaim_notice", what=told, in_s=round(in_s, 1), source=source)
        self._changed()

    def cancel(self) -> None:
        """Nothing is taken away after all; who serves in place of somebody goes on doing so."""
        self._notices.clear()
        self._fates = {}
        self._around.log.tell("reclaim_cancelled")
        self._changed()

    @property
    def all_goes(self) -> bool:
        """Say whether the whole machine goes, so that nothing is started here any more."""
        return None in self._notices

    def report(self) -> ReclaimReport:
        now_s = self._around.clock.now_s()
        notices = tuple(
            NoticeReport(
                round(notice.ends_s - now_s, 1),
                _sorted(notice.devices),
            )
            for notice in self._notices.values()
        )
        return ReclaimReport(notices, self._fates, self._memory.stand_ins)

    def shaped(self, wanted: tuple[Wanted, ...]) -> tuple[Wanted, ...]:
        """Return what is to be wanted in place of `wanted`, and see to it that time is kept."""
        if not self._notices and self._memory == Memory():
            return wanted
        now_s = self._around.clock.now_s()
        leases = self._around.cards.leases
        seen = {name: self._seen(keeper) for name, keeper in self._keepers.items()}
        free = len(leases.free) if leases is not None else 0
        out = outcome(wanted, seen, list(self._notices.values()), self._memory, free, now_s)
        for name, event in out.pushes:
            self._keepers[name].apply(event, "its machine is about to be taken away")
        for name, fate in out.fates.items():
            if self._fates.get(name) is not fate:
                stand_in = out.memory.stand_ins.get(name, "")
                self._around.log.tell("reclaim", replica=name, fate=fate, stand_in=stand_in)
        self._fates = out.fates
        if out.memory != self._memory:
            self._memory = out.memory
            self._write()
        self._wake_at(out.next_s, now_s)
        return out.wanted

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _changed(self) -> None:
        self._write()
        self._withdraw()
        self._look()

    def _withdraw(self) -> None:
        leases = self._around.cards.leases
        if leases is not None:
            all_devices = frozenset(gpu.device for gpu in leases.inventory.gpus)
            gone = [all_devices if d is None else d for d in self._notices]
            self._around.cards.withdraw(frozenset[str]().union(*gone))

    def _seen(self, keeper: Keeper) -> Seen:
        spec, leases = keeper.spec, self._around.cards.leases
        devices = leases.holders.get(spec.replica_id, ()) if leases is not None else ()
        return Seen(
            replica_id=spec.replica_id,
            phase=keeper.state.phase,
            work_class=spec.work_class,
            devices=devices,
            stop_grace_s=spec.stop_grace_s,
            move_s=self._move_s(keeper) if devices else None,
            pinned=pinned(spec.env, spec.args, 1) is not None,
        )

    def _move_s(self, keeper: Keeper) -> float | None:
        """Return what suspending it and resuming it elsewhere takes; None: it cannot be done."""
        capability = self._around.suspender_of(self._engines[keeper.spec.engine]).probe()
        able = keeper.spec.sleep and capability.works and capability.moves
        if not able or Rung.SUSPENDED in keeper.observed.out:
            return None
        cost = keeper.turns.get(Rung.SUSPENDED)
        measured = cost is not None and cost.down_s > 0 and cost.up_s > 0
        return cost.down_s + cost.up_s if cost is not None and measured else MOVE_S

    def _wake_at(self, next_s: float | None, now_s: float) -> None:
        self.close()
        self._timer = None
        if next_s is not None:
            self._timer = self._around.clock.call_later(next_s - now_s, self._look)

    def _devices(self, gpus: Sequence[str]) -> frozenset[str]:
        leases = self._around.cards.leases
        if leases is None:
            raise RefusedNoticeError("this manager leases no GPUs; leave gpus out")
        found = [(name, leases.inventory.gpu(name)) for name in gpus]
        unknown = [name for name, gpu in found if gpu is None]
        if unknown or not found:
            known = ", ".join(gpu.device for gpu in leases.inventory.gpus)
            raise RefusedNoticeError(f"no GPU '{', '.join(unknown)}'; there are {known}")
        return frozenset(gpu.device for _, gpu in found if gpu is not None)

    def _read(self) -> None:
        try:
            kept = msgspec.json.decode(self._path.read_bytes(), type=_Kept)
        except FileNotFoundError:
            return
        except (OSError, msgspec.MsgspecError) as error:
            self._around.log.caution("reclaim_file", path=str(self._path), error=str(error))
            return
        if kept.boot_id != self._around.provider.boot_id:
            return
        self._memory = kept.memory
        ahead_s = self._around.clock.now_s() - self._around.clock.unix_s()
        for told_s, ends_s, cards in kept.notices:
            devices = None if cards is None else frozenset(cards)
            self._notices[devices] = Notice(told_s + ahead_s, ends_s + ahead_s, devices)

    def _write(self) -> None:
        ahead_s = self._around.clock.now_s() - self._around.clock.unix_s()
        kept = _Kept(
            self._around.provider.boot_id,
            [
                (n.told_s - ahead_s, n.ends_s - ahead_s, _sorted(n.devices))
                for n in self._notices.values()
            ],
            self._memory,
        )
        fresh = self._path.with_name(self._path.name + ".new")
        try:
            fresh.write_bytes(msgspec.json.encode(kept))
            os.replace(fresh, self._path)
        except OSError as error:  # it is done all the same; only a manager after this one forgets
            self._around.log.fault("reclaim_file", path=str(self._path), error=str(error))


def _sorted(devices: frozenset[str] | None) -> list[str] | None:
    return None if devices is None else sorted(devices)
