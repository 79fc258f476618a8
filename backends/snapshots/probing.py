"""Whether CRIU is here and can do what is asked of it on this machine, and else what is missing."""

from __future__ import annotations

import os
import random
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from backends.snapshots.base import Capability, SnapshotError
from backends.snapshots.cells import Cells

VARIABLE = "DOHERTY_CRIU"
# 3.17 fails on kernel 6.18 (vdso), 4.1 cannot dump a listening TCP socket from 6.16 on.
VERSION_MIN = (4, 2)
TIMEOUT_S = 20.0
_HIDDEN = Path("/dev/shm")  # noqa: S108  # a cell has its own there


class Found(NamedTuple):
    """CRIU on this machine; without `works` the rest may be empty."""

    capability: Capability
    argv: tuple[str, ...] = ()
    version: str = ""


def find_criu(environ: Mapping[str, str], folder: Path, *, tried: bool = True) -> Found:
    """Ask for everything in turn, the cheapest first.

    Not `tried`: only whether all is there, for who will find out at once whether it works.
    """
    named = environ.get(VARIABLE, "")
    argv = tuple(shlex.split(named)) or ("criu",)
    try:
        _ask_machine(argv, folder)
        version = _ask_version(argv)
        if tried:
            _ask_check(argv)
            _ask_cell()
    except SnapshotError as error:
        return Found(Capability(works=False, reason=str(error)))
    return Found(Capability(works=True, reason=f"CRIU {version}"), argv, version)


def _ask_machine(argv: Sequence[str], folder: Path) -> None:
    if os.geteuid() != 0:
        raise SnapshotError("snapshots need root: CRIU and cells are made of what only root may do")
    for tool, package in (("nsenter", "util-linux"), ("tar", "tar")):
        if shutil.which(tool) is None:
            raise SnapshotError(f"`{tool}` is not installed (package {package})")
    program = shutil.which(argv[0])
    if program is None:
        raise SnapshotError(
            f"`{argv[0]}` is not installed; deploy/criu.sh FOLDER fetches one, and "
            f"{VARIABLE}=FOLDER/criu names it"
        )
    for path in (Path(program).resolve(), folder.resolve()):
        if path.is_relative_to(_HIDDEN):
            raise SnapshotError(f"{path} is in {_HIDDEN}, of which every cell has its own")


def _ask_version(argv: Sequence[str]) -> str:
    said = _run((*argv, "--version"))
    match = re.search(r"Version: (\d+)\.(\d+)(\S*)", said.stdout)
    if match is None:
        raise SnapshotError(f"`{argv[0]} --version` does not answer: {_last(said)}")
    if (int(match[1]), int(match[2])) < VERSION_MIN:
        wanted = ".".join(map(str, VERSION_MIN))
        raise SnapshotError(
            f"CRIU {match[1]}.{match[2]} is too old, {wanted} is needed; deploy/criu.sh FOLDER "
            f"fetches one, and {VARIABLE}=FOLDER/criu names it"
        )
    return f"{match[1]}.{match[2]}{match[3]}"


def _ask_check(argv: Sequence[str]) -> None:
    said = _run((*argv, "check"))
    if said.returncode:
        raise SnapshotError(f"this kernel does not do for CRIU: {_last(said)}")


def _ask_cell() -> None:
    """Make a cell and let it end: namespaces, links and the filter of calls all work, or not."""
    with tempfile.TemporaryDirectory(prefix="doherty-cell-") as name:
        cells = Cells(Path(name), random.Random())  # noqa: S311  # no secret
        said = _run(cells.run("probe", ("true",)).argv)
    if said.returncode:
        raise SnapshotError(f"a cell cannot be made here: {_last(said)}")


def _run(argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Raises `SnapshotError`."""
    try:
        return subprocess.run(  # noqa: S603
            argv, capture_output=True, text=True, check=False, timeout=TIMEOUT_S,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SnapshotError(f"{argv[0]}: {error}") from error


def _last(said: subprocess.CompletedProcess[str]) -> str:
    lines = (said.stderr or said.stdout).strip().splitlines()
    return lines[-1] if lines else f"status {said.returncode}"
