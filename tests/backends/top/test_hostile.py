"""Names that a hostile manager, engine or client chose, and output that nobody takes."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from backends.cli import main
from backends.failure import StartError
from backends.printing import plain, plain_json
from backends.top.feed import Admin
from backends.top.look import Look
from backends.top.screen import Heard, draw
from proxy.contract.view import View, decode_view
from tests.fakes import view_server
from tests.fakes.terminal import Terminal
from tests.fakes.view_server import ViewServer
from tests.fakes.views import a_view

# A title, a colour, a control sequence of C1, a line turned round, a line end, markup of Textual.
EVIL = "\x1b]0;owned\x07\x1b[31m\x9b31m\u202e\r\n\x7f[bold]"
ROOT = Path(__file__).parents[3]


def _poisoned(value: object) -> object:
    """Return a view in which each text is one that would move a cursor."""
    if isinstance(value, str):
        return EVIL + value
    if isinstance(value, dict):
        return {key: _poisoned(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_poisoned(each) for each in value]
    return value


VIEW = msgspec.convert(_poisoned(msgspec.to_builtins(a_view(6))), View)


def _moves(octets: bytes) -> list[str]:
    text = octets.decode()
    return [hex(ord(letter)) for letter in text if not letter.isprintable() and letter != "\n"]


async def _top(*arguments: str) -> tuple[int | None, bytes, bytes]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "backends.cli", "top", *arguments),
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    out, err = await process.communicate()
    return process.returncode, out, err


async def test_no_escape_sequence_reaches_whoever_reads_the_text_or_the_json() -> None:
    async with ViewServer(VIEW) as server:
        for flag in ("--once", "--json"):
            status, out, _ = await _top("--url", server.url, flag)
            assert (status, _moves(out)) == (0, [])
        assert decode_view(out) == VIEW


async def test_nor_does_one_in_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = view_server._error
    monkeypatch.setattr(view_server, "_error", lambda status, _: answer(status, EVIL))
    async with ViewServer(VIEW) as server:
        server.refused = 503
        status, _, err = await _top("--url", server.url, "--once")
        assert (status, _moves(err)) == (1, [])
        assert "31m" in err.decode()


@pytest.mark.parametrize("panel", range(6))
@pytest.mark.parametrize("size", [(1, 1), (3, 2), (80, 24), (500, 3), (500, 60)])
def test_nor_is_one_in_a_line_of_any_panel_at_any_size(panel: int, size: tuple[int, int]) -> None:
    drawn = draw(VIEW, Look(panel=panel, words=""), Heard(0.0, EVIL, 1.0), size, EVIL)
    assert all(line.text.isprintable() for line in drawn.lines)
    assert len(drawn.lines) <= size[1]


async def test_nor_does_one_in_a_dialog() -> None:
    async with ViewServer(VIEW) as server, Terminal(120, 30) as terminal:
        await terminal.until("ready> ")
        terminal.type(f"{sys.executable} -m backends.cli top --url {server.url}\n")
        await terminal.until("READY")
        for keys, words in (
            ("\r", "Esc closes"),
            ("qd", "y: yes"),
            ("n", "nothing was done"),
            ("e", "Empty: a short chat"),
        ):
            await terminal.until(words, terminal.type(keys))
        for moves in (b"\x1b]0;owned", "\x9b".encode(), "\u202e".encode(), b"\x7f"):
            assert moves not in terminal.written
        terminal.resize(1, 1)
        at = terminal.resize(80, 24)
        await terminal.until("Empty: a short chat", at)
        terminal.type("\x03")
        assert "Traceback" not in terminal.text()


async def test_a_view_of_a_great_fleet_is_read_to_its_end() -> None:
    view = a_view(500)
    async with ViewServer(view) as server, Admin(server.url, None) as admin:
        assert await admin.fetch() == view


@pytest.mark.parametrize(
    ("shell", "words"),
    [
        ('"$@" >/dev/full', "standard output cannot be written: No space left on device\n"),
        ('"$@" >&-', "standard output is closed; nothing was printed\n"),
    ],
)
async def test_output_that_nobody_takes_is_one_line(shell: str, words: str) -> None:
    async with ViewServer(a_view(3)) as server:
        command = (sys.executable, "-m", "backends.cli", "top", "--once", "--url", server.url)
        process = await asyncio.create_subprocess_exec(
            *("sh", "-c", shell, "sh", *command), cwd=ROOT, stderr=subprocess.PIPE
        )
        _, err = await process.communicate()
    assert (process.returncode, err.decode()) == (1, words)


def test_lines_stay_lines_and_json_stays_json() -> None:
    assert plain("a\n\tb\x1bc") == "a\n\tb�c"
    for text in (EVIL, "\U000e0001", "héé 模\ud7ff"):
        json = msgspec.json.encode([text]).decode()
        assert msgspec.json.decode(plain_json(json)) == [text]
        assert plain_json(json).isprintable()


def test_a_status_table_is_as_harmless(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(_: str) -> None:
        raise StartError(EVIL)

    monkeypatch.setattr("backends.status.fetch_fleet", refused)
    assert main(["status"]) == 1
    assert "\x1b" not in capsys.readouterr().err
