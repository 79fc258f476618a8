"""A ring for people says what the ring does."""

from __future__ import annotations

import itertools
import random

import pytest

from proxy.core.ring import Ring
from proxy.core.ring_view import WHOLE, arcs, place_of, shares

NAMES = ("a", "b/0", "b/1", "c")
SERVERS = {"a": "a", "b/0": "b", "b/1": "b", "c": "c"}


@pytest.mark.parametrize("most", [100_000, 90])
@pytest.mark.parametrize("names", [NAMES, NAMES[:1], NAMES[1:3]])
def test_arcs_follow_one_another_from_0_to_1(names: tuple[str, ...], most: int) -> None:
    found = arcs(Ring(names), SERVERS, most)
    assert len(found) <= most
    assert (found[0].begin, found[-1].end) == (0.0, 1.0)
    for one, other in itertools.pairwise(found):
        assert one.begin < one.end == other.begin
        assert one.replica_id != other.replica_id


def test_arcs_name_who_is_home() -> None:
    ring, draw = Ring(NAMES, weights={"c": 0.25}), random.Random(1)
    found = arcs(ring, SERVERS, 100_000)
    for _ in range(3000):
        key = draw.getrandbits(64)
        place = key / WHOLE
        if any(abs(place - arc.begin) < 2e-6 for arc in found):
            continue  # nearer to an edge than places are told
        (owner,) = [arc.replica_id for arc in found if arc.begin < place <= arc.end]
        assert owner == SERVERS[next(ring.walk(key))]


def test_too_many_arcs_are_told_by_their_middles() -> None:
    ring = Ring(f"r{number}" for number in range(40))
    servers = {name: name for name in ring.names}
    for arc in arcs(ring, servers, 100):
        steps = round((arc.end - arc.begin) * 100)
        for step in range(steps):
            middle = arc.begin + (step + 0.5) / 100
            assert next(ring.walk(int(middle * WHOLE))) == arc.replica_id


def test_shares_are_those_of_many_keys() -> None:
    ring, draw = Ring(NAMES, weights={"c": 0.25}), random.Random(2)
    told = shares(ring, SERVERS)
    assert sum(told.values()) == pytest.approx(1.0)
    seen = dict.fromkeys(told, 0)
    for _ in range(20_000):
        seen[SERVERS[next(ring.walk(draw.getrandbits(64)))]] += 1
    for server, share in told.items():
        assert seen[server] / 20_000 == pytest.approx(share, abs=0.012)
    assert told["c"] < told["a"] < told["b"]


def test_nobody_has_no_ring() -> None:
    assert arcs(Ring(()), {}, 10) == ()
    assert shares(Ring(()), {}) == {}


def test_places_are_of_1() -> None:
    assert (place_of(0), place_of(WHOLE // 4)) == (0.0, 0.25)
