"""The scaling lab: laws of its replicas and its oracle, what it says of the laws, the command."""

from __future__ import annotations

import json
import math
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest.__main__ import main
from loadtest.scaling.cells import Cell, run_cell
from loadtest.scaling.judge import misses
from loadtest.scaling.laws import Knative, Tracking
from loadtest.scaling.loads import LOADS, jobs_of
from loadtest.scaling.oracle import needs, schedule
from loadtest.scaling.replicas import Job, Speeds
from loadtest.scaling.world import QUEUED_S_MAX, Pool, Seen, World

SPEEDS = Speeds(prefill_s_per_token=1e-3, step_s=0.01, step_s_per_sequence=0.001, kv_tokens=10_000)


def served(*jobs: Job, replicas: int = 1, max_inputs: int = 8) -> Pool:
    """Run these requests on replicas that are there from the beginning."""
    world = World()
    pool = Pool(world, start_s=5.0, max_inputs=max_inputs, speeds=SPEEDS)
    for _ in range(replicas):
        pool.open(0.0)
    world.run([(job, pool) for job in jobs], until_s=0.0)
    return pool


# --- replicas -------------------------------------------------------------------------------------


def test_a_request_alone_takes_its_prefill_and_its_steps() -> None:
    job = Job(1.0, 100, 50)
    served(job)
    assert job.first_s == pytest.approx(1.1)
    assert job.done_s == pytest.approx(1.1 + 50 * 0.011)


def test_streams_slow_each_other_down_and_stand_still_for_a_prefill() -> None:
    one, other = Job(0.0, 100, 100), Job(0.5, 200, 100)
    served(one, other)
    # 0.4 s alone at 11 ms; 0.2 s of the other's prefill; then 12 ms steps for both.
    left = 100 - 0.4 / 0.011
    assert other.first_s == pytest.approx(0.7)
    assert one.done_s == pytest.approx(0.7 + left * 0.012)


def test_a_full_cache_makes_the_next_one_wait_inside_the_engine() -> None:
    one, other = Job(0.0, 100, 100, cached_tokens=9_000), Job(0.0, 100, 100, cached_tokens=5_000)
    served(one, other)
    assert other.first_s == pytest.approx(one.done_s + 0.1)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0, 5), st.integers(1, 300), st.integers(1, 80)), min_size=1, max_size=40
    ),
    st.integers(1, 3),
    st.integers(1, 6),
)
def test_every_request_is_served_once_and_no_replica_is_overfilled(
    rows: list[tuple[float, int, int]], replicas: int, max_inputs: int
) -> None:
    jobs = [Job(*row) for row in sorted(rows)]
    pool = served(*jobs, replicas=replicas, max_inputs=max_inputs)
    assert all(job.at_s < job.first_s < job.done_s < math.inf for job in jobs)
    assert sum(one.in_flight for one in pool.ready) == 0
    busy = sorted([(job.first_s, 1) for job in jobs] + [(job.done_s, -1) for job in jobs])
    most = there = 0
    for _, change in busy:
        there += change
        most = max(most, there)
    assert most <= replicas * max_inputs


def test_the_rate_at_a_target_is_what_keeps_it_in_flight() -> None:
    speeds = Speeds()
    rate = speeds.rate_at(8.4, 2_000, 150)
    prefill_s = speeds.prefill_s_per_token * 2_000
    step_s = speeds.step_s + speeds.step_s_per_sequence * 8.4
    assert rate * (prefill_s + 150 * step_s / (1 - rate * prefill_s)) == pytest.approx(8.4)


# --- pools ----------------------------------------------------------------------------------------


def test_a_replica_on_its_way_is_paid_and_can_be_called_off() -> None:
    world = World()
    pool = Pool(world, start_s=10.0, max_inputs=1, speeds=SPEEDS)
    pool.resize(3, 0.0)
    world.at(4.0, lambda now_s: pool.resize(1, now_s))
    world.run([], until_s=20.0)
    pool.pay(20.0)
    assert len(pool.ready) == 1
    assert pool.paid_s == pytest.approx(3 * 4 + 1 * 16)
    assert pool.turns == 1


def test_a_replica_that_leaves_ends_what_it_has_and_is_paid_until_then() -> None:
    world = World()
    pool = Pool(world, start_s=1.0, max_inputs=1, speeds=SPEEDS)
    pool.open(0.0)
    job, late = Job(0.0, 1_000, 100), Job(1.5, 10, 10)
    world.at(0.5, lambda now_s: pool.resize(0, now_s))
    world.at(2.0, lambda now_s: pool.resize(1, now_s))
    world.run([(job, pool), (late, pool)], until_s=4.0)
    assert job.done_s == pytest.approx(1.0 + 100 * 0.011)
    assert late.first_s == pytest.approx(3.01)  # by the one that came, not by the one that left


def test_who_waits_too_long_is_lost_and_counted() -> None:
    world = World()
    pool = Pool(world, start_s=1.0, max_inputs=1, speeds=SPEEDS)
    world.at(QUEUED_S_MAX + 1, pool.serve)
    world.run([(Job(0.0, 10, 10), pool)], until_s=QUEUED_S_MAX + 2)
    assert (pool.lost_total, len(pool.queue), pool.queued_tokens) == (1, 0, 0)


# --- the oracle -----------------------------------------------------------------------------------


def test_the_oracle_orders_a_start_ahead_and_keeps_what_is_cheaper_to_keep() -> None:
    needed = [1] * 20 + [2] * 5 + [1] * 3 + [2] * 5 + [1] * 20
    assert schedule(needed, 3.0) == [(-3.0, 1), (17.0, 2), (33.0, 1), (53.0, 0)]
    assert schedule(needed, 2.0)[1:5] == [(18.0, 2), (25.0, 1), (26.0, 2), (33.0, 1)]


def test_the_oracle_needs_the_mean_at_the_target_and_a_second_at_the_maximum() -> None:
    assert needs([8.0] * 10, 8.0, 12, 0.0) == [1] * 10
    assert needs([8.0] * 5 + [30.0] + [8.0] * 5, 8.0, 12, 0.0)[5] == 3
    assert max(needs([8.5] * 10, 8.0, 12, 0.1)) == 1


# --- others' laws ---------------------------------------------------------------------------------


def seen(at_s: float, flight: int, ready: int, coming: int = 0) -> Seen:
    pool = Pool(World(), start_s=1.0, max_inputs=10, speeds=SPEEDS)
    for _ in range(ready):
        pool.open(0.0)
    one = Seen(at_s, pool)
    one.in_flight = flight
    one.coming_in_s = (1.0,) * coming
    return one


def test_knative_panics_at_twice_the_target_and_does_not_go_down_in_it() -> None:
    law = Knative(7.0, 1, 100)
    assert law.desired(seen(2.0, 7, 1)) == 1
    assert law.desired(seen(4.0, 70, 1)) == 6  # the mean of what the panic window has so far
    assert [law.desired(seen(at, 0, 6)) for at in (6.0, 8.0, 10.0)] == [6, 6, 6]
    later = [law.desired(seen(float(at), 0, 6)) for at in range(12, 80, 2)]
    assert later[-1] == 3  # half at most


def test_target_tracking_has_a_tolerance_and_remembers_for_five_minutes() -> None:
    law = Tracking(10.0, 1, 100)
    assert law.desired(seen(15.0, 21, 2)) == 2
    assert law.desired(seen(30.0, 200, 2)) == 6  # by four a period
    assert law.desired(seen(45.0, 10, 6)) == 20  # still what was recommended
    assert [law.desired(seen(at, 10, 20)) for at in (330.0, 345.0)] == [1, 1]


# --- ours -----------------------------------------------------------------------------------------


def test_the_loads_are_what_their_names_say() -> None:
    for name, load in LOADS.items():
        jobs = jobs_of(load, 8.4, Speeds(), 7)
        assert [job.at_s for job in jobs] == sorted(job.at_s for job in jobs), name
        assert 0.9 * load.span_s < jobs[-1].at_s < load.span_s + 1, name
    step = jobs_of(LOADS["step10"], 8.4, Speeds(), 7)
    before = sum(job.at_s < 300 for job in step)
    during = sum(300 <= job.at_s < 600 for job in step)
    assert 8 < during / before < 12


@pytest.mark.parametrize("start_s", [2.0, 15.0, 60.0])
def test_a_tenfold_step_costs_a_quarter_more_than_the_oracle_at_most(start_s: float) -> None:
    cell = Cell("step10", start_s)
    found = {law: run_cell(cell, law) for law in ("oracle", "doherty")}
    assert found["doherty"].lost == 0
    assert found["doherty"].peak <= found["oracle"].peak + 1
    assert found["doherty"].paid_s <= 1.25 * found["oracle"].paid_s


def test_the_same_cell_gives_the_same_figures() -> None:
    cell = Cell("kv", 15.0)
    assert run_cell(cell, "doherty") == run_cell(cell, "doherty")


def test_a_miss_says_by_how_much() -> None:
    cell = Cell("step10", 2.0)
    fair = run_cell(cell, "oracle")
    laws = ("oracle", "instant", "knative", "tracking", "doherty")
    found = {law: msgspec.structs.replace(fair, law=law) for law in laws}
    assert list(misses(cell, found)) == []
    found["doherty"] = msgspec.structs.replace(
        found["doherty"],
        lost=1,
        peak=fair.peak + 2,
        ttft_p99_s=fair.ttft_p99_s + 5,
        paid_s=2 * fair.paid_s,
    )
    told = {miss.target: miss.text for miss in misses(cell, found)}
    assert told["lost"] == f"1 of {fair.requests} lost"
    assert told["paid"] == "2.00 x the oracle's"
    assert "5.00 s later" in told["before knative"]
    assert "100.0% more" in told["cheaper than tracking"]


def test_the_command_prints_a_table_a_cell_and_judges(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = tmp_path / "lab.json"
    status = main(
        [
            "scaling",
            "--loads",
            "kv",
            "--starts",
            "2",
            "--seeds",
            "7,8",
            "--check",
            "--json",
            str(written),
        ]
    )
    out = capsys.readouterr().out
    missed = json.loads(written.read_bytes())["missed"]
    assert status == (1 if missed else 0)
    assert "doherty" in out
    assert ("all targets reached" in out) == (not missed)
    with pytest.raises(SystemExit):
        main(["scaling", "--loads", "nothing"])
