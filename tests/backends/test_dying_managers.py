"""Managers that are killed at each step of each turn; the next one adopts, or cleans up.

Two models share one card, over real managers and simulators that are suspended by SIGSTOP. After
every death: each process belongs to a life that the journal knows, no card and no port is
anybody's twice, what is published as serving serves, and the replica that was in the turn comes
back to service.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from backends.journal import replay
from backends.providers.base import LAUNCH_ID_VARIABLE
from proxy.contract import ReplicaRecord, decode_snapshot
from tests.fakes.region import ROOT, alive

MANAGERS = ROOT / "tests" / "fakes" / "dying_manager.py"
MARK = "TEST_OF_DYING_MANAGERS"
PATIENCE_S = 60.0
T = TypeVar("T")

pytestmark = pytest.mark.faults

# What is done to the replica, and after which steps of it its manager dies. One that is not here
# is followed, or preceded, by one that is, with nothing between them.
STARTS = [
    "before note Launch",
    "after note Launch",
    "after spawn",
    "after note Started",
    "after note Ready",
]
SLEEPS = [
    "before note Nap turning asleep",
    "after note Nap turning asleep",
    "after post /sleep",
    "after note Nap asleep",
]
SUSPENSIONS = [
    "after note Suspension turning",
    "after suspend",
    "after note Suspension suspended",
]
RESUMPTIONS = [
    "before note Suspension suspended turning",
    "after note Suspension suspended turning",
    "after resume",
    "after note Suspension",
]
WAKES = [
    "after note Nap turning asleep",
    "after post /wake_up",
    "after note Nap",
    "after note Ready",
]
ENDS = [
    "after SIGTERM",
    "before note Ended",
    "after note Ended",
]


class Card:
    """Two models that share a card, and the managers that ran on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mark = uuid.uuid4().hex
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.manager = 0
        pool = {"engine": "simulator", "gpus": 1, "sleep": True, "stop_grace_secs": 5.0}
        fast = {"args": ["--time-scale", "50"]}
        pools = [pool | fast | {"name": name} for name in ("a", "b")]
        manager = {
            "port": port,
            "run_dir": str(folder / "run"),
            "gpus": "0",
            "scrape_interval_secs": 0.1,
            "restart_backoff_secs": 0.05,
        }
        config = {"manager": manager, "models": [{"name": "m", "pools": pools}]}
        path = folder / "config.json"
        path.write_text(json.dumps(config))
        with (folder / "log").open("ab") as log:
            self.managers = subprocess.Popen(
                [sys.executable, str(MANAGERS), str(path)],
                env=os.environ | {"PYTHONPATH": str(ROOT), MARK: self.mark},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                bufsize=0,
            )

    def start(self) -> None:
        assert self.managers.stdin is not None
        assert self.managers.stdout is not None
        self.managers.stdin.write(b"\n")
        self.manager = int(self.managers.stdout.readline())

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()[-6000:]

    def until(self, look: Callable[[], T | None], what: str) -> T:
        give_up_s = time.monotonic() + PATIENCE_S
        while time.monotonic() < give_up_s:
            if seen := look():
                return seen
            time.sleep(0.01)
        raise AssertionError(f"in vain: {what}\n{self.fleet()}\n{self.log}")

    def fleet(self) -> dict[str, ReplicaRecord]:
        try:
            with urllib.request.urlopen(self.url + "/v1/fleet", timeout=5) as page:
                return {r.replica_id: r for r in decode_snapshot(page.read()).replicas}
        except OSError:
            return {}

    def is_(self, name: str, state: str, *, asleep: bool = False) -> ReplicaRecord:
        def look() -> ReplicaRecord | None:
            record = self.fleet().get(name)
            fits = record and (record.state.value, record.asleep) == (state, asleep)
            return record if fits else None

        return self.until(look, f"{name} {state}, asleep: {asleep}")

    def wish(self, name: str, wish: str) -> None:
        url = f"{self.url}/v1/replicas/{name}/{wish}"
        urllib.request.urlopen(urllib.request.Request(url, b"", method="POST"), timeout=5).close()

    def dies(self, step: str, act: Callable[[], None]) -> None:
        """Have the manager die at `step` of what follows from `act`."""
        (self.folder / "die").write_text(step)
        act()
        self.until(lambda: not alive(self.manager), f"the death {step}")

    def processes(self) -> dict[int, str]:
        """Return the engines' processes with the launch that each carries."""
        found = {}
        for folder in Path("/proc").iterdir():
            try:
                environ = (folder / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            pairs = dict(pair.partition(b"=")[::2] for pair in environ)
            launch_id = pairs.get(LAUNCH_ID_VARIABLE.encode())
            if launch_id and pairs.get(MARK.encode()) == self.mark.encode():
                found[int(folder.name)] = launch_id.decode()
        return found

    def check(self) -> None:
        """See that nobody is forgotten and nothing is had twice."""
        journal = (self.folder / "run" / "journal").read_bytes()
        live, _ = replay(journal.split(b"\n"))
        fleet = self.fleet().values()
        assert set(self.processes().values()) <= set(live), "an orphan"
        assert len({launch.replica_id for launch in live.values()}) == len(live)
        ports = [launch.port for launch in live.values()]
        assert len(set(ports)) == len(ports)
        on_the_card = [record.replica_id for record in fleet if record.gpus]
        assert len(on_the_card) <= 1, "a card that two have"

    def serves(self, name: str) -> None:
        """See that what is published as serving serves."""
        record = self.is_(name, "ready")
        with urllib.request.urlopen(record.url + "/is_sleeping", timeout=5) as page:
            assert json.loads(page.read()) == {"is_sleeping": False}

    def settle(self) -> None:
        """Have `a` serve, whatever became of it, and `b` suspended."""
        self.until(lambda: len(self.fleet()) == 2, "a fleet")
        self.check()

        def there() -> bool:
            fleet = self.fleet()
            a, b = fleet["a-0"], fleet["b-0"]
            if (a.state.value, a.asleep) == ("ready", False):
                return True
            for name, record in (("b-0", b), ("a-0", a)):
                if record.state.value == "ready":
                    lowered = "sleep?rung=suspended" if name == "b-0" else "wake"
                    if (name == "a-0") == record.asleep:
                        self.try_(name, lowered)
            return False

        self.until(there, "a serves")
        self.serves("a-0")
        self.check()

    def try_(self, name: str, wish: str) -> None:
        try:
            self.wish(name, wish)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code != 409:
                raise

    def clean(self) -> None:
        assert self.managers.stdin is not None
        if self.manager and alive(self.manager):
            os.kill(self.manager, signal.SIGKILL)
        self.managers.stdin.close()
        self.managers.kill()
        self.managers.wait()
        assert self.managers.stdout is not None
        self.managers.stdout.close()
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Card]:
    """A card with both models started, `a` serving and `b` suspended."""
    folder = tmp_path_factory.mktemp("card")
    card = Card(folder)
    try:
        card.start()
        card.is_("a-0", "ready")
        card.wish("a-0", "sleep?rung=suspended")
        card.is_("b-0", "ready")
        card.settle()
        yield card
    finally:
        card.clean()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def _settled(card: Card) -> Iterator[None]:
    yield
    (card.folder / "die").unlink(missing_ok=True)
    if not alive(card.manager):
        card.start()


@pytest.mark.parametrize("step", STARTS)
def test_in_a_start(card: Card, step: str) -> None:
    pid = card.fleet()["a-0"].pid
    card.dies(step, lambda: os.kill(pid, signal.SIGKILL))
    card.start()
    card.settle()
    assert card.fleet()["a-0"].pid != pid


@pytest.mark.parametrize("step", [*SLEEPS, *SUSPENSIONS])
def test_on_the_way_down(card: Card, step: str) -> None:
    pid = card.fleet()["a-0"].pid
    card.dies(step, lambda: card.wish("a-0", "sleep?rung=suspended"))
    card.start()
    card.until(lambda: card.fleet().get("a-0"), "it is published")
    known = step in [SLEEPS[0], SLEEPS[-1], *SUSPENSIONS]
    card.settle()
    assert (card.fleet()["a-0"].pid == pid) == known, "only what nobody knows is started anew"


@pytest.mark.parametrize("step", [*RESUMPTIONS, *WAKES])
def test_on_the_way_up(card: Card, step: str) -> None:
    pid = card.fleet()["a-0"].pid
    card.wish("a-0", "sleep?rung=suspended")
    card.is_("a-0", "ready", asleep=True)
    card.dies(step, lambda: card.wish("a-0", "wake"))
    card.start()
    card.settle()
    known = step in [*RESUMPTIONS, *WAKES[2:]]
    assert (card.fleet()["a-0"].pid == pid) == known


@pytest.mark.parametrize("step", ENDS)
def test_in_a_restart(card: Card, step: str) -> None:
    pid = card.fleet()["a-0"].pid
    card.dies(step, lambda: card.wish("a-0", "restart"))
    card.start()
    card.settle()
    assert step != "after SIGTERM" or not alive(pid)


def test_a_suspended_one_is_ended_with_its_manager(card: Card) -> None:
    card.wish("a-0", "sleep?rung=suspended")
    card.is_("a-0", "ready", asleep=True)
    os.kill(card.manager, signal.SIGTERM)
    card.until(lambda: not alive(card.manager), "the end of the manager")
    assert card.processes() == {}
