"""A replica is drained through the proxy while it streams, and its manager remembers."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.programs import fetch, until
from tests.fakes.whole import REPLICAS, Whole, whole

pytestmark = pytest.mark.faults
TOKENS = 60


def view_of(up: Whole) -> dict[str, dict[str, Any]]:
    """Return the replicas of the view by name."""
    return {one["replica_id"]: one for one in fetch(up.admin_url + "/view").value["replicas"]}


def post(url: str, body: bytes = b"") -> Any:
    asked = urllib.request.Request(url, body, {"content-type": "application/json"})
    return urllib.request.urlopen(asked, timeout=30)


def test_a_stream_outlives_the_drain_of_its_replica_and_the_manager_remembers(
    tmp_path: Path,
) -> None:
    body = {
        "model": "demo",
        "stream": True,
        "max_tokens": TOKENS,
        "messages": [{"role": "user", "content": "count"}],
    }
    with whole(tmp_path) as up:
        with post(up.url + "/v1/chat/completions", json.dumps(body).encode()) as stream:
            replica_id = stream.headers["x-doherty-replica"]
            first = stream.readline()
            assert first.startswith(b"data: ")
            told = json.load(post(f"{up.admin_url}/replicas/{replica_id}/drain"))
            assert told == {"replica_id": replica_id, "state": "draining", "held": True}
            until(lambda: view_of(up)[replica_id]["held"], "the view says that it is held")
            shown = view_of(up)[replica_id]
            assert (shown["state"], shown["reason"]) == ("draining", "drained by an operator")
            lines = [first, *stream]
        assert lines[-2:] == [b"data: [DONE]\n", b"\n"]
        texts = [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]
        assert (
            sum(bool(t["choices"] and t["choices"][0]["delta"].get("content")) for t in texts) > 9
        )
        for _ in range(12):
            with post(
                up.url + "/v1/chat/completions", json.dumps(body | {"max_tokens": 1}).encode()
            ) as answer:
                assert answer.headers["x-doherty-replica"] != replica_id
        page = fetch(up.manager_url + "/v1/fleet").value["replicas"]
        states = {one["replica_id"]: one.get("state", "ready") for one in page}
        assert states[replica_id] == "draining"
        told = json.load(post(f"{up.admin_url}/replicas/{replica_id}/undrain"))
        assert (told["held"], told["replica_id"]) == (False, replica_id)
        up.until_whole()
        assert not view_of(up)[replica_id]["held"]
        assert len(view_of(up)) == REPLICAS
