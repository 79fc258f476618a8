"""Three nodes, four replicas and two engine workers; one node dies under load, all at once."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import ray_cluster
from tests.fakes.load import Load, Outcome
from tests.fakes.programs import CLI, Program, children, fetch, free_port, until
from tests.fakes.ray_cluster import RAY_ENVIRONMENT, Node, RayCluster

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(
        bool(ray_cluster.reason_why_not()), reason=ray_cluster.reason_why_not() or "ray is here"
    ),
]

CLIENTS = 12
REPLICAS, WORKERS = 4, 2
LINES = 1200
WINDOWS = {"stable_window_secs": 4, "panic_window_secs": 1, "scaledown_window_secs": 2}
CHAT = {"max": 1, "rungs": ["cold"], **WINDOWS}
FAST = ["--profile", "h200-8b"]
WORK = {"max": 9, "scaledown_window_secs": 2}


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    """What is left of it when a node has died has room for all, and no more."""
    with ray_cluster.ray_cluster(2, 4, 4) as cluster:
        yield cluster


class Region:
    """`doherty up` on the cluster."""

    def __init__(self, folder: Path, cluster: RayCluster) -> None:
        self.run_dir = folder / "run"
        offline_port = free_port()
        pool: dict[str, Any] = {"engine": "simulator", "gpus": 1, "stop_grace_secs": 5}
        slow = ["--profile", "fast", "--time-scale", "0.1"]
        pools = [
            pool | {"replicas": REPLICAS, "args": slow},
            pool | {"replicas": WORKERS, "args": slow, "serves": "jobs", "name": "jobs"},
        ]
        config = {
            "proxy": {"workers": 1, "access_log": "off", "expose_routing": True},
            "manager": {
                "provider": "ray",
                "ray": {"address": cluster.address},
                "restart_backoff_secs": 0.1,
            },
            "offline": {
                "work_url": f"http://127.0.0.1:{offline_port}",
                "port": offline_port,
                "chunk_lines": 50,
                "hold_secs": 3,
                "spare_capacity": False,
            },
            "models": [
                {"name": "demo", "pools": pools},
                {"name": "chat", "pools": [pool | {"autoscale": CHAT, "target_inputs": 4}]},
                {
                    "name": "work",
                    "pools": [pool | {"args": FAST, "serves": "jobs", "autoscale": WORK}],
                },
            ],
        }
        path = folder / "doherty.yaml"
        path.write_text(json.dumps(config))
        ports = ("--port=0", "--admin-port=0", "--manager-port=0", f"--run-dir={self.run_dir}")
        self.up = Program((*CLI, "up", str(path), *ports), folder / "up.log")

    def start(self) -> None:
        self.url = self.up.until_said(r"Ready.*: (http://\S+)/v1")[1]
        self.manager_url = self.up.until_said(r"--manager-url (http://\S+)")[1]
        self.admin_url = self.up.until_said(r"admin +(http://\S+)")[1]
        until(self.whole, "all are ready")

    def records(self) -> list[dict[str, Any]]:
        try:
            told = fetch(self.manager_url + "/v1/fleet").value
        except OSError:
            return []
        return [*told["replicas"], *told.get("workers", ())]

    def ready(self) -> dict[str, str]:
        """Return where each that is ready runs."""
        return {
            record["replica_id"]: record["url"].split("/")[2].partition(":")[0]
            for record in self.records()
            if record.get("state", "ready") == "ready"
        }

    def whole(self, but: Iterable[str] = ()) -> bool:
        """Say whether all are ready, none of them on these nodes."""
        hosts = list(self.ready().values())
        return len(hosts) == REPLICAS + WORKERS and not set(but) & set(hosts)

    # --- jobs ---------------------------------------------------------------------------------

    def submit(self, lines: int, model: str = "demo", tokens: int = 20) -> str:
        content = b"".join(
            json.dumps(
                {
                    "custom_id": f"line-{number}",
                    "method": "POST",
                    "url": "/v1/chat/completions",
                    "body": {
                        "model": model,
                        "messages": [{"role": "user", "content": f"{number} is the number"}],
                        "max_tokens": tokens,
                    },
                }
            ).encode()
            + b"\n"
            for number in range(lines)
        )
        mark = "a-boundary"
        parts = (
            f'--{mark}\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
            f'--{mark}\r\ncontent-disposition: form-data; name="file"; filename="l.jsonl"\r\n'
            "content-type: application/jsonl\r\n\r\n"
        ).encode()
        body = parts + content + f"\r\n--{mark}--\r\n".encode()
        kind = {"content-type": f"multipart/form-data; boundary={mark}"}
        file = fetch(self.url + "/v1/files", body, kind)
        assert file.status == 200, file.text
        order = {
            "input_file_id": file.value["id"],
            "endpoint": "/v1/chat/completions",
            "completion_window": "24h",
        }
        kind = {"content-type": "application/json"}
        job = fetch(self.url + "/v1/batches", json.dumps(order).encode(), kind)
        assert job.status == 200, job.text
        return str(job.value["id"])

    def job(self, job_id: str) -> dict[str, Any]:
        return dict(fetch(f"{self.url}/v1/batches/{job_id}").value)

    def output(self, file_id: str) -> list[dict[str, Any]]:
        content = fetch(f"{self.url}/v1/files/{file_id}/content").text
        return [json.loads(line) for line in content.splitlines()]


@pytest.fixture(scope="module")
def region(tmp_path_factory: pytest.TempPathFactory, cluster: RayCluster) -> Iterator[Region]:
    region = Region(tmp_path_factory.mktemp("ray"), cluster)
    try:
        region.start()
        yield region
    finally:
        region.up.end()


async def test_the_manager_and_its_bridge_die_and_nobody_notices(region: Region) -> None:
    before = {record["replica_id"]: record["url"] for record in region.records()}
    manager = int((region.run_dir / "lock").read_text())
    (bridge,) = [pid for pid in children(manager) if b"ray_bridge" in command(pid)]
    async with Load(region.url, clients=CLIENTS) as load:
        await load.until_more(CLIENTS)
        os.kill(bridge, signal.SIGKILL)
        await load.until_more(CLIENTS)
        log = region.run_dir / "logs" / "manager.log"
        found = lambda: log.read_text().count('"ray_cluster"') == 2  # noqa: E731
        await asyncio.to_thread(until, found, "the cluster is found again")
        os.kill(manager, signal.SIGKILL)
        adopted = lambda: log.read_text().count('"replica_adopted"') == REPLICAS + WORKERS  # noqa: E731
        await asyncio.to_thread(until, adopted, "all are adopted")
        await asyncio.to_thread(until, region.whole, "all are ready")
        await load.until_more(CLIENTS)
        await load.stop()
    assert not load.failed(), load.summary()
    assert {record["replica_id"]: record["url"] for record in region.records()} == before
    assert not any(record.get("restarts") for record in region.records())
    with pytest.raises(ProcessLookupError):
        os.kill(bridge, 0)


TENANT = """
import sys, time, ray
ray.init(address=sys.argv[1], namespace="another", log_to_driver=False)
ray.get(ray.util.placement_group([{"GPU": 1}] * int(sys.argv[2])).ready())
print("it has them", flush=True)
time.sleep(600)
"""


@pytest.fixture
def tenant(cluster: RayCluster, tmp_path: Path) -> Iterator[int]:
    """Somebody else of the cluster, who leaves one GPU beside those of the fixed replicas."""
    gpus = 2 + 4 + 4 - REPLICAS - WORKERS - 1
    argv = (sys.executable, "-c", TENANT, cluster.address, str(gpus))
    program = Program(argv, tmp_path / "tenant.log", env=RAY_ENVIRONMENT)
    program.until_said("it has them")
    yield gpus
    program.end()


def test_a_worker_has_the_last_gpu_that_is_ours_and_yields_to_who_is_online(
    region: Region, tenant: int
) -> None:
    def gpus() -> dict[str, Any]:
        return dict(fetch(region.manager_url + "/v1/scaling").value["gpus"])

    def workers() -> list[str]:
        return [name for name in region.ready() if name.startswith("work")]

    until(lambda: gpus()["total"] == 10 - tenant, "what another tenant has is not ours")
    job_id = region.submit(LINES // 4, "work", 100)
    until(workers, "a worker")
    assert gpus()["free"] == 0
    body = {"model": "chat", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
    assert fetch(region.url + "/v1/chat/completions", json.dumps(body).encode()).status == 200
    assert region.job(job_id)["status"] == "in_progress"
    hosts, holders = region.ready(), gpus()["holders"]
    assert "chat-0" in hosts
    assert not workers()
    leased = {name: place.rpartition("/")[0] for name, (place,) in holders.items()}
    assert hosts.items() <= leased.items(), "each runs where its lease says"
    log = (region.run_dir / "logs" / "manager.log").read_text()
    assert "work-0 makes room for it" in log
    until(lambda: region.job(job_id)["status"] == "completed", "the job is done")
    job = region.job(job_id)
    assert job["request_counts"] == {"total": LINES // 4, "completed": LINES // 4, "failed": 0}
    until(region.whole, "what has no work has gone")


def command(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def fullest(region: Region, cluster: RayCluster) -> Node:
    """Return the node, not the head, on which most of all runs."""
    hosts = list(region.ready().values())
    return max(cluster.nodes, key=lambda node: hosts.count(node.host))


async def test_a_node_that_dies_under_load_takes_only_what_it_was_answering(
    region: Region, cluster: RayCluster
) -> None:
    before = region.ready()
    victim = fullest(region, cluster)
    lost = {name for name, host in before.items() if host == victim.host}
    replicas = {name for name in lost if not name.startswith("jobs")}
    assert replicas, before
    job_id = await asyncio.to_thread(region.submit, LINES)
    async with Load(region.url, clients=CLIENTS) as load:
        await load.until_more(2 * CLIENTS)
        await load.until(
            lambda: any(r.replica in replicas for r in load.streaming()), "streams of that node"
        )
        await asyncio.to_thread(victim.kill)
        dead_s = time.monotonic()
        await load.until_more(3 * CLIENTS)
        left = {victim.host}
        await asyncio.to_thread(until, lambda: region.whole(left), "all are ready elsewhere")
        await load.until_more(3 * CLIENTS)
        await load.stop()
    after = region.ready()
    assert {k: v for k, v in after.items() if k not in lost} == {
        k: v for k, v in before.items() if k not in lost
    }
    assert not load.having(Outcome.CUT_SILENTLY), load.summary()
    assert not load.having(Outcome.REFUSED), load.summary()
    for record in load.failed():
        assert record.begun_s < dead_s, record
        assert record.code == "replica_lost", record
    restarts = {r["replica_id"]: r.get("restarts", 0) for r in region.records()}
    assert {name for name, count in restarts.items() if count} == lost
    reasons = (region.run_dir / "logs" / "manager.log").read_text()
    assert f"its node {victim.host} is gone" in reasons

    def done() -> bool:
        return bool(region.job(job_id)["status"] == "completed")

    await asyncio.to_thread(until, done, "the job is done")
    job = region.job(job_id)
    assert job["request_counts"] == {"total": LINES, "completed": LINES, "failed": 0}
    ids = [line["custom_id"] for line in region.output(job["output_file_id"])]
    assert ids == [f"line-{number}" for number in range(LINES)]


def test_a_cluster_that_does_not_answer_is_one_line(tmp_path: Path) -> None:
    config = tmp_path / "doherty.yaml"
    address = f"127.0.0.1:{free_port()}"
    config.write_text(json.dumps({"manager": {"provider": "ray", "ray": {"address": address}}}))
    run = Program(
        (*CLI, "manager", "--config", str(config), "--port=0", f"--run-dir={tmp_path}/run"),
        tmp_path / "log",
    )
    assert run.ended() == 1
    (line,) = run.said.splitlines()
    assert f"the Ray cluster at {address} cannot be used" in line
    assert "manager.ray.address" in line
