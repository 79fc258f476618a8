"""`doherty top` as people run it: in a shell in a terminal, and with its output in a pipe."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from pathlib import Path

import msgspec
import pytest

from backends.cli import main
from backends.top import command
from proxy.contract.extras import install_command
from proxy.contract.view import decode_view
from tests.fakes.programs import WAIT_S
from tests.fakes.terminal import Terminal
from tests.fakes.view_server import ViewServer
from tests.fakes.views import a_view

VIEW = a_view(9)
COMMAND = f"{sys.executable} -m backends.cli top"


async def test_start_resize_suspend_and_quit_leave_the_terminal_as_it_was() -> None:
    async with ViewServer(VIEW) as server, Terminal(80, 24) as terminal:
        await terminal.until("ready> ")
        before = await terminal.run("stty -g")
        at = terminal.type(f"{COMMAND} --url {server.url}\n")
        await terminal.until(VIEW.replicas[-1].replica_id, at)
        text = terminal.text(at)
        assert "PREFILL/S" not in text
        at = terminal.resize(190, 40)
        await terminal.until("PREFILL/S", at)
        at = terminal.type("\x1a")
        await terminal.until("Stopped", at)
        assert await terminal.run("stty -g") == before
        at = terminal.type("fg\n")
        await terminal.until("CLASS ", at)
        at = terminal.type("q")
        await terminal.until("ready> ", at)
        assert await terminal.run("stty -g") == before
        assert b"\x1b[?1049l" in terminal.written[at:], "the screen of before is back"
        assert b"\x1b[?25h" in terminal.written[at:], "the cursor is back"


async def test_it_ends_with_its_terminal_where_hanging_up_is_ignored() -> None:
    group = 0
    try:
        async with (
            asyncio.timeout(WAIT_S),  # what goes on would have the shell wait for it
            ViewServer(VIEW) as server,
            Terminal(80, 24) as terminal,
        ):
            await terminal.until("ready> ")
            terminal.type("trap '' HUP\n")
            at = terminal.type(f"{COMMAND} --url {server.url}\n")
            await terminal.until(VIEW.replicas[-1].replica_id, at)
            group = terminal.foreground()
        assert not _lives(group)
    finally:
        if group and _lives(group):
            os.killpg(group, signal.SIGKILL)


def _lives(group: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, 0)
        return True
    return False


async def test_a_second_in_which_nothing_changes_costs_no_traffic() -> None:
    async with ViewServer(VIEW) as server, Terminal(80, 24, {"NO_COLOR": "1"}) as terminal:
        await terminal.until("ready> ")
        at = terminal.type(f"{COMMAND} --url {server.url}\n")
        await terminal.until("pause", at)
        await server.show(VIEW)  # so that nothing is called stale meanwhile
        await terminal.quiet()
        drawn = terminal.written[at:]
        assert not any(f"\x1b[3{n}m".encode() in drawn for n in range(8)), "NO_COLOR"
        still = len(terminal.written)
        for _ in range(3):
            await server.show(VIEW)
            await asyncio.sleep(0.05)
        assert len(terminal.written) == still
        busier = msgspec.structs.replace(VIEW.proxy, in_flight=7)
        await asyncio.sleep(0.6)  # the least time between two frames
        await server.show(msgspec.structs.replace(VIEW, proxy=busier))
        await terminal.until("inflight 7", still)
        assert len(terminal.written) - still < 300
        terminal.type("q")


async def test_a_pipe_gets_text_and_json_gets_the_view(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOHERTY_ADMIN_API_KEY", "hush")
    async with ViewServer(VIEW, key="hush") as server:
        assert await asyncio.to_thread(main, ["top", "--url", server.url]) == 0
        assert "\nREPLICAS\nREPLICA " in capsys.readouterr().out
        assert await asyncio.to_thread(main, ["top", "--json", "--url", server.url]) == 0
        assert decode_view(capsys.readouterr().out.encode()) == VIEW


async def test_a_key_comes_from_a_file_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "key"
    path.write_text("other\n")
    async with ViewServer(VIEW, key="other") as server:
        call = ["top", "--once", "--url", server.url]
        assert await asyncio.to_thread(main, call) == 1
        words = capsys.readouterr().err
        assert words.count("\n") == 1
        assert "the admin key is wrong or missing" in words
        assert await asyncio.to_thread(main, [*call, "--api-key-file", str(path)]) == 0


def _status(arguments: list[str]) -> object:
    try:
        return main(arguments)
    except SystemExit as end:
        return end.code


FAULTS = [
    (["--interval", "0"], 2, "'0' is not a number of seconds from 1 to 60"),
    (["--once", "--json"], 2, "not allowed with argument"),
    (["--url", "localhost"], 1, "such as http://127.0.0.1:8001"),
    (["--api-key-file", "/nowhere"], 2, "--api-key-file /nowhere: "),
    (["--once", "--url", "http://127.0.0.1:1"], 1, "does not answer"),
]


@pytest.mark.parametrize(("flags", "status", "words"), FAULTS)
def test_faults_are_one_line_and_a_status(
    flags: list[str], status: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _status(["top", *flags]) == status
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said


def test_without_textual_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "_on_a_terminal", lambda: True)
    monkeypatch.setitem(sys.modules, "backends.top.app", None)
    assert main(["top"]) == 2
    assert install_command("top") in capsys.readouterr().err
