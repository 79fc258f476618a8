"""What a kill is judged by: who was handed what, and whether its reader could tell."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from loadtest.faults import (
    Stream,
    choose_victim,
    command_line,
    descendants,
    judge,
    kept_promises,
    outcome,
    table,
)
from loadtest.fleet import Replica
from loadtest.run import RunError
from loadtest.wire import AnswerReader

KILLED_S = 10.0


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
    assert outcome(reader) == ("failed", "status 0")
    reader.status = 200
    assert outcome(reader) == ("silent", "no [DONE]")
    reader.done_seen = True
    assert outcome(reader) == ("complete", "")
    reader.stream_error = "replica_lost"
    assert outcome(reader)[0] == "cut"


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
