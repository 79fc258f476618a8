"""What a vector must come to in the whole proxy, on both of its sides.

The client's side: one answer for each request, in order, then the refusal and the end. The
engine's side: exactly the requests that are for engines, octet for octet, under a head of ours.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from proxy.core.http1 import HOP_BY_HOP
from tests.conformance.reader import Taken
from tests.conformance.vector import HOP, PATH, POISON, EngineVector, Outcome, Vector
from tests.fakes.plane import Answer, AnswerReader
from tests.fakes.strict_engine import Delivered, echo

# The paths among the vectors that are served here, and with which methods.
_LOCAL = {b"/livez": (b"GET", b"HEAD"), b"/v1/models": (b"GET", b"HEAD")}


def for_engines(requests: Iterable[Taken]) -> list[Taken]:
    """Return the requests that go to an engine."""
    return [r for r in requests if (r.method, r.target) == (b"POST", PATH)]


def status_of(request: Taken) -> int:
    """Return the status of the answer to a request that was understood."""
    path = request.target.partition(b"?")[0]
    if path == PATH:
        return 200 if request.method == b"POST" else 405
    if path in _LOCAL:
        return 200 if request.method in _LOCAL[path] else 405
    return 404


def statuses(vector: Vector) -> list[int]:
    """Return the statuses of all answers that a client gets for a vector's octets."""
    if vector.answered:
        return [vector.answered]
    refused = [vector.refused] if vector.refused else []
    return [*map(status_of, vector.taken), *refused]


def methods(vector: Vector) -> list[str]:
    """Return the methods by which a client reads its answers."""
    known = [request.method.decode() for request in vector.taken]
    return [*known, "POST"][: len(statuses(vector))]


def check_answers(vector: Vector, answers: Sequence[Answer]) -> None:
    """Each answer is whole, the right one, and says what it should."""
    assert [answer.status for answer in answers] == statuses(vector), vector.rule
    assert all(answer.complete for answer in answers)
    for request, answer in zip(vector.taken, answers, strict=False):
        if answer.status == 200 and for_engines([request]):
            assert answer.body == echo(request.body)
    for answer in answers:
        if answer.status >= 400:
            check_error(answer)
    if vector.refused:
        assert answers[-1].fields["connection"] == "close"


def check_error(answer: Answer) -> None:
    """An error is an object that OpenAI's clients can read."""
    error = json.loads(answer.body)["error"]
    assert error["message"]
    assert error["type"]
    assert error["code"]


def check_delivered(
    delivered: Sequence[Delivered], expected: Sequence[Taken], *, marked: bool = True
) -> None:
    """An engine got these requests, and of their heads only what may go on.

    `marked`: what may not go on carries a mark; not so once heads have been damaged at random.
    """
    got = [Taken(request.method, request.target, request.body) for request in delivered]
    assert got == list(expected)
    for request in delivered:
        names = [name.lower() for name, _ in request.fields]
        assert not HOP_BY_HOP & set(names)
        assert names.count(b"host") == 1
        assert names.count(b"content-length") == 1
        values = b"\n".join(value for _, value in request.fields)
        assert not marked or not (HOP in values or POISON in values)
        assert dict(request.fields)[b"host"].startswith(b"127.0.0.1:")


def check_outcome(vector: EngineVector, received: bytes, *, ended: bool) -> None:
    """The client sees one of three: the whole right answer, an error object, a visible cut."""
    reader = AnswerReader("POST")
    reader.feed(received)
    if ended:
        reader.feed(b"")
    answer = reader.answer
    assert answer is not None
    # Where a cut is due, an error is as good: nothing of the answer had gone out yet.
    if vector.outcome is Outcome.ERROR or (vector.outcome is Outcome.CUT and answer.status == 502):
        assert (answer.status, answer.complete) == (502, True), vector.rule
        check_error(answer)
    elif vector.outcome is Outcome.WHOLE:
        assert (answer.status, answer.complete) == (vector.status, True), vector.rule
        assert answer.body == vector.payload
    else:
        assert not answer.complete, vector.rule
        assert ended
        assert answer.status == vector.status
        assert vector.payload.startswith(answer.body)
    if answer.complete:
        assert not reader.rest
    check_passed_on(answer, received)


def check_passed_on(answer: Answer, received: bytes) -> None:
    """Of an engine's head, what belongs to its connection stays there."""
    head = received.partition(b"\r\n\r\n")[0]
    assert HOP not in received
    assert POISON not in head
    # RFC 9110 §7.6.1. Framing and persistence are our own word to this client.
    kept = {name.decode() for name in HOP_BY_HOP} - {"connection", "transfer-encoding"}
    assert not kept & set(answer.fields)
