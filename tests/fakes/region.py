"""A region on this machine: a run folder, its configuration, and managers as real processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from backends.providers.process import read_stat
from proxy.contract import FleetSnapshot, ReplicaRecord, decode_snapshot

ROOT = Path(__file__).parents[2]
MANAGER = ROOT / "tests" / "fakes" / "manager_process.py"
PATIENCE_S = 30.0
T = TypeVar("T")


def until(look: Callable[[], T | None], what: str) -> T:
    """Poll until `look` sees something; an error that says what was waited for otherwise."""
    give_up_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < give_up_s:
        if seen := look():
            return seen
        time.sleep(0.02)
    raise AssertionError(f"in vain: {what}")


def alive(pid: int) -> bool:
    stat = read_stat(pid)
    return stat is not None and stat.alive


class Region:
    """A run folder, its configuration, and the managers that ran on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "config.yaml"
        self.run_dir = folder / "run"
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port = listener.getsockname()[1]
        self.managers: list[subprocess.Popen[bytes]] = []
        self.settings: dict[str, Any] = {}  # of the manager, beside the usual ones
        self.environ = dict(os.environ)

    def write(self, *more: dict[str, Any], **pool: Any) -> None:
        usual = {"engine": "simulator", "stop_grace_secs": 1.0}
        pools = [usual | pool, *(usual | other for other in more)]
        config = {
            "manager": {
                "port": self.port,
                "run_dir": str(self.run_dir),
                "scrape_interval_secs": 0.1,
                "restart_backoff_secs": 0.2,
                **self.settings,
            },
            "models": [{"name": "m", "pools": pools}],
        }
        self.path.write_text(json.dumps(config))

    def start(self, *flags: str, output: int | None = None) -> subprocess.Popen[bytes]:
        """Start a manager that writes to the log, or to `output`."""
        with (self.folder / "manager.log").open("ab") as log:
            manager = subprocess.Popen(
                [sys.executable, str(MANAGER), str(self.path), *flags],
                env=self.environ | {"PYTHONPATH": str(ROOT)},
                stdout=log if output is None else output,
                stderr=log if output is None else output,
            )
        self.managers.append(manager)
        return manager

    @property
    def log(self) -> str:
        return (self.folder / "manager.log").read_text()

    def fleet(self) -> FleetSnapshot | None:
        try:
            with urllib.request.urlopen(
                f"http://127.0.0.1:{self.port}/v1/fleet", timeout=5
            ) as page:
                return decode_snapshot(page.read())
        except OSError:
            return None

    def replicas(self, state: str, count: int = 1) -> tuple[ReplicaRecord, ...]:
        """Wait until exactly `count` replicas are published, all in `state`."""

        def look() -> tuple[ReplicaRecord, ...] | None:
            fleet = self.fleet()
            if fleet is None or len(fleet.replicas) != count:
                return None
            return fleet.replicas if {r.state.value for r in fleet.replicas} == {state} else None

        return until(look, f"{count} replicas {state}; the log:\n{self.log}")

    def clean(self) -> None:
        """End whatever a failed test left: the managers, then what the journal names."""
        for manager in self.managers:
            if manager.poll() is None:
                manager.kill()
            manager.wait()
        journal = self.run_dir / "journal"
        lines = journal.read_text().splitlines() if journal.exists() else []
        for entry in map(json.loads, lines):
            pid, ticks = entry.get("pid", 0), entry.get("start_ticks", 0)
            stat = read_stat(pid) if pid else None
            if stat is not None and stat.start_ticks == ticks:
                os.killpg(pid, signal.SIGKILL)
