"""`doherty batch` as a person types it, against a service on the wire."""

from __future__ import annotations

import asyncio
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import msgspec

from backends.cli import main
from backends.offline.client.bar import bar, duration, line, story, table
from backends.offline.client.values import Progress, progress_of
from tests.fakes.offline_stage import LONG, HttpWorker, Stage, offline_stage
from tests.fakes.programs import CLI, ROOT, environment

PROGRESS = Progress(
    job_id="batch_1",
    state="in_progress",
    endpoint="/v1/chat/completions",
    model="demo",
    created_s=1,
    expires_s=2,
    total=4000,
    completed=990,
    failed=10,
    tokens=123_456,
    tokens_per_s=4210.4,
    eta_s=130.0,
    cost=0.12345,
    problem=None,
    problems=(),
    metadata={"team": "blue"},
)


def bodies(*words: str) -> str:
    made = [{"model": "demo", "messages": [{"role": "user", "content": w}]} for w in words]
    return "".join(json.dumps(body) + "\n" for body in made)


class Ended(msgspec.Struct, frozen=True):
    """What a command said, and its status."""

    returncode: int
    stdout: str
    stderr: str


async def batch(stage: Stage, *arguments: str, given: str = "") -> Ended:
    """Run the command here, beside the loop that serves it, one at a time."""
    out = io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True)
    err = io.StringIO()
    told = {"DOHERTY_URL": stage.url, "DOHERTY_API_KEY": "key"}
    with (
        patch.dict(os.environ, told),
        patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(given.encode()))),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        status = await asyncio.to_thread(_status, ["batch", *arguments])
    said = out.buffer.getvalue().decode()  # type: ignore[attr-defined]
    # The service is of this process, and what it logs is not the command's.
    own = [row for row in err.getvalue().splitlines(keepends=True) if not row.startswith('{"at"')]
    return Ended(status, said, "".join(own))


def _status(arguments: list[str]) -> int:
    try:
        return main(arguments)
    except SystemExit as error:  # argparse's
        return int(error.code or 0)


async def process(stage: Stage, *arguments: str) -> Ended:
    """Run it as a process of its own, which others may run beside."""
    told = {"DOHERTY_URL": stage.url, "DOHERTY_API_KEY": "key"}
    run = await asyncio.create_subprocess_exec(
        *(*CLI, "batch", *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env=environment(told),
    )
    out, err = await run.communicate()
    assert run.returncode is not None
    return Ended(run.returncode, out.decode(), err.decode())


# --- what is shown ---------------------------------------------------------------------------


def test_the_bar_says_what_is_done_at_which_speed_and_cost() -> None:
    assert line(PROGRESS) == (
        "in_progress  [######..................]  1,000/4,000 lines  10 failed  4,210 tokens/s  "
        "2 min 10 s left  cost 0.1235"
    )
    assert line(PROGRESS, 40) == "in_progress  [######..................]"
    assert line(PROGRESS, 39) == "in_progress  [######.................."
    done = msgspec.structs.replace(PROGRESS, state="completed", completed=3990, eta_s=0.0)
    assert bar(done) == "[" + "#" * 24 + "]"
    assert line(done).endswith("10 failed  123,456 tokens  cost 0.1235")
    almost = msgspec.structs.replace(PROGRESS, completed=3989)
    assert bar(almost) == "[" + "#" * 23 + ".]"
    assert line(progress_of(b'{"id": "batch_2", "status": "validating"}')) == "validating"


def test_the_story_says_why_nobody_does_it() -> None:
    told = b'{"id": "batch_2", "status": "in_progress", "doherty": {"problem": "nobody can"}}'
    assert story(progress_of(told)).splitlines()[1:] == ["  nobody can"]


def test_times_are_in_their_two_greatest_units() -> None:
    times = {0.4: "0 s", 59: "59 s", 61: "1 min 1 s", 3660: "1 h 1 min", 90_000: "1 d 1 h"}
    assert {seconds: duration(seconds) for seconds in times} == times


def test_a_batch_of_a_newer_service_is_read_all_the_same() -> None:
    body = {
        "id": "batch_3",
        "status": "failed",
        "later": 1,
        "errors": {"data": [{"code": "empty_file", "message": "No lines.", "more": 1}]},
    }
    progress = progress_of(json.dumps(body).encode())
    assert (progress.ended, progress.refused, progress.cost) == (True, True, None)
    assert story(progress) == "batch_3  failed\n  No lines. (empty_file)"
    assert table([]) == "no batches"
    assert table([PROGRESS, progress]).splitlines()[2].split() == (
        ["batch_3", "failed", "-", "0", "0", "0", "0", "-"]
    )


# --- what is done ----------------------------------------------------------------------------


async def test_bodies_are_submitted_watched_and_read(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(bodies("say a", LONG, "say b"))
    async with offline_stage(tmp_path) as stage:
        sent = await batch(stage, "submit", str(source), "--metadata", "team=blue")
        assert (sent.returncode, sent.stderr) == (0, "")
        job_id = sent.stdout.strip()
        status = await batch(stage, "status", job_id)
        assert "  team: blue" in status.stdout.splitlines()
        watching = asyncio.ensure_future(process(stage, "watch", job_id))
        following = asyncio.ensure_future(process(stage, "results", job_id, "--follow"))
        worker = HttpWorker(stage.url)
        while len(worker.done) < 3:
            await worker.work(3)
            await asyncio.sleep(0.02)
        watched, followed = await watching, await following
        assert watched.returncode == 0
        assert watched.stdout == ""
        assert watched.stderr.splitlines()[-1].startswith("completed  [" + "#" * 24)
        assert followed.returncode == 0
        ids = [json.loads(row)["custom_id"] for row in followed.stdout.splitlines()]
        assert sorted(ids) == ["line-0", "line-2"]
        out = tmp_path / "errors.jsonl"
        assert (await batch(stage, "results", job_id, "--errors", "-o", str(out))).stdout == ""
        (row,) = [json.loads(row) for row in out.read_text().splitlines()]
        assert (row["custom_id"], row["response"]["status_code"]) == ("line-1", 400)
        assert set(row) == {"id", "custom_id", "response", "error"}
        listed = (await batch(stage, "list")).stdout.splitlines()
        assert listed[1].split()[:6] == [job_id, "completed", "demo", "3", "3", "1"]


async def test_whole_lines_come_from_standard_input_and_name_their_endpoint(tmp_path: Path) -> None:
    row = {"custom_id": "mine", "method": "POST", "url": "/v1/embeddings"}
    given = json.dumps({**row, "body": {"model": "demo", "input": "x"}})
    async with offline_stage(tmp_path) as stage:
        job_id = (await batch(stage, "submit", "-", given=given)).stdout.strip()
        async with stage.client() as client:
            made = await client.batches.retrieve(job_id)
            assert made.endpoint == "/v1/embeddings"
        cancelled = await batch(stage, "cancel", job_id)
        assert cancelled.returncode == 0
        assert (await batch(stage, "watch", job_id)).returncode == 1


async def test_a_file_that_is_wrong_is_refused_before_it_is_sent(tmp_path: Path) -> None:
    wrong = {
        bodies("a") + "{\n": "-: line 2: This line is not parseable as valid JSON",
        "\n" + bodies("a") + '{"messages": []}\n': "-: line 3: Missing required parameter",
        '{"model": "demo", "input": "x"}\n': "-: say which --endpoint it is for",
        "": "-: there is no request",
    }
    async with offline_stage(tmp_path) as stage:
        for given, why in wrong.items():
            run = await batch(stage, "submit", "-", given=given)
            assert (run.returncode, run.stdout) == (2, "")
            assert run.stderr.startswith(why)
            assert run.stderr.count("\n") == 1
        missing = await batch(stage, "submit", "/nowhere/in.jsonl")
        assert (missing.returncode, missing.stderr) == (
            2,
            "/nowhere/in.jsonl: No such file or directory\n",
        )
        assert (await batch(stage, "list")).stdout == "no batches\n"
        failed = await batch(
            stage, "submit", "-", "--watch", given=bodies("a").replace("demo", "z")
        )
        assert failed.returncode == 1
        assert "No replica or pool serves the model 'z'" in failed.stderr


async def test_what_cannot_be_is_one_line(tmp_path: Path) -> None:
    async with offline_stage(tmp_path) as stage:
        unknown = await batch(stage, "status", "batch_nix")
        assert (unknown.returncode, unknown.stderr.count("\n")) == (1, 1)
        address = await batch(stage, "list", "--url", "localhost:8000")
        assert (address.returncode, address.stderr.count("\n")) == (2, 1)
        pair = await batch(stage, "submit", "-", "--metadata", "team")
        assert pair.returncode == 2
        assert "'team' is not KEY=VALUE" in pair.stderr
        assert (await batch(stage)).returncode == 2


async def test_a_disk_that_is_full_is_said_in_one_line(tmp_path: Path) -> None:
    async with offline_stage(tmp_path) as stage:
        job_id = (await batch(stage, "submit", "-", given=bodies("say a"))).stdout.strip()
        worker = HttpWorker(stage.url)
        while not worker.done:
            await worker.work(1)
            await asyncio.sleep(0.02)
        full = await batch(stage, "results", job_id, "-o", "/dev/full")
        assert (full.returncode, full.stderr) == (1, "the output: No space left on device\n")


async def test_an_interrupt_leaves_the_job_running_and_says_so(tmp_path: Path) -> None:
    async with offline_stage(tmp_path) as stage:
        job_id = (await batch(stage, "submit", "-", given=bodies("a"))).stdout.strip()
        screen, terminal = pty.openpty()
        watching = await asyncio.create_subprocess_exec(
            *(*CLI, "batch", "watch", job_id, "--url", stage.url, "--api-key", "key"),
            stdout=terminal,
            stderr=terminal,
            cwd=ROOT,
            env=environment(),
            # Whoever runs these tests in the background has it ignored, and children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        os.close(terminal)
        seen = b""
        while b"0/1 lines" not in seen:
            seen += await asyncio.to_thread(os.read, screen, 4096)
        watching.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(watching.wait(), 20) == 130
        seen += await asyncio.to_thread(os.read, screen, 4096)
        os.close(screen)
        assert re.search(rb"\r\x1b\[Kin_progress  \[\.{24}\]  0/1 lines", seen)
        assert f"{job_id} goes on; see it with: doherty batch watch {job_id}".encode() in seen
        async with stage.client() as client:
            assert (await client.batches.retrieve(job_id)).status == "in_progress"
