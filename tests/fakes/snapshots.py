"""Images that a test holds in its hand: no cell, no dump, no disk."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

from backends.snapshots.base import Capability, Enclosure, Snapshot, SnapshotKey

CELL = "169.254.7.2"
COPY = "169.254.7.6"


class FakeSnapshots:
    """Remembers what it was asked; raises what the test says; waits while `free` is not set."""

    def __init__(self) -> None:
        self.capability = Capability(works=True)
        self.image: Snapshot | None = None
        self.asked: list[str] = []
        self.states: list[tuple[bool, int, tuple[str, ...]]] = []  # suspended, level, cards
        self.failures: dict[str, Exception] = {}  # by what is asked
        self.free = asyncio.Event()
        self.free.set()

    def probe(self) -> Capability:
        return self.capability

    def enclose(self, launch_id: str, argv: Sequence[str]) -> Enclosure:
        self._do("enclose")
        return Enclosure(argv=("cell", "run", *argv), host=CELL)

    def find(self, key: SnapshotKey) -> Snapshot | None:
        self.asked.append("find")
        return self.image if self.image is not None and self.image.key == key else None

    def images(self, pool: str) -> Sequence[Snapshot]:
        return [self.image] if self.image is not None and self.image.key.pool == pool else []

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
        told("dumping", 0.0)
        told("dumping", 0.5)
        self.states.append((suspended, nap_level, tuple(devices)))
        self.asked.append("create")
        await self.free.wait()
        if "create" in self.failures:
            raise self.failures["create"]
        count = self.asked.count("create")
        self.image = Snapshot(
            snapshot_id=f"image-{count}",
            key=key,
            folder=Path("/images"),
            image_bytes=100,
            made_at_s=1.0,
            dump_s=1.0,
            port=port,
            suspended=suspended,
            nap_level=nap_level,
            devices=tuple(devices),
        )
        return self.image

    def restore(self, snapshot: Snapshot, launch_id: str) -> Enclosure:
        self._do("restore")
        return Enclosure(argv=("cell", "restore", snapshot.snapshot_id), host=COPY)

    async def restored(self, pid: int, launch_id: str) -> None:
        self.asked.append("restored")
        await self.free.wait()
        if "restored" in self.failures:
            raise self.failures["restored"]

    def discard(self, snapshot_id: str, reason: str) -> None:
        self.asked.append("discard")
        if self.image is not None and self.image.snapshot_id == snapshot_id:
            self.image = None

    def _do(self, word: str) -> None:
        self.asked.append(word)
        if word in self.failures:
            raise self.failures[word]
