"""The places of the workers, with processes that misbehave in place of workers."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from proxy import places
from proxy.config import ProxyConfig
from proxy.io import control
from proxy.io.hub import Hub
from proxy.io.tasks import Tasks
from proxy.io.teller import Teller
from proxy.listeners import deal, open_listeners
from proxy.places import Places
from tests.fakes.hub import WORKERS
from tests.fakes.plane import until
from tests.fakes.proxy_process import alive

# Called as `stand-in -P -m proxy.worker FD LISTENER`.
HEAD = "#!{python} -S\nimport os, socket, sys, time\nend = socket.socket(fileno=int(sys.argv[4]))\n"
READY = "frame = bytes.fromhex('81') + b'\\xa4type\\xa5Ready'\n"
SEND = "end.sendall(len(frame).to_bytes(4) + frame)\n"
SLEEP = "time.sleep(30)\n"


def _no_session() -> aiohttp.ClientSession:
    raise AssertionError("nobody is told of demand here")


class Filled:
    """Places, and what is heard of them."""

    def __init__(self, count: int) -> None:
        self.tasks = Tasks()
        self.failures: list[str] = []
        self.places = Places(
            deal(open_listeners("127.0.0.1", 0, count), count),
            self.tasks,
            Hub(WORKERS),
            Teller(_no_session),
            on_message=lambda _: None,
            on_failure=self.failures.append,
        )

    def pid(self) -> int:
        process = self.places._places[0].process
        return process.pid if process is not None else 0


@asynccontextmanager
async def filled(count: int) -> AsyncIterator[Filled]:
    made = Filled(count)
    try:
        async with asyncio.timeout(20):  # only so that this ends if a claim is false
            yield made
    finally:
        await made.tasks.close()
        await made.places.kill()


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Have processes of this kind fill the places."""
    python, path = sys.executable, tmp_path / "stand-in"

    def write(text: str) -> None:
        path.write_text(HEAD.format(python=python) + text)
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))

    return write


@pytest.mark.parametrize(
    "does",
    [f"frame = b'\\xc1'\n{SEND}{SLEEP}", f"end.close()\n{SLEEP}"],
    ids=["speaks nonsense", "closes its channel"],
)
async def test_a_worker_that_cannot_be_talked_to_is_ended_and_another_started(
    stand_in: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, does: str
) -> None:
    monkeypatch.setattr(places, "END_TIMEOUT_S", 0.05, raising=False)
    stand_in(does)
    async with filled(1) as made:
        made.places.start(ProxyConfig())
        await until(made.pid)
        first = made.pid()
        await until(lambda: made.pid() != first)
        assert not alive(first)


async def test_a_place_that_stays_empty_ends_the_proxy_though_others_serve(
    stand_in: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its socket would go on taking its share of the clients."""
    monkeypatch.setattr(places, "RESTART_PAUSE_MAX_S", 0.0)
    first = f"os.mkdir({str(tmp_path / 'first')!r})\n"  # one can do this
    stand_in(first + READY + SEND + SLEEP)
    async with filled(2) as made:
        made.places.start(ProxyConfig())
        await until(lambda: made.failures)
        assert made.places.ready_count == 1
        assert "fails as soon as it starts" in made.failures[0]


async def test_a_worker_that_is_being_started_when_a_drain_comes_hears_of_it(
    stand_in: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = tmp_path / "heard"
    stand_in(f"while b'Drain' not in end.recv(1 << 20): pass\nos.mkdir({str(heard)!r})\n")
    open_channel = control.Channel.open

    async with filled(1) as made:

        async def drained_meanwhile(end: object) -> control.Channel:
            made.places.drain(control.Drain(1.0))
            return await open_channel(end)  # type: ignore[arg-type]

        monkeypatch.setattr(control.Channel, "open", drained_meanwhile)
        made.places.start(ProxyConfig())
        await until(made.pid)
        await made.places.ended()
        assert heard.exists()


async def test_no_worker_is_started_after_a_drain(
    stand_in: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    stand_in("")
    async with filled(1) as made:
        made.places.start(ProxyConfig())
        await until(lambda: "ended with 0" in caplog.text)
        first = made.pid()
        made.places.drain(control.Drain(0.0))
        await asyncio.sleep(places.RESTART_PAUSE_FIRST_S * 4)
        assert made.pid() == first
        assert "task worker 0 failed" not in caplog.text
