"""The prefix chain that the proxy would make of each job's prompt.

The lab has block names instead of octets, so a point of the chain is named by the block it lies in
and by how far; points lie where the proxy puts them: at growing depths, where the shared head ends,
where earlier prompts of the session ended (a message ends there), and at the end of the prompt.
With `every`, at every block: what a proxy would know that hashed everything.
"""

from __future__ import annotations

from functools import lru_cache

from loadtest.policies.router import mix
from loadtest.policies.workload import BLOCK_TOKENS, Job, Workload
from proxy.core import limits
from proxy.core.prefix import DEPTHS, PrefixChain

POINTS = ("chain", "every")
_MESSAGE_END = 1 << 62
_HOME = 1 << 61


@lru_cache(maxsize=8)
def chains_of(workload: Workload, points: str) -> list[PrefixChain]:
    """Return the chain of each job, by index."""
    return [_chain(job, every=points == "every") for job in workload.jobs]


def _chain(job: Job, *, every: bool) -> PrefixChain:
    tokens = job.prompt_tokens
    named: dict[int, int] = {}
    if every:
        for place in range(tokens // BLOCK_TOKENS):
            named[(place + 1) * BLOCK_TOKENS] = _inside(job, (place + 1) * BLOCK_TOKENS)
    else:
        for depth in DEPTHS:
            end = depth // limits.BYTES_PER_TOKEN
            if end > tokens:
                break
            named[end] = _inside(job, end)
        head = job.head_blocks * BLOCK_TOKENS
        if 0 < head <= tokens:
            named[head] = _inside(job, head)
    for end in (*job.earlier, tokens):
        if end % BLOCK_TOKENS:
            named[end] = _at_message_end(job, end)
        elif end:
            named[end] = _inside(job, end)
    ends = sorted(named)
    hashes = [named[end] for end in ends]
    octets = [end * limits.BYTES_PER_TOKEN for end in ends]
    home_key = mix(_HOME ^ job.opener)
    return PrefixChain(home_key, hashes, octets, tokens * limits.BYTES_PER_TOKEN)


def _inside(job: Job, end: int) -> int:
    """Name a point by its block: prompts that share the block share what leads up to here."""
    place, rest = divmod(end - 1, BLOCK_TOKENS)
    return mix(mix(job.blocks[min(place, len(job.blocks) - 1)]) + rest)


def _at_message_end(job: Job, end: int) -> int:
    """Name the end of a message: the next prompt of the session repeats it, in another block."""
    whole = end // BLOCK_TOKENS
    before = job.blocks[whole - 1] if whole else -1
    return mix(mix(_MESSAGE_END | job.session) ^ mix(before + 1) ^ end)
