"""The fleet: what snapshots say and what this proxy found out, kept apart and put together."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.contract import FleetSnapshot, ReplicaRecord, ReplicaState
from proxy.core.fleet import (
    Event,
    Fleet,
    ReplicaCleared,
    ReplicaSuspected,
    SnapshotReceived,
    apply,
    empty_fleet,
)
from tests.core.builders import fleet, record


def test_nobody_serves_at_first() -> None:
    empty = empty_fleet()
    assert empty.pool_for("m") is None
    assert empty.only_pool() is None


def test_pools_are_by_model() -> None:
    known = fleet(record("a", "m"), record("b", "m", "n"), record("c", "o"))
    assert set(known.pools) == set("mno")
    assert known.pools["m"].ring.names == ("a", "b")
    assert set(known.pools["n"].replicas) == {"b"}
    assert known.pool_for("x") is None


def test_a_replica_that_does_not_say_what_it_serves_serves_anything() -> None:
    known = fleet(record("a", "m"), record("b"))
    assert set(known.pools["m"].replicas) == {"a", "b"}
    anything = known.pool_for("never heard of")
    assert anything is not None
    assert anything.ring.names == ("b",)


@pytest.mark.parametrize(
    ("records", "only"),
    [
        ((record("a", "m"), record("b", "m")), {"a", "b"}),
        ((record("a", "m", "n"), record("b", "m", "n")), {"a", "b"}),  # two names, one pool
        ((record("a", "m"), record("b", "n")), None),
        ((record("a"), record("b")), {"a", "b"}),
        ((record("a", "m"), record("b")), {"a", "b"}),
    ],
)
def test_the_pool_when_no_model_is_named(
    records: tuple[ReplicaRecord, ...], only: set[str] | None
) -> None:
    pool = fleet(*records).only_pool()
    assert (set(pool.replicas) if pool else None) == only


@pytest.mark.parametrize("state", list(ReplicaState))
def test_the_ring_keeps_all_but_the_stopped(state: ReplicaState) -> None:
    known = fleet(record("a", "m"), record("b", "m", state=state))
    on_ring = state is not ReplicaState.STOPPED
    assert ("b" in known.pools["m"].ring.names) is on_ring
    assert ("b" in known.pools["m"].replicas) is on_ring
    assert "b" in known.replicas


def test_suspicion_survives_a_snapshot_but_not_a_restart() -> None:
    known = apply(fleet(record("a", "m"), record("b", "m")), ReplicaSuspected("a"))
    assert known.replicas["a"].suspect
    assert not known.pools["m"].replicas["a"].available
    assert known.pools["m"].replicas["b"].available
    again = fleet(record("a", "m"), record("b", "m", max_inputs=3), before=known)
    assert again.replicas["a"].suspect
    assert again.replicas["b"].max_inputs == 3
    restarted = fleet(record("a", "m", restarts=1), before=again)
    assert not restarted.replicas["a"].suspect
    assert set(restarted.replicas) == {"a"}


def test_a_probe_clears_a_suspect() -> None:
    known = apply(fleet(record("a", "m")), ReplicaSuspected("a"))
    assert not apply(known, ReplicaCleared("a")).replicas["a"].suspect


def test_a_suspect_that_left_and_came_back_is_none() -> None:
    known = apply(fleet(record("a", "m")), ReplicaSuspected("a"))
    assert not fleet(record("a", "m"), before=fleet(before=known)).replicas["a"].suspect


def test_what_changes_nothing_is_the_same_value() -> None:
    known = fleet(record("a", "m"))
    assert apply(known, ReplicaCleared("a")) is known
    assert apply(known, ReplicaSuspected("stranger")) is known
    suspected = apply(known, ReplicaSuspected("a"))
    assert apply(suspected, ReplicaSuspected("a")) is suspected
    assert not known.replicas["a"].suspect


def test_rings_are_built_anew_only_for_new_members() -> None:
    known = fleet(record("a", "m"), record("b", "m"), record("c"))
    same = fleet(record("c"), record("b", "m", state=ReplicaState.BACKOFF), record("a", "m"),
                 before=known)  # fmt: skip
    suspected = apply(known, ReplicaSuspected("a"))
    for other in (same, suspected):
        assert other.pools["m"].ring is known.pools["m"].ring
        assert other.any_model.ring is known.any_model.ring
    fewer = fleet(record("a", "m"), record("c"), before=known)
    assert fewer.pools["m"].ring.names == ("a", "c")
    assert fewer.any_model.ring is known.any_model.ring


def test_a_bad_url_is_an_error_and_changes_nothing() -> None:
    known = fleet(record("a", "m"))
    bad = FleetSnapshot(epoch="e", version=2, replicas=(record("b", url="nowhere"),))
    with pytest.raises(ValueError, match="nowhere"):
        apply(known, SnapshotReceived(bad))


def test_the_ranks_of_a_server_are_members_of_its_pool_each() -> None:
    known = fleet(record("a", "m", dp_size=2), record("b", "m"))
    assert known.pools["m"].ring.names == ("a/0", "a/1", "b")
    assert [r.name for r in known.pools["m"].available] == ["a/0", "a/1", "b"]
    assert set(known.replicas) == {"a/0", "a/1", "b"}
    assert set(known.servers) == {"a", "b"}


def test_what_happens_to_a_server_happens_to_all_of_its_ranks() -> None:
    known = fleet(record("a", "m", dp_size=2), record("b", "m"))
    suspected = apply(known, ReplicaSuspected("a"))
    assert [r.name for r in suspected.pools["m"].available] == ["b"]
    assert suspected.pools["m"].ring is known.pools["m"].ring
    assert apply(suspected, ReplicaSuspected("a")) is suspected
    grown = fleet(record("a", "m", dp_size=3), record("b", "m"), before=suspected)
    assert [r.name for r in grown.pools["m"].available] == ["b"]
    cleared = apply(grown, ReplicaCleared("a"))
    assert [r.name for r in cleared.pools["m"].available] == ["a/0", "a/1", "a/2", "b"]
    assert apply(cleared, ReplicaSuspected("a/0")) is cleared, "no server has that name"


def test_weights_are_part_of_the_ring() -> None:
    known = fleet(record("a", "m"), record("b", "m", weight=3.0))
    homes = [next(known.pools["m"].ring.walk(key << 50)) for key in range(1 << 14)]
    assert 0.6 < homes.count("b") / len(homes) < 0.9
    same = fleet(record("a", "m"), record("b", "m", weight=3.0, restarts=1), before=known)
    assert same.pools["m"].ring is known.pools["m"].ring
    other = fleet(record("a", "m"), record("b", "m", weight=2.0), before=known)
    assert other.pools["m"].ring is not known.pools["m"].ring


_IDS = st.sampled_from("abc")
_RECORDS = st.builds(
    lambda name, models, state, restarts, ranks: record(
        name, *models, state=state, restarts=restarts, dp_size=ranks
    ),
    _IDS,
    st.sets(st.sampled_from("mn")),
    st.sampled_from(ReplicaState),
    st.integers(0, 1),
    st.integers(1, 3),
)
_EVENTS: st.SearchStrategy[Event] = (
    st.builds(
        lambda records: SnapshotReceived(
            FleetSnapshot(epoch="e", version=1, replicas=tuple(records))
        ),
        st.lists(_RECORDS, max_size=4),
    )
    | st.builds(ReplicaSuspected, _IDS)
    | st.builds(ReplicaCleared, _IDS)
)


@given(st.lists(_EVENTS, max_size=8))
def test_the_fleet_hangs_together_after_any_events(events: list[Event]) -> None:
    known: Fleet = empty_fleet()
    suspects: dict[str, int] = {}  # and the life in which each was suspected
    for event in events:
        known = apply(known, event)
        match event:
            case ReplicaSuspected(replica_id) if replica_id in known.servers:
                suspects[replica_id] = known.servers[replica_id].restarts
            case ReplicaCleared(replica_id):
                suspects.pop(replica_id, None)
            case _:
                pass
        suspects = {
            k: life
            for k, life in suspects.items()
            if k in known.servers and known.servers[k].restarts == life
        }
        for name, replica in known.replicas.items():
            assert replica.name == name
            assert replica.suspect is (replica.replica_id in suspects)
        assert set(known.servers) == {r.replica_id for r in known.replicas.values()}
        for model, pool in known.pools.items():
            assert pool.ring.names == tuple(sorted(pool.replicas))
            assert any(model in r.models for r in pool.replicas.values())
            for replica_id, replica in pool.replicas.items():
                assert known.replicas[replica_id] is replica
                assert model in replica.models or not replica.models
                assert replica.state is not ReplicaState.STOPPED


def test_the_adapters_of_a_fleet_are_those_that_some_replica_has_loaded() -> None:
    known = fleet(
        record("a", "m", "fr", adapters=("fr",)), record("b", "m", "fr", "sql", adapters=()),
        record("c", "m", adapters=("x",), state=ReplicaState.STOPPED), record("d", "m"),
    )  # fmt: skip
    assert known.adapters == {"fr"}
