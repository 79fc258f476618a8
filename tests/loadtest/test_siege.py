"""The siege, the quick way: its promises hold. Times are for the long way, on a quiet machine."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest

from loadtest.__main__ import main
from loadtest.siege import SCENARIOS
from loadtest.siege.findings import (
    Figure,
    Finding,
    at_most,
    kept_promises,
    kibibytes,
    milliseconds,
    promise,
    ratio,
    table,
    timing,
)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_promises_hold_under_siege(
    scenario: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "figures.json"
    status = main(["siege", scenario, "--quick", "--json", str(file)])
    shown = capsys.readouterr()
    (finding,) = orjson.loads(file.read_bytes())["findings"]
    if finding["skipped"]:
        pytest.skip(finding["skipped"])
    assert status == 0, shown.out + shown.err
    assert sum(figure["promise"] for figure in finding["figures"]) >= 3
    assert finding["scenario"] in shown.out


def test_an_unknown_scenario_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["siege", "slow-hands"]) == 2
    assert "no scenario 'slow-hands'" in capsys.readouterr().err


KEPT = promise("served", "5", "5", met=True)
BROKEN = promise("lost", "1", "0", met=False)
MISSED = timing("gone after", 12.0, 10.0)


@pytest.mark.parametrize(
    ("figures", "kept"), [((KEPT,), True), ((KEPT, BROKEN), False), ((KEPT, MISSED), True)]
)
def test_only_a_broken_promise_fails(figures: tuple[Figure, ...], *, kept: bool) -> None:
    assert kept_promises([Finding(scenario="s", figures=figures)]) == kept


def test_a_table_says_what_was_kept_met_missed_and_skipped() -> None:
    figures = (KEPT, BROKEN, MISSED, timing("told after", 0.5, 10.0), Figure(what="x", value="1"))
    text = table([Finding(scenario="s", figures=figures), Finding(scenario="t", skipped="no root")])
    assert text.splitlines() == [
        "s",
        "  served             5  5           kept",
        "  lost               1  0           BROKEN",
        "  gone after   12.00 s  <= 10.00 s  missed",
        "  told after  500.0 ms  <= 10.00 s  met",
        "  x                  1",
        "t",
        "  skipped: no root",
    ]


def test_figures_have_units() -> None:
    assert milliseconds(0.0123) == "12.3 ms"
    assert milliseconds(3.2) == "3.20 s"
    assert kibibytes(2048) == "2.0 KiB"
    assert kibibytes(3 << 20) == "3.0 MiB"
    assert ratio("p99", 0.03, 0.01, 2).value == "x3.00 (10.0 ms -> 30.0 ms)"
    assert not ratio("p99", 0.03, 0.01, 2).met
    assert not ratio("p99", 0.03, 0.0, 2).met
    assert at_most("m", 1.0, 1.0, milliseconds).met
