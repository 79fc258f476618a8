"""`doherty up` and jobs: a batch through the proxy, the service killed and brought back."""

from __future__ import annotations

import json
import os
import signal
from contextlib import suppress
from pathlib import Path

import openai
import pytest
from openai import OpenAI

from tests.fakes.offline_stage import CHAT, jsonl, request
from tests.fakes.programs import CLI, Program, running, until

pytestmark = pytest.mark.faults

# The service may die with lines in its dispatcher's hands: they go out anew after the hold.
_CONFIG = """
offline: {hold_secs: 2}
models:
- name: demo
  pools:
  - {engine: simulator, replicas: 1, args: [--profile, fast]}
"""
_PORTS = ("--port=0", "--admin-port=0", "--manager-port=0")


def _argv(folder: Path, *flags: str) -> tuple[str, ...]:
    config = folder / "config.yaml"
    config.write_text(_CONFIG)
    return (*CLI, "up", str(config), *_PORTS, f"--run-dir={folder / 'run'}", *flags)


def _client(up: Program) -> OpenAI:
    url = up.until_said(r"Ready: (http://\S+)")[1]
    return OpenAI(base_url=url, api_key="key", max_retries=0)


def _pid(folder: Path) -> int:
    return int((folder / "run" / "offline.pid").read_text().split()[0])


def test_a_batch_through_the_proxy_outlives_the_service(tmp_path: Path) -> None:
    with running(_argv(tmp_path), tmp_path / "up.log") as up, _client(up) as client:
        assert "/v1/batches" in up.said
        lines = [request(n) for n in range(300)]
        file = client.files.create(file=("a.jsonl", jsonl(lines)), purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
        os.kill(_pid(tmp_path), signal.SIGKILL)

        def ended() -> str | None:
            with suppress(openai.APIStatusError, openai.APIConnectionError):
                found = client.batches.retrieve(batch.id)
                if found.status not in {"validating", "in_progress", "finalizing"}:
                    return found.status
            return None

        assert until(ended, "the end of the batch") == "completed"
        up.until_said("offline service was killed by SIGKILL; starting it again")
        batch = client.batches.retrieve(batch.id)
        assert batch.request_counts is not None
        assert batch.request_counts.completed == 300
        assert batch.output_file_id is not None
        answers = client.files.content(batch.output_file_id).text.splitlines()
        assert [json.loads(line)["custom_id"] for line in answers] == [
            f"id-{n}" for n in range(300)
        ]
        assert json.loads(answers[0])["response"]["body"]["object"] == "chat.completion"
    assert not (tmp_path / "run" / "offline.pid").exists()
