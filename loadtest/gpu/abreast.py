"""Several engines started beside each other and used one after another.

A start takes minutes and loads one processor and one card; a measurement takes seconds and wants
the machine for itself. So those that have cards start together, and each is used alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from loadtest.gpu.direct import EngineOptions, Running, started
from loadtest.run import RunError

CARDS_MAX = 64

T = TypeVar("T")


async def abreast(
    options: Sequence[EngineOptions], use: Callable[[int, Running], Awaitable[T]]
) -> list[T | RunError]:
    """Start all, use each by its place in the list, stop all; return what came of each."""
    found: list[T | RunError] = []
    async with contextlib.AsyncExitStack() as stack:
        starts = await asyncio.gather(
            *(stack.enter_async_context(started(each)) for each in options), return_exceptions=True
        )
        for place, start in enumerate(starts):
            try:
                if isinstance(start, BaseException):
                    raise start
                found.append(await use(place, start))
            except RunError as error:
                found.append(error)
    return found


def visible_devices() -> list[str]:
    """Return the names of the cards that may be used, the first first."""
    variable = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    named = [name for name in variable.split(",") if name]
    return named or [str(index) for index in range(CARDS_MAX)]
