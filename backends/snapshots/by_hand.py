"""Images made and restored without a manager: one cell, a child of ours that ends with us."""

from __future__ import annotations

import asyncio
import hashlib
import os
import platform
import signal
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from backends.logfile import last_lines, open_log
from backends.providers.base import LAUNCH_ID_VARIABLE
from backends.snapshots.base import Enclosure, Snapshot, SnapshotError, SnapshotKey
from backends.snapshots.criu import CriuSnapshots

_POLL_S = 0.01
_ANSWER_S_MAX = 5.0
_STOP_S_MAX = 10.0
_HEAD_BYTES_MAX = 4096


class Ask(NamedTuple):
    """How to tell that an engine serves."""

    port: int
    path: str
    timeout_s: float


class _Cell:
    """A cell that was started, and where its engine writes."""

    def __init__(self, process: asyncio.subprocess.Process, host: str, log_path: Path) -> None:
        self.process = process
        self.host = host
        self._log_path = log_path

    async def serves(self, ask: Ask) -> None:
        """Wait until the engine answers 200. Raises `SnapshotError` when it will not."""
        try:
            async with asyncio.timeout(ask.timeout_s):
                while not await _answers(self.host, ask):
                    if self.process.returncode is not None:
                        raise SnapshotError(f"it has ended: {self._last_words()}")
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            text = f"{ask.path} on port {ask.port} did not answer 200 within {ask.timeout_s:g} s"
            hint = "does it listen on all addresses (--host 0.0.0.0)?"
            raise SnapshotError(f"{text}; {hint} {self._last_words()}") from None

    def _last_words(self) -> str:
        return " / ".join(last_lines(self._log_path, 3)) or "it said nothing"


async def create(
    snapshots: CriuSnapshots,
    command: Sequence[str],
    ask: Ask,
    names: tuple[str, str],
    told: Callable[[str, float], None],
) -> tuple[Snapshot, float]:
    """Start `command`, dump it once it serves, and end it; return also how long it took to serve.

    `names` are those of the pool and the model. Raises `SnapshotError`.
    """
    launch_id = uuid.uuid4().hex
    begun_s = time.monotonic()
    key = SnapshotKey(
        pool=names[0],
        model=names[1],
        engine=Path(command[0]).name,
        engine_version="",
        launch_hash=hashlib.sha256("\0".join(command).encode()).hexdigest()[:16],
        host=platform.release(),
    )
    async with _started(snapshots.enclose(launch_id, command), launch_id) as cell:
        told("starting", 0.0)
        await cell.serves(ask)
        cold_s = time.monotonic() - begun_s
        return await snapshots.create(cell.process.pid, key, ask.port, told), cold_s


async def restore(
    snapshots: CriuSnapshots,
    snapshot: Snapshot,
    ask: Ask,
    told: Callable[[str, float], None],
    *,
    once: bool,
) -> int:
    """Start a copy and keep it until it ends or we are told to; `told` hears when it serves.

    Raises `SnapshotError`.
    """
    launch_id = uuid.uuid4().hex
    begun_s = time.monotonic()
    async with _started(snapshots.restore(snapshot, launch_id), launch_id) as cell:
        await snapshots.restored(cell.process.pid, launch_id)
        if snapshot.suspended or snapshot.nap_level:
            told(f"http://{cell.host}:{ask.port} (as it was dumped: suspended or asleep)", 0.0)
        else:
            await cell.serves(ask)
            told(f"http://{cell.host}:{ask.port}", time.monotonic() - begun_s)
        if once:
            return 0
        return await _until_ended(cell.process)


async def _until_ended(process: asyncio.subprocess.Process) -> int:
    """Wait for a signal (0) or the end of the process (1)."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    told, ended = asyncio.ensure_future(stop.wait()), asyncio.ensure_future(process.wait())
    await asyncio.wait((told, ended), return_when=asyncio.FIRST_COMPLETED)
    for one in (told, ended):
        one.cancel()
    return 0 if stop.is_set() else 1


@asynccontextmanager
async def _started(enclosure: Enclosure, launch_id: str) -> AsyncIterator[_Cell]:
    """Start a cell; it is gone at the end of the block."""
    with tempfile.TemporaryDirectory(prefix="doherty-snapshot-") as folder:
        log_path = Path(folder, "engine.log")
        log = open_log(log_path)
        process = await asyncio.create_subprocess_exec(
            *enclosure.argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, LAUNCH_ID_VARIABLE: launch_id},
            start_new_session=True,
        )
        os.close(log)
        try:
            yield _Cell(process, enclosure.host, log_path)
        finally:
            await _end(process)


async def _end(process: asyncio.subprocess.Process) -> None:
    with suppress(ProcessLookupError):
        process.terminate()
    try:
        async with asyncio.timeout(_STOP_S_MAX):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


async def _answers(host: str, ask: Ask) -> bool:
    """Say whether a GET is answered 200."""
    try:
        async with asyncio.timeout(_ANSWER_S_MAX):
            reader, writer = await asyncio.open_connection(host, ask.port)
            try:
                head = f"GET {ask.path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
                writer.write(head.encode())
                return (await reader.read(_HEAD_BYTES_MAX)).startswith(b"HTTP/1.1 200")
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return False
