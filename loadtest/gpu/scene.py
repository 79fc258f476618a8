"""What the steps of a proof share: the running stack, ways to ask its parts, and the measure."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

import msgspec

from loadtest.client import Client
from loadtest.gpu import machine
from loadtest.gpu.events import Listener
from loadtest.gpu.gauges import Gauge
from loadtest.gpu.stack import Stack, client
from loadtest.run import RunError

if TYPE_CHECKING:
    from loadtest.gpu.caching import Asker


class Measure(msgspec.Struct, frozen=True, kw_only=True):
    """How much of everything."""

    long_tokens: int = 32_000  # a prompt whose client leaves while it is computed
    leave_after_s: float = 0.2
    leaves: int = 5
    stream_tokens: int = 2000  # an answer whose client leaves, and one that outlives a SIGTERM
    requests: int = 60  # of the prediction, after its warm-up
    warmup: int = 20
    head_words: int = 1400
    turns: int = 5
    crowd: int = 8  # requests that fill KV memory together
    crowd_words: int = 6000
    crowd_output_tokens: int = 400
    flood_tokens_max: int = 600_000  # a KV cache beyond this is not flooded
    flood_prompt_tokens: int = 16_000
    revisits: int = 8


# A small measure of everything, for a machine without time.
QUICK = Measure(
    long_tokens=16_000,
    leaves=2,
    stream_tokens=400,
    requests=16,
    warmup=8,
    head_words=300,
    turns=3,
    crowd=4,
    crowd_words=1500,
    crowd_output_tokens=300,
    flood_tokens_max=100_000,
    flood_prompt_tokens=8000,
    revisits=4,
)


class Scene:
    """One run; what only exists once the engine is up is asked for through `begin`."""

    def __init__(self, stack: Stack, measure: Measure, seed: int) -> None:
        self.stack = stack
        self.measure = measure
        self.draw = random.Random(seed)
        self.header: dict[str, str] = {}
        self.gpu_mib_before: int | None = None
        self.listener: Listener | None = None
        self.asked: Asker | None = None  # of the prediction, to be asked again
        self.proxy = client(stack.proxy_url, explain=True)
        self.admin = client(f"http://127.0.0.1:{stack.ports.admin}")
        self._engine: Client | None = None
        self._gauge: Gauge | None = None

    @property
    def model(self) -> str:
        return self.stack.options.model

    @property
    def engine_name(self) -> str:
        return self.stack.options.engine

    @property
    def cards(self) -> frozenset[int]:
        """The cards that the manager was given by name; empty: all."""
        return machine.named(str(self.stack.options.manager.get("gpus", "")))

    async def used_mib(self) -> int | None:
        """Return the memory in use on the manager's cards; None where there are none."""
        return await asyncio.to_thread(machine.used_mib, self.cards)

    @property
    def engine(self) -> Client:
        """The engine itself, past the proxy."""
        if self._engine is None:
            raise RunError("the engine is not up")
        return self._engine

    @property
    def gauge(self) -> Gauge:
        if self._gauge is None:
            raise RunError("the engine is not up")
        return self._gauge

    @property
    def begun(self) -> bool:
        return self._engine is not None

    def begin(self) -> None:
        self._engine = client(self.stack.engine_url)
        self._gauge = Gauge(self._engine)

    async def close(self) -> None:
        if self.listener is not None:
            await self.listener.close()
        for open_client in (self.proxy, self.admin, self._engine):
            if open_client is not None:
                open_client.close()
