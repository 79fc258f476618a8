"""The replay: sends a trace's requests when they are due and writes down what came back.

*Open loop*: when a request is due depends on the trace and the clock, never on an answer. A server
that stalls gets the next requests all the same, as it would from strangers; a client that waited
would spare it exactly the load that hurts. Each request's body is made before it is due.

*Closed loop*: a session's turn is due when the last answer is complete and the think time is over;
`users` sessions go on at a time, and the next session takes the place of one that ended.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Protocol

import msgspec

from loadtest.client import RequestError
from loadtest.measure import UNKNOWN_REPLICA, Outcome
from loadtest.prompts import PromptWriter
from loadtest.traces import Arrival, Trace
from loadtest.wire import AnswerReader, error_text

USER_START_SPREAD_S = 60.0  # the users of a closed loop begin over this time, before --speed
REPLICA_HEADER = "x-doherty-replica"
SESSION_HEADER = "x-session-id"
SESSION_CHARACTERS_MAX = 255
PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}

_NOT_VISIBLE = re.compile(r"[^!-~]")

Post = Callable[[str, bytes, str], Awaitable[AnswerReader]]


class Pacing(msgspec.Struct, frozen=True, kw_only=True):
    """How the requests are sent."""

    speed: float = 1.0  # 2: arrivals and think times in half the time
    users: int = 1
    duration_s: float = 0.0  # closed loop: no turn begins after it; 0: no limit
    timeout_s: float = 600.0  # for a whole answer
    concurrency_max: int = 4096  # open requests; a bound on this client, not a model of clients
    session_header: bool = False


class Clock(Protocol):
    """Time, so that tests can have another."""

    def now_s(self) -> float: ...

    async def sleep_until(self, when_s: float) -> None: ...


class WallClock:
    """Seconds since its own beginning."""

    def __init__(self) -> None:
        self._start_s = time.perf_counter()

    def now_s(self) -> float:
        return time.perf_counter() - self._start_s

    async def sleep_until(self, when_s: float) -> None:
        # Also when nothing is left to wait for: answers must be read between two requests.
        await asyncio.sleep(max(0.0, when_s - self.now_s()))


class Replay:
    """One run over a trace: `sent` in the order of sending, `outcomes` in the order of their ends.

    An outcome's index is its request's place in `sent`.
    """

    def __init__(self, post: Post, writer: PromptWriter, pacing: Pacing, clock: Clock) -> None:
        self.outcomes: list[Outcome] = []
        self.sent: list[Arrival] = []
        self._post = post
        self._writer = writer
        self._pacing = pacing
        self._clock = clock
        self._open_count = 0
        self._path = PATHS[writer.style.api]

    async def run(self, trace: Trace) -> None:
        """Send everything and wait for the answers. Cancelled, it notes what was open."""
        if trace.closed_loop:
            await self._run_closed(trace.sessions)
        else:
            await self._run_open(trace.arrivals)

    async def _run_open(self, arrivals: Sequence[Arrival]) -> None:
        start_s = self._clock.now_s()
        async with asyncio.TaskGroup() as requests:
            for arrival in arrivals:
                body = self._writer.body(arrival)
                due_s = start_s + arrival.at_s / self._pacing.speed
                await self._clock.sleep_until(due_s)
                requests.create_task(
                    self._request(arrival, body, due_s), name=f"request {len(self.sent)}"
                )
                await asyncio.sleep(0)  # it goes out before the next body is made

    async def _run_closed(self, sessions: Sequence[Sequence[Arrival]]) -> None:
        start_s = self._clock.now_s()
        spread_s = USER_START_SPREAD_S / self._pacing.speed
        waiting = iter(sessions)
        async with asyncio.TaskGroup() as users:
            for user in range(min(self._pacing.users, len(sessions))):
                begin_s = start_s + spread_s * user / self._pacing.users
                users.create_task(self._user(waiting, start_s, begin_s), name=f"user {user}")

    async def _user(
        self, waiting: Iterator[Sequence[Arrival]], start_s: float, begin_s: float
    ) -> None:
        end_s = start_s + self._pacing.duration_s if self._pacing.duration_s else float("inf")
        due_s = begin_s
        # One iterator for all users: whoever is free takes the next session.
        for turns in waiting:
            for place, arrival in enumerate(turns):
                if place:
                    due_s = self._clock.now_s() + arrival.think_s / self._pacing.speed
                if due_s >= end_s:
                    return
                body = self._writer.body(arrival)
                await self._clock.sleep_until(due_s)
                await self._request(arrival, body, due_s)
            due_s = self._clock.now_s()

    async def _request(self, arrival: Arrival, body: bytes, due_s: float) -> None:
        """Send one request and append its outcome, whatever becomes of it."""
        index = len(self.sent)
        self.sent.append(arrival)
        sent_s = self._clock.now_s()
        if self._open_count >= self._pacing.concurrency_max:
            detail = f"{self._open_count} requests open; raise --concurrency-max"
            self._note(index, due_s, sent_s, None, ("client_limit", detail))
            return
        reader: AnswerReader | None = None
        failure = ("interrupted", "the replay ended before the answer")
        self._open_count += 1
        headers = session_line(arrival.session) if self._pacing.session_header else ""
        try:
            async with asyncio.timeout(self._pacing.timeout_s):
                reader = await self._post(self._path, body, headers)
            failure = judge(reader)
        except RequestError as error:
            failure = error.kind, error.detail
        except TimeoutError:
            failure = "timeout", f"no whole answer in {self._pacing.timeout_s:g} s"
        finally:
            self._open_count -= 1
            self._note(index, due_s, sent_s, reader, failure)

    def _note(
        self,
        index: int,
        due_s: float,
        sent_s: float,
        reader: AnswerReader | None,
        failure: tuple[str, str],
    ) -> None:
        outcome = Outcome(
            index=index,
            scheduled_s=due_s,
            sent_s=sent_s,
            ended_s=self._clock.now_s(),
            error=failure[0],
            detail=failure[1],
        )
        if reader is not None:
            outcome = _with_answer(outcome, reader)
        self.outcomes.append(outcome)


def session_line(session: str) -> str:
    """Return the header that names a session; a trace may call it anything, a header may not."""
    return f"{SESSION_HEADER}: {_NOT_VISIBLE.sub('_', session)[:SESSION_CHARACTERS_MAX]}\r\n"


def judge(reader: AnswerReader) -> tuple[str, str]:
    """Return the error's word and detail of an answer that came; empty words for a good one."""
    if reader.status != 200:
        try:
            detail = error_text(msgspec.json.decode(reader.body))
        except msgspec.DecodeError:
            detail = error_text(reader.body[:200].decode("utf-8", "backslashreplace"))
        return f"http_{reader.status}", detail
    if not reader.streamed:
        return "not_a_stream", "answered 200 without an event stream"
    if reader.stream_error is not None:
        return "stream_error", reader.stream_error
    if not reader.done_seen:
        return "cut", "the stream ended without [DONE]"
    return "", ""


def _with_answer(outcome: Outcome, reader: AnswerReader) -> Outcome:
    usage = reader.usage or {}
    details = usage.get("prompt_tokens_details")
    return msgspec.structs.replace(
        outcome,
        first_content_s=reader.first_content_s,
        last_content_s=reader.last_content_s,
        prompt_tokens=_count(usage.get("prompt_tokens")),
        # SGLang writes null where nothing was cached.
        cached_tokens=_count(details.get("cached_tokens")) if isinstance(details, dict) else None,
        output_tokens=_count(usage.get("completion_tokens")) or reader.content_events,
        replica=reader.headers.get(REPLICA_HEADER, UNKNOWN_REPLICA)[:128],
    )


def _count(value: object) -> int:
    return value if isinstance(value, int) and value > 0 else 0
