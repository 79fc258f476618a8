"""Sequences of calls to an engine: the order, and the end at the first wrong answer."""

from __future__ import annotations

import pytest

from backends.calls import CallFailedError, perform, problem_of
from backends.engines.base import Call
from backends.fetch import Answer, Silence
from tests.fakes.provider import FakeFetch

PAUSE = Call("POST", "/pause", b"{}", why="nothing may run")
FLUSH = Call("GET", "/flush", statuses=(200, 404), why="see that it is idle")
FREE = Call("POST", "/free", why="free the memory")


async def test_one_after_another() -> None:
    fetch = FakeFetch()
    await perform((PAUSE, FLUSH, FREE), "http://e", fetch, lambda: True)
    assert (fetch.posted, fetch.asked) == (["http://e/pause", "http://e/free"], ["/flush"])


async def test_a_wrong_answer_ends_it_and_says_which() -> None:
    fetch = FakeFetch()
    fetch.answers["/flush"] = Answer(400, b"it is busy\n")
    with pytest.raises(CallFailedError) as caught:
        await perform((PAUSE, FLUSH, FREE), "http://e", fetch, lambda: True)
    assert str(caught.value) == "GET /flush (see that it is idle): answered 400: it is busy"
    assert caught.value.done == 1
    assert fetch.posted == ["http://e/pause"]


async def test_it_goes_on_only_while_it_may() -> None:
    fetch = FakeFetch()
    with pytest.raises(CallFailedError) as caught:
        await perform((PAUSE, FREE), "http://e", fetch, lambda: not fetch.posted)
    assert (caught.value.done, fetch.posted) == (1, ["http://e/pause"])


SLEEPS = Call("GET", "/is_sleeping", expect=b'{"is_sleeping":true}', timeout_s=3.0)
ANSWERS = [
    (FREE, Answer(200, b"anything"), ""),
    (FLUSH, Answer(404), ""),
    (FLUSH, Answer(500), "answered 500"),
    (SLEEPS, Answer(200, b'{ "is_sleeping": true }\n'), ""),
    (
        SLEEPS,
        Answer(200, b'{"is_sleeping":false}'),
        'answered {"is_sleeping":false} where {"is_sleeping":true} was due',
    ),
    (SLEEPS, Answer(200), 'answered nothing where {"is_sleeping":true} was due'),
    (SLEEPS, Answer(0, silence=Silence.TIMEOUT), "no answer in time (3 s)"),
    (FREE, Answer(500, b"x" * 1000), "answered 500: " + "x" * 200),
    (FREE, Answer(500, b"\xff"), "answered 500: \\xff"),
]


@pytest.mark.parametrize(("call", "answer", "problem"), ANSWERS)
def test_what_is_wrong_with_an_answer(call: Call, answer: Answer, problem: str) -> None:
    assert problem_of(call, answer) == problem
