"""Many models on one set of cards, in virtual time: the lab of it, small."""

from __future__ import annotations

import argparse
import functools

import msgspec
import pytest

from backends.ladder import Ladder, Rung
from loadtest.scaling import pool
from loadtest.scaling.pool import Case, jobs_of, models_of, run_own, run_shared
from loadtest.scaling.replicas import Job
from loadtest.scaling.sharing import Sharer, Sharing
from loadtest.scaling.world import World

CASE = Case(models=4, span_s=240.0, seed=2)  # two of them burst at once, by 3 and 4

shared = functools.cache(functools.partial(run_shared, CASE))


def test_the_same_arguments_give_the_same_figures() -> None:
    assert run_shared(CASE, "ours", 3) == shared("ours", 3)


def test_each_model_has_its_own_load_in_order() -> None:
    models = models_of(CASE)
    loads = [[job.at_s for job in jobs_of(model, CASE)] for model in models]
    assert all(times == sorted(times) for times in loads)
    assert len({tuple(times) for times in loads}) == len(models)
    assert [model.peak for model in models] == [1, 3, 4, 1]


def test_enough_shared_cards_lose_nothing_and_few_make_everybody_wait() -> None:
    own, many, few = run_own(CASE), shared("ours", 9), shared("ours", 3)
    assert own.requests == many.requests == few.requests > 50
    assert own.lost == many.lost == 0
    assert own.ttft_p99_s < many.ttft_p99_s < few.ttft_p99_s
    assert many.used < few.used <= 1.0


def test_starting_anew_costs_more_than_resuming() -> None:
    assert shared("ours", 9).ttft_p99_s + 1.0 < shared("no ladder", 9).ttft_p99_s


def test_offline_work_takes_what_is_left_and_gives_way() -> None:
    beside = msgspec.structs.replace(CASE, offline=1)
    alone, both = shared("ours", 9), run_shared(beside, "ours", 9)
    assert both.offline_tokens > 0
    assert both.offline_taken > 0
    assert both.used > alone.used
    assert both.ttft_p99_s < alone.ttft_p99_s + 2.0
    assert both.lost == 0


def test_a_replica_is_paid_for_by_the_rung_that_it_comes_from() -> None:
    world = World()
    one = Sharer(world, "m", "online", Ladder(), replicas_max=1)
    one.suspend_all()
    assert [unit.rung for unit in one.units.values()] == [Rung.SUSPENDED]
    sharing = Sharing(world, [one], 1)
    sharing.govern(1.0)
    world.run([(Job(0.5, 2_000, 100), one)], 10_000.0)
    (unit,) = one.units.values()
    assert (unit.rung, unit.devices) == (Rung.AWAKE, ("0",))
    assert sharing.moves == {"raise": 1, "lower": 0}


def test_the_command_says_what_each_arrangement_came_to(
    capsys: pytest.CaptureFixture[str],
) -> None:
    parser = argparse.ArgumentParser()
    pool.add_arguments(parser)
    args = parser.parse_args(
        ["--models", "2", "--offline", "1", "--cards", "3", "--minutes", "1", "--seed", "4"]
    )
    assert pool.run(args) == 0
    told = capsys.readouterr().out
    assert all(f"\n{name}" in told for name in ("own peaks", *pool.ARRANGEMENTS))
    assert "offline: " in told
