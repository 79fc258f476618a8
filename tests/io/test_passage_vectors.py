"""The vectors of clients on a path that passes: the same verdicts, though bodies are never whole.

What has been judged right up to some octet has gone on by then. So where a vector is refused within
a body, the service has the beginning of one request, never a whole one, and the connection is cut.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest

from tests.conformance import request_chunks, request_framing
from tests.conformance.judge import check_error, for_engines, methods, statuses
from tests.conformance.mutate import mutated
from tests.conformance.reader import RequestReader, Taken, octet_by_octet
from tests.conformance.vector import HOP, PATH, POISON, Vector
from tests.conformance.vectors import REQUESTS
from tests.fakes.plane import Bench
from tests.fakes.stage import Cut, Stage, whole
from tests.fakes.strict_engine import Delivered, echo

# As long as the path of the vectors, so that those at a limit stay there; and POST alone, too.
PASSING = b"/v1/batches/abcde/cancel"
MakeBench = Callable[..., Bench]


def on_the_way(octets: bytes) -> bytes:
    return octets.replace(PATH, PASSING)


def check_delivered(delivered: Sequence[Delivered], expected: Sequence[Taken]) -> None:
    got = [Taken(each.method, each.target, each.body) for each in delivered]
    assert got == [Taken(each.method, PASSING, each.body) for each in expected]
    for each in delivered:
        names = [name.lower() for name, _ in each.fields]
        assert names.count(b"host") == names.count(b"connection") == 1
        assert names.count(b"content-length") + names.count(b"transfer-encoding") == 1
        values = b"\n".join(value for _, value in each.fields)
        assert HOP not in values
        assert POISON not in values


_BODIES = [  # before its head is whole, a request is on no path yet
    *(*request_framing.BASE, *request_framing.CONFLICT, *request_framing.CODING),
    *(*request_framing.LENGTHS, *request_chunks.CHUNKS),
]
_BODIES = [each for each in _BODIES if len(each.octets) < 512 and each.answered != 413]
_SHORT = [vector for vector in REQUESTS if vector.answered != 413]  # no length is too large here


async def check(bench: Bench, vector: Vector, cut: Cut) -> None:
    """Send a vector over a connection of its own; its engines are new, too."""
    bench.service.engines.clear()
    stage = Stage(bench, bench.service)
    client = bench.client()
    await stage.send(client, cut(on_the_way(vector.octets)))
    answers = client.answers(*methods(vector)) if statuses(vector) else []
    assert [answer.status for answer in answers] == statuses(vector), vector.rule
    for request, answer in zip(vector.taken, answers, strict=False):
        if answer.status == 200 and for_engines([request]):
            assert answer.body == echo(request.body)
    for answer in answers:
        if answer.status >= 400:
            check_error(answer)
    if vector.refused:
        assert client.transport.closed or client.transport.eof_written
        assert all(engine.transport.closed or engine.cut_off for engine in bench.service.engines)
    assert [talk.fault for talk in stage.conversations if talk.fault] == []
    expected = [] if vector.answered else for_engines(vector.taken)
    check_delivered([each for talk in stage.conversations for each in talk.delivered], expected)
    client.protocol.kill()
    await bench.settle()


@pytest.mark.parametrize("cut", [whole, octet_by_octet], ids=["whole", "octets"])
async def test_every_vector_has_its_verdict(make_bench: MakeBench, cut: Cut) -> None:
    assert len(PASSING) == len(PATH)
    bench = make_bench(offline_url="http://127.0.0.1:8003")
    wrong = []
    for vector in _SHORT if cut is whole else _BODIES:
        try:
            await check(bench, vector, cut)
        except AssertionError as error:
            wrong.append((vector.name, error))
    assert wrong == []
    assert bench.upstreams.dialled == []
    assert len(bench.service.dialled) > 50


async def test_mutated_vectors_never_smuggle(make_bench: MakeBench) -> None:
    """What a plain reader takes of a damaged vector is at most what the service gets whole."""
    draw = random.Random(20261127)
    bench = make_bench(offline_url="http://127.0.0.1:8003")
    seeds = [on_the_way(vector.octets) for vector in _SHORT if len(vector.octets) <= 600]
    reached = 0
    for _ in range(400):
        octets = mutated(draw, seeds)
        reader = RequestReader()
        reader.feed(octets)
        whole_ones = [each for each in reader.taken if each.target == PASSING]
        stage = Stage(bench, bench.service)
        client = bench.client()
        await stage.send(client, [octets])
        talks = stage.conversations
        assert [talk.fault for talk in talks if talk.fault] == []
        got = [each for talk in talks for each in talk.delivered if each.target == PASSING]
        bodies = [each.body for each in got]
        assert bodies == [each.body for each in whole_ones][: len(bodies)]
        reached += len(got)
        client.protocol.kill()
        await bench.settle()
        bench.service.engines.clear()
    assert reached > 25
