"""Continuous batching in virtual time: which tokens the next step computes, and what comes of it.

The engine takes turns: `plan` chooses the work of one step and says when it will be done, the
caller waits until then, `finish` applies it. Each step serves all decoding sequences first, one
token each, then prefill chunks of admitted sequences, then admits from the waiting queue, all under
one budget of tokens: prefill never starves decode, it only makes its steps longer. (SGLang mixes
them only with --enable-mixed-chunk; by default its prefill goes alone and first. Here both dialects
mix.) The queue is first come, first served; ranks, where priorities are on, go before that.

KV blocks are taken as tokens are computed. When a running sequence finds none, the newest running
one (the lowest ranked, then newest) is preempted: its blocks are let go, it returns to its place in
the queue and is recomputed later, from the prefix cache where that still holds it. The oldest
sequence is never preempted, and none is admitted that could not fit alone, so all of them finish.

Nothing here reads a clock or waits; time is an argument, in seconds of the simulated machine.
"""

from __future__ import annotations

import enum
import heapq
from collections import deque
from typing import NamedTuple

from backends.simulator.kv_cache import KvCache, extend_chain
from backends.simulator.profiles import Profile
from backends.simulator.tally import Tally
from backends.simulator.tokens import (
    TOKEN_BYTES,
    WORD_BYTES,
    WORDS,
    StopFinder,
    WordSource,
    count_tokens,
)


class Phase(enum.Enum):
    """Where a sequence stands."""

    INTAKE = enum.auto()
    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


class Sequence:
    """One prompt and the answer that grows from it."""

    __slots__ = (
        "adapter",
        "cached_tokens",
        "chain",
        "computed_tokens",
        "first_token_s",
        "generated_tokens",
        "held_blocks",
        "last_token_s",
        "max_tokens",
        "natural_end",
        "order",
        "outbox",
        "phase",
        "planned_s",
        "preemptions",
        "prompt_tokens",
        "rank",
        "ready_s",
        "root",
        "sealed_blocks",
        "stops",
        "streaming",
        "submitted_s",
        "tokens",
        "total_tokens",
        "unsent",
        "wanted_blocks",
        "words",
    )

    def __init__(self, prompt: bytes, *, max_tokens: int, words: WordSource) -> None:
        # Of the request:
        self.tokens = bytearray(prompt)
        self.words = words
        self.max_tokens = max_tokens
        self.natural_end = 0  # tokens after which the answer ends by itself; 0: never
        self.stops: StopFinder | None = None
        self.rank = 0  # lower goes first
        self.adapter = ""
        self.root = 0
        self.streaming = False
        self.outbox: object = None  # the caller's; carried along
        # Of its course:
        self.prompt_tokens = self.total_tokens = count_tokens(prompt)
        self.chain: list[int] = []  # hashes of all full blocks of the tokens so far
        self.phase = Phase.INTAKE
        self.order = 0
        self.computed_tokens = 0
        self.generated_tokens = 0
        self.cached_tokens = -1  # not known before the first admission
        self.held_blocks = 0
        self.sealed_blocks = 0
        self.wanted_blocks = 0  # what admission lacked when it last failed
        self.preemptions = 0
        self.unsent = ""
        self.submitted_s = self.ready_s = self.last_token_s = 0.0
        self.planned_s = self.first_token_s = 0.0  # its first step begins, and its prefill ends


class Emission(NamedTuple):
    """Text that a step brought forth; the last one of a sequence has the reason of its end."""

    sequence: Sequence
    text: str
    tokens: int
    finish_reason: str | None
    stop: str | None


class Step(NamedTuple):
    """Planned work: for each sequence how many tokens are computed."""

    work: list[tuple[Sequence, int]]
    end_s: float
    duration_s: float
    prefill_tokens: int


class Limits(NamedTuple):
    """Of one step and one stream."""

    sequences_max: int
    batched_tokens_max: int
    model_tokens_max: int
    stream_interval: int = 1


class Clockwork:
    """The scheduler of one engine."""

    def __init__(self, profile: Profile, cache: KvCache, limits: Limits, tally: Tally) -> None:
        self.profile = profile
        self.cache = cache
        self.limits = limits
        self.tally = tally
        self.running: list[Sequence] = []
        self.slowdown = 1.0  # a fault: all steps take so many times as long
        self._intake: deque[Sequence] = deque()
        self._intake_free_s = 0.0
        self._waiting: list[tuple[int, int, Sequence]] = []
        self._aborted: list[Sequence] = []
        self._submitted = 0

    @property
    def waiting_count(self) -> int:
        """Requests that are here but not running."""
        return len(self._waiting) + len(self._intake)

    @property
    def waiting(self) -> list[Sequence]:
        """Those that are here but not running."""
        return [*self._intake, *(entry[2] for entry in self._waiting)]

    @property
    def busy(self) -> bool:
        """Whether any sequence is here, in whatever phase."""
        return bool(self.running or self._waiting or self._intake)

    @property
    def waiting_uncached_tokens(self) -> int:
        """Prompt tokens that waiting sequences will have computed, by what is cached now."""
        total = 0
        for sequence in self.waiting:
            hits = self.cache.match(sequence.chain, len(sequence.chain))
            total += sequence.total_tokens - hits * self.cache.block_tokens
        return total

    def fits(self, prompt_tokens: int, max_tokens: int) -> bool:
        """Return whether the pool could hold the sequence if it were alone."""
        # The last token is never computed, so it needs no room.
        blocks = -(-(prompt_tokens + max_tokens - 1) // self.cache.block_tokens)
        return blocks <= self.cache.blocks_max

    def submit(self, sequence: Sequence, now_s: float, spent_s: float = 0.0) -> None:
        """Take a sequence into the intake, which began `spent_s` ago; it is seen by `plan` once
        that is done, never before now."""
        assert self.fits(sequence.prompt_tokens, sequence.max_tokens)
        extend_chain(sequence.chain, sequence.root, sequence.tokens, self.cache.block_tokens)
        self._submitted += 1
        sequence.order = self._submitted
        sequence.submitted_s = now_s - spent_s
        start_s = max(now_s - spent_s, self._intake_free_s)
        self._intake_free_s = start_s + self.profile.intake_work_s(sequence.prompt_tokens)
        sequence.ready_s = max(now_s, self._intake_free_s + self.profile.intake_s)
        self._intake.append(sequence)
        self.tally.requests[sequence.streaming] += 1

    def abort(self, sequence: Sequence) -> bool:
        """Mark a sequence; it and its blocks go before the next step. False: it has ended."""
        if sequence.phase is Phase.FINISHED:
            return False
        self._aborted.append(sequence)
        return True

    def abort_all(self) -> None:
        """Mark every sequence."""
        self._aborted += [*self._intake, *(entry[2] for entry in self._waiting), *self.running]

    def reap(self) -> list[Emission]:
        """Remove the marked sequences; return their ends."""
        if not self._aborted:
            return []
        emissions = []
        for sequence in self._aborted:
            if sequence.phase is Phase.FINISHED:
                continue
            self._let_go(sequence)
            sequence.phase = Phase.FINISHED
            self.tally.finished["abort"] += 1
            emissions.append(Emission(sequence, sequence.unsent, 0, "abort", None))
        self._aborted.clear()
        self.running = [s for s in self.running if s.phase is Phase.RUNNING]
        self._intake = deque(s for s in self._intake if s.phase is Phase.INTAKE)
        self._waiting = [entry for entry in self._waiting if entry[2].phase is Phase.WAITING]
        heapq.heapify(self._waiting)
        return emissions

    def retract_all(self) -> None:
        """Send every running sequence back to the queue, to be recomputed."""
        for sequence in self.running:
            self._preempt(sequence)
        self.running = []

    def next_ready_s(self, now_s: float) -> float | None:
        """Return when the next step can begin; None while nothing is here."""
        if self.running or self._waiting:
            return now_s
        return max(now_s, self._intake[0].ready_s) if self._intake else None

    def plan(self, now_s: float) -> Step | None:
        """Return the step that begins at `now_s`; None when there is nothing to compute."""
        while self._intake and self._intake[0].ready_s <= now_s:
            sequence = self._intake.popleft()
            sequence.phase = Phase.WAITING
            heapq.heappush(self._waiting, (sequence.rank, sequence.order, sequence))
        preemptions = self.tally.preemptions
        work = self._plan_decodes()
        self._plan_prefills(work, self.limits.batched_tokens_max - len(work))
        if preemptions == self.tally.preemptions:  # else there is no room for more
            self._plan_admissions(work, now_s)
        if not work:
            return None
        # A preemption may have taken back what was planned before it.
        work = [(s, count) for s, count in work if s.phase is Phase.RUNNING]
        batch = context_tokens = prefill_tokens = 0
        chunks = []
        for sequence, count in work:
            start = sequence.computed_tokens
            if count == 1 and sequence.generated_tokens:
                batch += 1
                context_tokens += start
            else:
                chunks.append((start, start + count))
                prefill_tokens += count
        duration_s = self.slowdown * self.profile.step_s(batch, context_tokens, chunks)
        return Step(work, now_s + duration_s, duration_s, prefill_tokens)

    def finish(self, step: Step) -> list[Emission]:
        """Apply a step that has come to its end; return what it brought forth."""
        emissions: list[Emission] = []
        block_tokens = self.cache.block_tokens
        self.tally.steps += 1
        self.tally.computed_tokens += step.prefill_tokens
        if step.prefill_tokens:
            self.tally.prefill_busy_s += step.duration_s
        ended = False
        for sequence, count in step.work:
            if sequence.phase is not Phase.RUNNING:
                continue
            sequence.computed_tokens += count
            if sequence.computed_tokens // block_tokens > sequence.sealed_blocks:
                self._seal(sequence)
            if sequence.computed_tokens == sequence.total_tokens:
                ended |= self._sample(sequence, step.end_s, emissions)
        if ended:
            self.running = [s for s in self.running if s.phase is Phase.RUNNING]
        return emissions

    def _plan_decodes(self) -> list[tuple[Sequence, int]]:
        work: list[tuple[Sequence, int]] = []
        block_tokens = self.cache.block_tokens
        for sequence in tuple(self.running):
            if sequence.computed_tokens + 1 != sequence.total_tokens:
                continue
            if sequence.phase is not Phase.RUNNING:
                continue
            full = sequence.computed_tokens == sequence.held_blocks * block_tokens
            if full and not self._reserve(sequence, 1):
                continue
            work.append((sequence, 1))
        return work

    def _plan_prefills(self, work: list[tuple[Sequence, int]], budget: int) -> None:
        for sequence in tuple(self.running):
            missing = sequence.total_tokens - sequence.computed_tokens
            if missing == 1 or sequence.phase is not Phase.RUNNING:
                continue
            count = min(missing, budget)
            if count <= 0:
                return
            if self._reserve(sequence, count):
                work.append((sequence, count))
                budget -= count

    def _plan_admissions(self, work: list[tuple[Sequence, int]], now_s: float) -> None:
        budget = self.limits.batched_tokens_max - sum(count for _, count in work)
        while self._waiting and budget > 0 and len(self.running) < self.limits.sequences_max:
            sequence = self._waiting[0][2]
            # While the head of the queue lacks blocks its prefix is not looked up in every step.
            if self.running and self.cache.available_blocks < sequence.wanted_blocks:
                return
            count = self._admit(sequence, budget)
            if not count:
                return
            heapq.heappop(self._waiting)
            self._account_admission(sequence, now_s)
            work.append((sequence, count))
            budget -= count

    def _admit(self, sequence: Sequence, budget: int) -> int:
        """Take the cached prefix and blocks for the first chunk; 0 when they are not there."""
        cache = self.cache
        # The last token is always computed: its answer is wanted, not its KV.
        hits = cache.match(sequence.chain, (sequence.total_tokens - 1) // cache.block_tokens)
        start = hits * cache.block_tokens
        count = min(sequence.total_tokens - start, budget)
        blocks = -(-(start + count) // cache.block_tokens) - hits
        wanted = blocks + cache.idle_count(sequence.chain, hits)
        if wanted > cache.available_blocks:
            sequence.wanted_blocks = wanted
            return 0
        cache.hold(sequence.chain, hits)
        cache.take(blocks)
        sequence.phase = Phase.RUNNING
        sequence.computed_tokens = start
        sequence.sealed_blocks = hits
        sequence.held_blocks = hits + blocks
        self.running.append(sequence)
        return count

    def _account_admission(self, sequence: Sequence, now_s: float) -> None:
        if sequence.cached_tokens >= 0:
            return  # it was here before: engines count a request's hits once
        tally = self.tally
        sequence.cached_tokens = sequence.computed_tokens
        tally.queried_tokens += sequence.prompt_tokens
        tally.cached_tokens += sequence.cached_tokens
        tally.prompt_tokens[sequence.streaming] += sequence.prompt_tokens
        tally.queue_time.observe(max(0.0, now_s - sequence.ready_s))
        sequence.planned_s = now_s

    def _reserve(self, sequence: Sequence, count: int) -> bool:
        """Take the blocks for `count` more tokens, preempting others; False: it was preempted."""
        cache = self.cache
        end_tokens = sequence.computed_tokens + count
        blocks = -(-end_tokens // cache.block_tokens) - sequence.held_blocks
        while blocks > cache.available_blocks:
            victim = max(self.running, key=lambda other: (other.rank, other.order))
            self._preempt(victim)
            self.running.remove(victim)
            if victim is sequence:
                return False
        cache.take(blocks)
        sequence.held_blocks += blocks
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._let_go(sequence)
        sequence.computed_tokens = 0
        sequence.wanted_blocks = 0
        sequence.preemptions += 1
        sequence.phase = Phase.WAITING
        self.tally.preemptions += 1
        heapq.heappush(self._waiting, (sequence.rank, sequence.order, sequence))

    def _let_go(self, sequence: Sequence) -> None:
        private_blocks = sequence.held_blocks - sequence.sealed_blocks
        self.cache.release(sequence.chain, sequence.sealed_blocks, private_blocks)
        sequence.held_blocks = sequence.sealed_blocks = 0

    def _seal(self, sequence: Sequence) -> None:
        block_tokens = self.cache.block_tokens
        start, end = sequence.sealed_blocks, sequence.computed_tokens // block_tokens
        if end > len(sequence.chain):
            extend_chain(sequence.chain, sequence.root, sequence.tokens, block_tokens)
        block_bytes = block_tokens * TOKEN_BYTES
        tokens = bytes(sequence.tokens[start * block_bytes : end * block_bytes])
        self.cache.seal(sequence.chain, start, end, tokens)
        sequence.sealed_blocks = end

    def _sample(self, sequence: Sequence, now_s: float, emissions: list[Emission]) -> bool:
        """Append one generated token; return whether it is the last."""
        tally = self.tally
        word = sequence.words.next_word()
        sequence.tokens += WORD_BYTES[word]
        sequence.total_tokens += 1
        sequence.generated_tokens += 1
        generated = sequence.generated_tokens
        tally.generation_tokens[sequence.streaming] += 1
        if generated == 1:
            sequence.first_token_s = now_s
            tally.time_to_first_token.observe(now_s - sequence.submitted_s)
        else:
            tally.inter_token_latency.observe(now_s - sequence.last_token_s)
        sequence.last_token_s = now_s

        text, stop, reason = WORDS[word], None, None
        if sequence.stops is not None:
            text, stop = sequence.stops.feed(text)
        if stop is not None or generated == sequence.natural_end:
            reason = "stop"
        elif (
            generated >= sequence.max_tokens
            or sequence.total_tokens >= self.limits.model_tokens_max
        ):
            reason = "length"
        if reason is not None:
            if sequence.stops is not None and stop is None:
                text += sequence.stops.flush()
            self._retire(sequence, reason, now_s)
        elif (generated - 1) % self.limits.stream_interval:
            sequence.unsent += text
            return False
        emissions.append(Emission(sequence, sequence.unsent + text, generated, reason, stop))
        sequence.unsent = ""
        return reason is not None

    def _retire(self, sequence: Sequence, reason: str, now_s: float) -> None:
        tally = self.tally
        self._let_go(sequence)
        sequence.phase = Phase.FINISHED
        tally.finished[reason] += 1
        tally.end_to_end.observe(now_s - sequence.submitted_s)
        tally.prompt_sizes.observe(sequence.prompt_tokens)
        tally.generation_sizes.observe(sequence.generated_tokens)
        tally.prefill_time.observe(sequence.first_token_s - sequence.planned_s)
        tally.prefill_sizes.observe(sequence.prompt_tokens - sequence.cached_tokens)
