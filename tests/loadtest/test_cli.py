"""The commands as they are typed: what they print, write and return."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from aiohttp import web

from loadtest.__main__ import main
from loadtest.run import make_progress
from tests.fakes.sse_engine import SseEngine

FAKE = Path(__file__).parents[1] / "fakes" / "doherty_command.py"
ROOT = Path(__file__).parents[2]


@pytest.fixture
def engine() -> Iterator[SseEngine]:
    """An engine in a thread of its own: the command has the main one."""
    made = SseEngine()
    ready, stopped = threading.Event(), asyncio.Event()

    async def serve() -> None:
        async with made:
            ready.set()
            await stopped.wait()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert ready.wait(30)
    yield made
    assert made.loop is not None
    made.loop.call_soon_threadsafe(stopped.set)
    thread.join(30)
    assert not thread.is_alive()


def test_a_replay_from_beginning_to_end(
    engine: SseEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, plot = tmp_path / "r.json", tmp_path / "r.svg"
    arguments = [
        "--url",
        engine.url,
        "--speed",
        "1000",
        "--limit",
        "40",
        "--max-output-tokens",
        "3",
    ]
    code = main(
        [
            *("replay", "conversation", *arguments, "--json", str(out), "--plot", str(plot)),
            *("--session-header", "--label", "mine", "--warmup", "0", "--quiet"),
        ]
    )
    assert code == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("mine: conversation at speed 1000\n")
    assert printed.err == ""
    value = json.loads(out.read_text())
    assert value["summary"]["requests"] == value["summary"]["succeeded"] == 40
    # The engine remembers everything, so it finds what the trace repeats, to the token; in whatever
    # order the requests were served, since each block is new to it once.
    assert value["summary"]["hit_rate"] == value["summary"]["hit_rate_bound"] > 0
    assert value["model"] == "demo"
    assert plot.stat().st_size > 1000
    assert all("x-session-id" in headers for headers in engine.request_headers)
    assert all(headers["x-doherty-explain"] == "1" for headers in engine.request_headers)
    assert max(body["max_tokens"] for body in engine.bodies) == 3


def test_a_key_is_sent_and_not_written_down(
    engine: SseEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-the-environment")
    out = tmp_path / "r.json"
    arguments = ["--url", engine.url + "/v1", "--limit", "2", "--speed", "1000", "--quiet"]
    assert main(["replay", "conversation", *arguments, "--json", str(out)]) == 0
    assert main(["replay", "conversation", *arguments, "--api-key", "sk-given"]) == 0
    sent = [headers["authorization"] for headers in engine.request_headers]
    assert sent == ["Bearer sk-of-the-environment"] * 2 + ["Bearer sk-given"] * 2
    assert "sk-" not in out.read_text()


def test_requests_beyond_the_context_are_announced(
    engine: SseEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.max_model_len = 7000
    arguments = ["--url", engine.url, "--limit", "4", "--speed", "1000", "--quiet"]
    assert main(["replay", "conversation", *arguments]) == 0
    # Prompts of 6,758, 7,322, 7,236 and 2,290 tokens, and their answers.
    assert (
        "loadtest: 3 of 4 requests do not fit the 7,000 tokens of demo" in capsys.readouterr().err
    )


def test_only_answered_requests_count_in_the_bound(
    engine: SseEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.prompt_bytes_max = 4 * 7000
    out = tmp_path / "r.json"
    arguments = ["--url", engine.url, "--limit", "30", "--speed", "1000", "--json", str(out)]
    arguments += ["--max-output-tokens", "2", "--warmup", "0"]
    assert main(["replay", "conversation", *arguments]) == 0
    summary = json.loads(out.read_text())["summary"]
    assert summary["errors"]["http_400"] > 3
    assert summary["hit_rate"] == summary["hit_rate_bound"] > 0
    assert "http_400" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("listing", "problem"),
    [
        (web.json_response({"data": []}), "names no model"),
        (web.json_response([]), "Expected `object`"),
        (web.Response(status=401, text="no key"), "http_401: no key"),
    ],
    ids=["empty", "not a list", "refused"],
)
def test_a_server_that_names_no_model_needs_one_named(
    listing: web.Response, problem: str, engine: SseEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.listing = listing
    arguments = ["--url", engine.url, "--limit", "1", "--quiet"]
    assert main(["replay", "conversation", *arguments]) == 1
    assert f"{engine.url}/v1/models: {problem}" in capsys.readouterr().err
    assert main(["replay", "conversation", *arguments, "--model", "mine"]) == 0
    assert engine.bodies[0]["model"] == "mine"


def test_json_on_standard_output_is_alone_there(
    engine: SseEngine, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    arguments = ["--url", engine.url, "--limit", "2", "--speed", "1000", "--api", "completions"]
    assert main(["replay", "conversation", *arguments, "--json", "-"]) == 0
    printed = capfdbinary.readouterr()
    assert json.loads(printed.out)["settings"]["api"] == "completions"
    assert b"TTFT" in printed.err
    assert "prompt" in engine.bodies[0]


def test_exit_code_and_reason_when_every_request_fails(
    engine: SseEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.mode = "http_500"
    assert main(["replay", "conversation", "--url", engine.url, "--limit", "2", "--quiet"]) == 1
    reason = f"loadtest: {engine.url}: every request failed: 2 x http_500 (out of luck)\n"
    assert capsys.readouterr().err == reason


def test_an_unreachable_server_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", "conversation", "--url", "http://127.0.0.1:9"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("loadtest: http://127.0.0.1:9: ")
    assert line.endswith("is the server running?")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "no such file"),
        (["conversation", "--url", "localhost"], "such as http://"),
        (["conversation", "--warmup", "x"], "expected a number of requests"),
        (["conversation", "--api-key", "a b"], "plain ASCII"),
        (["conversation", "--plot", "x.gif"], "must end in"),
        (["conversation", "--json", "/nonexistent/x"], "no such folder"),
        (["conversation", "--offset", "5000"], "none of its 1750 requests"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_sent(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("option", ["--speed=0", "--limit=x", "--speed=nan", "--users=0"])
def test_bad_numbers_are_usage_errors(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["replay", "conversation", option])
    assert caught.value.code == 2
    assert "is not a " in capsys.readouterr().err


def test_an_interrupted_replay_shows_what_it_has(engine: SseEngine) -> None:
    command = [sys.executable, "-m", "loadtest", "replay", "conversation", "--url", engine.url]
    with subprocess.Popen(
        [*command, "--warmup", "0"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert engine.loop is not None
            asyncio.run_coroutine_threadsafe(engine.until_arrived(2), engine.loop).result(60)
            process.send_signal(signal.SIGINT)
            output = process.communicate(timeout=30)[0]
        finally:
            process.kill()
    assert process.returncode == 130
    assert "interrupted after" in output.splitlines()[0]
    assert "TTFT p50" in output


def test_sigterm_ends_a_replay_that_was_started_with_sigint_ignored(engine: SseEngine) -> None:
    """As under nohup, or behind `&` in a script."""
    command = (
        f"trap '' INT; exec {sys.executable} -m loadtest replay conversation --url {engine.url}"
    )
    with subprocess.Popen(
        ["/bin/sh", "-c", command], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert engine.loop is not None
            asyncio.run_coroutine_threadsafe(engine.until_arrived(2), engine.loop).result(60)
            process.send_signal(signal.SIGTERM)
            output = process.communicate(timeout=30)[0]
        finally:
            process.kill()
    assert process.returncode == 130
    assert "interrupted after" in output.splitlines()[0]


def test_a_comparison_from_beginning_to_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "c.json"
    code = main(
        [
            *("compare", "conversation", "--policies", "round_robin,prefix", "--replicas", "2"),
            *("--doherty", f"{sys.executable} {FAKE}", "--limit", "5", "--speed", "1000"),
            *("--max-output-tokens", "2", "--json", str(out)),
            *("--plot", str(tmp_path / "c.png")),
        ]
    )
    assert code == 0
    printed = capsys.readouterr()
    title, head, *rows = printed.out.splitlines()
    assert title == "conversation, 5 requests at speed 1000, 2 replicas h200-8b"
    assert head.split() == ["round_robin", "prefix"]
    assert any(row.startswith("TTFT p99") and "(x" in row for row in rows)
    assert printed.err.splitlines() == [
        "round_robin: starting 2 replicas",
        "prefix: starting 2 replicas",
    ]
    runs = json.loads(out.read_text())["runs"]
    assert [list(runs[policy][0]["summary"]["replicas"]) for policy in runs] == [
        ["round_robin-0"],
        ["prefix-0"],
    ]
    prompts = [runs[policy][0]["requests"]["prompt_tokens"] for policy in runs]
    assert prompts[0] == prompts[1]
    assert (tmp_path / "c.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--policies", "prefix,cache_aware", "--kv-cache-tokens", "9000"], "doherty:cache_aware"),
        (["--policies", "prefix"], "needs the usual profile, and --kv-cache-tokens"),
        (["--profile", "fast", "--kv-cache-tokens", "9000"], "needs the usual profile"),
    ],
)
def test_what_the_lab_cannot_do_is_said_before_anything_is_started(
    arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", "conversation", "--lab", "--doherty", "/nonexistent", *arguments]) == 2
    assert problem in capsys.readouterr().err


def test_a_comparison_with_the_lab_beside_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loadtest.rest.REST_TIMEOUT_S", 0.0)
    code = main(
        [
            *("compare", "conversation", "--policies", "prefix", "--replicas", "2", "--quiet"),
            *("--doherty", f"{sys.executable} {FAKE} --leases 1", "--limit", "5", "--lab"),
            *("--speed", "1000", "--max-output-tokens", "2", "--kv-cache-tokens", "750000"),
        ]
    )
    assert code == 1
    printed = capsys.readouterr()
    assert printed.err == "loadtest: prefix: not back to zero: leases 1\n"
    assert "leases left                       1" in printed.out
    assert printed.out.endswith("the same order\n")


def test_a_comparison_that_is_ended_stops_what_it_started(tmp_path: Path) -> None:
    notes = tmp_path / "ready"
    command = [sys.executable, "-m", "loadtest", "compare", "conversation", "--limit", "900"]
    doherty = f"{sys.executable} {FAKE} --notes {notes}"
    os.mkfifo(notes)
    with (
        subprocess.Popen(
            [*command, "--doherty", doherty, "--policies", "prefix", "--quiet", "--warmup", "0"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            env={**os.environ, "TMPDIR": str(tmp_path)},
            text=True,
        ) as process,
        notes.open() as lines,
    ):
        pid = int(lines.readline())
        try:
            assert lines.readline() == "request\n"
            process.send_signal(signal.SIGTERM)
            output = process.communicate(timeout=60)[0]
        except BaseException:
            os.kill(pid, signal.SIGKILL)  # it has a session of its own
            raise
        finally:
            process.kill()
    assert process.returncode == 130
    assert "TTFT p50" in output
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert [p.name for p in tmp_path.iterdir()] == ["ready"]


def test_progress_is_shown_to_people_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_progress(10, "t", quiet=False).show(5, 4, 1, 0.25)
    assert capsys.readouterr().err == ""  # not a terminal
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    bar = make_progress(10, "t", quiet=False)
    bar.show(5, 4, 1, 0.25)
    bar.close()
    assert "sent 5, errors 1, TTFT p50 250 ms" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm", None)
    make_progress(10, "t", quiet=False).show(1, 1, 0, None)
    assert "pip install 'doherty[loadtest]'" in capsys.readouterr().err
