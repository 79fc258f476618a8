"""Which release each engine's program is of: asked once, aside, before its first start.

To ask means to start a Python interpreter, some tens of milliseconds on a quiet machine and seconds
on a cold disk; the manager's other replicas do not wait for that. A program that has changed on the
disk since is asked again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from backends.engines.base import Engine
from backends.engines.release import UNKNOWN_RELEASE, Release

Ask = Callable[[str], Release]


class Releases:
    """What programs have said."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._known: dict[tuple[str, float], Release] = {}

    def known(self, engine: Engine, program: str) -> Release | None:
        """Return the release, None when it has to be asked for."""
        if engine.name == "simulator":
            return UNKNOWN_RELEASE  # of one piece with the manager
        return self._known.get(_state(program))

    async def ask(self, engine: Engine, program: str) -> Release:
        """Ask, off the loop."""
        state = _state(program)
        release = await asyncio.to_thread(self._ask, program)
        self._known[state] = release
        return release


def _state(program: str) -> tuple[str, float]:
    try:
        return program, Path(program).stat().st_mtime
    except OSError:
        return program, 0.0
