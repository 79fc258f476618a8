"""Tasks with an owner, a name and an end: none is lost, and none fails in silence.

And the moments at which those come back that do something at intervals.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, Final

_log = logging.getLogger("doherty.tasks")

TIMER_EARLY_S: Final = 0.002  # event loops count in milliseconds


def next_beat_s(interval_s: float, after_s: float = 0.0) -> float:
    """Return the next moment, by the loop's time, that is so much after a multiple of the interval.

    So what a process does at intervals it does at the same moments, and is woken once for all of
    it: to be woken costs more than most of it does.
    """
    now_s = asyncio.get_running_loop().time()
    wait_s = interval_s - (now_s - after_s) % interval_s
    # A timer may come a little early, and its moment is not to come twice.
    return now_s + (wait_s if wait_s > TIMER_EARLY_S else wait_s + interval_s)


async def beat(interval_s: float, after_s: float = 0.0) -> None:
    """Wait for that moment."""
    await asyncio.sleep(next_beat_s(interval_s, after_s) - asyncio.get_running_loop().time())


class Tasks:
    """The tasks of one owner. Closing it cancels and awaits them all."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def spawn(self, name: str, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def start(self, name: str, work: Coroutine[Any, Any, Any]) -> None:
        """Spawn what nobody will await."""
        task = self.spawn(name, work)
        assert not task.done()

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("task %s failed", task.get_name(), exc_info=error)

    async def close(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
