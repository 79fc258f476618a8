"""Which of the inputs that a run found are worth keeping: the shortest that reach something new."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, Final

from tests.fuzz.targets import FOLDER, TARGETS, kept

_CORE: Final = str(FOLDER.parents[1] / "proxy")
_Step = tuple[str, int, int]  # a file, and two lines of it that ran one after the other


def _reached(law: Callable[[bytes], None], octets: bytes) -> set[_Step]:
    """Return the steps of the proxy's code that a law's run takes."""
    steps: set[_Step] = set()
    last: dict[int, int] = {}

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        file = frame.f_code.co_filename
        if not file.startswith(_CORE):
            return None
        if event == "line":
            key = id(frame)
            steps.add((file, last.get(key, 0), frame.f_lineno))
            last[key] = frame.f_lineno
        elif event == "return":
            last.pop(id(frame), None)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        law(octets)
    finally:
        sys.settrace(before)
    return steps


def keep(name: str, corpus: Path) -> int:
    """Copy to the kept seeds what reaches what no seed reaches yet, the shortest first."""
    law = TARGETS[name].law
    known: set[_Step] = set()
    for octets in [*TARGETS[name].seeds(), *(octets for _, octets in kept(name))]:
        known |= _reached(law, octets)
    folder = FOLDER / "seeds" / name
    added = 0
    for path in sorted(corpus.iterdir(), key=lambda path: (path.stat().st_size, path.name)):
        new = _reached(law, path.read_bytes()) - known
        if new:
            known |= new
            added += 1
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / path.name)
    print(f"{name}: {added} of {len(list(corpus.iterdir()))} added; {len(known)} steps reached")
    return 0
