"""kill -9 of engine worker, manager and service at random points of a job: each line once."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from loadtest.offline.kills import Setting, kept, measure, shown

pytestmark = pytest.mark.faults


def test_no_line_is_lost_or_twice_whoever_is_killed(tmp_path: Path) -> None:
    setting = Setting(
        lines=800, kills=6, chunk_lines=100, sequences_max=32, hold_s=5.0, time_scale=0.5, seed=7
    )
    finding = asyncio.run(measure(setting, tmp_path))
    assert {kill.victim for kill in finding.kills} == {"worker", "manager", "service"}
    assert kept(setting, finding), shown(setting, finding)
