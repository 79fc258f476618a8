"""What a trace says: who sends what, when; and which part of it is replayed.

Two kinds of load come out of a trace. *Open loop*: each request has an arrival time, and is sent
then whatever the server does; this is a population of strangers. *Closed loop*: a session's next
request waits for the last answer and a think time; this is an agent or a person. A trace is one or
the other, never a mixture, so that a figure can be read.

Prompts are named by blocks, not by text: an id stands for a block of tokens and everything before
it, so that equal ids at the beginning of two prompts are what a prefix cache can reuse. Ids are
kept as runs (first, count), since agents send thousands of them a request, mostly consecutive.

Pure: values in, values out; `loadtest.formats` reads the bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import msgspec

SHARED_HEAD_SHARE = (
    0.05  # an opening block in more requests than this is everybody's, not a session's
)


class TraceError(Exception):
    """The trace cannot be used; the text says where and what to do."""


class Arrival(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One request of a trace."""

    input_tokens: int
    output_tokens: int
    at_s: float = 0.0  # since the first arrival; open loop only
    think_s: float = 0.0  # since the session's last answer; closed loop only
    session: str = ""  # names what shares a prefix: a conversation, an agent's run
    block_tokens: int = 512
    runs: tuple[tuple[int, int], ...] = ()  # block ids of the prompt: first and count
    system_blocks: int = 0  # leading blocks that are the system message
    message_blocks: tuple[int, ...] = ()  # blocks of each further message; empty: one each
    texts: tuple[str, ...] = ()  # the real messages, where the trace has them

    @property
    def block_count(self) -> int:
        return sum(count for _, count in self.runs)


class Trace(msgspec.Struct, frozen=True, kw_only=True):
    """The requests to replay: `arrivals` (open loop) or `sessions` (closed loop), not both."""

    source: str
    kind: str  # mooncake, azure, agent, text
    arrivals: tuple[Arrival, ...] = ()
    sessions: tuple[tuple[Arrival, ...], ...] = ()

    @property
    def closed_loop(self) -> bool:
        return bool(self.sessions)

    @property
    def block_tokens(self) -> int:
        """One size for all: it comes with the format."""
        return next((arrival.block_tokens for arrival in in_sending_order(self)), 512)

    @property
    def request_count(self) -> int:
        return len(self.arrivals) + sum(len(turns) for turns in self.sessions)


class Selection(msgspec.Struct, frozen=True, kw_only=True):
    """Which part of a trace is replayed."""

    offset: int = 0  # requests (open loop) or sessions (closed loop) left out at the beginning
    limit: int = 0  # requests; 0: all
    duration_s: float = 0.0  # of the replay; 0: to the end
    speed: float = 1.0
    users: int = 1  # sessions at a time (closed loop)
    input_tokens_max: int = (
        0  # longer prompts are left out, since cutting them would fake prefix hits
    )
    output_tokens_max: int = 0  # longer answers are cut; 0: no limit
    output_tokens_scale: float = 1.0
    think_s_max: float = 120.0  # longer pauses are cut


def select(trace: Trace, selection: Selection) -> Trace:
    """Return the part of `trace` that is replayed. The same arguments give the same requests.

    Raises `TraceError` when nothing is left.
    """
    if trace.closed_loop:
        chosen = msgspec.structs.replace(trace, sessions=_select_sessions(trace, selection))
    else:
        chosen = msgspec.structs.replace(trace, arrivals=_select_arrivals(trace, selection))
    if chosen.request_count == 0:
        raise TraceError(
            f"{trace.source}: none of its {trace.request_count} requests is left; "
            "relax --offset, --limit, --duration or --max-input-tokens"
        )
    return chosen


def _select_arrivals(trace: Trace, selection: Selection) -> tuple[Arrival, ...]:
    kept = [a for a in trace.arrivals[selection.offset :] if _fits(a, selection)]
    if selection.limit:
        kept = kept[: selection.limit]
    start_s = kept[0].at_s if kept else 0.0
    arrivals = (_shaped(a, selection, a.at_s - start_s) for a in kept)
    end_s = selection.duration_s * selection.speed
    return tuple(a for a in arrivals if not end_s or a.at_s <= end_s)


def _select_sessions(trace: Trace, selection: Selection) -> tuple[tuple[Arrival, ...], ...]:
    """Limit by breadth within each group of `users` sessions, since those run side by side."""
    sessions = [
        tuple(_shaped(turn, selection, 0.0) for turn in turns if _fits(turn, selection))
        for turns in trace.sessions[selection.offset :]
    ]
    sessions = [turns for turns in sessions if turns]
    left = selection.limit or sum(map(len, sessions))
    kept: list[tuple[Arrival, ...]] = []
    for first in range(0, len(sessions), selection.users):
        group = sessions[first : first + selection.users]
        lengths = _share_out([len(turns) for turns in group], left)
        left -= sum(lengths)
        kept += [turns[:length] for turns, length in zip(group, lengths, strict=True) if length]
    return tuple(kept)


def _share_out(wanted: Sequence[int], available: int) -> list[int]:
    """Return how many turns each session gets when they take turns until `available` is spent."""
    given = [0] * len(wanted)
    while available > 0 and given != list(wanted):
        open_sessions = [i for i, want in enumerate(wanted) if given[i] < want]
        rounds = min(wanted[i] - given[i] for i in open_sessions)
        rounds = min(rounds, available // len(open_sessions))
        takers = open_sessions if rounds else open_sessions[:available]
        for i in takers:
            given[i] += rounds or 1
        available -= len(takers) * (rounds or 1)
    return given


def _fits(arrival: Arrival, selection: Selection) -> bool:
    return not selection.input_tokens_max or arrival.input_tokens <= selection.input_tokens_max


def _shaped(arrival: Arrival, selection: Selection, at_s: float) -> Arrival:
    output_tokens = max(1, round(arrival.output_tokens * selection.output_tokens_scale))
    if selection.output_tokens_max:
        output_tokens = min(output_tokens, selection.output_tokens_max)
    return msgspec.structs.replace(
        arrival,
        at_s=at_s,
        output_tokens=output_tokens,
        think_s=min(arrival.think_s, selection.think_s_max),
    )


def block_ids(arrival: Arrival) -> Iterator[int]:
    """Yield the ids of the prompt's blocks, in order."""
    for first, count in arrival.runs:
        yield from range(first, first + count)


def join_runs(runs: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Return `runs` with those joined that follow each other; equal prompts have equal runs."""
    joined: list[tuple[int, int]] = []
    for first, count in runs:
        if joined and first == joined[-1][0] + joined[-1][1]:
            joined[-1] = (joined[-1][0], joined[-1][1] + count)
        else:
            joined.append((first, count))
    return tuple(joined)


def shared_blocks(left: Arrival, right: Arrival) -> int:
    """Return how many leading blocks two prompts have in common."""
    shared = 0
    for (left_first, left_count), (right_first, right_count) in zip(
        left.runs, right.runs, strict=False
    ):
        if left_first != right_first:
            break
        shared += min(left_count, right_count)
        if left_count != right_count:
            break
    return shared


def in_sending_order(trace: Trace) -> Iterator[Arrival]:
    """Yield all requests: by arrival, or turn by turn of the sessions (as if all took as long)."""
    yield from trace.arrivals
    for turn in range(max(map(len, trace.sessions), default=0)):
        yield from (turns[turn] for turns in trace.sessions if turn < len(turns))


def reusable_share(arrivals: Iterable[Arrival], skip_count: int) -> float | None:
    """Return the token hit rate of one endless prefix cache, after the first `skip_count` requests.

    No router and no cache can do better on these requests. None where the prompts are text.
    """
    seen: set[int] = set()
    reused_tokens = total_tokens = 0
    for position, arrival in enumerate(arrivals):
        if not arrival.runs:
            return None
        ids = list(block_ids(arrival))
        known = next((i for i, block_id in enumerate(ids) if block_id not in seen), len(ids))
        seen.update(ids)
        if position >= skip_count:
            reused_tokens += min(known * arrival.block_tokens, arrival.input_tokens)
            total_tokens += arrival.input_tokens
    return reused_tokens / total_tokens if total_tokens else None
