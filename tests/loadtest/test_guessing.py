"""Whether the time of a refusal tells how near a key came: a run, and what it would find."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from loadtest.__main__ import main
from loadtest.guessing import KEY_CHARS, SHARED, Z_MAX, Finding, _wrong, table


def found(us_per_character: float) -> Finding:
    draw = random.Random(1)

    def times(shared: int) -> list[float]:
        return [100 + us_per_character * shared + draw.expovariate(0.05) for _ in range(300)]

    return Finding(times_us={shared: (times(shared), times(shared)) for shared in SHARED})


def test_a_comparison_from_the_beginning_would_be_found() -> None:
    assert abs(found(0.0).z) < Z_MAX
    assert found(0.1).z > Z_MAX  # a twentieth of what else differs
    assert found(-0.1).z < -Z_MAX
    text = table(found(0.0))
    assert len(text.splitlines()) == len(SHARED) + 3
    assert "z +" in text or "z -" in text


def test_wrong_keys_share_what_they_should() -> None:
    draw = random.Random(1)
    right = "a" * KEY_CHARS
    for shared in SHARED:
        wrong = _wrong(right, shared, draw)
        assert len(wrong) == KEY_CHARS
        assert wrong[:shared] == right[:shared]
        assert wrong[shared] != right[shared]


@pytest.mark.faults
def test_a_quick_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "report.json"
    status = main(["guessing", "--quick", "--json", str(report)])
    z = json.loads(report.read_text())["z"]
    assert status == int(abs(z) > Z_MAX)  # so few keys on a busy machine prove nothing
    assert "spread over kinds" in capsys.readouterr().out
