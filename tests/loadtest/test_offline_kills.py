"""The kill run: its plan and its verdict as values. The run itself is a fault test."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import msgspec
import pytest

from loadtest.__main__ import main
from loadtest.offline.kills import (
    VICTIMS,
    Finding,
    Kill,
    Setting,
    config,
    faults,
    kept,
    plan,
    shown,
)

SETTING = Setting(lines=100, kills=4, chunk_lines=5)
GOOD = Finding(
    kills=(Kill("worker", 7, 50, 1.5),) * 4,
    lines=100,
    answered=100,
    failed=0,
    missing=0,
    twice=0,
    computed=120,
    state="completed",
    took_s=9.0,
    left_running=0,
)


def test_kills_are_spread_over_the_job_and_over_all_kinds() -> None:
    made = plan(Setting(seed=3))
    assert made == plan(Setting(seed=3)) != plan(Setting(seed=4))
    points = [at for at, _ in made]
    assert points == sorted(points)
    assert 0 <= points[0] < points[-1] < 20_000
    assert sorted(Counter(victim for _, victim in made).values()) == [6, 7, 7]
    assert {victim for _, victim in made} == set(VICTIMS)


def test_a_line_in_no_file_or_in_two_is_found() -> None:
    whole = [f"line-{number}" for number in range(4)]
    assert faults(4, whole) == (0, 0)
    assert faults(4, whole[1:]) == (1, 0)
    assert faults(4, [*whole, "line-2"]) == (0, 1)
    assert faults(4, [*whole, "line-9"]) == (0, 1)


@pytest.mark.parametrize(
    "change",
    [
        {"state": "expired"},
        {"answered": 99},
        {"failed": 1},
        {"missing": 1},
        {"twice": 1},
        {"computed": 121},
        {"left_running": 1},
    ],
)
def test_each_promise_can_be_broken(change: dict[str, object]) -> None:
    assert kept(SETTING, GOOD)
    finding = msgspec.structs.replace(GOOD, **change)
    assert not kept(SETTING, finding)
    assert shown(SETTING, finding).endswith("BROKEN")


def test_the_report_says_what_was_done_and_what_came_of_it() -> None:
    text = shown(SETTING, GOOD)
    assert "kill -9: 4 of worker, 0 of manager, 0 of service" in text
    assert "120 lines computed, 20 of them again (at most 20)" in text
    assert text.endswith("kept")


def test_the_workers_have_chunks_and_holds_as_asked(tmp_path: Path) -> None:
    value = config(SETTING, tmp_path)
    assert value["offline"]["chunk_lines"] == 5
    assert value["models"][0]["pools"][0]["serves"] == "jobs"


def test_a_job_without_lines_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["offline", "kills", "--lines", "0"]) == 2
    assert "expected 1 line" in capsys.readouterr().err
