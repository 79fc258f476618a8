"""Images of warm replicas on disk, by CRIU: dumped out of a cell, restored into new ones.

CRIU is run inside the cell's namespaces, where nothing of them is to be dumped: processes, memory,
files and sockets only. Connections are kept (`--tcp-established`): those between an engine's own
processes go on in the copy. Those to the outside are to addresses that are the copy's own loopback,
so the first packet of it finds nobody there, and they end. The original runs on after a dump, and
after one that failed.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from backends.snapshots import cells, manifest, whole
from backends.snapshots.asking import Asking
from backends.snapshots.base import (
    Capability,
    Enclosure,
    Snapshot,
    SnapshotError,
    SnapshotKey,
)
from backends.snapshots.cell import SHM_ARCHIVE, errors_in
from backends.snapshots.probing import Found, find_criu
from backends.snapshots.store import Store, secure
from backends.snapshots.tree import alive

DUMP_S_MAX = 600.0
POLL_S = 0.02
_SCRIPT = """#!/bin/sh
# CRIU runs this at its stages. At the end of a dump, while everything stands still, the cell's
# shared memory is kept; before a copy is let go, all of its image must have been found whole.
case $CRTOOLS_SCRIPT_ACTION in
post-dump) exec tar -C /dev/shm --exclude=./.cell -cf "$CRTOOLS_IMAGE_DIR/%s" . 2>/dev/null ;;
post-restore) read -r verdict <"$DOHERTY_VERDICT" && [ "$verdict" = whole ] ;;
esac
"""
# What is CRIU's own report, and no part of an image.
_REPORTS = ("dump.log", "stats-dump")


class CriuSnapshots:
    """`Snapshots` in one folder of this machine: `images` and the state of `cells`."""

    def __init__(
        self,
        folder: Path,
        environ: Mapping[str, str] = os.environ,
        *,
        bytes_max: int = 0,
        tell: Callable[..., None] = lambda *_, **__: None,
    ) -> None:
        self._folder = folder.absolute()
        self._bytes_max = bytes_max
        self._environ = environ
        self.store = Store(self._folder / "images", tell)
        self._cells = cells.Cells(self._folder / "cells", random.Random())  # noqa: S311  # no secret
        self._asking = Asking(
            lambda: find_criu(self._environ, self._folder), lambda found: found.capability.works
        )
        self._wanted: dict[str, SnapshotKey] = {}  # by pool; as bounded as pools are
        self._restoring: dict[str, str] = {}  # launch id to the image it comes from

    def probe(self) -> Capability:
        """Return whether images can be made here; the first answer takes a second."""
        return self._asking.answer().capability

    def enclose(self, launch_id: str, argv: Sequence[str]) -> Enclosure:
        self._ready()
        return self._cells.run(launch_id, argv)

    def find(self, key: SnapshotKey) -> Snapshot | None:
        self._wanted[key.pool] = key
        if not self.probe().works:
            return None
        with suppress(SnapshotError):
            self.store.open()
            return self.store.find(key)
        return None

    def images(self, pool: str) -> Sequence[Snapshot]:
        with suppress(SnapshotError):
            self.store.open()
            return self.store.of_pool(pool)
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
        """Dump the cell of which `pid` is the keeper; its processes run on.

        The rest is the state that the engine was brought to, and that its copies come back in.
        Raises `SnapshotError`.
        """
        self._ready()
        inside = cells.inside(pid)
        snapshot_id = uuid.uuid4().hex[:12]
        try:
            folder, lock = self.store.begin(snapshot_id)
        except OSError as error:
            raise SnapshotError(f"{self.store.folder}: {error.strerror}", running=True) from error
        try:
            begun_s = time.monotonic()
            await self._dump(folder, inside, told)
            dump_s = time.monotonic() - begun_s
            told("securing", 0.0)
            made = manifest.Manifest(
                format=manifest.FORMAT,
                snapshot_id=snapshot_id,
                key=key,
                made_at_s=time.time(),
                dump_s=dump_s,
                port=port,
                suspended=suspended,
                nap_level=nap_level,
                devices=tuple(devices),
                criu_version=self._asking.answer().version,
                cell=inside.facts(),
                files=(),
            )
            made, final = await asyncio.to_thread(self._publish, folder, made)
        except OSError as error:
            raise SnapshotError(f"the image could not be written: {error}", running=True) from error
        finally:
            await asyncio.to_thread(_leave, folder, lock)
        told("done", 1.0)
        self._wanted[key.pool] = key
        await asyncio.to_thread(self.prune)
        return made.snapshot(final)

    def restore(self, snapshot: Snapshot, launch_id: str) -> Enclosure:
        # Where nobody has asked yet whether it works here, this start will tell.
        found = self._asking.known or find_criu(self._environ, self._folder, tried=False)
        self._ready(found)
        held = self.store.look(snapshot.snapshot_id)
        if held.problem:
            raise SnapshotError(f"image {snapshot.snapshot_id} is damaged: {held.problem}")
        if len(self._restoring) > 1000:  # of launches that nobody waited for
            self._restoring.clear()
        self._restoring[launch_id] = snapshot.snapshot_id
        return self._cells.restore(launch_id, snapshot.folder, found.argv)

    async def restored(self, pid: int, launch_id: str) -> None:
        """Wait until the cell runs. What it finds damaged is never found again.

        Raises `SnapshotError`.
        """
        name = self._restoring.pop(launch_id, "")
        while True:
            state = self._cells.state(launch_id)
            if state.state == "running":
                return
            if state.state == "failed":
                self._cells.forget(launch_id)
                if state.reason.startswith("damaged: ") and name:
                    self.store.mark(name, state.reason.removeprefix("damaged: "))
                raise SnapshotError(f"image {name or 'unknown'}: {state.reason}")
            if not alive(pid):
                raise SnapshotError(f"image {name or 'unknown'}: the cell has ended; see its log")
            await asyncio.sleep(POLL_S)

    def discard(self, snapshot_id: str, reason: str) -> None:
        self.store.mark(snapshot_id, reason)

    def prune(
        self, wanted: Iterable[SnapshotKey] = (), bytes_max: int | None = None
    ) -> dict[str, str]:
        """Remove what is of no use or beyond the bound; return what went, and why."""
        keys = [*self._wanted.values(), *wanted]
        return self.store.prune(keys, self._bytes_max if bytes_max is None else bytes_max)

    def _ready(self, found: Found | None = None) -> None:
        """Raises `SnapshotError` when nothing can be made here."""
        found = found or self._asking.answer()
        if not found.capability.works:
            raise SnapshotError(found.capability.reason, running=True)
        self.store.open()
        self._cells.open()

    async def _dump(
        self, folder: Path, inside: cells.Inside, told: Callable[[str, float], None]
    ) -> None:
        script = folder / "script"
        script.write_text(_SCRIPT % SHM_ARCHIVE)
        script.chmod(0o700)
        enter = ("nsenter", "-t", str(inside.init), "--pid", "--mount", "--net", "--time")
        process = await asyncio.create_subprocess_exec(
            *(*enter, "--", *self._asking.answer().argv, "dump"),
            *("--tree", str(inside.engine), "--images-dir", str(folder), "--leave-running"),
            *("--log-file", "dump.log", "-v2", "--action-script", str(script)),
            *("--tcp-established", "--ext-unix-sk", "--file-locks", "--link-remap"),
            *("--manage-cgroups=ignore", "--network-lock", "skip", "--ghost-limit", "512M"),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            async with asyncio.timeout(DUMP_S_MAX):
                await _watched(process, folder, inside.resident_bytes(), told)
        except BaseException as error:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
            if isinstance(error, TimeoutError):
                # CRIU was killed inside the processes, so how they are is not known.
                text = f"the dump took longer than {DUMP_S_MAX:g} s"
                raise SnapshotError(text) from error
            raise
        if process.returncode:
            raise SnapshotError(why_not(folder / "dump.log"), running=inside.lives())

    def _publish(self, folder: Path, made: manifest.Manifest) -> tuple[manifest.Manifest, Path]:
        """Complete the manifest and have the image under its name. Raises `OSError`."""
        for name in _REPORTS:
            (folder / name).unlink(missing_ok=True)
        secure(folder)
        paths = sorted(folder.iterdir())
        hashes = whole.hash_files(paths)
        files = tuple(
            manifest.File(path.name, path.stat().st_size, tuple(hashes[path.name]))
            for path in paths
        )
        made = manifest.with_files(made, files)
        return made, self.store.publish(folder, made)


def _leave(folder: Path, lock: int) -> None:
    """Remove what was not published, which has another name then, and only then unlock it.

    It may be as large as the memory of a card.
    """
    try:
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


async def _watched(
    process: asyncio.subprocess.Process,
    folder: Path,
    resident_bytes: int,
    told: Callable[[str, float], None],
) -> None:
    """Wait for the end of a dump, and say how far it is: what is written of what is resident."""
    while process.returncode is None:
        with suppress(TimeoutError):
            async with asyncio.timeout(0.2):
                await process.wait()
        told("dumping", min(1.0, _bytes_in(folder) / max(1, resident_bytes)))


def _bytes_in(folder: Path) -> int:
    with suppress(OSError):
        return sum(path.stat().st_size for path in folder.iterdir())
    return 0


def why_not(log: Path) -> str:
    """Return what CRIU says of a failed dump, and what helps where that is known."""
    try:
        lines = errors_in(log.read_text("utf-8", "replace"))
    except OSError:
        lines = []
    text = " / ".join(line.partition("): ")[2] or line for line in lines[:3])
    if "No space left" in text:
        return f"the disk is full: {text}"
    if "io_uring" in text:
        return f"the engine has an io_uring open that it did not make in its cell: {text}"
    if "nvidia" in text:
        return f"the engine still holds a GPU; suspend it first: {text}"
    return f"CRIU could not dump it: {text or 'it did not say why'}"
