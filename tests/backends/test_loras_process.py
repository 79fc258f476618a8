"""Adapters that come and go by a reload, over a real manager and simulators of both dialects."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from proxy.contract import ReplicaRecord
from tests.fakes.region import ROOT, Region, until

pytestmark = pytest.mark.faults


class SimulatedRegion(Region):
    """A replica of each dialect, started as a user would."""

    def adapt(self, **adapters: str) -> None:
        pool = {"args": ["--profile", "fast"], "adapters": adapters}
        sglang = pool | {"name": "s", "args": ["--dialect", "sglang", "--profile", "fast"]}
        self.write(sglang, name="v", **pool)

    def start_manager(self) -> subprocess.Popen[bytes]:
        words = ("-m", "backends.cli", "manager", "--config", str(self.path))
        with (self.folder / "manager.log").open("ab") as log:
            manager = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=log, stderr=log)
        self.managers.append(manager)
        return manager

    def listing(self, *names: str) -> dict[str, ReplicaRecord]:
        """Return the replicas once both list these adapters."""

        def look() -> dict[str, ReplicaRecord] | None:
            records = {r.replica_id: r for r in self.replicas("ready", 2)}
            complete = all(r.models == ("m", *names) for r in records.values())
            return records if complete else None

        return until(look, f"both list {names}")


@pytest.fixture
def region(tmp_path: Path) -> Iterator[SimulatedRegion]:
    region = SimulatedRegion(tmp_path)
    yield region
    region.clean()


def ask(replica: ReplicaRecord, model: str) -> tuple[int, Any]:
    body = json.dumps({"model": model, "prompt": "one two", "max_tokens": 4}).encode()
    request = urllib.request.Request(
        replica.url + "/v1/completions", body, {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as page:
            return page.status, json.loads(page.read())
    except urllib.error.HTTPError as error:
        return error.code, None


def test_adapters_come_and_go_while_the_process_runs_on(region: SimulatedRegion) -> None:
    region.adapt(a="/lora/a")
    manager = region.start_manager()
    before = region.listing("a")
    pids = {name: replica.pid for name, replica in before.items()}
    assert [ask(replica, "b")[0] for replica in before.values()] == [404, 404]

    region.adapt(a="/lora/a", b="/lora/b")
    manager.send_signal(signal.SIGHUP)
    after = region.listing("a", "b")
    for replica in after.values():
        status, answer = ask(replica, "b")
        assert (status, answer["model"]) == (200, "b")
    manager.kill()
    manager.wait()

    region.adapt(b="/lora/b")  # the next one knows what was loaded by the one before
    region.start_manager()
    last = region.listing("b")
    assert [ask(replica, "a")[0] for replica in last.values()] == [404, 404]
    assert [ask(replica, "b")[0] for replica in last.values()] == [200, 200]
    for seen in (after, last):
        assert {name: replica.pid for name, replica in seen.items()} == pids
