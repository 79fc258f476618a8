"""Upgrades under load as the command runs them, and what it counts."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from loadtest.__main__ import main
from loadtest.upgrade import Finding, Load, Options, schedule, table


def test_a_quick_run_loses_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "report.json"
    assert main(["upgrade", "--quick", "--json", str(report)]) == 0
    output = capsys.readouterr().out
    assert "1 upgrades (took " in output
    assert "1 reloads; 1 old processes have ended" in output
    found = json.loads(report.read_text())
    assert all(found["complete"][kind] > 0 for kind in ("kept", "fresh", "stream"))
    assert found["failed"] == found["cut"] == {}


@pytest.mark.parametrize(
    ("upgrades", "reloads", "events"),
    [
        (1, 1, ["reload", "upgrade"]),
        (2, 0, ["upgrade", "upgrade"]),
        (0, 2, ["reload", "reload"]),
        (2, 4, ["reload", "reload", "upgrade"] * 2),
    ],
)
def test_the_schedule(upgrades: int, reloads: int, events: list[str]) -> None:
    assert schedule(Options(upgrades=upgrades, reloads=reloads)) == events


def test_a_broken_promise_is_one() -> None:
    finding = Finding(
        complete={"kept": 5},
        failed={"kept": 1},
        cut={"stream": 2},
        details=("1 kept: closed",),
        upgrades_s=(0.5,),
        reloads=0,
        left=1,
    )
    assert not finding.kept_promises
    assert "kept             6         1         0" in table(finding)
    assert "stream           2         0         2" in table(finding)
    assert table(finding).endswith("1 kept: closed")


async def test_what_clients_count() -> None:
    """A server that closes, refuses, cuts, and forgets the end."""
    answers = [
        b"",
        b"HTTP/1.1 503 No\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf",
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}",
    ]
    asked = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        await reader.read(4096)
        writer.write(answers[min(asked, len(answers) - 1)])
        asked += 1
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with Load(server.sockets[0].getsockname()[1], 0) as load:
        load._over = False
        task = asyncio.ensure_future(load._go_on("stream"))
        while asked < len(answers):
            await asyncio.sleep(0.01)
        load._over = True
        await task
    server.close()
    await server.wait_closed()
    assert load.failed == {"stream": 2}
    assert load.cut["stream"] >= 2
    assert load.details["stream: closed"] == 1
    assert load.details["stream: status 503"] == 1
    assert load.details["stream: cut"] == 1
