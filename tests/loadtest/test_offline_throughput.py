"""The throughput run: its jobs as values, and a rehearsal of all of it with small ones."""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from loadtest.offline import stage
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


SLEEPS = "import time; print('loading', flush=True); time.sleep(60)"
DIES = "import sys; print('torch.OutOfMemoryError: CUDA out of memory', flush=True); sys.exit(3)"


def test_a_program_that_dies_breaks_off_who_waits_for_it_with_its_last_words(
    tmp_path: Path,
) -> None:
    async def run(code: str, wait: Callable[[], Awaitable[None]]) -> None:
        log = tmp_path / "worker.log"
        async with (
            stage.program([sys.executable, "-c", code], log) as process,
            stage.alive(process, log),
        ):
            await wait()

    async def for_ever() -> None:
        await asyncio.Event().wait()

    async def stalled() -> None:
        while "loading" not in stage.said(tmp_path / "worker.log"):
            await asyncio.sleep(0.01)
        raise RunError("for 1 s no line was done")

    async def wrong() -> None:
        raise KeyError("x")

    async def done() -> None: ...

    words = r"it ended with 3 before its work was done; the end of worker.log: torch.OutOfMem"
    with pytest.raises(RunError, match=words):
        asyncio.run(run(DIES, for_ever))
    with pytest.raises(RunError, match=r"no line was done; the end of worker.log: loading"):
        asyncio.run(run(SLEEPS, stalled))
    with pytest.raises(KeyError):
        asyncio.run(run(SLEEPS, wrong))
    asyncio.run(run(SLEEPS, done))


def test_a_job_that_nobody_does_is_not_waited_for(tmp_path: Path) -> None:
    async def run() -> None:
        async with stage.service(tmp_path, {}) as url:
            content = input_file(bodies(SHARED, "m"))
            await stage.do_job(url, content, 60.0, stall_s=0.3)

    with pytest.raises(RunError, match=r"for 0\.3 s no line was done, of \d+"):
        asyncio.run(run())


def test_a_long_log_keeps_how_it_began_and_how_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "LOG_HEAD_BYTES", 10)
    monkeypatch.setattr(stage, "LOG_TAIL_BYTES", 20)
    log = tmp_path / "worker.log"
    log.write_bytes(b"0123456789abcdefghij")
    stage.cut(log)
    assert log.read_bytes() == b"0123456789abcdefghij"
    log.write_bytes(b"h" * 10 + b"m" * 500 + b"t" * 20)
    stage.cut(log)
    assert log.read_bytes() == b"h" * 10 + b"\n... 500 bytes are left out ...\n" + b"t" * 20
