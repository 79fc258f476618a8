"""The clockwork in real time: one loop that steps it, and who may submit, pause, sleep or stop it.

The loop keeps an absolute schedule: a step begins where the last one was planned to end, however
late a timer fired, so jitter does not add up. Only when it has fallen far behind (the machine had
no processor to spare) does it start afresh from now; how much was lost is counted, because figures
taken from an engine that was late are not the profile's.

Engines die from misuse: SGLang from releasing memory while busy, resuming what was not released, or
computing on released memory. `die` records that, and whoever runs the server ends the process.
"""

from __future__ import annotations

import asyncio
import enum
import time
from typing import NamedTuple

from backends.simulator.clockwork import Clockwork, Emission, Limits, Sequence, Step
from backends.simulator.kv_cache import KvCache
from backends.simulator.kv_events import EventPublisher
from backends.simulator.settings import Settings
from backends.simulator.tally import BOUNDS, Tally

LATENESS_MAX_S = 0.25  # real; beyond it the schedule starts afresh
TIMER_GRAIN_S = 0.001  # event loops round to milliseconds; shorter sleeps only burn processor
WEIGHTS, KV_CACHE = "weights", "kv_cache"
MEMORY_PARTS = frozenset({WEIGHTS, KV_CACHE, "cuda_graph"})


class Gate(enum.Enum):
    """What becomes of new requests."""

    OPEN = "open"
    QUEUE = "queue"  # taken, not computed
    REFUSE = "refuse"  # answered 503
    ABORT = "abort"  # taken and ended at once, as vLLM does while it shuts down


class Piece(NamedTuple):
    """What one choice of an exchange gained."""

    choice: int
    emission: Emission


class Outbox:
    """Where the sequences of one exchange leave their text; read by the one who answers it."""

    __slots__ = ("_indexes", "_pieces", "_waiter")

    def __init__(self, sequences: list[Sequence]) -> None:
        self._pieces: list[Piece] = []
        self._waiter: asyncio.Future[None] | None = None
        self._indexes = {id(sequence): index for index, sequence in enumerate(sequences)}
        for sequence in sequences:
            sequence.outbox = self

    def put(self, emission: Emission) -> None:
        """Leave a piece and wake the reader."""
        self._pieces.append(Piece(self._indexes[id(emission.sequence)], emission))
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def take(self) -> list[Piece]:
        """Return what is there, at least one piece."""
        if not self._pieces:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        pieces, self._pieces = self._pieces, []
        return pieces


class Clock:
    """Time of the simulated machine, which runs `scale` times as fast as ours."""

    def __init__(self, scale: float) -> None:
        self.scale = scale
        self._start_s = time.monotonic()

    def now_s(self) -> float:
        """Return simulated seconds since the start."""
        return (time.monotonic() - self._start_s) * self.scale


class Engine:
    """One engine: its clockwork, its gate and its memory."""

    def __init__(self, settings: Settings, publisher: EventPublisher | None) -> None:
        self.settings = settings
        self.tally = Tally(BOUNDS[settings.dialect])
        self.clock = Clock(settings.time_scale)
        self.cache = KvCache(
            settings.kv_blocks_max, settings.block_tokens, record_events=publisher is not None
        )
        limits = Limits(
            settings.sequences_max,
            settings.batched_tokens_max,
            settings.context_tokens_max,
            settings.stream_interval,
        )
        self.clockwork = Clockwork(settings.profile, self.cache, limits, self.tally)
        self.gate = Gate.OPEN
        self.frozen = False  # no step begins
        self.released: set[str] = set()  # parts of memory that are not there
        self.sleep_level: int | None = None
        self.blank = False  # the memory of the weights is there, and nothing has been read into it
        self.late_s = 0.0
        self.dead: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._publisher = publisher
        self._wake = asyncio.Event()
        self._idle_waiters: list[asyncio.Future[None]] = []
        self._slept_before = False

    def submit(self, sequences: list[Sequence]) -> Outbox:
        """Take the sequences of one exchange."""
        outbox = Outbox(sequences)
        now_s = self.clock.now_s()
        for sequence in sequences:
            self.clockwork.submit(sequence, now_s)
        if self.gate is Gate.ABORT:
            self.abort(sequences)
        self._wake.set()
        return outbox

    def abort(self, sequences: list[Sequence]) -> None:
        """Give up what has not ended."""
        for sequence in sequences:
            if self.clockwork.abort(sequence):
                self._wake.set()

    def abort_all(self) -> None:
        """Give up everything."""
        self.clockwork.abort_all()
        self._wake.set()

    async def idle(self) -> None:
        """Return once nothing is running, waiting or on its way in."""
        if self.clockwork.busy:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._idle_waiters.append(waiter)
            await waiter

    async def pause(self, mode: str) -> None:
        """Stop computing: `abort` what is here, `wait` for it, or `keep` it for later."""
        self.gate = Gate.QUEUE if mode == "keep" else Gate.REFUSE
        if mode == "abort":
            self.abort_all()
        if mode != "keep":
            await self.idle()
        self.frozen = True

    def resume(self) -> None:
        """Go on computing."""
        self.gate = Gate.OPEN
        self.frozen = False
        self._wake.set()

    async def pass_s(self, simulated_s: float) -> None:
        """Wait for a simulated duration."""
        await asyncio.sleep(self.settings.real_s(simulated_s))

    async def sleep(self, level: int, mode: str) -> None:
        """Let go of the GPU: 0 only stops, 1 keeps the weights in host memory, 2 keeps nothing."""
        await self.pause(mode)
        if level == 0 or self.released:
            self.sleep_level = self.sleep_level or 0
            return
        self.clockwork.retract_all()
        self.cache.clear()
        self.sleep_level = level
        self.released = {WEIGHTS, KV_CACHE}
        profile = self.settings.profile
        if level == 1:
            await self.pass_s(profile.sleep_s if self._slept_before else profile.sleep_first_s)
            self._slept_before = True
        else:
            self.blank = True
            await self.pass_s(profile.discard_s)

    async def wake_up(self, tags: list[str]) -> None:
        """Take back the named parts, all if none is named; awake once nothing is missing."""
        if self.sleep_level is None:
            return
        wanted = set(tags) or {WEIGHTS, KV_CACHE}
        if WEIGHTS in wanted & self.released:
            profile = self.settings.profile
            await self.pass_s(profile.wake_s if self.sleep_level == 1 else profile.remap_s)
        self.released -= wanted
        if not self.released:
            self.sleep_level = None
            self.resume()

    def reload(self) -> None:
        """Read the weights again, where there is memory for them."""
        self.blank = self.blank and WEIGHTS in self.released

    def release(self, tags: frozenset[str]) -> None:
        """Let go of parts of the memory, SGLang's way: fatal unless nothing is going on."""
        if self.clockwork.busy:
            self.die("release_memory_occupation while the scheduler was not idle")
            return
        self.released |= tags
        if KV_CACHE in tags:
            self.cache.clear()

    def take_back(self, tags: frozenset[str]) -> None:
        """Map parts of the memory again: fatal for one that is not out."""
        missing = tags - self.released
        if missing:
            self.die(f"resume_memory_occupation of {sorted(missing)}, which is not released")
            return
        self.released -= tags

    def die(self, reason: str) -> None:
        """End the engine as a failed assertion in its scheduler would."""
        if not self.dead.done():
            self.dead.set_result(reason)

    async def run(self) -> None:
        """Step for ever."""
        end_s = self.clock.now_s()
        while True:
            self._deliver(self.clockwork.reap())
            self._tell_idle()
            step = self._next_step(end_s)
            if step is None:
                if self.settings.dialect == "sglang":
                    self._publish()
                stood_still = self.frozen
                await self._rest()
                if stood_still:
                    end_s = max(end_s, self.clock.now_s())
                continue
            end_s = step.end_s
            await self._pass_until(end_s)
            self._deliver(self.clockwork.finish(step))
            self._publish()
            overdue_s = self.clock.now_s() - end_s
            if overdue_s > LATENESS_MAX_S * self.clock.scale:
                self.late_s += overdue_s
                end_s += overdue_s

    def _next_step(self, end_s: float) -> Step | None:
        """Plan the step after the one that ended at `end_s`; None: nothing can begin now."""
        if self.frozen or self.dead.done():
            return None
        start_s = self.clockwork.next_ready_s(end_s)
        if start_s is None or (start_s > end_s and start_s > self.clock.now_s()):
            return None
        if self.released:
            self.die("a batch was computed on released memory")
            return None
        step = self.clockwork.plan(start_s)
        assert step is not None, "work is here and none of it could be planned"
        return step

    async def _rest(self) -> None:
        """Wait for something to do: a submission, an abort, or the end of an intake."""
        self._wake.clear()
        now_s = self.clock.now_s()
        ready_s = None if self.frozen or self.dead.done() else self.clockwork.next_ready_s(now_s)
        if ready_s is None:
            await self._wake.wait()
            return
        delay_s = max(self.settings.real_s(ready_s - now_s), TIMER_GRAIN_S)
        try:
            async with asyncio.timeout(delay_s):
                await self._wake.wait()
        except TimeoutError:
            return

    async def _pass_until(self, end_s: float) -> None:
        delay_s = self.settings.real_s(end_s - self.clock.now_s())
        await asyncio.sleep(max(delay_s, TIMER_GRAIN_S) if delay_s > 0 else 0)

    def _deliver(self, emissions: list[Emission]) -> None:
        for emission in emissions:
            outbox = emission.sequence.outbox
            assert isinstance(outbox, Outbox)
            outbox.put(emission)

    def _publish(self) -> None:
        """Send what changed in the cache. vLLM does so after a step only, so what a sleep or a
        reset did is told with the next step; SGLang also when idle."""
        if self._publisher is None:
            return
        events = self.cache.drain_events()
        if events:
            self._publisher.publish(events, time.time())

    def _tell_idle(self) -> None:
        if self._idle_waiters and not self.clockwork.busy:
            for waiter in self._idle_waiters:
                if not waiter.done():
                    waiter.set_result(None)
            self._idle_waiters.clear()
