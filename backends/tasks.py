"""The one way to start a task: it has a name, an owner that holds it, and an end that is reported.

asyncio keeps only a weak reference to a task and is silent about its exception until the garbage is
collected; both make a control plane forget work. Here the owner keeps the task, and an exception
that nobody expects is logged the moment it happens.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Coroutine, Iterable
from pathlib import Path
from typing import Any

from backends.log import Log

_FRAMES_MAX = 5


def spawn(coroutine: Coroutine[Any, Any, None], name: str, log: Log) -> asyncio.Task[None]:
    """Start `coroutine`; the caller keeps the task and ends it with `cancel_all` or awaits it."""
    task = asyncio.get_running_loop().create_task(coroutine, name=name)

    def report(done: asyncio.Task[None]) -> None:
        if not done.cancelled() and (error := done.exception()) is not None:
            what = f"{type(error).__name__}: {error}"
            log.fault("task_failed", task=name, error=what, where=place_of(error))

    task.add_done_callback(report)
    return task


async def cancel_all(tasks: Iterable[asyncio.Task[None]]) -> None:
    """Cancel and wait until each is over; what they raised has been reported already."""
    pending = [task for task in tasks if not task.done()]
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)


def place_of(error: BaseException) -> str:
    """Name the places that an exception passed, innermost first; places hold no secrets."""
    frames = traceback.extract_tb(error.__traceback__)[-_FRAMES_MAX:]
    return " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in reversed(frames))
