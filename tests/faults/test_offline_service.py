"""The offline service killed at random moments, and a file of 200 MB in flat memory."""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import openai
import pytest
from openai import OpenAI

from backends.offline.client import Client
from tests.fakes.offline_stage import CHAT, CONFIG, jsonl, request
from tests.fakes.offline_worker import BlockingWorker
from tests.fakes.programs import CLI, ROOT, WAIT_S, Program, environment, free_port, until

pytestmark = pytest.mark.faults

_KILLS = 6
_LINES = 2_000
_MIB = 1024 * 1024

T = TypeVar("T")


class _Service:
    """A service on one port and one store, in as many lives as it takes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        config = folder / "config.yaml"
        config.write_text(CONFIG + "offline: {hold_secs: 2}\n")
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._argv = (*CLI, "offline", str(config), f"--port={port}", f"--run-dir={folder}")
        self._lives = 0
        self.program = self.start()

    def start(self) -> Program:
        self._lives += 1
        self.program = Program(self._argv, self._folder / f"life-{self._lives}.log")
        self.program.until_said("offline_listening")
        return self.program

    def kill(self) -> None:
        self.program.process.kill()
        assert self.program.ended() == -signal.SIGKILL

    @property
    def most_bytes(self) -> int:
        """Return the most memory that it ever had resident."""
        status = Path(f"/proc/{self.program.pid}/status").read_text()
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        assert found is not None
        return int(found[1]) * 1024


@pytest.fixture
def service(tmp_path: Path) -> Iterator[_Service]:
    service = _Service(tmp_path)
    yield service
    assert service.program.end() == 0


def _patient(call: Callable[[], T]) -> T:
    """Do what a client does that must have it: again, while nobody is there."""

    def attempt() -> T | None:
        with suppress(openai.APIConnectionError, openai.InternalServerError):
            return call()
        return None

    return until(attempt, "an answer")


def test_killed_at_random_moments_of_upload_validation_and_work(service: _Service) -> None:
    rng, over = random.Random(7), threading.Event()

    def kill_now_and_then() -> None:
        for _ in range(_KILLS):
            if over.wait(rng.uniform(0.02, 0.5)):
                return
            service.kill()
            service.start()

    content = jsonl([request(n, f"say {n} " + "lorem " * 400) for n in range(_LINES)])
    killer = threading.Thread(target=kill_now_and_then)
    killer.start()
    once = {"Idempotency-Key": "once"}
    try:
        with OpenAI(base_url=service.url + "/v1", api_key="key", max_retries=0) as client:
            file = _patient(
                lambda: client.files.create(
                    file=("a", content), purpose="batch", extra_headers=once
                )
            )
            batch = _patient(
                lambda: client.batches.create(
                    input_file_id=file.id,
                    endpoint=CHAT,
                    completion_window="24h",
                    extra_headers=once,
                )
            )
            worker = BlockingWorker(service.url, lines_max=50)

            def ended() -> bool:
                worker.do_some()
                state = _patient(lambda: client.batches.retrieve(batch.id)).status
                assert state in {"validating", "in_progress", "completed"}
                return state == "completed" and not killer.is_alive()

            until(ended, "the batch to be done, and all kills")
            batch = client.batches.retrieve(batch.id)
            assert batch.request_counts is not None
            assert batch.request_counts.completed == _LINES
            assert batch.output_file_id is not None
            lines = client.files.content(batch.output_file_id).text.splitlines()
            assert [json.loads(line)["custom_id"] for line in lines] == [
                f"id-{n}" for n in range(_LINES)
            ]
            assert worker.computed <= _LINES + 50 * _KILLS
            assert [b.id for b in client.batches.list()] == [batch.id]
            assert {f.id for f in client.files.list()} == {file.id, batch.output_file_id}
            assert client.files.content(file.id).content == content
    finally:
        over.set()
        killer.join(WAIT_S)


def test_a_file_of_200_mb_passes_in_flat_memory(service: _Service, tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    words = "lorem ipsum " * 325
    with path.open("wb") as file:
        for n in range(48_000):
            file.write(jsonl([request(n, f"{n} {words}")]))
    size = path.stat().st_size
    assert 190_000_000 < size < 200_000_000
    before = service.most_bytes
    with OpenAI(base_url=service.url + "/v1", api_key="key", max_retries=0) as client:
        with path.open("rb") as file:
            uploaded = client.files.create(file=file, purpose="batch")
        assert uploaded.bytes == size
        batch = client.batches.create(
            input_file_id=uploaded.id, endpoint=CHAT, completion_window="24h"
        )
        until(lambda: client.batches.retrieve(batch.id).status != "validating", "validation")
        batch = client.batches.retrieve(batch.id)
        assert batch.status == "in_progress"
        assert batch.request_counts is not None
        assert batch.request_counts.total == 48_000
        with client.files.with_streaming_response.content(uploaded.id) as response:
            assert sum(map(len, response.iter_bytes(_MIB))) == size
    assert service.most_bytes - before < 100 * _MIB


def test_a_client_reads_each_result_once_while_the_service_is_killed(service: _Service) -> None:
    lines, page = 600, 200
    over = threading.Event()

    def work() -> None:
        worker = BlockingWorker(service.url, lines_max=40)
        while not over.is_set():
            if not worker.do_some():
                over.wait(0.05)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        with Client(service.url, "key") as client:
            job = client.spawn_map(request(n)["body"] for n in range(lines))
            for ordered in (True, False):
                places = []
                for result in job.results(ordered=ordered):
                    if len(places) in {1, page + 1}:  # with a page in hand, and more to come
                        service.kill()
                        service.start()
                    places.append(result.number if ordered else result.sequence - 1)
                assert places == list(range(lines))
            assert job.progress().succeeded
    finally:
        over.set()
        worker.join(WAIT_S)


_SPAWNING = """\
import re, sys
from pathlib import Path
from backends.offline.client import Client

def most_kib():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

def requests(count):
    for number in range(count):
        content = f"{number} " + "lorem ipsum " * 350
        yield {"model": "demo", "messages": [{"role": "user", "content": content}]}

with Client(sys.argv[1], "key") as client:
    client.spawn_map(requests(100))
    before = most_kib()
    job = client.spawn_map(requests(10_000))
    print(job.lines, most_kib() - before)
"""


def test_a_client_sends_what_a_generator_yields_in_flat_memory(service: _Service) -> None:
    run = subprocess.run(
        [sys.executable, "-c", _SPAWNING, service.url],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(),
        check=True,
    )
    lines, grown_kib = map(int, run.stdout.split())
    assert lines == 10_000, "some 42 MB"
    assert grown_kib < 12 * 1024
