"""The cells of this machine as their manager sees them: names, addresses, states, processes.

A cell's address is drawn out of 4,096 pairs of loopback's. Its link has the same number in its
name, and the kernel gives a name once: of two managers that draw the same, one cell ends at once
and its replica is started anew.
"""

from __future__ import annotations

import json
import os
import random
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from ipaddress import ip_address, ip_network
from pathlib import Path

import msgspec

from backends.snapshots.base import Enclosure, SnapshotError
from backends.snapshots.cell import ADDRESSES
from backends.snapshots.manifest import CellFacts
from backends.snapshots.tree import alive, children, members, resident_bytes

PAIRS = ip_network(ADDRESSES).num_addresses // 2
LINK_PREFIX = "dohcell"
_FIRST = int(ip_network(ADDRESSES).network_address)
_LINKS = Path("/sys/class/net")
_PROC = Path("/proc")
_GIVEN_S = 60.0  # an address is ours that long before its link must be there
_STATE_AGE_S_MIN = 60.0  # somebody may still want to know why it failed


class CellState(msgspec.Struct, frozen=True):
    """What a cell tells: running, restoring or failed; "" before it tells anything."""

    state: str = ""
    reason: str = ""
    engine: int = 0
    keeper: int = 0


class Cells:
    """Numbers and states of cells; states are files in `folder`, one for each launch."""

    def __init__(self, folder: Path, draw: random.Random) -> None:
        self._folder = folder
        self._draw = draw
        self._given: dict[int, float] = {}  # numbers of cells that are not up yet

    def open(self) -> None:
        """Make the folder, and remove what dead cells have left there. Raises `SnapshotError`."""
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._sweep()
        except OSError as error:
            raise SnapshotError(f"{self._folder}: {error.strerror}", running=True) from error

    def run(self, launch_id: str, argv: Sequence[str]) -> Enclosure:
        """Return how to start `argv` in a cell. Raises `SnapshotError`."""
        return self._enclosure("run", launch_id, ("--", *argv))

    def restore(self, launch_id: str, image: Path, criu: Sequence[str]) -> Enclosure:
        """Return how to start a cell out of an image. Raises `SnapshotError`."""
        words = ("--image", str(image), "--criu", shlex.join(criu))
        return self._enclosure("restore", launch_id, words)

    def state(self, launch_id: str) -> CellState:
        """Return what the cell of a launch has told last."""
        return read_state(self._path(launch_id))

    def forget(self, launch_id: str) -> None:
        """Remove what a cell has left behind."""
        with suppress(OSError):
            self._path(launch_id).unlink()

    def _sweep(self) -> None:
        """Remove the states of cells that are gone: those that were killed leave theirs behind."""
        for path in self._folder.iterdir():
            with suppress(OSError):
                young = path.stat().st_mtime > time.time() - _STATE_AGE_S_MIN
                if not young and not _keeps(read_state(path).keeper, path):
                    path.unlink()

    def _path(self, launch_id: str) -> Path:
        return self._folder / f"{launch_id}.json"

    def _enclosure(self, role: str, launch_id: str, words: Sequence[str]) -> Enclosure:
        number = self._number()
        peer, host = addresses(number)
        argv = (
            *(sys.executable, "-m", "backends.snapshots.cell", role),
            *("--state", str(self._path(launch_id)), "--link", f"{LINK_PREFIX}{number}"),
            *("--host", host, "--peer", peer, *words),
        )
        return Enclosure(argv=argv, host=host)

    def _number(self) -> int:
        """Draw a number that is not in use. Raises `SnapshotError`."""
        now_s = time.monotonic()
        self._given = {n: at_s for n, at_s in self._given.items() if now_s - at_s < _GIVEN_S}
        taken = self._given.keys() | in_use()
        if len(taken) >= PAIRS // 2:
            raise SnapshotError(f"{len(taken)} cells are up on this machine, and more are not made")
        while (number := self._draw.randrange(PAIRS)) in taken:
            pass
        self._given[number] = now_s
        return number


class Inside:
    """The processes of a cell, by the pids of this machine; `engine` by that of the cell."""

    def __init__(self, init: int, engine: int, engine_pid: int) -> None:
        self.init = init
        self.engine = engine
        self._engine_pid = engine_pid

    def lives(self) -> bool:
        """Say whether the engine is there."""
        return alive(self._engine_pid)

    def facts(self) -> CellFacts:
        """Return what a copy must know."""
        names = {os.readlink(_PROC / str(self._engine_pid) / "fd" / fd) for fd in ("1", "2")}
        # CRIU's names: of a file the path from the root on, of a pipe what its link says.
        outputs = tuple(sorted(n.removeprefix("/") for n in names if n != os.devnull))
        return CellFacts(self.engine, outputs)

    def resident_bytes(self) -> int:
        """Return the memory of the engine's own process and its children, roughly."""
        return resident_bytes(member.pid for member in members(self._engine_pid))


def inside(pid: int) -> Inside:
    """Return what is in the cell of which `pid` is the keeper. Raises `SnapshotError`."""
    try:
        state = read_state(_state_path(pid))
        init = children(pid)[0]
        engine_pid = next(one for one in children(init) if _pid_inside(one) == state.engine)
    except (ValueError, IndexError, StopIteration):
        text = f"process {pid} is no cell with an engine in it, so it cannot be dumped"
        raise SnapshotError(text, running=alive(pid)) from None
    strays = [_name(one) for one in children(init) if one != engine_pid]
    if strays:
        text = f"the engine has left processes on their own, which would be lost: {strays[:5]}"
        raise SnapshotError(text, running=True)
    return Inside(init, state.engine, engine_pid)


def addresses(number: int) -> tuple[str, str]:
    """Return this machine's address on the link of a cell, and the cell's."""
    first = _FIRST + 2 * number
    return str(ip_address(first)), str(ip_address(first + 1))


def in_use() -> set[int]:
    """Return the numbers of the cells that are up on this machine."""
    names = [name.removeprefix(LINK_PREFIX) for name in os.listdir(_LINKS) if LINK_PREFIX in name]
    return {int(name) for name in names if name.isdecimal()}


def read_state(path: Path) -> CellState:
    """Return what a cell has written; an empty one before it has."""
    try:
        return msgspec.convert(json.loads(path.read_bytes()), CellState)
    except (OSError, ValueError, msgspec.ValidationError):
        return CellState()


def _state_path(pid: int) -> Path:
    """Return where the cell that `pid` keeps tells its state. Raises `ValueError` if it is none."""
    words: list[bytes] = []
    with suppress(OSError):
        words = (_PROC / str(pid) / "cmdline").read_bytes().split(b"\0")
    return Path(words[words.index(b"--state") + 1].decode())


def _keeps(pid: int, state: Path) -> bool:
    try:
        return alive(pid) and _state_path(pid) == state
    except (ValueError, IndexError):
        return False


def _name(pid: int) -> str:
    with suppress(OSError):
        return (_PROC / str(pid) / "comm").read_text("utf-8", "replace").strip()
    return "gone"


def _pid_inside(pid: int) -> int:
    """Return the pid of a process in its innermost namespace."""
    with suppress(OSError, ValueError, StopIteration):
        lines = (_PROC / str(pid) / "status").read_text("utf-8", "replace").splitlines()
        return int(next(line for line in lines if line.startswith("NSpid:")).split()[-1])
    return 0
