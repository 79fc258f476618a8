"""The measure of files fetched ahead, with a command that is quick."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from loadtest import readahead
from loadtest.__main__ import main
from loadtest.run import RunError


def test_a_command_is_timed_cold_ahead_and_warm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "slow.py").write_text("import colorsys\n")
    out, told = tmp_path / "out.txt", tmp_path / "out.json"
    words = ["readahead", "--rounds", "1", "--drop", str(tmp_path)]
    words += [
        "--out",
        str(out),
        "--json",
        str(told),
        "--",
        sys.executable,
        str(tmp_path / "slow.py"),
    ]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert out.read_text() == text
    rows = [line.split() for line in text.splitlines()[-3:]]
    assert [row[0] for row in rows] == ["cold", "ahead", "warm"]
    figures = json.loads(told.read_text())
    assert figures["record"][0]["files"] > 5
    assert figures["ahead"][0]["fetched_mib"] == figures["record"][0]["listed_mib"]
    assert figures["warm"][0]["fetched_mib"] == 0


def test_what_cannot_be_measured_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["readahead", "--", "true"]) == 2
    assert main(["readahead", "--drop", "/nowhere", "--", "false"]) == 1
    assert "the start ended with 1" in capsys.readouterr().err


def test_a_folder_is_taken_out_of_the_cache(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(1 << 20))
    readahead.drop([str(tmp_path)])
    assert path.stat().st_size == 1 << 20


def test_all_of_it_needs_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(readahead, "_DROP", tmp_path / "none" / "drop_caches")
    with pytest.raises(RunError, match="be root, or --drop a folder"):
        readahead.drop([readahead.ALL])
