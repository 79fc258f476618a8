"""Images on disk: published whole or not at all, found by what they are images of, and pruned.

An image holds the memory and the environment of an engine, with whatever secrets are in them. The
folder is 0700 and its files 0600, and one that others can look into is refused, not repaired: who
has looked already cannot be known.

`find` reads the manifest and the sizes only; every byte is read when an image is restored, before
anything of it runs (`whole`), because reading it twice would cost what a snapshot is to save. What
is found damaged there, or of no use, is marked and never found again, by later managers neither:
what is found is the one before it. A mark that the disk does not take is kept in memory.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import msgspec

from backends.snapshots import manifest, whole
from backends.snapshots.base import Snapshot, SnapshotError, SnapshotKey

KEPT_OF_KEY = 2  # the newest, and one for the moment when it turns out to be damaged
_NEW = ".new-"
_DAMAGED = "damaged"
MARKED_MAX = 256  # remembered here; the oldest goes
_MODE, _FILE_MODE = 0o700, 0o600


class Held(msgspec.Struct, frozen=True):
    """What is in the folder under one name; `problem` says why it cannot be used."""

    name: str
    manifest: manifest.Manifest | None
    problem: str = ""


class Store:
    """The folder of images."""

    def __init__(self, folder: Path, tell: Callable[..., None] = lambda *_, **__: None) -> None:
        self.folder = folder
        self._tell = tell
        self._told: set[tuple[str, str]] = set()
        self._marked: dict[str, str] = {}  # names of images to what is wrong with them

    def open(self) -> None:
        """Make the folder. Raises `SnapshotError` when others can look into it."""
        try:
            self.folder.mkdir(mode=_MODE, parents=True, exist_ok=True)
            found = self.folder.stat()
        except OSError as error:
            raise SnapshotError(f"{self.folder}: {error.strerror}", running=True) from error
        if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
            raise SnapshotError(
                f"{self.folder} is open to others, and images hold memory with secrets in it: "
                "remove what is in it and `chmod 700` it, or name another folder",
                running=True,
            )

    def held(self) -> list[Held]:
        """Return what is there, newest first; what cannot be read comes last."""
        try:
            names = [path.name for path in self.folder.iterdir() if not path.name.startswith(".")]
        except OSError:
            return []
        found = [self.look(name) for name in names]
        return sorted(found, key=lambda held: -held.manifest.made_at_s if held.manifest else 0.0)

    def look(self, name: str) -> Held:
        """Return one image; sizes are looked at, bytes are not."""
        folder = self.folder / name
        if not folder.is_dir():
            return Held(name, None, f"there is no such image in {self.folder}")
        try:
            known = manifest.read((folder / manifest.NAME).read_bytes())
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            words = error.strerror if isinstance(error, OSError) else str(error)
            return Held(name, None, f"{manifest.NAME}: {words}")
        if problem := self._mark_of(name):
            return Held(name, known, problem)
        for file in known.files:
            problem = whole.odd_size(folder / file.name, file.bytes)
            if problem:
                return Held(name, known, problem)
        return Held(name, known)

    def find(self, key: SnapshotKey) -> Snapshot | None:
        """Return the newest image that fits; those that do not are told of, each once."""
        for held in self.held():
            if held.problem:
                self._tell_once("snapshot_damaged", held.name, held.problem)
            elif held.manifest is not None and held.manifest.key.pool == key.pool:
                stale = manifest.difference(held.manifest.key, key)
                if not stale:
                    return held.manifest.snapshot(self.folder / held.name)
                self._tell_once("snapshot_stale", held.name, stale)
        return None

    def of_pool(self, pool: str) -> list[Snapshot]:
        """Return the images of a pool of which nothing is known to be wrong, the newest first."""
        return [
            held.manifest.snapshot(self.folder / held.name)
            for held in self.held()
            if held.manifest is not None and held.manifest.key.pool == pool and not held.problem
        ]

    def verify(self, name: str) -> str:
        """Read every byte; return what is wrong, "" when nothing is, and mark it."""
        held = self.look(name)
        problem = held.problem or whole.first_problem(self.folder / name)
        if problem and held.manifest is not None:
            self.mark(name, problem)
        return problem

    def mark(self, name: str, problem: str) -> None:
        """Note what is wrong with an image, so that it is never found again. The first note stays.

        It is there whole or not at all. It is not waited for until the disk has it: what a loss of
        power takes of it costs one more failed restore.
        """
        problem = self._mark_of(name) or problem
        self._marked.pop(name, None)
        self._marked[name] = problem
        if len(self._marked) > MARKED_MAX:
            del self._marked[next(iter(self._marked))]
        new = self.folder / name / (_DAMAGED + ".new")
        with suppress(OSError):
            new.touch(_FILE_MODE)
            new.write_text(problem)
            new.replace(new.with_name(_DAMAGED))

    def _mark_of(self, name: str) -> str:
        """Return what was noted of an image; "" when nothing was."""
        with suppress(OSError):
            noted = (self.folder / name / _DAMAGED).read_text("utf-8", "replace")
            return noted or "it is marked as damaged"
        return self._marked.get(name, "")

    def begin(self, snapshot_id: str) -> tuple[Path, int]:
        """Return a folder to write to, and the lock that keeps it from being swept away.

        Raises `OSError`.
        """
        folder = self.folder / (_NEW + snapshot_id)
        folder.mkdir(mode=_MODE)
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(lock, fcntl.LOCK_EX)
        return folder, lock

    def publish(self, folder: Path, made: manifest.Manifest) -> Path:
        """Have it under its final name, all on the disk. Raises `OSError`."""
        _write(folder / manifest.NAME, manifest.sealed(made))
        _sync(folder)
        final = self.folder / made.snapshot_id
        folder.rename(final)
        _sync(self.folder)
        return final

    def prune(
        self, wanted: Iterable[SnapshotKey] = (), bytes_max: int = 0, kept: int = KEPT_OF_KEY
    ) -> dict[str, str]:
        """Remove what is of no use; return what went, and why. One in use stays."""
        held = self.held()
        gone = doomed(held, {key.pool: key for key in wanted}, bytes_max, kept)
        removed = {name: why for name, why in gone.items() if self._remove(self.folder / name)}
        with suppress(OSError):
            for folder in self.folder.glob(_NEW + "*"):
                if self._remove(folder, folder):
                    removed[folder.name] = "never finished"
        return removed

    def _remove(self, folder: Path, lock_path: Path | None = None) -> bool:
        """Remove a folder unless somebody uses it."""
        try:
            lock = os.open(lock_path or folder / manifest.NAME, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            lock = -1
        try:
            if lock >= 0:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The manifest goes first: half an image is never taken for one.
            (folder / manifest.NAME).unlink(missing_ok=True)
            shutil.rmtree(folder)
        except OSError:
            return False
        finally:
            if lock >= 0:
                os.close(lock)
        return True

    def _tell_once(self, event: str, name: str, why: str) -> None:
        if (name, why) not in self._told:
            if len(self._told) >= 1000:
                self._told.clear()
            self._told.add((name, why))
            self._tell(event, snapshot=name, reason=why)


def doomed(
    held: Iterable[Held], wanted: Mapping[str, SnapshotKey], bytes_max: int, kept: int
) -> dict[str, str]:
    """Return which images go, and why; `held` is newest first, `wanted` by pool.

    Useless ones go, then those beyond `kept` of a key; then, until `bytes_max` (0: no bound) holds,
    the stale before the old. The bound is kept even if it takes the last.
    """
    gone: dict[str, str] = {}
    rest: list[tuple[bool, Held, manifest.Manifest]] = []
    counts: dict[SnapshotKey, int] = {}
    for one in held:
        if one.problem or one.manifest is None:
            gone[one.name] = one.problem
            continue
        key = one.manifest.key
        counts[key] = counts.get(key, 0) + 1
        if counts[key] > kept:
            gone[one.name] = f"there are {kept} newer ones"
            continue
        stale = key.pool in wanted and wanted[key.pool] != key
        rest.append((stale, one, one.manifest))
    total = sum(made.image_bytes for _, _, made in rest)
    rest.sort(key=lambda item: (not item[0], item[2].made_at_s))
    for stale, one, made in rest:
        if not bytes_max or total <= bytes_max:
            break
        total -= made.image_bytes
        gone[one.name] = "stale, and room is wanted" if stale else "room is wanted"
    return gone


def secure(folder: Path) -> None:
    """Take from others what CRIU gave them (0644), and have every file on the disk.

    Raises `OSError`.
    """
    for path in folder.iterdir():
        path.chmod(_MODE if path.stat().st_mode & 0o100 else _FILE_MODE)
        _sync(path)


def _write(path: Path, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, _FILE_MODE)
    with open(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(fd)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
