"""What this manager has started, on disk before it is started: no engine is ever forgotten.

A line of JSON is appended, and on the disk, before each step that a crash could hide. An intent
comes before the spawn and the process's identity after it; a manager that died between the two
finds its child by the launch id that the child carries in its environment. A pid alone identifies
nothing, because pids are used again: with the start time from `/proc/PID/stat` and the boot id it
does.

Whether an engine sleeps is here, too, before it is told and after it has done so: SGLang does not
say it, and dies of being told to take back what it holds. So is whether it is suspended, and which
cards it was resumed on.

Which adapters it has loaded is here as well: its own list has their names and not their weights.

The file is rewritten with what still lives at each start, and when it has grown. A torn last line
(the machine died while it was written) is what an append-only file may lose, and is skipped.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import msgspec

from backends.adapters import Loaded

JOURNAL_BYTES_MAX = 1024 * 1024
_MODE = 0o600


class Launch(msgspec.Struct, frozen=True, kw_only=True, tag="intent", tag_field="entry"):
    """One life of one replica: the intent, and what later entries added to it."""

    launch_id: str
    replica_id: str
    launch_hash: str
    engine: str
    model: str
    pool: str
    port: int
    stop_grace_s: float
    starts: int
    at_s: float
    pid: int = 0
    start_ticks: int = 0
    boot_id: str = ""
    ready: bool = False
    held: bool = False  # drained by an operator
    ports: dict[str, tuple[int, int]] = {}  # beside `port`, what for: the first, and how many
    engine_version: str = ""
    kv_source: tuple[str, str, str] | None = None  # endpoint, replay endpoint and topic
    rid_header: bool = False  # it takes a chat request's id from a field of the head
    priority_fields: tuple[str, ...] = ()  # of the head, by class
    nap_level: int | None = None  # how deep it sleeps; None: awake
    gpus: tuple[str, ...] = ()  # leased to it
    turning: bool = False  # between awake and asleep: what it has let go of is not known
    suspended: bool = False  # stands still; its cards are given back
    suspending: bool = False  # between standing still and running
    moving: bool = False  # and that on other cards than before
    host: str = "127.0.0.1"  # where this machine reaches it
    staged: bool = False  # being restored from an image, or made into one
    loras: Loaded = Loaded()
    image_of: str = ""  # what an image made of it would be an image of; empty: none can be made
    image: str = ""  # of its container; empty: it is a process of this machine
    gpus_wanted: int = 0  # where the cluster says which
    resources: dict[str, float] = {}  # beside these


class Started(msgspec.Struct, frozen=True, tag="started", tag_field="entry"):
    launch_id: str
    pid: int
    start_ticks: int
    boot_id: str


class Placed(msgspec.Struct, frozen=True, tag="placed", tag_field="entry"):
    """A cluster has found it a machine."""

    launch_id: str
    host: str
    kv_source: tuple[str, str, str] | None


class Ready(msgspec.Struct, frozen=True, tag="ready", tag_field="entry"):
    launch_id: str


class Held(msgspec.Struct, frozen=True, tag="held", tag_field="entry"):
    launch_id: str
    held: bool


class Nap(msgspec.Struct, frozen=True, tag="nap", tag_field="entry"):
    """It falls asleep or wakes (`turning`), or has done so."""

    launch_id: str
    level: int | None
    turning: bool


class Suspension(msgspec.Struct, frozen=True, tag="suspension", tag_field="entry"):
    """It is being suspended or resumed (`turning`), or has been."""

    launch_id: str
    suspended: bool
    turning: bool
    gpus: tuple[str, ...] | None = None  # those that it is resumed on; None: as before
    moving: bool = False  # these are others than it had


class Staged(msgspec.Struct, frozen=True, tag="staged", tag_field="entry"):
    """It is being made into an image, or that is over."""

    launch_id: str
    staged: bool


class Adapted(msgspec.Struct, frozen=True, tag="adapted", tag_field="entry"):
    """It is told to have other adapters (not `settled`), or has them."""

    launch_id: str
    loras: Loaded


class Ended(msgspec.Struct, frozen=True, tag="ended", tag_field="entry"):
    launch_id: str
    reason: str


_Fact = Started | Placed | Ready | Held | Nap | Suspension | Staged | Adapted
Entry = Launch | _Fact | Ended
_DECODER: msgspec.json.Decoder[Entry] = msgspec.json.Decoder(Entry)


class Journal:
    """The file, and the lives that it says have not ended."""

    def __init__(self, path: Path) -> None:
        """Read and compact the file at `path`. Raises `OSError`."""
        self._path = path
        content = path.read_bytes() if path.exists() else b""
        self.live, self.damaged_lines = replay(content.split(b"\n"))
        self._torn = False
        self._fd = -1
        self._compact()

    def append(self, entry: Entry) -> None:
        """Put `entry` on the disk. Raises `OSError`, and then nothing has changed."""
        line = msgspec.json.encode(entry) + b"\n"
        line = b"\n" + line if self._torn else line  # keep a half-written line to itself
        try:
            self._torn = os.write(self._fd, line) != len(line)
            os.fsync(self._fd)
        except OSError:
            self._torn = True
            raise
        if self._torn:
            raise OSError(f"{self._path}: only a part of an entry could be written; is it full?")
        apply(self.live, entry)
        self._size_bytes += len(line)
        if self._size_bytes > JOURNAL_BYTES_MAX:
            self._compact()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _compact(self) -> None:
        """Replace the file by one that holds the live entries; never is there half a file."""
        content = b"".join(msgspec.json.encode(launch) + b"\n" for launch in self.live.values())
        fresh = self._path.with_name(self._path.name + ".new")
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, _MODE)
        try:
            with open(fd, "wb", closefd=False) as file:
                file.write(content)
            os.fsync(fd)
            fresh.replace(self._path)
            _sync_folder(self._path.parent)
        finally:
            os.close(fd)
        self.close()
        self._fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        self._size_bytes = len(content)
        self._torn = False


def replay(lines: Iterable[bytes]) -> tuple[dict[str, Launch], int]:
    """Return the lives that have not ended, by launch id, and the number of unreadable lines."""
    live: dict[str, Launch] = {}
    damaged = 0
    for line in lines:
        if not line.strip():
            continue
        try:
            entry = _DECODER.decode(line)
        except msgspec.MsgspecError:
            damaged += 1
        else:
            apply(live, entry)
    return live, damaged


def apply(live: dict[str, Launch], entry: Entry) -> None:
    """Take one entry into `live`; an entry about an unknown life says nothing."""
    if isinstance(entry, Launch):
        live[entry.launch_id] = entry
        return
    launch = live.get(entry.launch_id)
    if launch is None:
        return
    if isinstance(entry, Ended):
        del live[entry.launch_id]
    else:
        live[entry.launch_id] = _with(launch, entry)


def _with(launch: Launch, entry: _Fact) -> Launch:
    changes: dict[str, object] = {}
    match entry:
        case Started(pid=pid, start_ticks=ticks, boot_id=boot_id):
            changes = {"pid": pid, "start_ticks": ticks, "boot_id": boot_id}
        case Placed(host=host, kv_source=kv_source):
            changes = {"host": host, "kv_source": kv_source}
        case Ready():
            changes = {"ready": True, "staged": False}
        case Staged(staged=staged):
            changes = {"staged": staged}
        case Held(held=held):
            changes = {"held": held}
        case Nap(level=level, turning=turning):
            changes = {"nap_level": level, "turning": turning}
        case Suspension(suspended=suspended, turning=turning, gpus=gpus, moving=moving):
            changes = {"suspended": suspended, "suspending": turning, "moving": moving}
            changes |= {} if gpus is None else {"gpus": gpus}
        case Adapted(loras=loras):
            changes = {"loras": loras}
    return msgspec.structs.replace(launch, **changes)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
