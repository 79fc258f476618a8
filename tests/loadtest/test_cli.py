"""The commands as they are typed: what they print, write and return."""

import asyncio
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

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
    # The engine remembers everything, so it finds what the trace repeats, to the token.
    assert value["summary"]["hit_rate"] == value["summary"]["hit_rate_bound"] > 0
    assert value["model"] == "demo"
    assert plot.stat().st_size > 1000
    assert all("x-session-id" in headers for headers in engine.request_headers)
    assert max(body["max_tokens"] for body in engine.bodies) == 3


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
        assert engine.loop is not None
        asyncio.run_coroutine_threadsafe(engine.until_arrived(2), engine.loop).result(60)
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=30)[0]
    assert process.returncode == 130
    assert "interrupted after" in output.splitlines()[0]
    assert "TTFT p50" in output


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
