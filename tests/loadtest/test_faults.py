"""What a kill is judged by: who was handed what, and whether its reader could tell."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import orjson
import pytest

from loadtest.__main__ import main
from loadtest.faults import (
    LONG_EVERY,
    Stream,
    choose_victim,
    command_line,
    descendants,
    judge,
    kept_promises,
    outcome,
    request_body,
    table,
    workers_whole,
)
from loadtest.fleet import Replica
from loadtest.run import RunError
from loadtest.wire import AnswerReader

KILLED_S = 10.0
FAKE = Path(__file__).parents[1] / "fakes" / "doherty_command.py"


def stream(begun_s: float, ended_s: float, what: str, replica: str = "") -> Stream:
    return Stream(begun_s=begun_s, ended_s=ended_s, replica=replica, outcome=what, detail="x")


@pytest.mark.parametrize(
    ("victim", "one", "counted"),
    [
        ("replica", stream(9, 11, "complete", "b"), "complete"),
        ("replica", stream(9, 11, "cut", "a"), "cut"),
        ("replica", stream(9, 11, "failed", "a"), "failed"),
        ("replica", stream(10.001, 10.002, "failed", "a"), "failed"),  # it was dying
        ("replica", stream(9, 11, "cut", "b"), "lost"),
        ("replica", stream(11, 12, "failed", ""), "lost"),
        ("replica", stream(9, 11, "silent", "a"), "silent"),
        ("manager", stream(9, 11, "cut", "a"), "lost"),
        ("manager", stream(9, 11, "complete", "a"), "complete"),
        ("worker", stream(9, 11, "cut", "a"), "cut"),
        ("worker", stream(9, 11, "failed", ""), "failed"),
        ("worker", stream(11, 12, "failed", ""), "lost"),
        ("worker", stream(1, 2, "cut", ""), "lost"),
    ],
)
def test_what_became_of_one_request(victim: str, one: Stream, counted: str) -> None:
    finding = judge(victim, "a", [one], KILLED_S, 0.5)
    counts = {
        word: getattr(finding, word) for word in ("complete", "cut", "failed", "lost", "silent")
    }
    assert counts == {word: int(word == counted) for word in counts}
    assert finding.in_flight == (one.begun_s <= KILLED_S < one.ended_s)
    assert kept_promises([finding]) == (counted not in ("lost", "silent"))
    assert table([finding]).splitlines()[1].split()[0] == victim


def test_what_an_ended_answer_was() -> None:
    reader = AnswerReader()
    assert outcome(reader, streamed=True) == ("failed", "status 0")
    reader.status = 502
    reader.headers = {"x-should-retry": "true"}
    assert outcome(reader, streamed=False) == ("failed", "status 502 with x-should-retry")
    reader.status = 200
    assert outcome(reader, streamed=True) == ("silent", "no [DONE]")
    reader.done_seen = True
    assert outcome(reader, streamed=True) == ("complete", "")
    reader.stream_error = "replica_lost"
    assert outcome(reader, streamed=True)[0] == "cut"


@pytest.mark.parametrize(
    ("body", "what"),
    [(b'{"choices": [{}]}', "complete"), (b'{"choices": [', "silent"), (b"", "silent")],
)
def test_what_a_whole_answer_was(body: bytes, what: str) -> None:
    reader = AnswerReader()
    reader.status, reader.body = 200, body
    assert outcome(reader, streamed=False)[0] == what


def test_the_load_has_a_long_request_among_short_ones() -> None:
    bodies = [orjson.loads(request_body(number, 7)) for number in range(2 * LONG_EVERY)]
    prompts = [body["messages"][0]["content"] for body in bodies]
    # Simulated engines, like most tokenizers, make a token of some four octets.
    long = [number for number, prompt in enumerate(prompts) if len(prompt) / 4 > 8000]
    assert long == [0, LONG_EVERY]
    assert [number for number, body in enumerate(bodies) if not body["stream"]] == long
    # No block of 16 tokens that a cache could have from another request.
    assert len({prompt[:64] for prompt in prompts}) == len(prompts)
    assert {body["max_tokens"] for body in bodies} == {7}


@pytest.mark.parametrize(
    ("workers", "restarts", "wanted", "whole"),
    [
        (1, 1, 1, True),
        (1, 0, 1, False),  # the dead one is still counted
        (0, 1, 1, False),
        (2, 1, 2, True),
        (1, 1, 2, False),
        (3, 1, 4, False),
    ],
)
def test_every_place_is_filled_again(workers: int, restarts: int, wanted: int, whole: bool) -> None:
    page = f"# HELP x\ndoherty_workers {workers}\ndoherty_worker_restarts_total {restarts}\n"
    assert workers_whole(page.encode(), wanted) == whole


def test_no_metrics_are_no_recovery() -> None:
    assert not workers_whole(b"", 1)


SHORTLY = ("--rate", "40", "--before", "0.3", "--after", "0.2", "--output-tokens", "2", "--quiet")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_is_killed_and_comes_back(workers: int, tmp_path: Path) -> None:
    out = tmp_path / "f.json"
    doherty = f"{sys.executable} {FAKE} --workers"
    victims = ("--victims", "worker", "--workers", str(workers), "--replicas", "1")
    assert main(["faults", *victims, "--doherty", doherty, *SHORTLY, "--json", str(out)]) == 0
    (finding,) = json.loads(out.read_text())["findings"]
    assert (finding["victim"], finding["requests"], finding["complete"]) == ("worker", 20, 20)


def test_a_run_that_cannot_go_on_says_why_and_keeps_the_logs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    doherty = f"{sys.executable} {FAKE}"  # its replicas have no process
    victims = ("--victims", "replica", "--replicas", "1")
    assert main(["faults", *victims, "--doherty", doherty, *SHORTLY]) == 1
    (folder,) = tmp_path.iterdir()
    assert {"doherty.yaml", "up.log"} <= {path.name for path in folder.iterdir()}
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("loadtest: no replica to kill was found below process ")
    assert line.endswith(f"; see {folder}")


def test_the_busiest_replica_is_the_victim() -> None:
    known = [Replica(replica_id="a", pid=1), Replica(replica_id="b", pid=2)]
    streams = [stream(0, 1, "complete", name) for name in "abb"]
    assert choose_victim("replica", 0, known, streams) == (2, "b")
    with pytest.raises(RunError, match="no replica to kill"):
        choose_victim("replica", 0, [], streams)


def test_processes_are_found_below_their_parent() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()", "proxy.worker"], stdin=-1) as child:
        try:
            assert child.pid in descendants(os.getpid())
            assert "proxy.worker" in command_line(child.pid)
            with pytest.raises(RunError, match=f"below process {child.pid}"):
                choose_victim("worker", child.pid, [], [])  # itself is not below itself
        finally:
            child.kill()
    assert command_line(child.pid) == ""
