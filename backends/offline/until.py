"""A wait that the end of the service cuts short."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def until(ending: asyncio.Event, work: Coroutine[Any, Any, T]) -> T | None:
    """Return what `work` returns, or None when `ending` is set before: it is cancelled then."""
    loop = asyncio.get_running_loop()
    working, waiting = loop.create_task(work), loop.create_task(ending.wait())
    try:
        await asyncio.wait({working, waiting}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        waiting.cancel()
        if not working.done():
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)
