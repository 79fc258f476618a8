"""Engine workers under `doherty up`: they come for a job, outlive a manager, yield to a burst, go.

One card for two models: jobs have it while nobody chats.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import NotFoundError, OpenAI

from tests.fakes.programs import CLI, Program, fetch, until
from tests.fakes.region import alive

pytestmark = pytest.mark.faults
LINES = 1200
WINDOWS = "stable_window_secs: 4, panic_window_secs: 1, scaledown_window_secs: 2"
CONFIG = f"""\
proxy: {{access_log: 'off'}}
manager: {{gpus: '0', scrape_interval_secs: 0.2}}
models:
  - name: chat
    pools:
      - engine: simulator
        gpus: 1
        args: [--profile, fast]
        target_inputs: 4
        autoscale: {{max: 1, rungs: [cold], {WINDOWS}}}
  - name: work
    pools:
      - engine: simulator
        serves: jobs
        gpus: 1
        gpu_price_per_hour: 3
        args: [--profile, h200-8b]
        autoscale: {{max: 2, scaledown_window_secs: 2}}
"""


class Run:
    """One `doherty up`, seen by the client of its API and by the manager's pages."""

    def __init__(self, folder: Path) -> None:
        config = folder / "doherty.yaml"
        config.write_text(CONFIG)
        self.run_dir = folder / "run"
        ports = ("--port=0", "--admin-port=0", "--manager-port=0", "--offline-port=0")
        argv = (*CLI, "up", str(config), f"--run-dir={self.run_dir}", *ports)
        self.up = Program(argv, folder / "up.log")
        url = self.up.until_said(r"Ready: (http://\S+)/v1")[1]
        self.manager_url = self.up.until_said(r"--manager-url (http://\S+)")[1]
        self.client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

    def workers(self) -> dict[str, tuple[str, int]]:
        """Return state and process of each engine worker; none while the manager is away."""
        try:
            told = fetch(self.manager_url + "/v1/fleet").value
        except OSError:
            return {}
        return {w["replica_id"]: (w.get("state", "ready"), w["pid"]) for w in told["workers"]}

    def worker(self) -> int | None:
        """Return the process of the one worker that is ready; None: there is not exactly one."""
        found = [pid for state, pid in self.workers().values() if state == "ready"]
        return found[0] if len(found) == len(self.workers()) == 1 else None

    def submit(self) -> str:
        lines = [
            {
                "custom_id": f"line-{number}",
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": {
                    "model": "work",
                    "max_tokens": 400,
                    "messages": [{"role": "user", "content": f"Tell me of {number}."}],
                },
            }
            for number in range(LINES)
        ]
        content = "\n".join(map(json.dumps, lines)).encode()
        sent = self.client.files.create(file=("in.jsonl", content), purpose="batch")
        batch = self.client.batches.create(
            input_file_id=sent.id, endpoint="/v1/chat/completions", completion_window="24h"
        )
        return batch.id

    def done(self, batch_id: str) -> int:
        counts = self.client.batches.retrieve(batch_id).request_counts
        return counts.completed if counts else 0

    def gpus_free(self) -> int:
        return int(fetch(self.manager_url + "/v1/scaling").value["gpus"]["free"])

    def log(self) -> list[dict[str, Any]]:
        text = (self.run_dir / "logs" / "manager.log").read_text()
        return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    run = Run(tmp_path)
    try:
        yield run
    finally:
        run.up.end()


def test_workers_come_outlive_a_manager_yield_to_a_burst_and_go(run: Run) -> None:
    assert run.workers() == {}, "there is no work"
    batch_id = run.submit()
    pid = until(run.worker, "a worker")
    until(lambda: run.done(batch_id) > 0, "its first lines")
    with pytest.raises(NotFoundError):  # a worker is no replica
        run.client.chat.completions.create(model="work", messages=[])

    run.up.process.send_signal(signal.SIGHUP)
    until(lambda: [e for e in run.log() if e["event"] == "reload_done"], "the file, read again")
    os.kill(int((run.run_dir / "lock").read_text()), signal.SIGKILL)
    until(lambda: [e for e in run.log() if e["event"] == "replica_adopted"], "another manager")
    assert until(run.worker, "the worker, adopted") == pid
    spawned = [e for e in run.log() if e["event"] == "replica_spawned"]
    assert [e["pid"] for e in spawned] == [pid], "none is started twice, nor anew by a reload"

    answer = run.client.chat.completions.create(
        model="chat", messages=[{"role": "user", "content": "Hello?"}], max_tokens=3
    )
    assert answer.choices[0].message.content
    assert not alive(pid), "it gave up its card"
    ends = [e for e in run.log() if e["event"] == "replica_stopping" and e["replica"] == "work-0"]
    assert "its GPU is needed" in ends[0]["reason"]
    assert run.done(batch_id) < LINES

    until(lambda: run.client.batches.retrieve(batch_id).status == "completed", "the job", 60.0)
    batch = run.client.batches.retrieve(batch_id)
    assert batch.output_file_id is not None
    results = run.client.files.content(batch.output_file_id).text.splitlines()
    ids = [json.loads(line)["custom_id"] for line in results]
    assert sorted(ids) == sorted(f"line-{number}" for number in range(LINES))
    until(lambda: not run.workers(), "the end of the last worker")
    until(lambda: run.gpus_free() == 1, "the card, free")
