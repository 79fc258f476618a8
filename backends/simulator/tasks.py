"""The one place that starts tasks: each has a name, an owner and an end that is looked at."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

_log = logging.getLogger(__name__)


def spawn(
    coroutine: Coroutine[Any, Any, None],
    name: str,
    on_failure: Callable[[BaseException], None] | None = None,
) -> asyncio.Task[None]:
    """Start a task; an exception that ends it is logged, and handed to `on_failure`."""
    task = asyncio.get_running_loop().create_task(coroutine, name=name)

    def ended(task: asyncio.Task[None]) -> None:
        if task.cancelled():
            return
        error = task.exception()
        if error is not None:
            _log.error("task %s failed", name, exc_info=error)
            if on_failure is not None:
                on_failure(error)

    task.add_done_callback(ended)
    return task


async def stop(task: asyncio.Task[None]) -> None:
    """Cancel a task and wait until it is gone; its own exception has been reported already."""
    task.cancel()
    await asyncio.wait([task])
