"""A machine on which nothing can be suspended, no image can be made, and no proxy reports.

What a manager is given where nobody gives it better, so that keepers ask one question everywhere:
does it work?
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from backends.snapshots.base import (
    Capability,
    Enclosure,
    Snapshot,
    SnapshotError,
    SnapshotKey,
    SuspendError,
)

_NOT_HERE = "not set up in this manager"


class NoSuspender:
    """Suspends nothing."""

    def probe(self) -> Capability:
        return Capability(works=False, reason=_NOT_HERE)

    async def suspend(self, pid: int) -> int:
        raise SuspendError(f"pid {pid} cannot be suspended: {_NOT_HERE}", intact=True)

    async def resume(self, pid: int, devices: Mapping[str, str] | None = None) -> None:
        raise SuspendError(f"pid {pid} cannot be resumed: {_NOT_HERE}", intact=True)


class NoSnapshots:
    """Has no images and makes none."""

    def probe(self) -> Capability:
        return Capability(works=False, reason=_NOT_HERE)

    def enclose(self, launch_id: str, argv: Sequence[str]) -> Enclosure:
        raise SnapshotError(_NOT_HERE, running=True)

    def find(self, key: SnapshotKey) -> Snapshot | None:
        return None

    def images(self, pool: str) -> Sequence[Snapshot]:
        return ()

    async def create(
        self,
        pid: int,
        key: SnapshotKey,
        port: int,
        told: Callable[[str, float], None],
        *,
        suspended: bool = False,
        nap_level: int = 0,
        devices: Sequence[str] = (),
    ) -> Snapshot:
        raise SnapshotError(_NOT_HERE, running=True)

    def restore(self, snapshot: Snapshot, launch_id: str) -> Enclosure:
        raise SnapshotError(_NOT_HERE)

    async def restored(self, pid: int, launch_id: str) -> None:
        raise SnapshotError(_NOT_HERE)

    def discard(self, snapshot_id: str, reason: str) -> None:
        return None


class NobodyTells:
    """No proxy says what it has on a replica."""

    def in_flight(self, replica_id: str) -> int | None:
        return None

    def expire(self, now_s: float) -> None:
        return None
