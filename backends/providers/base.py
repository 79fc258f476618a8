"""What starts engine processes and finds them again, as a protocol."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from backends.journal import Launch

LAUNCH_ID_VARIABLE = "DOHERTY_LAUNCH_ID"


class Process(Protocol):
    """One engine process and everything it started."""

    @property
    def pid(self) -> int: ...

    @property
    def start_ticks(self) -> int:
        """Return the start time that, with the pid and the boot, identifies it."""

    @property
    def exited(self) -> asyncio.Future[str]:
        """Return a future that says how it ended, in words, as soon as it has."""

    def signal_group(self, number: int) -> None:
        """Signal it and all that it started; nothing happens when it is gone."""

    def release(self) -> None:
        """Stop watching it; it runs on."""


class Provider(Protocol):
    """Where engine processes run."""

    @property
    def boot_id(self) -> str: ...

    def spawn(
        self, argv: Sequence[str], env: Mapping[str, str], launch_id: str, log_path: Path
    ) -> Process:
        """Start a process in a group of its own. Raises `OSError`."""

    def recover(self, launches: Iterable[Launch]) -> Mapping[str, Process]:
        """Return those that still run, by launch id; what is left of the others is killed."""
