"""The throughput run: its jobs as values, and a rehearsal of all of it with small ones."""

from __future__ import annotations

import asyncio
import itertools
import json
from pathlib import Path

import pytest

from loadtest.offline.lines import Shape, bodies, input_file, sorted_by_prefix
from loadtest.offline.throughput import Row, Setting, bare, ratio, run_bare, shown, through
from loadtest.run import RunError

SHARED = Shape(lines=40, prompt_words=(2, 4), prefixes=4, prefix_words=20)


def _beginnings(requests: list[dict[str, object]]) -> list[str]:
    return [json.dumps(request["messages"])[:120] for request in requests]


def _changes(names: list[str]) -> int:
    return sum(a != b for a, b in itertools.pairwise(names))


def test_shared_beginnings_are_apart_until_they_are_sorted() -> None:
    made = bodies(SHARED, "m")
    assert len(set(_beginnings(made))) == 4
    assert _changes(_beginnings(made)) > 15
    assert _changes(_beginnings(sorted_by_prefix(made))) == 3
    assert bodies(SHARED, "m") == made, "the same seed makes the same job"


def test_an_input_file_has_a_line_for_each_request() -> None:
    rows = [json.loads(row) for row in input_file(bodies(SHARED, "m")).splitlines()]
    assert [row["custom_id"] for row in rows] == [f"line-{n}" for n in range(40)]
    assert {row["url"] for row in rows} == {"/v1/chat/completions"}


def test_the_ratio_is_of_the_same_job() -> None:
    rows = [Row("a", "bare", 100.0, 1, 0, 1), Row("a", "Doherty", 98.0, 1, 0, 1)]
    rows += [Row("b", "bare", 50.0, 1, 0, 1), Row("b", "Doherty", 100.0, 1, 0, 1)]
    assert ratio(rows, "a", "bare") == pytest.approx(0.98)
    assert ratio(rows, "b", "bare") == pytest.approx(2.0)


def test_a_bare_engine_that_fails_says_why() -> None:
    with pytest.raises(RunError, match="no such thing"):
        asyncio.run(run_bare(["sh", "-c", "echo no such thing >&2; exit 1"], 10.0))


def test_a_job_goes_through_and_every_line_is_there_once(tmp_path: Path) -> None:
    setting = Setting(lines=60, profile="fast", sequences_max=16, chunk_lines=20)
    content = input_file(bodies(Shape(lines=60, prompt_words=(2, 9)), "m"))

    async def both() -> list[Row]:
        yardstick = await bare(setting, tmp_path, "different", "bare", content)
        return [yardstick, await through(setting, tmp_path, "different", content)]

    rows = asyncio.run(both())
    assert all(row.tokens_per_s > 0 for row in rows)
    shared = [Row("shared", way, 1.0, 1, 0, 1) for way in ("bare", "bare, sorted", "Doherty")]
    text = shown(setting, [*rows, *shared], 1.0)
    assert "60 different lines, Doherty over bare: " in text
