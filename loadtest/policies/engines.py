"""How a replica spends its time: two models of one engine.

`Serial`: one prefill at a time, first come first served, at a fixed rate; then the answer at a
fixed rate, whatever else runs. Cache and running requests do not compete for memory. It is the
model of most papers, and simple enough to be checked by hand.

`Mixed`: continuous batching with chunked prefill. A step computes up to `chunk_tokens` prompt
tokens, first come first served, and one token of every answer under way; all of them wait for the
whole step. So a long prompt stalls the answers beside it, which is what a placement takes from
others. A step costs its prompt tokens, one pass over the weights and the reading of all contexts.
Running requests pin their blocks; what is left of the memory is the cache. An answer's room is
taken at admission, so nothing is ever preempted.

Between steps with prefill nothing happens to an answer but tokens, so those stretches are not
stepped through: the end of the next answer, and the end of the step in which somebody arrives, are
found by solving for them.

Both run in virtual time: the world tells them the time, and they ask it to be woken.
"""

from __future__ import annotations

import abc
import heapq
import math
from bisect import bisect_right
from collections import deque
from typing import Final, Protocol

import msgspec
from typing_extensions import override

from loadtest.policies.caches import Caches, SharedMemory
from loadtest.policies.workload import BLOCK_TOKENS, Job

SLOT_WAIT_S: Final = 0.1  # a guess at what one more than the slots waits, as routers make it


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """An 8 B model in bf16 on one H200.

    The steps are the simulator's profile `h200-8b`, measured with vLLM 0.26; the rate of prefill
    is a round number between what SGLang and vLLM did there, 26,000 to 39,000.
    """

    prefill_tokens_per_s: float = 30_000.0
    # Of attention: a chunk from token a to b takes so much of b^2 - a^2. None of it is in the rate
    # by default, which is that of a usual prompt.
    prefill_s_per_token_squared: float = 0.0
    chunk_tokens: int = 8_192
    slots_serial: int = 64
    decode_tokens_per_s: float = 50.0  # of one answer; serial only
    slots_mixed: int = 256
    # Answers in a step: seconds it takes without reading any context.
    step_base_s: tuple[tuple[int, float], ...] = (
        (1, 5.19e-3), (8, 5.46e-3), (32, 5.48e-3), (64, 5.77e-3), (128, 6.77e-3),
    )  # fmt: skip
    step_s_per_context_token: float = 147_456 / 4.9e12

    def base_s(self, answers: int) -> float:
        """Return the interpolated base of a step; the table's last slope goes on."""
        table = self.step_base_s
        index = bisect_right(table, answers, key=lambda row: row[0])
        high = min(max(index, 1), len(table) - 1)
        (few, few_s), (many, many_s) = table[high - 1], table[high]
        return few_s + (many_s - few_s) * max(0, answers - few) / (many - few)


class Flight:
    """One job in one run: where it went, and when."""

    __slots__ = (
        "arrived_s", "cached_tokens", "ended_s", "estimate_tokens", "first_s", "job", "left_tokens",
        "proxy", "replica",
    )  # fmt: skip

    def __init__(self, job: Job, arrived_s: float, proxy: int) -> None:
        self.job = job
        self.arrived_s = arrived_s
        self.proxy = proxy
        self.replica = -1
        self.estimate_tokens = 0  # of prefill, as its router believed when it sent it
        self.cached_tokens = 0  # as the engine found
        self.left_tokens = 0  # of its prefill; mixed only
        self.first_s = self.ended_s = math.inf

    @property
    def ttft_s(self) -> float:
        return self.first_s - self.arrived_s


class World(Protocol):
    """What an engine tells."""

    def wake(self, engine: Engine, at_s: float, token: object) -> None: ...

    def first_token(self, flight: Flight, now_s: float) -> None: ...

    def ended(self, flight: Flight, now_s: float) -> None: ...


class Engine(abc.ABC):
    """One replica. `speed` is 1 unless it is a slow one."""

    def __init__(self, place: int, world: World, timing: Timing, *, speed: float) -> None:
        self.place = place
        self.world = world
        self.timing = timing
        self.rate = timing.prefill_tokens_per_s * speed
        self.speed = speed
        self.queue: deque[Flight] = deque()  # not yet begun
        self.running = 0
        self.work_s = 0.0  # of prefill
        self.busy_s = 0.0  # with anything; mixed only
        self.requests = 0

    @abc.abstractmethod
    def submit(self, flight: Flight, now_s: float) -> None:
        """Take a request."""

    @abc.abstractmethod
    def woken(self, token: object, now_s: float) -> None:
        """The time has come that was asked for."""

    @abc.abstractmethod
    def under_way_s(self, now_s: float) -> float:
        """Return the prefill seconds that are still to come of requests that have begun."""

    def held_tokens(self) -> int:
        """Return the KV memory that running requests take; 0 where they take none."""
        return 0

    @abc.abstractmethod
    def room_wait_s(self, job: Job) -> float:
        """Return how long a newcomer would wait for a slot, or for memory."""


class Serial(Engine):
    """One prefill at a time, then a steady answer."""

    def __init__(
        self, place: int, world: World, timing: Timing, caches: Caches, *, speed: float
    ) -> None:
        super().__init__(place, world, timing, speed=speed)
        self._caches = caches
        self._prefilling: Flight | None = None
        self._until_s = 0.0

    @override
    def submit(self, flight: Flight, now_s: float) -> None:
        self.requests += 1
        self.queue.append(flight)
        self._begin(now_s)

    def _begin(self, now_s: float) -> None:
        if self._prefilling or not self.queue or self.running >= self.timing.slots_serial:
            return
        flight = self._prefilling = self.queue.popleft()
        job = flight.job
        depth = self._caches.depth(self.place, job.blocks)
        flight.cached_tokens = min(depth * BLOCK_TOKENS, job.prompt_tokens)
        self._caches.insert(self.place, job.blocks)
        duration_s = max(1, job.prompt_tokens - flight.cached_tokens) / self.rate
        self.running += 1
        self.work_s += duration_s
        self._until_s = now_s + duration_s
        self.world.wake(self, self._until_s, flight)

    @override
    def woken(self, token: object, now_s: float) -> None:
        assert isinstance(token, Flight)
        if token is self._prefilling:
            self._prefilling = None
            answer_s = token.job.output_tokens / self.timing.decode_tokens_per_s
            self.world.wake(self, now_s + answer_s, token)
            self.world.first_token(token, now_s)
        else:
            self.running -= 1
            self.world.ended(token, now_s)
        self._begin(now_s)

    @override
    def under_way_s(self, now_s: float) -> float:
        return max(0.0, self._until_s - now_s) if self._prefilling else 0.0

    @override
    def room_wait_s(self, job: Job) -> float:
        over = self.running + len(self.queue) + 1 - self.timing.slots_serial
        return over * SLOT_WAIT_S if over > 0 else 0.0


IDLE, ANSWERING, PREFILLING = range(3)


class Mixed(Engine):
    """Steps of prefill chunks and answers together."""

    def __init__(
        self, place: int, world: World, timing: Timing, memory: SharedMemory, *, speed: float
    ) -> None:
        super().__init__(place, world, timing, speed=speed)
        self.memory = memory
        self._state = IDLE
        self._begun: deque[Flight] = deque()  # admitted, prefill not done
        self._squares = 0  # of this step's chunks
        self._done: list[Flight] = []  # whose prefill this step completes
        self._steps = 0  # tokens that every answer under way has got since the beginning
        self._ends: list[tuple[int, int, Flight]] = []  # heap: step, order, answer
        self._context_tokens = 0  # of all answers under way
        self._since_s = 0.0  # this step, or this stretch of steps, began
        self._until_s = 0.0
        self._stretch = 0  # steps until the next answer ends
        self._wake = 0  # names the wake-up that counts; earlier ones were overtaken
        self._blocked = False  # the next in the queue has no room

    # --- arrivals ---------------------------------------------------------------------------

    @override
    def submit(self, flight: Flight, now_s: float) -> None:
        self.requests += 1
        self.queue.append(flight)
        if self._state == IDLE:
            self._step(now_s)
        elif self._state == ANSWERING and not self._blocked:
            # The step that runs is finished, the next one takes the newcomer in.
            steps = self._steps_by((now_s - self._since_s) * self.speed)
            if steps < self._stretch:
                self._stretch = steps
                self._set_wake(self._since_s + self._stretch_s(steps) / self.speed)

    def _stretch_s(self, steps: int) -> float:
        """Return how long so many steps of nothing but answers take."""
        answers = len(self._ends)
        contexts = steps * self._context_tokens + answers * steps * (steps - 1) / 2
        timing = self.timing
        return steps * timing.base_s(answers) + contexts * timing.step_s_per_context_token

    def _steps_by(self, elapsed_s: float) -> int:
        """Return after how many steps the one ends that runs after `elapsed_s`."""
        timing = self.timing
        growth_s = len(self._ends) * timing.step_s_per_context_token / 2
        first_s = timing.base_s(len(self._ends)) - growth_s
        first_s += self._context_tokens * timing.step_s_per_context_token
        root = math.sqrt(first_s * first_s + 4 * growth_s * elapsed_s)
        steps = max(1, int(2 * elapsed_s / (first_s + root)))
        while self._stretch_s(steps) < elapsed_s:
            steps += 1
        return steps

    def _set_wake(self, at_s: float) -> None:
        self._wake += 1
        self._until_s = at_s
        self.world.wake(self, at_s, self._wake)

    # --- steps ------------------------------------------------------------------------------

    @override
    def woken(self, token: object, now_s: float) -> None:
        if token != self._wake:
            return
        self.busy_s += now_s - self._since_s
        if self._state == PREFILLING:
            self._advance(1, now_s)
            done, self._done = self._done, []
            for flight in done:
                self._answer(flight, now_s)
        else:
            self._advance(self._stretch, now_s)
        self._step(now_s)

    def _advance(self, steps: int, now_s: float) -> None:
        """Every answer under way has got so many tokens; some have ended."""
        ends = self._ends
        self._steps += steps
        self._context_tokens += steps * len(ends)
        while ends and ends[0][0] <= self._steps:
            flight = heapq.heappop(ends)[2]
            self._context_tokens -= flight.job.prompt_tokens + flight.job.output_tokens
            self._end(flight, now_s)

    def _answer(self, flight: Flight, now_s: float) -> None:
        """The prompt is computed, and with it the first token."""
        self.world.first_token(flight, now_s)
        job = flight.job
        if job.output_tokens <= 1:
            self._end(flight, now_s)
            return
        self._context_tokens += job.prompt_tokens + 1
        heapq.heappush(self._ends, (self._steps + job.output_tokens - 1, job.index, flight))

    def _end(self, flight: Flight, now_s: float) -> None:
        job = flight.job
        self.running -= 1
        self.memory.leave(self.place, job.blocks, _answer_blocks(job))
        self.world.ended(flight, now_s)

    def _step(self, now_s: float) -> None:
        """Begin the next step, or the next stretch of steps without prefill."""
        chunk_tokens = self._fill()
        self._since_s = now_s
        if chunk_tokens:
            duration_s = chunk_tokens / self.rate
            duration_s += self._squares * self.timing.prefill_s_per_token_squared / self.speed
            self.work_s += duration_s
            self._state = PREFILLING
            self._set_wake(now_s + duration_s + self._stretch_s(1) / self.speed)
        elif self._ends:
            self._state = ANSWERING
            self._stretch = self._ends[0][0] - self._steps
            self._set_wake(now_s + self._stretch_s(self._stretch) / self.speed)
        else:
            self._state = IDLE

    def _fill(self) -> int:
        """Choose the step's prompt tokens: those begun first, then newcomers while they fit."""
        left = self.timing.chunk_tokens
        begun = self._begun
        self._squares = 0
        while left:
            if not begun and not self._admit():
                break
            flight = begun[0]
            tokens = min(left, flight.left_tokens)
            end = flight.job.prompt_tokens - flight.left_tokens + tokens
            self._squares += tokens * (2 * end - tokens)
            flight.left_tokens -= tokens
            left -= tokens
            if not flight.left_tokens:
                self._done.append(begun.popleft())
        return self.timing.chunk_tokens - left

    def _admit(self) -> bool:
        self._blocked = False
        if not self.queue:
            return False
        flight = self.queue[0]
        job = flight.job
        depth = self.memory.depth(self.place, job.blocks)
        self._blocked = self.running >= self.timing.slots_mixed or not self.memory.admit(
            self.place, job.blocks, _answer_blocks(job)
        )
        if self._blocked:
            return False
        self.queue.popleft()
        flight.cached_tokens = min(depth * BLOCK_TOKENS, job.prompt_tokens)
        flight.left_tokens = max(1, job.prompt_tokens - flight.cached_tokens)
        self.running += 1
        self._begun.append(flight)
        return True

    @override
    def held_tokens(self) -> int:
        return self.memory.used_blocks(self.place) * BLOCK_TOKENS

    # --- what only an oracle sees -------------------------------------------------------------

    @override
    def under_way_s(self, now_s: float) -> float:
        left_s = sum(flight.left_tokens for flight in self._begun) / self.rate
        if self._state == PREFILLING:
            left_s += self._until_s - now_s
        return left_s

    @override
    def room_wait_s(self, job: Job) -> float:
        """Return how long the answers under way take to make room; those queued come first."""
        blocks = len(job.blocks) + _answer_blocks(job)
        lacking = self.memory.lacking(self.place, job.blocks, _answer_blocks(job))
        for flight in self.queue:
            lacking += len(flight.job.blocks) + _answer_blocks(flight.job)
        slots = self.running + len(self.queue) + 1 - self.timing.slots_mixed
        if lacking <= 0 and slots <= 0:
            return 0.0
        steps = 0
        for end, _, flight in sorted(self._ends):
            lacking -= len(flight.job.blocks) + _answer_blocks(flight.job)
            slots -= 1
            steps = end - self._steps
            if lacking <= 0 and slots <= 0:
                return self._stretch_s(steps) / self.speed
        # Those that are queued must have ended, too.
        return self._stretch_s(steps) / self.speed + max(0, lacking) / blocks * SLOT_WAIT_S


def _answer_blocks(job: Job) -> int:
    return -(-job.output_tokens // BLOCK_TOKENS)
