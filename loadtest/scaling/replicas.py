"""A replica of the scaling lab: what it costs to serve a request beside others.

Prompts are computed one after the other and first, as chunked prefill does it: while one is
computed the streams beside it get about a token a step of tens of milliseconds, next to nothing.
Otherwise every stream gets a token a step, and a step is the longer the more streams there are. So
streams share a replica as processes share a processor, and one clock of tokens per replica is
enough: exact, and some three events a request. A request holds KV for all of its context from the
beginning of its prefill; one that finds no room waits inside the engine.

The speeds are those of a 70 B model in FP8 on one H200, derived from data sheets by the
efficiencies that a measured 8 B model showed there: 0.77 of the dense arithmetic in large chunks
(1,979 TFLOPS), and steps that take 1.8 ms more than reading the weights at 4.8 TB/s. A sequence
adds what a prompt token costs; the cache is what weights and 4 GB leave of 0.92 x 141 GB, at
327,680 bytes a token.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from typing import NamedTuple


class Speeds(NamedTuple):
    """How fast a replica is."""

    prefill_s_per_token: float = 2 * 70.6e9 / (1979e12 * 0.77)
    step_s: float = 70.6e9 / 4.8e12 + 1.8e-3
    step_s_per_sequence: float = 2 * 70.6e9 / (1979e12 * 0.77)
    kv_tokens: int = int((141e9 * 0.92 - 70.6e9 - 4e9) / 327_680)

    def rate_at(self, inputs: float, prompt_tokens: float, output_tokens: float) -> float:
        """Return the requests a second that keep `inputs` in flight, apart from chance."""
        prefill_s = self.prefill_s_per_token * prompt_tokens
        decode_s = output_tokens * (self.step_s + self.step_s_per_sequence * inputs)
        low, high = 0.0, 1.0 / prefill_s
        for _ in range(60):
            rate = (low + high) / 2
            stay_s = prefill_s + decode_s / (1 - rate * prefill_s)
            low, high = (rate, high) if rate * stay_s < inputs else (low, rate)
        return low


class Job:
    """One request: what it asks for, and what became of it."""

    __slots__ = (
        "at_s",
        "context_tokens",
        "done_s",
        "first_s",
        "output_tokens",
        "pool",
        "prompt_tokens",
    )

    def __init__(
        self, at_s: float, prompt_tokens: int, output_tokens: int, *, cached_tokens: int = 0
    ) -> None:
        self.at_s = at_s
        self.prompt_tokens = prompt_tokens  # to be computed
        self.output_tokens = output_tokens
        self.context_tokens = cached_tokens + prompt_tokens + output_tokens
        self.pool = 0  # of several that share GPUs
        self.first_s = math.inf  # its first token
        self.done_s = math.inf


class Replica:
    """Requests that share one engine, in virtual time."""

    def __init__(self, name: int, speeds: Speeds) -> None:
        self.name = name
        self.speeds = speeds
        self.waiting: deque[Job] = deque()
        self.waiting_tokens = 0
        self.in_flight = 0
        self.held_tokens = 0
        self.version = 0  # of what `next_s` was said for
        self._prefilling: Job | None = None
        self._prefill_left_s = 0.0
        self._decoding: list[tuple[float, int, Job]] = []
        self._tokens = 0.0  # that a stream would have if it had been here always
        self._updated_s = 0.0
        self._sequence = 0

    @property
    def kv_used_ratio(self) -> float:
        return min(1.0, self.held_tokens / self.speeds.kv_tokens)

    def take(self, job: Job, now_s: float) -> None:
        self._advance(now_s)
        self.in_flight += 1
        self.waiting.append(job)
        self.waiting_tokens += job.prompt_tokens
        self._begin_prefill()

    def next_s(self) -> float:
        """Return when something ends here, if nothing comes before."""
        if self._prefilling is not None:
            return self._updated_s + self._prefill_left_s
        if self._decoding:
            left = max(0.0, self._decoding[0][0] - self._tokens)
            return self._updated_s + left * self._step_s()
        return math.inf

    def turn(self, now_s: float) -> Job | None:
        """Let happen what `next_s` said. Returns the request that ended, if one did."""
        self._advance(now_s)
        ended = None
        if self._prefilling is not None:
            job, self._prefilling = self._prefilling, None
            job.first_s = now_s
            self._sequence += 1
            end = self._tokens + job.output_tokens
            heapq.heappush(self._decoding, (end, self._sequence, job))
        else:
            end, _, ended = heapq.heappop(self._decoding)
            self._tokens = max(self._tokens, end)
            ended.done_s = now_s
            self.held_tokens -= ended.context_tokens
            self.in_flight -= 1
        self._begin_prefill()
        return ended

    def _advance(self, now_s: float) -> None:
        elapsed_s, self._updated_s = now_s - self._updated_s, now_s
        if self._prefilling is not None:
            self._prefill_left_s = max(0.0, self._prefill_left_s - elapsed_s)
        elif self._decoding:
            self._tokens += elapsed_s / self._step_s()

    def _step_s(self) -> float:
        return self.speeds.step_s + self.speeds.step_s_per_sequence * len(self._decoding)

    def _begin_prefill(self) -> None:
        self.version += 1
        if self._prefilling is not None or not self.waiting:
            return
        room = self.speeds.kv_tokens - self.held_tokens
        if self.held_tokens and self.waiting[0].context_tokens > room:
            return
        job = self._prefilling = self.waiting.popleft()
        self.waiting_tokens -= job.prompt_tokens
        self.held_tokens += job.context_tokens
        self._prefill_left_s = self.speeds.prefill_s_per_token * job.prompt_tokens
