"""A burst in one region, for which another one comes up: over two whole Dohertys."""

from __future__ import annotations

import json
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from backends.scaling_report import PoolReport, decode_report
from tests.fakes.programs import CLI, WAIT_S, Program, fetch, free_port, metric, until

pytestmark = pytest.mark.faults
CLIENTS = 20  # five times what one replica takes
ENOUGH = 30  # answers of the other region
TOKENS = 100  # in a second
REGION = """\
region: {name}
proxy: {{port: {port}, admin_port: {admin}, workers: 1, peer_listen: "127.0.0.1:{peer}",
        expose_routing: true, access_log: 'off'}}
manager: {{port: {manager}, run_dir: {folder}, gpus: none}}
offline: {{enabled: false}}
remote_regions: [{{region: {other}, url: "http://127.0.0.1:{other_port}",
                  peer: "127.0.0.1:{other_peer}"}}]
models:
  - name: demo
    pools:
      - engine: simulator
        target_inputs: 4
        max_inputs: 4
        autoscale: {{min: {least}, max: {most}, rungs: [cold], scaledown_window_secs: 300}}
        args: [--profile, fast, --time-scale, "0.1", --startup-seconds, "1"]
"""


class Ports(NamedTuple):
    port: int
    admin: int
    manager: int
    peer: int


def write(folder: Path, name: str, ours: Ports, other: str, theirs: Ports, **size: int) -> Path:
    path = folder / f"{name}.yaml"
    text = REGION.format(
        name=name,
        folder=folder / name,
        other=other,
        other_port=theirs.port,
        other_peer=theirs.peer,
        **ours._asdict(),
        **size,
    )
    path.write_text(text)
    return path


def pool(ports: Ports) -> PoolReport:
    """Return the manager's pool."""
    return decode_report(fetch(f"http://127.0.0.1:{ports.manager}/v1/scaling").text.encode()).pools[
        0
    ]


def linked(ports: Ports) -> bool:
    text = fetch(f"http://127.0.0.1:{ports.admin}/metrics").text
    return metric(text, "doherty_remote_linked", {}) == 1.0


def ask(ports: Ports, number: int) -> tuple[int, str, int]:
    """Return the status, the region that computed the answer, and its tokens."""
    body = {
        "model": "demo",
        "max_tokens": TOKENS,
        "ignore_eos": True,
        "messages": [{"role": "user", "content": f"question {number}"}],
    }
    got = fetch(
        f"http://127.0.0.1:{ports.port}/v1/chat/completions",
        json.dumps(body).encode(),
    )
    return got.status, got.headers["x-doherty-region"], got.value["usage"]["completion_tokens"]


def burst(ports: Ports) -> list[tuple[int, str, int]]:
    """Ask until the other region has answered often enough, however long it takes to come up."""
    found: list[tuple[int, str, int]] = []
    give_up_s = time.monotonic() + WAIT_S

    def keep_asking(client: int) -> None:
        while sum(region == "us" for _, region, _ in found) < ENOUGH:
            assert time.monotonic() < give_up_s, f"no more than {Counter(r for _, r, _ in found)}"
            found.append(ask(ports, client + len(found)))

    with ThreadPoolExecutor(CLIENTS) as clients:
        list(clients.map(keep_asking, range(CLIENTS)))
    return found


def test_another_region_comes_up_for_a_burst_that_this_one_has_no_room_for(tmp_path: Path) -> None:
    eu, us = (Ports(*(free_port() for _ in Ports._fields)) for _ in range(2))
    files = (
        write(tmp_path, "eu", eu, "us", us, least=1, most=1),
        write(tmp_path, "us", us, "eu", eu, least=0, most=3),
    )
    ups = [Program((*CLI, "up", str(path)), path.with_suffix(".log")) for path in files]
    try:
        for up in ups:
            up.until_said(r"Ready: ")
        until(lambda: linked(eu) and linked(us), "both are linked")
        until(lambda: pool(eu).ready == 1, "the replica of eu")
        assert (pool(us).ready, pool(us).coming) == (0, 0)
        found = burst(eu)
        assert {(status, tokens) for status, _, tokens in found} == {(200, TOKENS)}
        ours, theirs = pool(eu), pool(us)
        assert any("left to us" in note.reason for note in ours.notes)
        assert (ours.ready, ours.coming) == (1, 0), "nothing was started twice"
        assert all(note.desired <= 1 for note in ours.notes)
        assert 1 <= max(note.desired for note in theirs.notes) <= 3
    finally:
        for up in ups:
            up.end()
