"""What is sent in a cell: which requests of a trace, and by how much its time is compressed.

*Load* is relative to what round robin can carry: the uncached tokens a second that its placement
leaves to compute, over those that the saturated replicas were seen to compute. So a load means the
same for every prompt mix, and 1.1 is more than round robin can ever finish.

Repeats take other sessions of the chat trace, chosen by a hash of the session, so that no repeat
knows a prompt of another. The agents' trace has few prompts that are short enough: all of them
take part, and a repeat begins elsewhere in it.

*Coding agents* are recorded in a closed loop. They are opened here: a turn is due when the one
before would have been answered by a machine at rest, and the recorded think time is over. Agents do
not slow down then when a router makes them wait, which is what open loop means.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Sequence
from typing import Final

import msgspec

from loadtest.formats import read_trace
from loadtest.policies.caches import Caches
from loadtest.policies.workload import BLOCK_TOKENS, Job, Picked, Workload, from_trace
from loadtest.traces import Arrival, Trace, TraceError

CONVERSATION, AGENTS, UNIQUE = "conversation", "agents", "unique"
WORKLOADS: Final = (CONVERSATION, AGENTS, UNIQUE)
AGENT_USERS: Final = 64
AGENT_THINK_S_MAX: Final = 60.0
AGENT_FIRST_TOKEN_S: Final = 0.5  # of a machine at rest
AGENT_TOKEN_S: Final = 0.01
BETWEEN_SESSIONS_S: Final = 5.0
SCALE_MAX: Final = 400.0
UNIQUE_FIRST: Final = 1 << 62  # no trace has ids as high


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """Which requests take part."""

    conversation: str = "conversation"
    agents: str = ""
    sessions_share: int = 4  # one session in so many
    input_tokens_max: int = 30_000
    output_tokens_max: int = 64


def arrivals_of(choice: Choice, workload: str, repeat: int) -> Trace:
    """Return the requests, in the time of the trace. Raises `TraceError`."""
    if workload not in WORKLOADS:
        raise TraceError(f"no workload {workload!r}; there are {', '.join(WORKLOADS)}")
    source = choice.agents if workload == AGENTS else choice.conversation
    if not source:
        raise TraceError(f"{workload}: no trace is named; give --agents-trace")
    trace = _short(read_trace(source), choice)
    kept = (
        opened(trace, first=repeat * AGENT_USERS).arrivals
        if workload == AGENTS
        else _part(trace.arrivals, repeat % choice.sessions_share, choice.sessions_share)
    )
    if not kept:
        raise TraceError(f"{source}: no request of up to {choice.input_tokens_max} tokens is left")
    if workload == UNIQUE:
        kept = tuple(_unique(arrival, place) for place, arrival in enumerate(kept))
    begin_s = kept[0].at_s
    kept = tuple(msgspec.structs.replace(one, at_s=one.at_s - begin_s) for one in kept)
    return msgspec.structs.replace(trace, arrivals=kept, sessions=())


def paced_by(workload: str) -> str:
    """Return the workload whose capacity counts: unique prompts are as long as the chat trace's."""
    return CONVERSATION if workload == UNIQUE else workload


def _short(trace: Trace, choice: Choice) -> Trace:
    """Leave long prompts out, and cut long answers: a prompt cut short would share too much."""

    def kept(arrivals: Sequence[Arrival]) -> tuple[Arrival, ...]:
        return tuple(
            msgspec.structs.replace(a, output_tokens=min(a.output_tokens, choice.output_tokens_max))
            for a in arrivals
            if a.input_tokens <= choice.input_tokens_max
        )

    sessions = tuple(turns for one in trace.sessions if (turns := kept(one)))
    return msgspec.structs.replace(trace, arrivals=kept(trace.arrivals), sessions=sessions)


def _part(arrivals: Sequence[Arrival], part: int, parts: int) -> tuple[Arrival, ...]:
    """Return the arrivals of one session in so many."""
    return tuple(a for a in arrivals if zlib.crc32(a.session.encode()) % parts == part)


def _unique(arrival: Arrival, place: int) -> Arrival:
    """Return a request of the same lengths that shares nothing with any other."""
    return msgspec.structs.replace(
        arrival,
        runs=((UNIQUE_FIRST + (place << 24), arrival.block_count),),
        session=f"unique-{place}",
        system_blocks=0,
        message_blocks=(),
    )


def opened(trace: Trace, users: int = AGENT_USERS, first: int = 0) -> Trace:
    """Return a closed loop's sessions as arrivals: each user works through every `users`-th.

    The sessions from place `first` on come before the others.
    """
    if not trace.closed_loop:
        return trace
    begin = first % len(trace.sessions)
    sessions = (*trace.sessions[begin:], *trace.sessions[:begin])
    arrivals = []
    for user in range(min(users, len(sessions))):
        at_s = BETWEEN_SESSIONS_S * user
        for turn in itertools.chain.from_iterable(sessions[user::users]):
            at_s += min(turn.think_s, AGENT_THINK_S_MAX)
            arrivals.append(msgspec.structs.replace(turn, at_s=at_s))
            at_s += AGENT_FIRST_TOKEN_S + turn.output_tokens * AGENT_TOKEN_S
    arrivals.sort(key=lambda arrival: (arrival.at_s, arrival.session))
    return msgspec.structs.replace(trace, arrivals=tuple(arrivals), sessions=())


def within(trace: Trace, scale: float, seconds: float) -> Trace:
    """Return the requests that are sent in so many seconds."""
    kept = tuple(a for a in trace.arrivals if a.at_s / scale < seconds)
    return msgspec.structs.replace(trace, arrivals=kept)


def workload_of(trace: Trace) -> Workload:
    return from_trace(trace, Picked(prompt_tokens_max=10**9))


def round_robin_tokens(jobs: Sequence[Job], replicas: int, cache_tokens: int) -> list[int]:
    """Return the uncached tokens of each request under round robin, from cold caches."""
    caches = Caches(replicas, cache_tokens // BLOCK_TOKENS)
    found = []
    for place, job in enumerate(jobs):
        replica = place % replicas
        depth = caches.depth(replica, job.blocks)
        caches.insert(replica, job.blocks)
        found.append(max(1, job.prompt_tokens - depth * BLOCK_TOKENS))
    return found


def scale_for(
    trace: Trace, tokens_per_s: float, *, seconds: float, replicas: int, cache_tokens: int
) -> float:
    """Return the compression at which round robin has so many uncached tokens a second to compute.

    Which requests come does not depend on the scale, only how many of them do: the sum over the
    first ones is made once. Raises `TraceError` when the trace is too short.
    """
    jobs = workload_of(trace).jobs
    sums = list(itertools.accumulate(round_robin_tokens(jobs, replicas, cache_tokens)))
    wanted = tokens_per_s * seconds
    if sums[-1] < wanted:
        raise TraceError(
            f"{trace.source}: its {len(jobs):,} requests leave {sums[-1]:,} tokens to compute, and "
            f"{wanted:,.0f} are needed; take more sessions (--sessions-share) or fewer --seconds"
        )
    last = next(place for place, total in enumerate(sums) if total >= wanted)
    return max(1 / SCALE_MAX, min(SCALE_MAX, trace.arrivals[last].at_s / seconds))
