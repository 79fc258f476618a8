"""Two models at nothing that share a card, behind `doherty up`: held, started, swapped, served."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from backends.scaling_report import ScalingReport, decode_report
from proxy.contract import FleetSnapshot, decode_snapshot
from tests.fakes.programs import CLI, WAIT_S, Program, running, until

pytestmark = pytest.mark.faults

POOL = """
      - engine: simulator
        args: [--profile, fast, --time-scale, '50']
        gpus: 1
        sleep: true
        target_inputs: 4
        autoscale: {max: 1, scaledown_window_secs: 600}
        stop_grace_secs: 5
"""
CONFIG = f"""\
proxy: {{access_log: 'off'}}
manager: {{gpus: '7', scrape_interval_secs: 0.2}}
models:
  - name: one
    pools:{POOL}
  - name: two
    pools:{POOL}
"""


class Shared:
    """A running Doherty of the configuration above."""

    def __init__(self, up: Program) -> None:
        self.url = up.until_said(r"Ready: (http://\S+)/v1")[1]
        self.manager_url = up.until_said(r"--manager-url (http://\S+)")[1]

    def get(self, url: str) -> bytes:
        with urllib.request.urlopen(url, timeout=WAIT_S) as page:
            return bytes(page.read())

    def ask(self, model: str) -> dict[str, Any]:
        body = json.dumps({"model": model, "prompt": "one two", "max_tokens": 4, "temperature": 0})
        request = urllib.request.Request(
            self.url + "/v1/completions", body.encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
            return dict(json.loads(answer.read()))

    def fleet(self) -> FleetSnapshot:
        return decode_snapshot(self.get(self.manager_url + "/v1/fleet"))

    def report(self) -> ScalingReport:
        return decode_report(self.get(self.manager_url + "/v1/scaling"))


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Shared]:
    config = tmp_path / "doherty.yaml"
    config.write_text(CONFIG)
    ports = ("--port=0", "--admin-port=0", "--manager-port=0")
    argv = (*CLI, "up", str(config), f"--run-dir={tmp_path / 'run'}", *ports)
    with running(argv, tmp_path / "up.log") as up:
        yield Shared(up)


def test_what_is_asked_for_comes_and_what_is_idle_makes_room(shared: Shared) -> None:
    assert shared.fleet().replicas == ()
    listed = json.loads(shared.get(shared.url + "/v1/models"))["data"]
    assert {model["id"] for model in listed} == {"one", "two"}, "at nothing they can be asked for"

    first = shared.ask("one")
    assert first["choices"][0]["text"]
    pid = shared.fleet().replicas[0].pid
    assert shared.ask("two")["choices"][0]["text"]
    rests = shared.report()
    assert rests.pools[0].resting == {"one-0": "suspended"}, "it gave its card up, and lives"
    assert rests.gpus.holders == {"two-0": ("7",)}

    again = shared.ask("one")
    assert again["choices"][0]["text"] == first["choices"][0]["text"]
    pids = {record.replica_id: record.pid for record in shared.fleet().replicas}
    assert pids["one-0"] == pid, "resumed, not started anew"

    def settled() -> bool:
        return shared.report().gpus.holders == {"one-0": ("7",)}

    until(settled, "the card is the one's")
