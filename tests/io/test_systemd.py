"""What systemd hears: ready, whose unit it is after an upgrade, that it lives, that it stops."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from backends.service import environment
from proxy import systemd
from proxy.app import main
from tests.fakes.engine import ScriptedEngine
from tests.fakes.proxy_process import ProxyProcess


@pytest.fixture
def ear(tmp_path: Path) -> Iterator[socket.socket]:
    """The socket at which systemd would listen."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.bind(str(tmp_path / "notify"))
        end.setblocking(False)
        yield end


async def hear(ear: socket.socket, word: str) -> dict[str, str]:
    """Return the next message that has `word` in it."""
    loop = asyncio.get_running_loop()
    while True:
        message = await asyncio.wait_for(loop.sock_recv(ear, 4096), 30)
        said = dict(line.split("=", 1) for line in message.decode().splitlines())
        if word in said:
            return said


async def test_an_upgrade_tells_the_new_main_process(ear: socket.socket, tmp_path: Path) -> None:
    path = str(tmp_path / "upgrade.sock")
    told = {"NOTIFY_SOCKET": ear.getsockname(), "WATCHDOG_USEC": "9000000", "WATCHDOG_PID": "1"}
    async with ScriptedEngine() as engine:
        flags = ("--worker-urls", engine.url, "--upgrade-socket", path, "--takeover")
        async with ProxyProcess(*flags, environment=told) as proxy:
            first = await hear(ear, "READY")
            assert first["MAINPID"] == str(proxy.process.pid)
            assert first["STATUS"] == f"listening on http://127.0.0.1:{proxy.port}, 1 workers"
            assert await hear(ear, "WATCHDOG") == {"WATCHDOG": "1"}
            await proxy.upgrade()
            second = await hear(ear, "READY")
            assert second["MAINPID"] == str(proxy.pid) != first["MAINPID"]
            # The old one has left and is silent; by its path the third takes over from the second.
            ports = ("--port", str(proxy.port), "--admin-port", str(proxy.admin_port))
            async with ProxyProcess(*flags, *ports, environment=told) as third:
                assert (await hear(ear, "READY"))["MAINPID"] == str(third.pid)
                third.signal(signal.SIGTERM)
                assert (await hear(ear, "STOPPING"))["STATUS"] == "draining"
                assert await third.ended() == 0


def test_nobody_is_told_where_nobody_listens(
    ear: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    def heard() -> bytes:
        try:
            return ear.recv(4096)
        except BlockingIOError:
            return b""

    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    systemd.serving("x")
    assert heard() == b""
    monkeypatch.setenv("NOTIFY_SOCKET", ear.getsockname())
    systemd.alive()  # nobody asked for that
    assert heard() == b""
    systemd.serving("at work")
    assert heard() == f"READY=1\nMAINPID={os.getpid()}\nSTATUS=at work".encode()
    ear.close()
    systemd.stopping("nobody hears")  # and it does not fail


def test_the_abstract_namespace(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"doherty-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.bind("\0" + name)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + name)
        systemd.stopping("x")
        assert end.recv(99) == b"STOPPING=1\nSTATUS=x"


def test_children_do_not_speak_for_their_parent() -> None:
    given = {"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "1", "WATCHDOG_PID": "2", "HOME": "/"}
    assert environment(given, {}) == {"HOME": "/", "PYTHONUNBUFFERED": "1"}


def test_taking_over_from_whoever_is_there_needs_a_place(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--worker-urls", "http://127.0.0.1:9", "--takeover"], {}) == 1
    assert "say of which SOCKET, or set --upgrade-socket" in capsys.readouterr().err
