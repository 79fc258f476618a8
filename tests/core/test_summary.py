"""What other regions are told of a model: what a newcomer would meet here, and not too much."""

from __future__ import annotations

import pytest

from proxy.contract import FleetSnapshot, PoolRecord, ReplicaState
from proxy.contract.regions import (
    NAME_CHARS_MAX,
    ModelSummary,
    RegionSummary,
    decode_summary,
    encode_summary,
)
from proxy.core import claim_limits, limits
from proxy.core.fleet import (
    Fleet,
    RemotesReceived,
    ReplicaSuspected,
    SnapshotReceived,
    apply,
    empty_fleet,
)
from proxy.core.picture import Picture
from proxy.core.replica import remote_replica
from proxy.core.summary import merge, summarise
from tests.core.builders import chain, record


def of_two(**fields: object) -> tuple[Fleet, Picture]:
    pool = PoolRecord(model="m", pool="p", wakes=True, coming=1, ready_in_s=4.0, start_s=9.0)
    replicas = tuple(record(name, "m", pool="p", **fields) for name in "ab")
    snapshot = FleetSnapshot(epoch="e", version=1, replicas=replicas, pools=(pool,))
    fleet = apply(empty_fleet(), SnapshotReceived(snapshot))
    picture = Picture()
    picture.know(fleet.replicas.values())
    return fleet, picture


def busy(picture: Picture, fleet: Fleet, name: str, octets: int) -> None:
    request = chain(1, octets)
    picture.acquire(fleet.replicas[name], request, cached_octets=0, now_s=0.0)


def test_idle_replicas_are_free_as_far_as_they_may_have_requests() -> None:
    fleet, picture = of_two(max_inputs=4)
    (summary,) = summarise(fleet, picture, {}, 0.0).values()
    assert summary.awake == 2
    assert summary.free == 8
    assert summary.wait_s == 0.0
    assert summary.s_per_token == picture.loads.s_per_token[0]
    assert (summary.wakes, summary.coming) == (True, 1)
    assert (summary.ready_in_s, summary.start_s) == (4.0, 9.0)


def test_a_replica_with_work_for_longer_than_the_runway_is_not_free() -> None:
    fleet, picture = of_two()
    idle = summarise(fleet, picture, {}, 0.0)["m"]
    assert idle.free >= 2
    busy(picture, fleet, "a", 4_000_000)
    half = summarise(fleet, picture, {"m": 3}, 0.0)["m"]
    assert 1 <= half.free < idle.free
    assert half.wait_s == 0.0  # the other one's
    assert half.queued == 3
    busy(picture, fleet, "b", 2_000_000)
    none = summarise(fleet, picture, {}, 0.0)["m"]
    assert none.free == 0
    assert none.awake == 2
    assert none.wait_s > limits.RUNWAY_S


def test_requests_that_it_has_take_what_it_may_have() -> None:
    fleet, picture = of_two(max_inputs=2)
    for name in ("a", "a", "b"):
        busy(picture, fleet, name, 40)
    assert summarise(fleet, picture, {}, 0.0)["m"].free == 1


def test_replicas_that_take_nothing_are_not_awake() -> None:
    fleet, picture = of_two()
    fleet = apply(fleet, ReplicaSuspected("a"))
    assert summarise(fleet, picture, {}, 0.0)["m"].awake == 1
    starting, picture = of_two(state=ReplicaState.STARTING)
    summary = summarise(starting, picture, {}, 0.0)["m"]
    assert (summary.awake, summary.free, summary.wait_s) == (0, 0, 0.0)


def test_workers_see_one_fleet_and_hold_each_their_own() -> None:
    one = ModelSummary(awake=4, free=9, wait_s=0.1, s_per_token=1e-4, queued=2, coming=1)
    other = ModelSummary(awake=3, free=7, wait_s=0.2, s_per_token=2e-4, queued=5, wakes=True)
    merged = ModelSummary(
        awake=3, free=7, wait_s=0.2, s_per_token=2e-4, queued=7, coming=1, wakes=True
    )
    assert merge([{"m": one}, {"m": other, "n": one}, {}]) == {"m": merged, "n": one}


def test_what_only_other_regions_have_is_theirs_to_tell() -> None:
    fleet, picture = of_two()
    remote = remote_replica("us#0", "us", "http://127.0.0.1:1", "theirs")
    fleet = apply(fleet, RemotesReceived((remote,)))
    assert "theirs" in fleet.pools
    assert list(summarise(fleet, picture, {}, 0.0)) == ["m"]


def test_a_name_that_cannot_be_told_does_not_silence_the_others() -> None:
    replica = record("a", "m", "n" * (NAME_CHARS_MAX + 1))
    snapshot = FleetSnapshot(epoch="e", version=1, replicas=(replica,))
    fleet = apply(empty_fleet(), SnapshotReceived(snapshot))
    picture = Picture()
    picture.know(fleet.replicas.values())
    summary = RegionSummary(region="eu", sequence=1, models=summarise(fleet, picture, {}, 0.0))
    assert list(decode_summary(encode_summary(summary)).models) == ["m"]


def test_only_so_many_models_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim_limits, "SUMMARY_MODELS_MAX", 3)
    replica = record("a", *(f"m{number}" for number in range(9)))
    fleet = apply(
        empty_fleet(), SnapshotReceived(FleetSnapshot(epoch="e", version=1, replicas=(replica,)))
    )
    picture = Picture()
    picture.know(fleet.replicas.values())
    assert len(summarise(fleet, picture, {}, 0.0)) == 3
