"""Sleep and wake by the command line, over real managers and simulators of both dialects."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from backends.providers.process import read_stat
from proxy.contract import ReplicaRecord, decode_snapshot

ROOT = Path(__file__).parents[2]
PATIENCE_S = 60.0
T = TypeVar("T")

pytestmark = pytest.mark.faults


class Region:
    """A run folder with a replica of each dialect, and the managers that ran on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.managers: list[subprocess.Popen[bytes]] = []
        self.path = folder / "config.json"
        self.path.write_text(json.dumps(self.config()))

    def config(self) -> dict[str, Any]:
        pool = {"engine": "simulator", "stop_grace_secs": 5.0}
        fast = ["--time-scale", "50"]
        pools = [
            pool | {"name": "v", "sleep": True, "args": fast},
            pool | {"name": "s", "sleep": True, "args": ["--dialect", "sglang", *fast]},
            pool | {"name": "never", "args": fast},
        ]
        manager = {
            "port": int(self.url.rpartition(":")[2]),
            "run_dir": str(self.folder / "run"),
            "scrape_interval_secs": 0.1,
        }
        return {"manager": manager, "models": [{"name": "m", "pools": pools}]}

    def start(self) -> subprocess.Popen[bytes]:
        with (self.folder / "manager.log").open("ab") as log:
            manager = subprocess.Popen(
                [*COMMAND, "manager", "--config", str(self.path)], cwd=ROOT, stdout=log, stderr=log
            )
        self.managers.append(manager)
        return manager

    def fleet(self) -> dict[str, ReplicaRecord]:
        try:
            with urllib.request.urlopen(self.url + "/v1/fleet", timeout=5) as page:
                return {r.replica_id: r for r in decode_snapshot(page.read()).replicas}
        except OSError:
            return {}

    def until(self, claim: Callable[[dict[str, ReplicaRecord]], bool]) -> dict[str, ReplicaRecord]:
        """Wait until the fleet is so. The limit only keeps a broken test from hanging."""
        give_up_s = time.monotonic() + PATIENCE_S
        while time.monotonic() < give_up_s:
            fleet = self.fleet()
            if len(fleet) == 3 and claim(fleet):
                return fleet
            time.sleep(0.02)
        raise AssertionError((self.folder / "manager.log").read_text())

    def doherty(self, *words: str) -> subprocess.CompletedProcess[str]:
        argv = [*COMMAND, *words, "--manager-url", self.url]
        return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)

    def clean(self) -> None:
        for manager in self.managers:
            if manager.poll() is None:
                manager.kill()
            manager.wait()
        journal = self.folder / "run" / "journal"
        lines = journal.read_text().splitlines() if journal.exists() else []
        for entry in map(json.loads, lines):
            stat = read_stat(entry["pid"]) if entry.get("pid") else None
            if stat is not None and stat.start_ticks == entry["start_ticks"]:
                os.killpg(entry["pid"], signal.SIGKILL)


COMMAND = (sys.executable, "-m", "backends.cli")


@pytest.fixture
def region(tmp_path: Path) -> Iterator[Region]:
    region = Region(tmp_path)
    yield region
    region.clean()


def complete(replica: ReplicaRecord) -> str:
    """Return what the engine itself says to a prompt."""
    body = json.dumps({"model": "m", "prompt": "one two", "max_tokens": 8, "temperature": 0})
    request = urllib.request.Request(
        replica.url + "/v1/completions", body.encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as page:
        return str(json.loads(page.read())["choices"][0]["text"])


def alive(pid: int) -> bool:
    stat = read_stat(pid)
    return stat is not None and stat.alive


def awake(fleet: dict[str, ReplicaRecord]) -> bool:
    return all(r.state.value == "ready" and not r.asleep for r in fleet.values())


def test_asleep_through_a_killed_manager_and_awake_again(region: Region) -> None:
    manager = region.start()
    before = region.until(awake)
    said = {name: complete(before[name]) for name in ("v-0", "s-0")}
    for name in said:
        done = region.doherty("sleep", name)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(f"{name} is asleep at level 1, after ")
    region.until(lambda fleet: fleet["v-0"].asleep and fleet["s-0"].asleep)
    table = region.doherty("status").stdout.splitlines()
    assert [line.split()[1] for line in table[1:]] == ["asleep", "asleep", "ready"]
    manager.kill()
    manager.wait()

    last = region.start()
    after = region.until(lambda fleet: fleet["never-0"].state.value == "ready")
    assert {k: (r.pid, r.url, r.kv_events) for k, r in after.items()} == {
        k: (r.pid, r.url, r.kv_events) for k, r in before.items()
    }
    assert (after["v-0"].asleep, after["s-0"].asleep) == (True, True)
    for name, words in said.items():
        done = region.doherty("wake", name)
        assert done.stdout.startswith(f"{name} is awake, after "), done.stderr
        assert complete(after[name]) == words
    region.until(awake)

    done = region.doherty("sleep", "v-0", "--rung", "suspended")
    assert done.stdout.startswith("v-0 is suspended, after "), done.stderr
    assert Path(f"/proc/{after['v-0'].pid}/stat").read_text().split(") ")[1][0] == "T"
    assert region.doherty("sleep", "v-0").stderr == (
        "v-0: it is suspended already, or on its way there; wake it first\n"
    )
    assert region.doherty("wake", "v-0").stdout.startswith("v-0 is awake, after ")
    assert complete(after["v-0"]) == said["v-0"]

    refused = region.doherty("sleep", "never-0")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "set `sleep: true` in its pool" in refused.stderr
    assert region.doherty("sleep", "s-0").returncode == 0
    last.terminate()  # with one asleep
    assert last.wait(PATIENCE_S) == 0
    assert not any(alive(replica.pid) for replica in after.values())
