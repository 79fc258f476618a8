"""Workloads that no published trace has, each at one end of what a router may meet.

`shared-head`: conversations of a few turns, all under one system prompt of 2,048 tokens (8 KB): the
head is everybody's, so that it must not decide, and the turns are worth following.
`nothing-shared`: every prompt is its own, with lengths as chat services see them; here affinity can
gain nothing and must cost nothing.

Both are drawn from named distributions with a fixed seed. Arrivals are a Poisson process; the rate
does not matter, since a cell compresses time to the load that it wants.
"""

from __future__ import annotations

import random
from typing import Final

from loadtest.policies.workload import BLOCK_TOKENS, Earlier, Job, Workload

HEAD_BLOCKS: Final = 4
TURNS_MEAN: Final = 6.0
THINK_MEAN_S: Final = 30.0
# Long enough for some turns of each conversation; it begins when as many end as begin.
WINDOW_S: Final = 120.0
RAMP_S: Final = 10 * THINK_MEAN_S
# Log-normal lengths with the medians and spreads of the Azure 2023 chat trace (Patel et al. 2024):
# prompts of 1,020 tokens in the median and 4,083 at p95, answers of 129 and 451.
PROMPT: Final = (1020.0, 0.84)
ANSWER: Final = (129.0, 0.76)
QUESTION: Final = (400.0, 0.8)  # tokens that a turn adds to the answer before it
TOKENS_MAX: Final = 32_000


def shared_head(requests: int, seed: int = 1) -> Workload:
    """Return conversations that begin alike, by the time of their turns."""
    chance = random.Random(seed)
    turns: list[tuple[float, int, int, int, int]] = []  # at, session, turn, prompt, answer
    begin_s = 0.0
    session = 0
    conversations_per_s = requests / WINDOW_S / TURNS_MEAN
    while begin_s < RAMP_S + 1.5 * WINDOW_S:
        begin_s += chance.expovariate(conversations_per_s)
        at_s, prompt = begin_s, HEAD_BLOCKS * BLOCK_TOKENS
        for turn in range(1 + int(chance.expovariate(1.0 / (TURNS_MEAN - 1.0)))):
            prompt += _length(chance, QUESTION)
            answer = _length(chance, ANSWER)
            turns.append((at_s, session, turn, prompt, answer))
            prompt += answer
            at_s += chance.expovariate(1.0 / THINK_MEAN_S)
        session += 1
    turns = sorted(turn for turn in turns if turn[0] >= RAMP_S)[:requests]
    earlier = Earlier()
    jobs = []
    for index, (at_s, owner, _, prompt, answer) in enumerate(turns):
        whole = prompt // BLOCK_TOKENS
        blocks = list(range(HEAD_BLOCKS))
        blocks += [_name(owner, place, 0) for place in range(HEAD_BLOCKS, whole)]
        if prompt % BLOCK_TOKENS:  # the last one is partial: it is never repeated
            blocks.append(_name(owner, whole, prompt))
        job = Job(index, owner, tuple(blocks), tokens=(prompt, answer))
        job.at_s = at_s - turns[0][0]
        job.head_blocks = HEAD_BLOCKS
        earlier.add(job)
        jobs.append(job)
    return Workload("shared-head", jobs, closed_loop=False)


def _name(session: int, place: int, prompt: int) -> int:
    return (session + 1) << 40 | place << 20 | prompt


def nothing_shared(requests: int, seed: int = 1) -> Workload:
    """Return prompts that have nothing in common."""
    chance = random.Random(seed)
    at_s = 0.0
    jobs = []
    for index in range(requests):
        prompt, answer = _length(chance, PROMPT), _length(chance, ANSWER)
        blocks = tuple((index + 1) << 20 | place for place in range(-(-prompt // BLOCK_TOKENS)))
        job = Job(index, index, blocks, tokens=(prompt, answer))
        job.at_s = at_s
        jobs.append(job)
        at_s += chance.expovariate(1.0)
    return Workload("nothing-shared", jobs, closed_loop=False)


def _length(chance: random.Random, distribution: tuple[float, float]) -> int:
    median, spread = distribution
    return min(TOKENS_MAX, max(1, round(median * chance.lognormvariate(0.0, spread))))


SYNTHETIC: Final = {"shared-head": shared_head, "nothing-shared": nothing_shared}
