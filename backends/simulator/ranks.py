"""The data-parallel ranks of one engine server: each computes for itself, with a cache of its own.

A request goes to the rank that it names by `X-Data-Parallel-Rank`; of the others vLLM picks the
least busy rank (a waiting request counts as four running ones), SGLang takes turns. What is told to
the server, such as to sleep or to drop its cache, is told to every rank.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterator, Sequence

from backends.simulator.api_errors import ApiError
from backends.simulator.engine import Engine, Gate
from backends.simulator.kv_events import EventPublisher
from backends.simulator.settings import Settings
from backends.simulator.tally import Tally, summed

_WAITING_WEIGHT = 4  # vLLM's


class Ranks:
    """All engines of one server, as one."""

    def __init__(self, settings: Settings, publishers: Sequence[EventPublisher]) -> None:
        self.settings = settings
        self.adapters = {name: name for name in settings.adapters}  # to where each came from
        self.engines = tuple(
            Engine(settings, publishers[rank] if publishers else None)
            for rank in range(settings.dp_size)
        )
        self.first = self.engines[0]
        self.dead = self.first.dead
        for engine in self.engines:
            engine.dead = self.dead  # they live and die together
        self._turn = 0

    def __iter__(self) -> Iterator[Engine]:
        return iter(self.engines)

    def choose(self, wanted: str | None) -> Engine:
        """Return the rank that a request goes to. Raises `ApiError` 400 for one there is not."""
        if wanted is not None and re.fullmatch(r"-?[0-9]{1,9}", wanted):
            if not 0 <= int(wanted) < len(self.engines):
                message = f"data_parallel_rank {wanted} is out of range [0, {len(self.engines)})"
                raise ApiError(400, message, param="data_parallel_rank")
            return self.engines[int(wanted)]
        if self.settings.dialect == "vllm":
            return min(self.engines, key=_busyness)
        self._turn += 1
        return self.engines[(self._turn - 1) % len(self.engines)]

    # --- told to all ---------------------------------------------------------------------------

    @property
    def gate(self) -> Gate:
        """Whether requests are taken."""
        return self.first.gate

    @gate.setter
    def gate(self, gate: Gate) -> None:
        for engine in self.engines:
            engine.gate = gate

    @property
    def frozen(self) -> bool:
        """Whether no step begins."""
        return self.first.frozen

    @property
    def sleep_level(self) -> int | None:
        """How deep they sleep; None: awake."""
        return self.first.sleep_level

    @property
    def busy(self) -> bool:
        """Whether any sequence is here."""
        return any(engine.clockwork.busy for engine in self.engines)

    @property
    def tally(self) -> Tally:
        """What all of them have counted."""
        if len(self.engines) == 1:
            return self.first.tally
        return summed([engine.tally for engine in self.engines])

    def count(self, of: Callable[[Engine], int]) -> int:
        """Return the sum of a figure."""
        return sum(of(engine) for engine in self.engines)

    def clear(self) -> bool:
        """Forget all prefixes; False when a rank could not."""
        cleared = [engine.cache.clear() for engine in self.engines]  # each of them, whatever fails
        return all(cleared)

    def slow_down(self, factor: float) -> None:
        """Let all steps take so many times as long."""
        for engine in self.engines:
            engine.clockwork.slowdown = factor

    def adapters_in_use(self) -> tuple[list[str], list[str]]:
        """Return the adapters of what is computed, and of what waits."""
        running = {s.adapter for engine in self.engines for s in engine.clockwork.running}
        waiting = {s.adapter for engine in self.engines for s in engine.clockwork.waiting}
        return sorted(running - {""}), sorted(waiting - {""})

    async def each(self, command: Callable[[Engine], Awaitable[None]]) -> None:
        """Do something with all of them at once."""
        await asyncio.gather(*(command(engine) for engine in self.engines))

    async def idle(self) -> None:
        """Return once nothing is here."""
        while self.busy:
            await self.each(lambda engine: engine.idle())

    def resume(self) -> None:
        """Go on computing."""
        for engine in self.engines:
            engine.resume()

    def abort_all(self) -> None:
        """Give up everything."""
        for engine in self.engines:
            engine.abort_all()

    def die(self, reason: str) -> None:
        """End as a failed assertion would."""
        self.first.die(reason)


def _busyness(engine: Engine) -> int:
    clockwork = engine.clockwork
    return _WAITING_WEIGHT * clockwork.waiting_count + len(clockwork.running)
