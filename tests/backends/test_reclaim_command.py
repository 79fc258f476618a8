"""`doherty reclaim` in words, and against a manager."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from backends.cli import main
from backends.notices import NoticeReport, ReclaimReport
from backends.reclaim import Fate
from backends.reclaim_command import story

REPORT = ReclaimReport(
    (NoticeReport(29.6, ["0", "1"]), NoticeReport(-2.0, None)),
    {"m-0": Fate.SERVES_ON, "m-1": Fate.MOVES},
    {"m-0": "m-2"},
)


def test_what_becomes_of_whom_is_told() -> None:
    assert story(REPORT).splitlines() == [
        "GPU 0, 1 will be gone in 30 s",
        "the machine will be gone by now",
        "  m-0 serves on; m-2 stands in for it",
        "  m-1 moves",
    ]
    assert story(ReclaimReport()) == "nothing is to be taken away"


@pytest.fixture
def asked() -> Iterator[tuple[str, list[str]]]:
    seen: list[str] = []

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(f"{self.command} {self.path}")
            refused = "gpus=9" in self.path
            self.send_response(400 if refused else 200)
            self.end_headers()
            words = {"error": {"message": "no GPU '9'"}} if refused else {"notices": []}
            self.wfile.write(json.dumps(words).encode())

        def do_POST(self) -> None:
            self.do_GET()

        def do_DELETE(self) -> None:
            self.do_GET()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Page) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", seen
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("words", "request_line"),
    [
        ([], "GET /v1/reclaim"),
        (["30"], "POST /v1/reclaim?in_s=30"),
        (["7.5", "--gpus", "0,1"], "POST /v1/reclaim?in_s=7.5&gpus=0%2C1"),
        (["--cancel"], "DELETE /v1/reclaim"),
    ],
)
def test_each_order_is_one_request(
    asked: tuple[str, list[str]],
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    request_line: str,
) -> None:
    url, seen = asked
    assert main(["reclaim", *words, "--manager-url", url]) == 0
    assert seen == [request_line]
    assert capsys.readouterr().out == "nothing is to be taken away\n"


def test_a_refusal_is_one_line(
    asked: tuple[str, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reclaim", "30", "--gpus=9", "--manager-url", asked[0]]) == 1
    assert capsys.readouterr().err == "no GPU '9'\n"
