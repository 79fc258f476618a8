"""The ring: a pure function of names, balanced, and moving no key without need."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from proxy.core import limits
from proxy.core.ring import Ring, points_of

_KEYS = st.integers(0, (1 << 64) - 1) | st.sampled_from([0, (1 << 64) - 1])
_NAMES = st.sets(st.text(max_size=8), min_size=1, max_size=6)


def _spread_keys(count: int) -> list[int]:
    return [xxh3_64_intdigest(b"key %d" % number) for number in range(count)]


def home_of(ring: Ring, key: int) -> str:
    return next(ring.walk(key))


@given(_NAMES, _KEYS)
def test_a_walk_meets_every_replica_once(names: set[str], key: int) -> None:
    walk = list(Ring(names, virtual_nodes=8).walk(key))
    assert len(walk) == len(names)
    assert set(walk) == names


def test_an_empty_ring_has_no_walk() -> None:
    assert list(Ring([]).walk(7)) == []


@given(st.permutations(["a", "b", "c", "d", "a"]), _KEYS)
def test_the_order_of_names_does_not_matter(names: list[str], key: int) -> None:
    assert Ring(names).names == ("a", "b", "c", "d")
    assert list(Ring(names, 8).walk(key)) == list(Ring("abcd", 8).walk(key))


@given(_NAMES, st.data())
def test_taking_one_away_moves_its_own_keys_and_no_others(
    names: set[str], data: st.DataObject
) -> None:
    gone = data.draw(st.sampled_from(sorted(names)))
    before = Ring(names, virtual_nodes=16)
    after = Ring(names - {gone}, virtual_nodes=16)
    for key in data.draw(st.lists(_KEYS, max_size=20)):
        # The whole walk stays as it was, without the one: so do home and every successor.
        assert list(after.walk(key)) == [name for name in before.walk(key) if name != gone]


_PATTERNS = ("replica-{}", "http://127.0.0.1:{}", "eu-{}", "pool/sim-{}", "10.0.0.{}:30000",
             "r{}", "demo-{}", "{}.example", "gpu{}/vllm", "a{}b", "{}", "sglang-{}-0")  # fmt: skip


def test_eight_replicas_share_evenly() -> None:
    """The share of one replica scatters by 1/sqrt(points), some 8 %, with its name."""
    keys = _spread_keys(8_000)
    fullest = []
    for pattern in _PATTERNS:
        ring = Ring(pattern.format(number) for number in range(8))
        homes = Counter(next(ring.walk(key)) for key in keys)
        shares = [homes[name] * 8 / len(keys) for name in ring.names]
        assert min(shares) >= 1 - 4 / limits.VIRTUAL_NODES**0.5
        assert max(shares) <= 1 + 4 / limits.VIRTUAL_NODES**0.5
        fullest.append(max(shares))
    assert statistics.median(fullest) <= 1.15


def test_what_one_replica_loses_goes_to_all_the_others() -> None:
    ring = Ring(f"replica-{number}" for number in range(8))
    walks = [list(ring.walk(key)) for key in _spread_keys(8_000)]
    heirs = Counter(walk[1] for walk in walks if walk[0] == "replica-0")
    assert len(heirs) == 7
    assert max(heirs.values()) <= 2 * sum(heirs.values()) / 7


_WEIGHTS = {"a": 0.5, "b": 4.0, "c": 1.0}


@given(_NAMES, st.data())
def test_whoever_comes_or_goes_moves_nobody_elses_keys_whatever_the_weights(
    names: set[str], data: st.DataObject
) -> None:
    weights = data.draw(st.dictionaries(st.sampled_from(sorted(names)), st.floats(0.01, 10)))
    gone = data.draw(st.sampled_from(sorted(names)))
    before = Ring(names, 16, weights)
    after = Ring(names - {gone}, 16, weights)
    for key in data.draw(st.lists(_KEYS, max_size=20)):
        assert list(after.walk(key)) == [name for name in before.walk(key) if name != gone]


def test_one_of_n_moves_about_its_share_of_the_keys() -> None:
    keys = _spread_keys(8_000)
    names = [f"replica-{number}" for number in range(8)]
    before, after = Ring(names), Ring([*names, "replica-8"])
    moved = [(home_of(before, key), home_of(after, key)) for key in keys]
    new = sum(home == "replica-8" for _, home in moved)
    assert all(now in (was, "replica-8") for was, now in moved)
    # The share scatters by 1/sqrt(points); four times that is beyond chance.
    assert abs(new * 9 / len(keys) - 1) <= 4 / limits.VIRTUAL_NODES**0.5


def test_a_change_of_weight_moves_keys_to_or_from_that_replica_only() -> None:
    before, after = Ring("abcd"), Ring("abcd", weights={"b": 3.0})
    homes = [(home_of(before, key), home_of(after, key)) for key in _spread_keys(2_000)]
    assert all(now in (was, "b") for was, now in homes)
    assert any(now != was for was, now in homes)


def test_shares_follow_weights() -> None:
    keys = _spread_keys(12_000)
    for pattern in _PATTERNS:
        names = [pattern.format(number) for number in range(6)]
        weights = dict(zip(names, (0.25, 0.5, 1.0, 1.0, 2.0, 4.0), strict=True))
        ring = Ring(names, weights=weights)
        homes = Counter(home_of(ring, key) for key in keys)
        for name, weight in weights.items():
            due = weight / sum(weights.values())
            # What scatters: the replica's points on the circle, and the keys between them.
            error = (1 / (weight * limits.VIRTUAL_NODES) + 1 / (due * len(keys))) ** 0.5
            assert abs(homes[name] / len(keys) / due - 1) <= 4 * error, (pattern, weight)


def test_equal_weights_are_no_weights() -> None:
    even = Ring("abc", weights=dict.fromkeys("abc", 1.0))
    for key in _spread_keys(50):
        assert list(even.walk(key)) == list(Ring("abc").walk(key))


def test_points_are_bounded() -> None:
    found = [points_of(weight) for weight in (0.0, 0.001, 0.5, 1.0, 3.333, 10.0, 1e9)]
    assert found == [1, 1, 80, 160, 533, 1600, limits.VIRTUAL_NODES_MAX]


_PROGRAM = """
import json
from proxy.core.ring import Ring
names = {"a", "b", "c", "\\u00e9", "http://127.0.0.1:30000"}
ring = Ring(names, weights={"c": 1.0, "b": 4.0, "a": 0.5})
print(json.dumps([list(ring.walk(n * 0x9E3779B97F4A7C15 % (1 << 64))) for n in range(50)]))
"""


def test_another_process_walks_the_same_way() -> None:
    walks = []
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        run = subprocess.run(
            [sys.executable, "-c", _PROGRAM], env=environment, capture_output=True, check=True
        )
        walks.append(json.loads(run.stdout))
    ring = Ring({"a", "b", "c", "é", "http://127.0.0.1:30000"}, weights=_WEIGHTS)
    here = [list(ring.walk(n * 0x9E3779B97F4A7C15 % (1 << 64))) for n in range(50)]
    assert walks == [here, here]


def test_the_placement_is_pinned() -> None:
    """Proxies of two versions must agree: a change of these is a change of `CHAIN_VERSION`."""
    ring = Ring(["a", "b", "c"])
    assert ["".join(ring.walk(key)) for key in (0, 1 << 62, 1 << 63, 3 << 62)] == [
        "bca",
        "cab",
        "cba",
        "cab",
    ]
