"""What the keepers ask of suspension and of snapshots, as protocols."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import msgspec


class Capability(msgspec.Struct, frozen=True):
    """Whether something works on this machine; `reason` says why not, and what would help."""

    works: bool
    reason: str = ""
    moves: bool = False  # of a suspender: it resumes on other cards of the same model, too


class SuspendError(Exception):
    """A process could not be suspended, or not be resumed; the text says what to do.

    `intact`: it is as it was before. Otherwise nobody knows, and only a new start helps.
    """

    def __init__(self, text: str, *, intact: bool) -> None:
        super().__init__(text)
        self.intact = intact


class SnapshotError(Exception):
    """A snapshot could not be made, or cannot be used; the text says why.

    `running`: the process that was to be dumped serves as before.
    """

    def __init__(self, text: str, *, running: bool = False) -> None:
        super().__init__(text)
        self.running = running


class Suspender(Protocol):
    """Moves what the processes of one replica hold on GPUs to host memory, and back.

    Both are level-triggered: what is suspended already, wholly or in part, may be asked again.
    """

    def probe(self) -> Capability: ...

    async def suspend(self, pid: int) -> int:
        """Suspend the tree of processes under `pid`; return the bytes that went to the host.

        Raises `SuspendError`.
        """

    async def resume(self, pid: int, devices: Mapping[str, str] | None = None) -> None:
        """Take it back, on other GPUs where `devices` names new UUIDs by the old.

        Raises `SuspendError`.
        """


class SnapshotKey(msgspec.Struct, frozen=True, kw_only=True):
    """What an image is an image of. One that differs in anything is stale."""

    pool: str
    model: str
    engine: str
    engine_version: str
    launch_hash: str  # of command, environment and adapters
    gpu: str = ""  # the model of its cards, and how many
    driver: str = ""
    host: str = ""  # kernel and CPU, as far as an image depends on them


class Progress(msgspec.Struct, frozen=True):
    """How far the making of an image is, or what came of it."""

    doing: str = ""  # empty: nothing is being done
    share: float = 0.0
    snapshot: str = ""  # the last that was made
    image_bytes: int = 0
    problem: str = ""  # why the last attempt came to nothing


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """An image on disk that has been verified at least once."""

    snapshot_id: str
    key: SnapshotKey
    folder: Path
    image_bytes: int
    made_at_s: float  # Unix time
    dump_s: float
    port: int  # where the engine listens in its cell
    suspended: bool  # the driver has to be asked to resume it
    nap_level: int = 0  # the engine's own sleep at the time of the dump; 0: it was awake
    devices: tuple[str, ...] = ()  # UUIDs of the cards that it ran on


class Enclosure(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be spawned so that an engine runs in a cell, and where it will answer."""

    argv: tuple[str, ...]
    host: str  # the cell's address, as this machine reaches it


class Snapshots(Protocol):
    """Images of warm replicas."""

    def probe(self) -> Capability: ...

    def enclose(self, launch_id: str, argv: Sequence[str]) -> Enclosure:
        """Return how to start `argv` so that it can be dumped. Raises `SnapshotError`."""

    def find(self, key: SnapshotKey) -> Snapshot | None:
        """Return an image that fits and is whole. Stale and damaged ones are told of, not used."""

    def images(self, pool: str) -> Sequence[Snapshot]:
        """Return all images of a pool that are whole as far as sizes tell, the newest first."""

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
        """Dump the cell of which `pid` is the init; its processes run on. Raises `SnapshotError`.

        `told` hears of progress: what is being done, and which share of it is done. The rest is
        kept with the image, and says how to bring its copies back to service.
        """

    def restore(self, snapshot: Snapshot, launch_id: str) -> Enclosure:
        """Return how to start a replica from an image. Raises `SnapshotError`."""

    async def restored(self, pid: int, launch_id: str) -> None:
        """Wait until the processes of the cell are back. Raises `SnapshotError`."""

    def discard(self, snapshot_id: str, reason: str) -> None:
        """Never find this image again, nor any manager after this one."""
