"""What the lab's replicas are asked: requests named by blocks of 512 tokens, and when.

Made from a trace by `from_trace`; `loadtest.policies.synthetic` makes those that no trace has. A
block's name stands for its tokens and all before them, as in the traces: equal names at the
beginning of two prompts are what a prefix cache can reuse. Blocks of other sizes are joined or
divided, and every name is a small whole number.

A request arrives at a time (open loop), or follows another after a think time (closed loop: users
who work through one session after the other).
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import msgspec

from loadtest.traces import Arrival, Trace, TraceError, block_ids

BLOCK_TOKENS: Final = 512
FIRST_S: Final = 60.0  # users of a closed loop begin within so long
BETWEEN_SESSIONS_S: Final = 5.0
EARLIER_MAX: Final = (
    4  # turns back whose end is a message boundary: each adds an answer, a question
)
EARLIER_KEPT: Final = 16  # prompts of a session that a later one may continue
TEXT_BLOCK_CHARACTERS: Final = 4 * BLOCK_TOKENS


class Job:
    """One request of a workload; what becomes of it in a run is a `Flight`."""

    __slots__ = (
        "at_s",
        "blocks",
        "earlier",
        "follows",
        "head_blocks",
        "index",
        "opener",
        "output_tokens",
        "prompt_tokens",
        "session",
        "think_s",
    )  # fmt: skip

    def __init__(
        self, index: int, session: int, blocks: tuple[int, ...], *, tokens: tuple[int, int]
    ) -> None:
        self.index = index
        self.session = session
        self.blocks = blocks
        self.prompt_tokens, self.output_tokens = tokens
        self.at_s = 0.0
        self.follows = -1  # the job after whose answer this one is sent; -1: it comes at `at_s`
        self.think_s = 0.0
        self.head_blocks = 0  # leading blocks that everybody shares
        self.earlier: tuple[int, ...] = ()  # where earlier prompts of the session end, in tokens
        self.opener = blocks[0]  # names the conversation: the same block for all of its turns


class Workload:
    """Jobs in the order of arrival. `ideal_hit` is the hit rate of one endless cache."""

    def __init__(self, name: str, jobs: Sequence[Job], *, closed_loop: bool) -> None:
        self.name = name
        self.jobs = tuple(jobs)
        self.closed_loop = closed_loop
        self.span_s = max((job.at_s for job in jobs), default=0.0)
        self.next_of = {job.follows: job for job in jobs if job.follows >= 0}
        self.ideal_tokens, self.ideal_hit = _endless_cache(self.jobs)

    def fitting(self, capacity_tokens: int) -> Workload:
        """Return the workload without what no replica of this capacity could ever hold."""
        blocks_max = capacity_tokens // BLOCK_TOKENS
        kept = [job for job in self.jobs if blocks_needed(job) <= blocks_max]
        if len(kept) == len(self.jobs):
            return self
        if not kept:
            raise TraceError(f"{self.name}: no request fits {capacity_tokens:,} tokens")
        return Workload(self.name, _renumbered(kept, self.jobs), closed_loop=self.closed_loop)


def blocks_needed(job: Job) -> int:
    """Return the blocks that the prompt and the whole answer take."""
    return len(job.blocks) - (-job.output_tokens // BLOCK_TOKENS)


def _renumbered(kept: Sequence[Job], before: Sequence[Job]) -> list[Job]:
    """Copy the jobs that are kept; whoever followed one that is gone follows its predecessor."""
    places = {job.index: place for place, job in enumerate(kept)}
    copies = []
    for place, job in enumerate(kept):
        copy = Job(place, job.session, job.blocks, tokens=(job.prompt_tokens, job.output_tokens))
        copy.at_s, copy.think_s = job.at_s, job.think_s
        copy.head_blocks, copy.earlier, copy.opener = job.head_blocks, job.earlier, job.opener
        follows = job.follows
        while follows >= 0 and follows not in places:
            follows = before[follows].follows
        copy.follows = places[follows] if follows >= 0 else -1
        copies.append(copy)
    return copies


def _endless_cache(jobs: Sequence[Job]) -> tuple[list[int], float]:
    """Return how many tokens of each job one endless cache would not have, and its hit rate.

    The rate is over the last nine tenths, as all figures of the lab are.
    """
    seen: set[int] = set()
    missing = []
    hit = total = 0
    for place, job in enumerate(jobs):
        known = next((i for i, block in enumerate(job.blocks) if block not in seen), None)
        depth = len(job.blocks) if known is None else known
        seen.update(job.blocks)
        cached = min(depth * BLOCK_TOKENS, job.prompt_tokens)
        missing.append(max(1, job.prompt_tokens - cached))
        if place >= len(jobs) // 10:
            hit += cached
            total += job.prompt_tokens
    return missing, hit / max(1, total)


class Names:
    """Small numbers for blocks: the same number for the same tokens after the same tokens."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[int, tuple[object, ...]], int] = {}

    def chain(self, parts: Iterable[tuple[object, ...]]) -> tuple[int, ...]:
        numbers, before = self._numbers, -1
        chain = []
        for part in parts:
            before = numbers.setdefault((before, part), len(numbers))
            chain.append(before)
        return tuple(chain)


def _parts(arrival: Arrival) -> Iterator[tuple[object, ...]]:
    """Yield what each block of 512 tokens is made of, in the trace's own names."""
    if arrival.texts:
        text = "\0".join(arrival.texts)
        for begin in range(0, len(text), TEXT_BLOCK_CHARACTERS):
            yield (text[begin : begin + TEXT_BLOCK_CHARACTERS],)
        return
    if arrival.block_tokens > BLOCK_TOKENS:
        pieces = arrival.block_tokens // BLOCK_TOKENS
        wanted = -(-arrival.input_tokens // BLOCK_TOKENS)
        for place in range(wanted):
            yield (next_id(arrival, place // pieces), place % pieces)
        return
    group = BLOCK_TOKENS // arrival.block_tokens
    ids = list(block_ids(arrival))
    for begin in range(0, len(ids), group):
        yield tuple(ids[begin : begin + group])


def next_id(arrival: Arrival, place: int) -> int:
    """Return the id at `place` of the prompt's blocks."""
    for first, count in arrival.runs:
        if place < count:
            return first + place
        place -= count
    raise IndexError(place)


class Earlier:
    """Which earlier prompts of its session each prompt continues: where they end, how they began.

    A conversation is named by the first block that is not everybody's, of its first prompt. The
    trace shows whole blocks; that the rest of an earlier prompt is repeated too is an assumption,
    and worth less than a block.
    """

    def __init__(self) -> None:
        self._prompts: dict[int, deque[tuple[int, int, int]]] = {}

    def add(self, job: Job) -> None:
        prompts = self._prompts.setdefault(job.session, deque(maxlen=EARLIER_KEPT))
        job.opener = job.blocks[min(job.head_blocks, len(job.blocks) - 1)]
        ends: list[int] = []
        for tokens, last_whole, opener in reversed(prompts):
            whole = tokens // BLOCK_TOKENS
            if tokens >= job.prompt_tokens or tokens in ends or not whole:
                continue
            if whole <= len(job.blocks) and job.blocks[whole - 1] == last_whole:
                ends.append(tokens)
                job.opener = opener
                if len(ends) == EARLIER_MAX:
                    break
        job.earlier = tuple(sorted(ends))
        whole = job.prompt_tokens // BLOCK_TOKENS
        last_whole = job.blocks[whole - 1] if whole else -1
        prompts.append((job.prompt_tokens, last_whole, job.opener))


class Picked(msgspec.Struct, frozen=True, kw_only=True):
    """Which part of a trace, and how a closed loop is driven."""

    limit: int = 0  # requests; 0: all
    users: int = 96
    turns_max: int = 40  # of a session
    prompt_tokens_max: int = 200_000
    think_s_max: float = 120.0
    seed: int = 1


def from_trace(trace: Trace, picked: Picked) -> Workload:
    """Return the workload in `trace`. Raises `TraceError` when nothing is left."""
    jobs = _closed(trace, picked) if trace.closed_loop else _open(trace, picked)
    if not jobs:
        raise TraceError(f"{trace.source}: no request is left")
    return Workload(trace.source, jobs, closed_loop=trace.closed_loop)


def _job(arrival: Arrival, index: int, session: int, names: Names) -> Job:
    blocks = names.chain(_parts(arrival))
    job = Job(index, session, blocks, tokens=(arrival.input_tokens, arrival.output_tokens))
    job.head_blocks = arrival.system_blocks * arrival.block_tokens // BLOCK_TOKENS
    return job


def _open(trace: Trace, picked: Picked) -> list[Job]:
    names, earlier, sessions = Names(), Earlier(), dict[str, int]()
    jobs: list[Job] = []
    for arrival in trace.arrivals[: picked.limit or None]:
        if arrival.input_tokens > picked.prompt_tokens_max:
            continue
        session = sessions.setdefault(arrival.session, len(sessions))
        job = _job(arrival, len(jobs), session, names)
        job.at_s = arrival.at_s - trace.arrivals[0].at_s
        earlier.add(job)
        jobs.append(job)
    return jobs


def _closed(trace: Trace, picked: Picked) -> list[Job]:
    """Deal the sessions out to the users, in an order of chance; each works through its own."""
    names, earlier = Names(), Earlier()
    order = list(range(len(trace.sessions)))
    random.Random(picked.seed).shuffle(order)
    last: dict[int, int] = {}
    jobs: list[Job] = []
    for place, session in enumerate(order):
        user = place % picked.users
        turns = [t for t in trace.sessions[session] if t.input_tokens <= picked.prompt_tokens_max]
        for turn, arrival in enumerate(turns[: picked.turns_max]):
            if picked.limit and len(jobs) == picked.limit:
                return jobs
            job = _job(arrival, len(jobs), session, names)
            job.follows = last.get(user, -1)
            job.at_s = FIRST_S * user / picked.users if job.follows < 0 else 0.0
            job.think_s = min(arrival.think_s, picked.think_s_max) if turn else BETWEEN_SESSIONS_S
            earlier.add(job)
            last[user] = job.index
            jobs.append(job)
    return jobs
