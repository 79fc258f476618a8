"""Faults: which, when and to whom, drawn from the seed; and their doing.

They are spread evenly over the requests, so that a slower machine has as many per stream.
"""

from __future__ import annotations

import asyncio
import random
import signal
import time
from typing import Literal, get_args

import msgspec

from loadtest.scripts import How, Order
from loadtest.storm.ledger import Strike
from loadtest.storm.stage import EngineProcess

Kind = Literal["kill", "reset", "half_close", "close", "stop", "pause"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_HOW: dict[Kind, How] = {"reset": "reset", "half_close": "half_close", "close": "close"}
STALL_S = (0.5, 2.0)
# To start a process stops ours for some 20 ms, in which no reader would notice that it was cut.
RESTART_PAUSE_S = 0.1
# Of the answers that an engine is giving, those that a reset, half-close or close meets.
BREAK_SHARE = 0.5


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """One fault: it strikes when request number `at` begins."""

    at: int
    kind: Kind
    engine: int  # index
    stall_s: float
    seed: int


def draw_faults(count: int, streams: int, engines: int, seed: int) -> list[Fault]:
    """Return the faults of a storm, in order; each kind as often as any other."""
    draw = random.Random(f"weather:{seed}")
    kinds = [KINDS[index % len(KINDS)] for index in range(count)]
    draw.shuffle(kinds)
    return [
        Fault(
            at=int((index + draw.uniform(0.25, 0.75)) * streams / count),
            kind=kind,
            engine=draw.randrange(engines),
            stall_s=round(draw.uniform(*STALL_S), 3),
            seed=draw.getrandbits(32),
        )
        for index, kind in enumerate(kinds)
    ]


class Weather:
    """Does the faults when their time has come."""

    def __init__(self, faults: list[Fault], engines: list[EngineProcess]) -> None:
        self.kills: dict[str, list[Strike]] = {engine.name: [] for engine in engines}
        self._faults = faults
        self._engines = engines
        # A place is struck by one process fault at a time: only a running process can be killed.
        self._held = {engine.port: asyncio.Lock() for engine in engines}
        self._begun = 0
        self._more = asyncio.Event()

    def note_begin(self, _number: int) -> None:
        """One more request begins."""
        self._begun += 1
        self._more.set()

    async def run(self) -> None:
        """Return when the last fault is over and every engine runs."""
        async with asyncio.TaskGroup() as group:
            for fault in self._faults:
                while self._begun < fault.at:
                    self._more.clear()
                    await self._more.wait()
                group.create_task(self._strike(fault))

    async def _strike(self, fault: Fault) -> None:
        engine = self._engines[fault.engine]
        if fault.kind == "kill":
            async with self._held[engine.port]:
                at_s = await engine.kill()
                self.kills[engine.name].append(Strike(at_s, "kill", time.monotonic()))
                await asyncio.sleep(RESTART_PAUSE_S)
                since_s = time.monotonic()
                await engine.start()
                await engine.until_listening(since_s)
        elif fault.kind == "stop":
            async with self._held[engine.port]:
                engine.signal(signal.SIGSTOP)
                await asyncio.sleep(fault.stall_s)
                engine.signal(signal.SIGCONT)
        elif fault.kind == "pause":
            engine.order(Order(do="pause", share=1.0, seed=fault.seed, seconds=fault.stall_s))
        else:
            how = _HOW[fault.kind]
            engine.order(Order(do="break", how=how, share=BREAK_SHARE, seed=fault.seed))
