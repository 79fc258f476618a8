"""Starts from images as the command measures them, in small, and what it calls a broken promise."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from loadtest.__main__ import main
from loadtest.snapshots.report import Finding, table
from tests.fakes.snapshot_stage import need_criu

GOOD = Finding(
    tables_mib=1024,
    cold_s=40.0,
    dump_s=1.0,
    image_mib=1050,
    restored_s=(1.0, 4.0),
    paired_s=(2.0,),
    loaded_s=(2.0,),
    load_answers=10,
    answers=20,
    wrong=0,
    damage="damaged: pages-1.img",
    damage_s=0.5,
    revivals_s=(3.0,),
    fallback_s=45.0,
)


@pytest.mark.snapshots
def test_a_quick_run_keeps_its_promises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    need_criu()
    report = tmp_path / "report.json"
    assert main(["snapshots", "--quick", "--json", str(report)]) == 0
    assert "all promises kept" in capsys.readouterr().out
    found = json.loads(report.read_text())
    assert len(found["restored_s"]) == 1
    assert found["load_answers"] > 0
    assert "damaged" in found["damage"]
    assert len(found["revivals_s"]) == 1


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ({}, True),
        ({"restored_s": (1.0, 4.1)}, False),  # the slowest counts
        ({"restored_s": (1.0, 4.1), "judge_gain": False}, True),
        ({"wrong": 1}, False),
        ({"damage": ""}, False),
    ],
)
def test_a_broken_promise_is_one(change: dict[str, object], kept: bool) -> None:
    finding = msgspec.structs.replace(GOOD, **change)
    assert finding.kept_promises is kept
    assert ("BROKEN" in table(finding)) is not kept
    assert ("NOT FOUND" in table(finding)) is not bool(finding.damage)
