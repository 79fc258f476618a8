"""A run folder whose managers die when they are told to, and what is seen of their replicas."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from backends.journal import Launch, replay
from backends.providers.base import LAUNCH_ID_VARIABLE
from proxy.contract import ReplicaRecord, decode_snapshot
from tests.fakes.region import ROOT, alive

MANAGERS = ROOT / "tests" / "fakes" / "dying_manager.py"
MARK = "TEST_OF_DYING_MANAGERS"
PATIENCE_S = 60.0
T = TypeVar("T")


class MortalRegion:
    """Managers of one run folder, one after another."""

    def __init__(
        self, folder: Path, pools: Sequence[Mapping[str, Any]], **settings: object
    ) -> None:
        self.folder = folder
        self.mark = uuid.uuid4().hex
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self._port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"
        self.manager = 0
        self._settings = settings
        self.path = folder / "config.json"
        self.write(pools)
        with (folder / "log").open("ab") as log:
            self.managers = subprocess.Popen(
                [sys.executable, str(MANAGERS), str(self.path)],
                env=os.environ | {"PYTHONPATH": str(ROOT), MARK: self.mark},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                bufsize=0,
            )

    def write(self, pools: Sequence[Mapping[str, Any]]) -> None:
        """Have the configuration name these pools; a running manager wants a SIGHUP."""
        usual = {"engine": "simulator", "stop_grace_secs": 5.0, "args": ["--time-scale", "50"]}
        manager = {
            "port": self._port,
            "run_dir": str(self.folder / "run"),
            "scrape_interval_secs": 0.1,
            "restart_backoff_secs": 0.05,
            **self._settings,
        }
        models = [{"name": "m", "pools": [usual | dict(pool) for pool in pools]}]
        self.path.write_text(json.dumps({"manager": manager, "models": models}))

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

    def engines(self) -> set[int]:
        """Return the simulators, in cells too, where no launch can be seen."""
        found = set()
        for folder in Path("/proc").iterdir():
            try:
                ours = self.mark.encode() in (folder / "environ").read_bytes()
                argv = (folder / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if ours and argv[1:3] == [b"-m", b"backends.simulator"]:
                found.add(int(folder.name))
        return found

    def live(self) -> dict[str, Launch]:
        """Return the lives that the journal knows."""
        journal = (self.folder / "run" / "journal").read_bytes()
        return replay(journal.split(b"\n"))[0]

    def check(self) -> None:
        """See that nobody is forgotten and nothing is had twice."""
        live = self.live()
        fleet = self.fleet().values()
        assert set(self.processes().values()) <= set(live), "an orphan"
        assert len({launch.replica_id for launch in live.values()}) == len(live)
        ports = [(launch.host, launch.port) for launch in live.values()]
        assert len(set(ports)) == len(ports)
        cards = [card for record in fleet for card in record.gpus]
        assert len(set(cards)) == len(cards), "a card that two have"

    def serves(self, name: str) -> None:
        """See that what is published as serving serves."""
        record = self.is_(name, "ready")
        with urllib.request.urlopen(record.url + "/is_sleeping", timeout=5) as page:
            assert json.loads(page.read()) == {"is_sleeping": False}

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
