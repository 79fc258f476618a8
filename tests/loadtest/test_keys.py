"""Keys that are made and revoked reach every worker of every proxy of two regions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loadtest.__main__ import main
from loadtest.keys import Finding, Options, table


@pytest.mark.faults
def test_a_revoked_key_is_refused_by_every_worker_of_every_region_for_good(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.json"
    assert main(["keys", "--quick", "--json", str(report)]) == 0
    output = capsys.readouterr().out
    found = json.loads(report.read_text())
    # That all of them took the change is what the run waits for; it fails if one never does.
    for change in ("created", "revoked"):
        assert set(found[f"{change}_s"]) == {"here", "there"}
        assert f"{change}   there" in output
    assert set(found["broken"].values()) == {0}


def test_a_broken_promise_is_one() -> None:
    finding = Finding(
        created_s={"here": [0.1, 0.3, 0.2]},
        revoked_s={"here": [0.4]},
        broken={"accepted again": 2, "no answer": 0},
        requests=7,
    )
    assert not finding.kept_promises
    text = table(finding, Options())
    assert "created   here         3         200         300" in text
    assert "2 accepted again" in text
