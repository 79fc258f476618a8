"""A Ray cluster that `doherty up` starts for itself: it outlives a killed manager, but not us."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from backends.providers.process import read_stat
from tests.fakes import ray_cluster
from tests.fakes.programs import CLI, Program, fetch, until

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(
        bool(ray_cluster.reason_why_not()), reason=ray_cluster.reason_why_not() or "ray is here"
    ),
]


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Program]:
    pool = {"engine": "simulator", "gpus": 1, "replicas": 2, "args": ["--profile", "fast"]}
    config = {
        "proxy": {"workers": 1, "access_log": "off"},
        "manager": {"provider": "ray", "gpus": "none", "ray": {"local_gpus": 1}},
        "offline": {"enabled": False},
        "models": [{"name": "demo", "pools": [pool | {"stop_grace_secs": 5}]}],
    }
    (tmp_path / "doherty.yaml").write_text(json.dumps(config))
    ports = ("--port=0", "--admin-port=0", "--manager-port=0", f"--run-dir={tmp_path}/run")
    up = Program((*CLI, "up", str(tmp_path / "doherty.yaml"), *ports), tmp_path / "up.log")
    yield up
    up.end()
    head = tmp_path / "run" / "ray-head.json"
    assert not head.exists(), "the cluster has ended with us"


def test_one_gpu_for_two_replicas_and_a_manager_that_dies(up: Program, tmp_path: Path) -> None:
    url = up.until_said(r"Ready: (http://\S+)/v1")[1]
    manager_url = up.until_said(r"--manager-url (http://\S+)")[1]
    run_dir = tmp_path / "run"

    def records() -> list[dict[str, Any]]:
        try:
            return list(fetch(manager_url + "/v1/fleet").value["replicas"])
        except OSError:
            return []

    def waiting() -> dict[str, Any] | None:
        told = (record for record in records() if record.get("state") == "starting")
        return next(
            (one for one in told if "waits for 1 GPU on one node" in one.get("reason", "")), None
        )

    waits = until(waiting, "one waits for the other's card, and says so")
    assert "unplaced.invalid" in waits["url"]
    ready = next(one for one in records() if one["replica_id"] != waits["replica_id"])
    head = json.loads((run_dir / "ray-head.json").read_text())
    manager = int((run_dir / "lock").read_text())
    os.kill(manager, signal.SIGKILL)
    log = run_dir / "logs" / "manager.log"
    # Both: the one that runs, and the one that has been asked for and waits.
    until(lambda: log.read_text().count('"replica_adopted"') == 2, "adopted by the next")
    again = until(
        lambda: next((one for one in records() if one["url"] == ready["url"]), None), "listed"
    )
    assert again.get("restarts", 0) == 0
    assert json.loads((run_dir / "ray-head.json").read_text()) == head
    stat = read_stat(head["pid"])
    assert stat is not None
    assert stat.alive
    until(waiting, "it still waits")
    body = {"model": "demo", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
    assert fetch(url + "/v1/chat/completions", json.dumps(body).encode()).status == 200
    pid = int(json.loads(log.read_text().split('"ray_placed"')[1].split('"pid":')[1].split(",")[0]))
    os.kill(pid, signal.SIGKILL)  # and what held the card makes room, for itself or the other
    until(lambda: "killed by SIGKILL" in log.read_text(), "its end is told")

    os.killpg(head["pid"], signal.SIGKILL)
    until(lambda: '"ray_head_ended"' in log.read_text(), "the end of the head is told")

    def serves_again() -> bool:
        now = json.loads((run_dir / "ray-head.json").read_text())
        ready = [one for one in records() if one.get("state", "ready") == "ready"]
        return now["pid"] != head["pid"] and len(ready) == 1 and ready[0]["url"] != again["url"]

    until(serves_again, "another head at the same address, and an engine there", 90.0)
    assert json.loads((run_dir / "ray-head.json").read_text())["address"] == head["address"]
