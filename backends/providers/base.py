"""What starts engine processes and finds them again, as a protocol."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from backends.engines.base import Engine
from backends.engines.probe import Program
from backends.journal import Launch
from backends.spec import ReplicaSpec

LAUNCH_ID_VARIABLE = "DOHERTY_LAUNCH_ID"


class Process(Protocol):
    """One engine process and everything it started."""

    @property
    def pid(self) -> int:
        """Return its number on this machine; 0 while it has none."""

    @property
    def start_ticks(self) -> int:
        """Return the start time that, with the pid and the boot, identifies it."""

    @property
    def exited(self) -> asyncio.Future[str]:
        """Return a future that says how it ended, in words, as soon as it has."""

    @property
    def placed(self) -> asyncio.Future[str] | None:
        """Return a future of the host that it listens on; None: its launch says it already."""

    @property
    def waits(self) -> str:
        """Say what it waits for before it can run; empty: for nothing."""

    def signal_group(self, number: int) -> None:
        """Signal it and all that it started; nothing happens when it is gone."""

    def release(self) -> None:
        """Stop watching it; it runs on."""


class Provider(Protocol):
    """Where engine processes run."""

    @property
    def boot_id(self) -> str: ...

    def program(self, engine: Engine, spec: ReplicaSpec) -> Program:
        """Return what serves `engine` there. Raises `EngineMissingError`."""

    def spawn(
        self, argv: Sequence[str], env: Mapping[str, str], launch_id: str, log_path: Path
    ) -> Process:
        """Start a process in a group of its own. Raises `OSError`.

        The journal knows the launch already. Where a start takes time it goes on by itself, and one
        that comes to nothing is told by `exited`; the process has no pid until then.
        """

    def recover(self, launches: Iterable[Launch]) -> Mapping[str, Process]:
        """Return those that still run, by launch id; what is left of the others is killed."""
