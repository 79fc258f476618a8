"""Every vector through the whole shell on fake connections, whole and octet by octet.

After each a new client, and the same connection if it is still open, get just their own answers.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.conformance.engine_vectors import ENGINE
from tests.conformance.judge import check_answers, check_outcome, for_engines, methods, statuses
from tests.conformance.reader import cut_at, octet_by_octet
from tests.conformance.vector import POISON, EngineVector, Outcome, Vector, posted
from tests.conformance.vectors import REQUESTS
from tests.fakes.plane import Bench
from tests.fakes.stage import Cut, Stage, canary, whole
from tests.fakes.strict_engine import Odd

_SMALL_BYTES = 2048
MakeBench = Callable[..., Bench]


def _in_octets(octets: bytes) -> list[bytes]:
    """Octet by octet; what is long in larger pieces, its ends still by octets."""
    if len(octets) <= _SMALL_BYTES:
        return octet_by_octet(octets)
    ends = range(len(octets) - 64, len(octets))
    return cut_at(octets, [*range(64), *range(64, len(octets), 1009), *ends])


_CUTS = pytest.mark.parametrize("cut", [whole, _in_octets], ids=["whole", "octets"])


@_CUTS
@pytest.mark.parametrize("vector", REQUESTS, ids=lambda vector: vector.name)
async def test_client_vector(make_bench: MakeBench, vector: Vector, cut: Cut) -> None:
    stage = Stage(make_bench())
    client = stage.bench.client()
    await stage.send(client, cut(vector.octets))
    check_answers(vector, client.answers(*methods(vector)) if statuses(vector) else [])
    if vector.refused:
        assert client.transport.closed or client.transport.eof_written
    if vector.waiting and not vector.answered:
        assert client.received in (b"", b"HTTP/1.1 100 Continue\r\n\r\n") or vector.taken
        assert not client.transport.closed
    expected = [] if vector.answered else for_engines(vector.taken)
    asked = await stage.check_canaries(None if vector.waiting else client)
    stage.check_engines([*expected, *asked])


@_CUTS
@pytest.mark.parametrize("vector", ENGINE, ids=lambda vector: vector.name)
async def test_engine_vector(make_bench: MakeBench, vector: EngineVector, cut: Cut) -> None:
    stage = Stage(make_bench())
    stage.cut = cut
    stage.odd[b"odd"] = Odd(vector.octets, vector.closes)
    client = stage.bench.client()
    await stage.send(client, [canary(b"odd")])
    check_outcome(vector, client.received, ended=client.transport.closed)
    if vector.surplus or vector.failed:
        assert stage.bench.upstreams.engines[0].cut_off
    stage.bench.plane.clear("a")  # the probe of a replica that failed finds it well
    asked = await stage.check_canaries(client)
    stage.check_engines([posted(b"odd"), *asked])
    if vector.outcome is not Outcome.WHOLE:
        assert len(stage.conversations) > 1  # nobody else met that connection
    assert POISON not in client.received.replace(vector.payload or b"\n", b"")
