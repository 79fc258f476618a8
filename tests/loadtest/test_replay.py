"""When requests are sent: in virtual time, against servers that answer as a test says."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from loadtest.prompts import PromptWriter, Style
from loadtest.replay import Pacing, Post, Replay, judge, session_line
from loadtest.traces import Arrival, Trace
from loadtest.wire import AnswerReader


class VirtualClock:
    """Sleeping moves the time, at once."""

    def __init__(self) -> None:
        self.time_s = 0.0

    def now_s(self) -> float:
        return self.time_s

    async def sleep_until(self, when_s: float) -> None:
        self.time_s = max(self.time_s, when_s)
        await asyncio.sleep(0)


def answer() -> AnswerReader:
    reader = AnswerReader()
    reader.status, reader.streamed, reader.done_seen = 200, True, True
    return reader


async def never(_path: str, _body: bytes, _headers: str) -> AnswerReader:
    await asyncio.Event().wait()
    raise AssertionError("unreachable")


def arrival(at_s: float = 0.0, think_s: float = 0.0) -> Arrival:
    return Arrival(
        at_s=at_s,
        think_s=think_s,
        input_tokens=4,
        output_tokens=2,
        runs=((7, 1),),
        session="a\r\nb",
    )


def open_loop(*times_s: float) -> Trace:
    return Trace(source="t", kind="mooncake", arrivals=tuple(arrival(t) for t in times_s))


def closed_loop(*thinks_s: list[float]) -> Trace:
    sessions = tuple(tuple(arrival(think_s=t) for t in turns) for turns in thinks_s)
    return Trace(source="t", kind="agent", sessions=sessions)


def replay(post: Post, clock: VirtualClock, **pacing: object) -> Replay:
    return Replay(post, PromptWriter(Style(model="m")), Pacing(**pacing), clock)  # type: ignore[arg-type]


async def run_until(made: Replay, trace: Trace, done: Callable[[], bool]) -> None:
    """Run the replay until `done` says so, and end it there; fail if that never comes."""
    task = asyncio.get_running_loop().create_task(made.run(trace))
    for _ in range(10_000):
        if done() or task.done():
            break
        await asyncio.sleep(0)
    assert done()
    task.cancel()
    await asyncio.wait([task])


async def test_a_server_that_never_answers_does_not_delay_the_next_request() -> None:
    clock = VirtualClock()
    made = replay(never, clock, speed=2.0)
    times_s = (0.0, 0.5, 0.5, 3.0, 10.0)
    await run_until(made, open_loop(*times_s), lambda: len(made.sent) == len(times_s))
    outcomes = sorted(made.outcomes, key=lambda o: o.index)
    assert [o.sent_s for o in outcomes] == [t / 2 for t in times_s]
    assert [o.scheduled_s for o in outcomes] == [t / 2 for t in times_s]
    assert {o.error for o in outcomes} == {"interrupted"}


async def test_a_client_that_falls_behind_says_how_far() -> None:
    clock = VirtualClock()

    async def hold_up_once(_path: str, _body: bytes, _headers: str) -> AnswerReader:
        if clock.time_s < 1.0:
            clock.time_s += 5.0  # the client's own core was taken away
        return answer()

    made = replay(hold_up_once, clock)
    await made.run(open_loop(0.0, 1.0, 4.0, 7.0))
    assert [o.lateness_s for o in sorted(made.outcomes, key=lambda o: o.index)] == [0, 4.0, 1.0, 0]


async def test_open_requests_are_bounded_and_refusals_counted() -> None:
    clock = VirtualClock()
    made = replay(never, clock, concurrency_max=2)
    await run_until(made, open_loop(0, 1, 2, 3, 4), lambda: len(made.sent) == 5)
    errors = [o.error for o in sorted(made.outcomes, key=lambda o: o.index)]
    assert errors == ["interrupted"] * 2 + ["client_limit"] * 3


def taking(clock: VirtualClock, answer_s: float) -> Post:
    async def post(_path: str, _body: bytes, _headers: str) -> AnswerReader:
        clock.time_s += answer_s
        return answer()

    return post


async def test_a_turn_waits_for_the_answer_and_the_think_time() -> None:
    clock = VirtualClock()
    made = replay(taking(clock, 3.0), clock, users=1, speed=2.0)
    await made.run(closed_loop([0.0, 10.0, 4.0], [99.0, 2.0]))
    # 3 s an answer, think times at double speed; a new session begins when the last one ended.
    assert [o.sent_s for o in made.outcomes] == [0.0, 8.0, 13.0, 16.0, 20.0]
    assert [o.index for o in made.outcomes] == [0, 1, 2, 3, 4]


async def test_so_many_sessions_go_on_at_a_time() -> None:
    clock = VirtualClock()
    made = replay(never, clock, users=3)
    trace = closed_loop(*[[0.0, 0.0]] * 5)
    task = asyncio.get_running_loop().create_task(made.run(trace))
    for _ in range(100):
        await asyncio.sleep(0)
    assert len(made.sent) == 3
    task.cancel()
    await asyncio.wait([task])
    assert sorted(o.scheduled_s for o in made.outcomes) == [0.0, 20.0, 40.0]  # spread over a minute


async def test_no_turn_begins_after_the_duration() -> None:
    clock = VirtualClock()
    made = replay(taking(clock, 1.0), clock, users=1, duration_s=5.0)
    await made.run(closed_loop([0.0, 2.0, 2.0, 2.0]))
    assert [o.sent_s for o in made.outcomes] == [0.0, 3.0]


async def test_the_session_header_is_sent_when_asked_for() -> None:
    seen: list[str] = []

    async def post(_path: str, _body: bytes, headers: str) -> AnswerReader:
        seen.append(headers)
        return answer()

    for session_header in (False, True):
        made = replay(post, VirtualClock(), session_header=session_header)
        await made.run(open_loop(0.0))
    assert seen == ["", "x-session-id: a__b\r\n"]  # no trace can add a header of its own
    assert len(session_line("x" * 999)) == len("x-session-id: \r\n") + 255


def good() -> AnswerReader:
    return answer()


def with_status() -> AnswerReader:
    reader = answer()
    reader.status, reader.body = 429, b"slow down"
    return reader


def without_stream() -> AnswerReader:
    reader = answer()
    reader.streamed = False
    return reader


def without_done() -> AnswerReader:
    reader = answer()
    reader.done_seen = False
    return reader


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (good, ""),
        (with_status, "http_429"),
        (without_stream, "not_a_stream"),
        (without_done, "cut"),
    ],
)
def test_answers_are_judged(make: Callable[[], AnswerReader], error: str) -> None:
    assert judge(make())[0] == error


async def test_a_fault_of_the_replay_is_not_hidden() -> None:
    def broken(_path: str, _body: bytes, _headers: str) -> Awaitable[AnswerReader]:
        raise ZeroDivisionError

    with pytest.raises(ExceptionGroup) as caught:
        await replay(broken, VirtualClock()).run(open_loop(0.0))
    assert caught.group_contains(ZeroDivisionError)
