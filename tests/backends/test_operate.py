"""`doherty sleep`, `wake` and `snapshot create` against a manager that answers as the test says."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from typing_extensions import override

from backends import operate as module
from backends.cli import main


class Manager:
    """What it is asked, and what it answers: to the POST first, the last of the rest for ever."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.asked: list[str] = []
        self.posted: tuple[int, bytes] = (200, b"{}")
        self.phases: list[tuple[str, str]] = []
        self.images: list[dict[str, object]] = [{}]  # what is told of it, as with `phases`

    def answer(self, method: str, path: str) -> tuple[int, bytes]:
        self.asked.append(f"{method} {path}")
        if method == "POST":
            return self.posted
        phase, reason = self.phases.pop(0) if len(self.phases) > 1 else self.phases[0]
        image = self.images.pop(0) if len(self.images) > 1 else self.images[0]
        told = {"phase": phase, "reason": reason, "replica_id": "m-0", "image": image}
        return 200, json.dumps(told).encode()


@pytest.fixture
def manager() -> Iterator[Manager]:
    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = made.answer(self.command, self.path)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            self.do_GET()

        @override
        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Page) as server:
        made = Manager(f"http://127.0.0.1:{server.server_port}/")
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield made
        server.shutdown()
        thread.join()


def run(manager: Manager, *words: str) -> int:
    return main([*words, "--manager-url", manager.url])


def test_it_waits_until_it_sleeps(manager: Manager, capsys: pytest.CaptureFixture[str]) -> None:
    manager.phases = [("emptying", ""), ("falling_asleep", ""), ("asleep", "asleep at level 2")]
    assert run(manager, "sleep", "a/b", "--level", "2") == 0
    assert manager.asked == [
        "POST /v1/replicas/a%2Fb/sleep?level=2&rung=asleep", *(["GET /v1/replicas/a%2Fb"] * 3),
    ]  # fmt: skip
    assert capsys.readouterr().out == "a/b is asleep at level 2\n"
    manager.phases = [("asleep", "asleep at level 1")]
    assert run(manager, "sleep", "m-0") == 0  # the engine knows how deep
    assert "POST /v1/replicas/m-0/sleep?rung=asleep" in manager.asked


def test_it_waits_until_it_is_awake(manager: Manager, capsys: pytest.CaptureFixture[str]) -> None:
    manager.phases = [("waking", ""), ("held", "")]
    assert run(manager, "wake", "m-0") == 0
    assert manager.asked[0] == "POST /v1/replicas/m-0/wake"
    assert capsys.readouterr().out == "m-0 is drained\n"


ENDS = [
    ("sleep", "ready", "it would not sleep, and serves on"),
    ("sleep", "stopping", "it broke while it fell asleep"),
    ("wake", "stopping", "it would not wake"),
    ("wake", "backoff", "killed by SIGKILL"),
]


@pytest.mark.parametrize(("command", "phase", "reason"), ENDS)
def test_what_did_not_come_about_is_a_failed_run(
    manager: Manager, command: str, phase: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "in backoff" if phase == "backoff" else phase
    manager.phases = [(phase, reason)]
    assert run(manager, command, "m-0") == 1
    assert capsys.readouterr().err == f"m-0 is {words}: {reason}\n"


def test_an_image_is_waited_for_and_its_progress_told(
    manager: Manager, capsys: pytest.CaptureFixture[str]
) -> None:
    manager.phases = [("emptying", ""), ("falling_asleep", ""), ("ready", "image ab was made")]
    manager.images = [
        {"doing": "draining"},
        {"doing": "dumping", "share": 0.5},
        {"snapshot": "ab", "image_bytes": 7},
    ]
    assert run(manager, "snapshot", "create", "m-0", "--json") == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == {"snapshot": "ab", "image_bytes": 7}
    assert said.err == "draining 0%\ndumping 50%\n"
    assert manager.asked[0] == "POST /v1/replicas/m-0/snapshot"


def test_an_image_that_was_not_made_is_a_failed_run(
    manager: Manager, capsys: pytest.CaptureFixture[str]
) -> None:
    manager.phases, manager.images = [("ready", "so it is")], [{"problem": "the disk is full"}]
    assert run(manager, "snapshot", "create", "m-0") == 1
    assert capsys.readouterr().err == "m-0 is ready, without an image: the disk is full\n"
    assert run(manager, "snapshot", "create", "m-0", "m-1") == 1
    assert "doherty snapshot create REPLICA" in capsys.readouterr().err


def test_a_turn_without_an_end_is_given_up(
    manager: Manager, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TURN_S_MAX", 0.0)
    manager.phases = [("waking", "woken by an operator")]
    assert run(manager, "wake", "m-0") == 1
    assert capsys.readouterr().err == "it is still waking: woken by an operator\n"


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((409, b'{"error": {"message": "m-0: it is starting"}}'), "m-0: it is starting"),
        ((404, b"<html>"), "answered 404: is that a manager?"),
    ],
)
def test_a_refusal_is_told_in_the_managers_words(
    manager: Manager, answer: tuple[int, bytes], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    manager.posted = answer
    assert run(manager, "sleep", "m-0") == 1
    assert capsys.readouterr().err.strip().endswith(words)


def test_something_else_that_answers(manager: Manager, capsys: pytest.CaptureFixture[str]) -> None:
    manager.phases = [("unheard-of", "")]
    assert run(manager, "sleep", "m-0") == 1
    assert "answered something else than a replica" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["-5", "1.5", "x", "9" * 5_000])
def test_no_images_are_removed_for_a_size_that_is_none(
    size: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["snapshot", "prune", "--dir", str(tmp_path), "--mib-max", size])
    assert caught.value.code == 2
    assert "is no number of MiB; use 0 or more" in capsys.readouterr().err
