"""Which rungs there are, what they cost, and where to rest."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends import ladder as ladders
from backends.ladder import (
    OUT_S_MAX,
    OUT_S_MIN,
    Ladder,
    Rest,
    Resting,
    Rung,
    RungCost,
    Rungs,
    WayUp,
    best_rest,
)

ALL = Rungs(
    launch_hash="h",
    engine="vllm",
    allowed=frozenset({Rung.ASLEEP, Rung.SUSPENDED, Rung.SNAPSHOTTED}),
    imaged=True,
)
ASLEEP, SUSPENDED, SNAPSHOTTED, COLD = (
    Rest(Rung.ASLEEP, 0.5, 0.4, 16),
    Rest(Rung.SUSPENDED, 2.0, 1.7, 18),
    Rest(Rung.SNAPSHOTTED, 15.0),
    Rest(Rung.COLD, 46.0),
)
RESTS = (ASLEEP, SUSPENDED, SNAPSHOTTED, COLD)


def rungs_of(ladder: Ladder, rungs: Rungs, now_s: float = 0.0) -> list[Rung]:
    return [rest.rung for rest in ladder.rests(rungs, now_s)]


def test_what_is_allowed_and_works_can_be_rested_on_and_cold_always_can() -> None:
    ladder = Ladder()
    assert rungs_of(ladder, ALL) == list(Rung)[1:]
    assert rungs_of(ladder, Rungs(launch_hash="h", engine="vllm")) == [Rung.COLD]


def test_there_is_nothing_to_restore_without_an_image() -> None:
    bare = Rungs(launch_hash="h", engine="vllm", allowed=ALL.allowed)
    assert rungs_of(Ladder(), bare) == [Rung.ASLEEP, Rung.SUSPENDED, Rung.COLD]
    assert Ladder().ways_up(bare, [], 0.0) == (WayUp(Rung.COLD, 46.0),)


def test_a_rung_that_failed_is_left_out_for_a_time_that_doubles() -> None:
    ladder = Ladder()
    assert ladder.failed("h", Rung.SUSPENDED, 100.0) == OUT_S_MIN
    assert rungs_of(ladder, ALL, 129.9) == [Rung.ASLEEP, Rung.SNAPSHOTTED, Rung.COLD]
    assert Rung.SUSPENDED in rungs_of(ladder, ALL, 130.0)
    assert ladder.failed("h", Rung.SUSPENDED, 130.0) == 2 * OUT_S_MIN
    assert ladder.out_for_s("h", Rung.SUSPENDED, 140.0) == 2 * OUT_S_MIN - 10.0
    assert ladder.out_for_s("other", Rung.SUSPENDED, 140.0) == 0.0


def test_failures_in_a_row_have_a_longest_time() -> None:
    ladder = Ladder()
    assert [ladder.failed("h", Rung.ASLEEP, 0.0) for _ in range(2000)][-1] == OUT_S_MAX


def test_a_turn_that_works_clears_the_failures_of_its_rung() -> None:
    ladder = Ladder()
    ladder.failed("h", Rung.SUSPENDED, 0.0)
    ladder.failed("h", Rung.ASLEEP, 0.0)
    ladder.learn("h", "a-0", {Rung.SUSPENDED: RungCost(2.0)})
    assert rungs_of(ladder, ALL) == [Rung.SUSPENDED, Rung.SNAPSHOTTED, Rung.COLD]
    assert ladder.failed("h", Rung.SUSPENDED, 0.0) == OUT_S_MIN


@pytest.mark.parametrize("rung", [Rung.AWAKE, Rung.COLD])
def test_serving_and_cold_are_never_left_out(rung: Rung) -> None:
    ladder = Ladder()
    assert ladder.failed("h", rung, 0.0) == 0.0
    assert ladder.out_for_s("h", rung, 0.0) == 0.0


def test_costs_are_an_engines_own_until_they_are_measured_and_then_smoothed() -> None:
    ladder = Ladder()
    assert ladder.cost("h", Rung.COLD, "sglang").up_s == 80.0
    ladder.learn("h", "a-0", {Rung.COLD: RungCost(100.0)})
    assert ladder.cost("h", Rung.COLD, "sglang").up_s == 100.0
    ladder.learn("h", "a-1", {Rung.COLD: RungCost(200.0, 10.0, 7, 8)})
    assert ladder.cost("h", Rung.COLD, "sglang") == RungCost(130.0, 3.0, 7, 8)
    assert ladder.cost("h", Rung.AWAKE, "sglang") == RungCost(0.0)


def test_the_same_turn_told_again_is_not_learnt_again() -> None:
    ladder = Ladder()
    ladder.learn("h", "a-0", {Rung.COLD: RungCost(100.0)})
    turns = {Rung.COLD: RungCost(200.0)}
    for _ in range(50):
        ladder.learn("h", "a-1", turns)
    assert ladder.cost("h", Rung.COLD, "vllm").up_s == 130.0


def test_a_failure_is_not_cleared_by_a_turn_from_before_it() -> None:
    ladder = Ladder()
    turns = {Rung.SUSPENDED: RungCost(2.0)}
    ladder.learn("h", "a-0", turns)
    ladder.failed("h", Rung.SUSPENDED, 0.0)
    ladder.learn("h", "a-0", turns)
    assert ladder.out_for_s("h", Rung.SUSPENDED, 0.0) == OUT_S_MIN


def test_the_launch_not_heard_of_longest_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladders, "ENTRIES_MAX", 2)
    ladder = Ladder()
    for launch in ("a", "b", "a", "c"):
        ladder.learn(launch, "r", {Rung.COLD: RungCost(1.0 if launch == "b" else 2.0)})
    assert [ladder.cost(launch, Rung.COLD, "vllm").up_s for launch in "abc"] == [2.0, 46.0, 2.0]


def test_the_quickest_way_up_comes_first_and_a_new_one_is_always_there() -> None:
    ladder = Ladder()
    ladder.learn("h", "a-9", {Rung.SUSPENDED: RungCost(20.0)})
    resting = [Resting("a-0", Rung.SUSPENDED), Resting("a-2", Rung.ASLEEP)]
    assert [(way.rung, way.replica_id) for way in ladder.ways_up(ALL, resting, 0.0)] == [
        (Rung.ASLEEP, "a-2"),
        (Rung.SNAPSHOTTED, None),
        (Rung.SUSPENDED, "a-0"),
    ]


def test_on_a_near_tie_what_rests_comes_before_a_new_one() -> None:
    """Seconds that scatter by a tenth would else have both kept and started, turn about."""
    resting = [Resting("a-0", Rung.SUSPENDED)]
    for measured, first in ((11.0, "a-0"), (9.0, "a-0"), (12.4, "a-0"), (30.0, None)):
        fresh = Ladder()
        fresh.learn("h", "a-1", {Rung.SNAPSHOTTED: RungCost(10.0)})
        fresh.learn("h", "a-0", {Rung.SUSPENDED: RungCost(measured)})
        ways = fresh.ways_up(ALL, resting, 0.0)
        assert ways[0].replica_id == first, measured
        assert ways[0].up_s == (measured if first else 10.0), "told as it is"


def test_at_rest_no_deeper_than_needed() -> None:
    assert best_rest(RESTS) is ASLEEP
    assert best_rest(RESTS, gpu_wanted=True) is SUSPENDED
    assert best_rest(RESTS, host_bytes_free=10) is SNAPSHOTTED
    assert best_rest(RESTS, gpu_wanted=True, host_bytes_free=17) is SNAPSHOTTED
    assert best_rest((ASLEEP, COLD), gpu_wanted=True) is COLD


def test_a_rung_that_is_too_slow_is_passed_for_a_quicker_one() -> None:
    slow = Rest(Rung.ASLEEP, 30.0)
    assert best_rest((slow, SUSPENDED, COLD), up_s_max=5.0) is SUSPENDED
    assert best_rest((slow, SNAPSHOTTED, COLD), up_s_max=5.0) is SNAPSHOTTED  # the quickest of all


RUNGS = st.sampled_from(list(Rung)[1:-1])
SOME_RESTS = st.lists(
    st.builds(Rest, RUNGS, st.floats(0.0, 60.0), st.just(0.0), st.integers(0, 20)),
    unique_by=lambda rest: rest.rung,
).map(lambda rests: (*sorted(rests, key=lambda rest: rest.rung.depth), COLD))


@given(SOME_RESTS, st.booleans(), st.none() | st.integers(0, 20), st.floats(0.0, 60.0))
def test_a_rest_never_holds_what_is_wanted_or_not_there(
    rests: tuple[Rest, ...], wanted: bool, free: int | None, up_s_max: float
) -> None:
    chosen = best_rest(rests, gpu_wanted=wanted, host_bytes_free=free, up_s_max=up_s_max)
    assert not (wanted and chosen.rung.holds_gpus)
    assert chosen.host_bytes <= (math.inf if free is None else free)
