"""The soak: what counts as a leak, and a short one from end to end."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

from loadtest.__main__ import main
from loadtest.run import RunError
from loadtest.scripts import Script
from loadtest.soak import (
    GROWTH_MAX,
    JUDGED_FROM,
    NOBODY,
    POINTS,
    Options,
    Result,
    Sample,
    complaints,
    make_kind,
    rss_bytes,
    table,
)


def result(**fields: object) -> Result:
    base: dict[str, object] = {
        "options": Options(requests=JUDGED_FROM),
        "outcomes": {"complete": 10},
        "first": Sample(10_000, 1000, 1.0),
        "last": Sample(100_000, 1000, 2.0),
        "elapsed_s": 1.0,
    }
    return Result(**base | fields)  # type: ignore[arg-type]


def grown(times: float) -> Sample:
    return Sample(100_000, int(1000 * times), 2.0)


def test_a_run_in_order_is_not_complained_of() -> None:
    assert complaints(result(last=grown(GROWTH_MAX))) == []
    assert "back to zero" in table(result())


def test_growth_is_a_leak_where_the_run_is_long_enough_to_tell() -> None:
    (text,) = complaints(result(last=grown(GROWTH_MAX + 0.01)))
    assert "memory grew to 1.06" in text
    short = Options(requests=JUDGED_FROM - 1)
    assert complaints(result(last=grown(2), options=short)) == []


def test_every_other_failure_is_named() -> None:
    assert complaints(result(outcomes={"complete": 1, "lost": 2})) == ["2 lost"]
    assert complaints(result(unrest={"leases": 1.0})) == ["not back to zero: leases 1"]
    assert "leases 1" in table(result(unrest={"leases": 1.0}))
    assert "lost: t1: why" in table(result(details=["lost: t1: why"]))


def test_requests_differ_in_their_token_alone() -> None:
    kind = make_kind(80, Script(token=NOBODY), 500, random.Random(1))
    octets = kind.octets("t00000012")
    assert octets == kind.octets(NOBODY).replace(NOBODY.encode(), b"t00000012")
    head, body = octets[: kind.head_bytes], octets[kind.head_bytes :]
    assert head.endswith(b"content-length: %d\r\n\r\n" % len(body))
    assert b"t00000012" in head
    assert json.loads(body)["messages"][0]["content"].startswith("t00000012 ")


def test_memory_is_read_of_running_processes() -> None:
    assert rss_bytes(os.getpid()) > 1_000_000
    with pytest.raises(RunError, match="is gone"):
        rss_bytes(2**31 - 1)


@pytest.mark.parametrize("arguments", [["--requests", "0"], ["--abort-share", "2"]])
def test_a_wrong_argument_is_said(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["soak", *arguments]) == 2
    assert "expected" in capsys.readouterr().err


@pytest.mark.faults
def test_a_short_soak_answers_all_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "soak.json"
    assert main(["soak", "--quick", "--quiet", "--json", str(out)]) == 0, capsys.readouterr()
    told = json.loads(out.read_text())
    assert set(told["outcomes"]) == {"complete"}
    assert told["outcomes"]["complete"] + sum(told["aborted"].values()) == 3000
    ways = {f"{point}, {how}" for point in POINTS for how in ("close", "reset")}
    assert set(told["aborted"]) == ways
    assert told["unrest"] == {}
    assert told["first"]["requests"] == 300
    assert "3,000 requests" in capsys.readouterr().out
