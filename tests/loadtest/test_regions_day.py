"""The lab of three regions in different hours of the day."""

from __future__ import annotations

import math

import pytest

from loadtest.__main__ import main
from loadtest.scaling.cells import Cell
from loadtest.scaling.regions import Case, jobs_of_region, mean_need, run_case, shifted, table

CASE = Case(load="step10", starts_s=(15.0, 15.0, 15.0), cards="scarce")


def test_what_one_region_has_no_cards_for_is_served_by_those_that_have() -> None:
    found = {name: run_case(CASE, name) for name in ("islands", "demand")}
    islands, ours = found["islands"], found["demand"]
    assert islands.requests == ours.requests > 3000
    assert islands.away == islands.asked == 0.0
    assert islands.lost > 0, "an island has not enough for its burst"
    assert ours.lost == 0
    assert ours.ttft_p99_s < 0.5 * islands.ttft_p99_s
    assert 0.1 < ours.away < 0.6
    assert ours.asked > 0.0
    text = table(CASE, found)
    assert "step10, cards scarce, start 15 s" in text
    assert f"{ours.paid_s:.0f}" in text


def test_where_every_region_has_what_it_needs_nothing_is_asked_and_little_moves() -> None:
    case = Case(load="step10", starts_s=(2.0, 2.0, 2.0), cards="ample")
    ours = run_case(case, "demand")
    assert (ours.lost, ours.asked) == (0, 0.0)
    assert ours.away < 0.15, "for as long as a start takes"
    assert ours == run_case(case, "requests"), "and by the same arguments the same comes out"


def test_a_day_is_shifted_whole() -> None:
    jobs, span_s = jobs_of_region("azure", Cell("azure", 2.0))
    later = list(shifted(jobs, span_s / 3, span_s))
    assert len(later) == len(jobs)
    assert sum(job.prompt_tokens for job in later) == sum(job.prompt_tokens for job in jobs)
    first = next(job for job in later if job.at_s >= span_s / 3)
    assert math.isclose(first.at_s - span_s / 3, jobs[0].at_s, abs_tol=1e-6)
    assert mean_need(later, span_s, Cell("azure", 2.0)) > 1.0


@pytest.mark.parametrize(
    ("argument", "word"),
    [
        ("--starts=2/3", "three such as"),
        ("--loads=night", "there are"),
        ("--seeds=a", "whole numbers"),
    ],
)
def test_what_is_not_meant_is_said(
    argument: str, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["regions-day", argument])
    assert stopped.value.code == 2
    assert word in capsys.readouterr().err
