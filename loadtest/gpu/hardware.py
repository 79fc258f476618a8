"""What a figure was measured on: date, cards, driver, versions, the command."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import shlex
import subprocess
import sys
from collections import Counter

import msgspec

NVIDIA_SMI_TIMEOUT_S = 20.0
PACKAGES = ("torch", "triton", "transformers", "flashinfer-python", "sglang-kernel", "doherty")


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """One host."""

    gpus: tuple[str, ...] = ()  # the name of each card
    driver: str = ""
    software: dict[str, str] = {}

    @property
    def hardware(self) -> str:
        """Return the cards for people."""
        if not self.gpus:
            return f"no GPU: {platform.machine()} processor"
        counted = Counter(self.gpus)
        return ", ".join(f"{count} x {name}" for name, count in counted.items())


def this_machine() -> Machine:
    """Return what this host says of itself."""
    gpus, driver = _cards(_nvidia_smi())
    software = {"Python": platform.python_version()}
    for name in PACKAGES:
        try:
            software[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return Machine(gpus=gpus, driver=driver, software=software)


def _nvidia_smi() -> str:
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(  # noqa: S603 - our own words
            query, capture_output=True, text=True, timeout=NVIDIA_SMI_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _cards(answer: str) -> tuple[tuple[str, ...], str]:
    """Return the names of the cards and the driver's version."""
    rows = [line.rpartition(",") for line in answer.splitlines() if "," in line]
    names = tuple(name.strip() for name, _, _ in rows)
    return names, rows[0][2].strip() if rows else ""


def today() -> str:
    """Return the date and time in UTC."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def command_line() -> str:
    """Return how this program was called."""
    return shlex.join(["python", "-m", "loadtest", *sys.argv[1:]])
