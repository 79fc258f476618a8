"""Performs a sequence of calls to an engine: one after another, and not one more after a failure.

The order is the engine's table's (`engines`); here it is only kept to. An answer that the table
does not foresee ends the sequence, because a call that was right after the one before may be fatal
after its failure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from backends.engines.base import Call
from backends.fetch import Answer, Fetch

SHOWN_BYTES_MAX = 200


class CallFailedError(Exception):
    """A call was not answered as it had to be; the text says which one. `done` came before it."""

    def __init__(self, text: str, done: int) -> None:
        super().__init__(text)
        self.done = done


async def perform(calls: Sequence[Call], url: str, fetch: Fetch, go_on: Callable[[], bool]) -> None:
    """Perform `calls` on the engine at `url` while `go_on()`. Raises `CallFailedError`."""
    for done, call in enumerate(calls):
        if not go_on():
            raise CallFailedError("it is not to go on", done)
        if call.method == "POST":
            answer = await fetch.post(url + call.path, call.body, call.timeout_s)
        else:
            answer = await fetch.get(url + call.path, call.timeout_s)
        problem = problem_of(call, answer)
        if problem:
            raise CallFailedError(f"{call.method} {call.path} ({call.why}): {problem}", done)


def problem_of(call: Call, answer: Answer) -> str:
    """Say what is wrong with an answer; nothing, when nothing is."""
    if answer.silence is not None:
        return f"{answer.silence.value} ({call.timeout_s:g} s)"
    said = answer.body[:SHOWN_BYTES_MAX].decode("utf-8", "backslashreplace").strip()
    if answer.status not in call.statuses:
        return f"answered {answer.status}" + (f": {said}" if said else "")
    if b"".join(call.expect.split()) not in b"".join(answer.body.split()):
        return f"answered {said or 'nothing'} where {call.expect.decode()} was due"
    return ""
