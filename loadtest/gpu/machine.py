"""What a figure was measured on: GPUs, driver, versions of everything that took part.

The versions are those of the interpreter that runs the engine, which need not be ours: they are
asked of it, with the engine's own path.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Collection, Iterable
from datetime import UTC, datetime
from pathlib import Path

import msgspec

PACKAGES = ("vllm", "sglang", "torch", "transformers")
OWN_PACKAGES = ("torch", "triton", "transformers", "flashinfer-python", "sglang-kernel", "doherty")
QUERY_TIMEOUT_S = 20.0
NO_GPU = "no GPU"

_ASK = (
    "import importlib.metadata as m, sys\n"
    "print('python', sys.version.split()[0])\n"
    "for name in sys.argv[1:]:\n"
    "    try: print(name, m.version(name))\n"
    "    except m.PackageNotFoundError: pass\n"
)


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """One card, as `nvidia-smi` tells of it."""

    index: int
    name: str
    memory_mib: int
    used_mib: int
    driver: str


def read_gpus(listing: str) -> list[Gpu]:
    """Read `nvidia-smi --query-gpu=index,name,memory.total,memory.used,driver_version` (CSV)."""
    found = []
    for line in listing.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != 5 or not all(cells[at].isdecimal() for at in (0, 2, 3)):
            continue  # a card that is lost is told in other words
        index, name, memory, used, driver = cells
        found.append(
            Gpu(
                index=int(index),
                name=name,
                memory_mib=int(memory),
                used_mib=int(used),
                driver=driver,
            )
        )
    return found


def gpus() -> list[Gpu]:
    """Return the cards that may be used here; none where there is no `nvidia-smi`."""
    fields = "index,name,memory.total,memory.used,driver_version"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        ran = subprocess.run(  # noqa: S603 - fixed words
            command, capture_output=True, text=True, check=False, timeout=QUERY_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    ours = {int(index) for index in visible if index.isdecimal()}
    return [gpu for gpu in read_gpus(ran.stdout) if not ours or gpu.index in ours]


def named(selection: str) -> frozenset[int]:
    """Return the cards that a manager's `gpus` names by index (`0,2-3`); none for other names."""
    found: set[int] = set()
    for word in selection.split(","):
        first, _, last = word.strip().partition("-")
        if not first.isdecimal() or not (last or first).isdecimal():
            return frozenset()
        found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)


def used_mib(only: Collection[int] = ()) -> int | None:
    """Return the GPU memory in use, over all cards or `only` these; None without any.

    Other cards may be another's, who takes and frees memory while we look.
    """
    found = [gpu for gpu in gpus() if not only or gpu.index in only]
    return sum(gpu.used_mib for gpu in found) if found else None


def described(cards: list[Gpu]) -> str:
    """Return the cards in a line: `2 x NVIDIA H200, 143771 MiB each, driver 580.1`."""
    if not cards:
        return NO_GPU
    kinds = Counter((card.name, card.memory_mib) for card in cards)
    texts = [f"{count} x {name}, {mib} MiB each" for (name, mib), count in kinds.items()]
    return f"{'; '.join(texts)}; driver {cards[0].driver}"


def interpreters(engine: str, pid: int = 0) -> list[str]:
    """Return the interpreters that may be the engine's: its program's first line, its process."""
    found = []
    if (program := shutil.which(engine)) is not None:
        first = Path(program).read_bytes()[:1024].partition(b"\n")[0].decode("utf-8", "replace")
        if first.startswith("#!") and "python" in first:
            found.append(first[2:].split()[-1])
    if pid:
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace").split("\0")
            found += [words[0], str(Path(f"/proc/{pid}/exe").readlink())]
    return [path for path in found if Path(path).name.startswith("python") and Path(path).is_file()]


def versions(engine: str, pid: int) -> dict[str, str]:
    """Return the versions that the interpreter of the engine imports; empty: not told."""
    told: dict[str, str] = {}
    for python in interpreters(engine, pid):
        command = [python, "-c", _ASK, *PACKAGES]
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            ran = subprocess.run(  # noqa: S603 - the interpreter of what we started
                command, capture_output=True, text=True, check=False, timeout=QUERY_TIMEOUT_S
            )
            told = dict(line.split(" ", 1) for line in ran.stdout.splitlines() if " " in line)
            if engine in told:
                return told
    return told


def proxy_kind(pids: Iterable[int]) -> str:
    """Say whether one of these processes runs the translation of the data path."""
    for pid in pids:
        with contextlib.suppress(OSError):
            if "__mypyc." in Path(f"/proc/{pid}/maps").read_text("utf-8", "replace"):
                return "as machine code"
    return "from the sources"


def own_version() -> str:
    """Return Doherty's version, and the commit where it is known."""
    try:
        found = importlib.metadata.version("doherty")
    except importlib.metadata.PackageNotFoundError:
        text = _read(Path("pyproject.toml"))
        match = re.search(r'^version = "([^"]+)"', text, re.MULTILINE)
        found = match[1] if match else "unknown"
    commit = os.environ.get("LOADTEST_COMMIT", "") or _commit()
    return f"{found} ({commit})" if commit else found


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        ran = subprocess.run(  # noqa: S603 - fixed words
            command, capture_output=True, text=True, check=False, timeout=QUERY_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ran.stdout.strip()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """This host, and the versions that this interpreter would import."""

    gpus: tuple[str, ...] = ()  # the name of each card
    driver: str = ""
    software: dict[str, str] = {}

    @property
    def hardware(self) -> str:
        """Return the cards for people."""
        if not self.gpus:
            return f"{NO_GPU}: {platform.machine()} processor"
        return ", ".join(f"{count} x {name}" for name, count in Counter(self.gpus).items())


def this_machine() -> Machine:
    """Return what this host says of itself."""
    cards = gpus()
    software = {"Python": platform.python_version()}
    for name in OWN_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            software[name] = importlib.metadata.version(name)
    names = tuple(card.name for card in cards)
    return Machine(gpus=names, driver=cards[0].driver if cards else "", software=software)


def today() -> str:
    """Return the date and time in UTC."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


def command_line() -> str:
    """Return how this program was called."""
    return shlex.join(["python", "-m", "loadtest", *sys.argv[1:]])


def header(cards: list[Gpu]) -> dict[str, str]:
    """Return what is known before anything is started."""
    return {
        "date": today(),
        "hardware": described(cards),
        "host": f"{os.cpu_count()} cores, {platform.system()} {platform.release()}",
        "doherty": own_version(),
        "client": f"Python {platform.python_version()}",
        "command": command_line(),
    }
