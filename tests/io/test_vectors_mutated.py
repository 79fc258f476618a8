"""The whole shell and the plain reader agree on mutated vectors, one plane for all of them.

Whatever the shell remembers from one head to the next, a head that differs from it by an octet must
be judged as if it were the first.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from proxy.config import ProxyConfig
from proxy.core.http1 import RequestHead
from tests.conformance.judge import status_of
from tests.conformance.mutate import mutated
from tests.conformance.reader import RequestReader, Taken, cut_at
from tests.conformance.vector import PATH
from tests.conformance.vectors import REQUESTS
from tests.fakes.plane import Bench
from tests.fakes.stage import Stage

MakeBench = Callable[..., Bench]
_COUNT = 700
_SEED_BYTES_MAX = 600
_PAYLOAD_BYTES_MAX = ProxyConfig().max_payload_size


class Expected:
    """What a client is told, and what engines are sent, for the octets that a reader has read."""

    def __init__(self, reader: RequestReader) -> None:
        self.statuses: list[int] = []
        self.methods: list[str] = []
        self.for_engines: list[Taken] = []
        self.closed = False  # by an answer before the body, or by the client's own word
        for head, taken in zip(reader.heads, [*reader.taken, None], strict=False):
            self._add(head, taken)
            if self.closed:
                return
        if reader.refused:
            self.statuses.append(reader.refused)
            self.methods.append("POST")

    def _add(self, head: RequestHead, taken: Taken | None) -> None:
        early = _status_of_head(head)
        if taken is None and early < 400:
            return
        self.statuses.append(early)
        self.methods.append(head.method.decode())
        if early >= 400:
            with_body = head.chunked or head.content_length > 0
            self.closed = with_body or head.minor == 0 or not head.keep_alive
            return
        self.closed = not head.keep_alive
        if taken is not None and (taken.method, head.path) == (b"POST", PATH):
            self.for_engines.append(taken)


def _told(statuses: list[int]) -> list[int]:
    """What a damaged path is called, nowhere or somewhere of another method, is the routes'."""
    return [404 if status == 405 else status for status in statuses]


def _status_of_head(head: RequestHead) -> int:
    status = status_of(Taken(head.method, head.path + head.query, b""))
    if status >= 400:
        return status
    if b"content-encoding" in head.special:
        return 415
    return 413 if head.content_length > _PAYLOAD_BYTES_MAX else status


@pytest.mark.parametrize("seed", range(4))
async def test_mutated_vectors(make_bench: MakeBench, seed: int) -> None:
    chance = random.Random(seed)
    stage = Stage(make_bench())
    sent: list[Taken] = []
    seeds = [v.octets for v in REQUESTS if len(v.octets) <= _SEED_BYTES_MAX]
    seeds += 2 * [v.octets for v in REQUESTS if v.taken and len(v.octets) <= _SEED_BYTES_MAX]
    for _ in range(_COUNT):
        octets = mutated(chance, seeds)
        cuts = [chance.randrange(1, 300) for _ in range(chance.randrange(4))]
        reader = RequestReader()
        for piece in cut_at(octets, cuts):
            reader.feed(piece)
        expected = Expected(reader)
        client = stage.bench.client()
        await stage.send(client, cut_at(octets, cuts))
        answers = client.answers(*expected.methods) if expected.methods else []
        assert _told([a.status for a in answers]) == _told(expected.statuses), octets
        sent += expected.for_engines
        if not client.transport.lost:
            client.transport.hang_up()
    stage.check_engines(sent, marked=False)
    assert len(sent) > _COUNT // 10
