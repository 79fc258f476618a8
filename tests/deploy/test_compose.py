"""`deploy/compose.yaml` on a real engine: built, up, healthy, served, rolled under load, and gone.

As a person would run it but for Grafana, whose image no package of Debian's can stand in for: that
service is judged by its form (`test_compose_file.py`). The tests run in their order, on one stack.
With DOHERTY_TEST_TRANSLATE=yes the image has the data path as machine code, which takes minutes.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import openai
import pytest

from backends.ports import PortLeases
from tests.fakes.compose_stack import BASE, FILE, Stack, kept_engine, reason_why_not
from tests.fakes.load import Load, Outcome
from tests.fakes.programs import ROOT, until

SERVICES = ("pod", "proxy", "manager", "offline", "prometheus")
ROLL = str(FILE.parent / "roll.sh")
MIB = 1 << 20

pytestmark = [
    pytest.mark.containers,
    pytest.mark.skipif(bool(reason_why_not()), reason=reason_why_not()),
]


def tell(words: str) -> None:
    """Say a figure, to whoever runs this with `-s`."""
    sys.stdout.write(words + "\n")


class Place:
    """The stack, and where it is published."""

    def __init__(self, stack: Stack, ports: dict[str, int]) -> None:
        self.stack = stack
        self.url = f"http://127.0.0.1:{ports['DOHERTY_PORT']}"
        self.admin_url = f"http://127.0.0.1:{ports['DOHERTY_ADMIN_PORT']}"
        self.prometheus_url = f"http://127.0.0.1:{ports['DOHERTY_PROMETHEUS_PORT']}"
        self.key = ""

    def admin(self, path: str) -> bytes:
        head = {"authorization": f"Bearer {self.key}"}
        with urlopen(Request(self.admin_url + path, headers=head), timeout=10) as answer:
            content: bytes = answer.read()
        return content

    def query(self, path: str) -> Any:
        with urlopen(self.prometheus_url + path, timeout=10) as answer:
            return json.load(answer)["data"]


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    """Bring the stack up, until all that has a health check is healthy; nothing of it is left."""
    names = ("DOHERTY_PORT", "DOHERTY_ADMIN_PORT", "DOHERTY_PROMETHEUS_PORT")
    leases = PortLeases(random.Random())
    ports = {name: leases.lease() for name in (*names, "DOHERTY_ALERTMANAGER_PORT")}
    translate = os.environ.get("DOHERTY_TEST_TRANSLATE", "no")
    told = {name: str(port) for name, port in ports.items()} | {"DOHERTY_TRANSLATE": translate}
    with tempfile.TemporaryDirectory(prefix="doherty-compose-") as name, ExitStack() as engines:
        try:
            engine = engines.enter_context(kept_engine())
        except OSError as error:
            pytest.skip(f"there is no engine with the base image here: {error}")
        stack = Stack(engine, Path(name), told)
        tell(f"\n{stack.run('docker', 'compose', 'version').strip()}, engine {version(stack)}")
        stack.compose("down", "--volumes", "--timeout", "1")  # of a run that was killed
        begun_s = time.monotonic()
        stack.compose("build", "keys", timeout_s=1800.0)
        tell(f"build (translated: {translate}): {time.monotonic() - begun_s:.1f} s")
        begun_s = time.monotonic()
        try:
            stack.compose("up", "--detach", "--wait", *SERVICES)
            tell(f"up, all healthy: {time.monotonic() - begun_s:.1f} s")
            here = Place(stack, ports)
            here.key = stack.inside("proxy", "cat", "/keys/admin_api_key")
            yield here
        finally:
            begun_s = time.monotonic()
            stack.compose("down", "--volumes")
        tell(f"down: {time.monotonic() - begun_s:.1f} s")
        assert engine.names() == []
        assert engine.docker("volume", "ls", "--quiet") == ""
        networks = engine.docker("network", "ls", "--format", "{{.Name}}").split()
        assert set(networks) <= {"host", "none"}


def version(stack: Stack) -> str:
    return stack.engine.docker("version", "--format", "{{.Server.Version}}")


def test_the_image_is_small(place: Place) -> None:
    def size(name: str) -> int:
        return int(place.stack.engine.docker("image", "inspect", "--format", "{{.Size}}", name))

    whole, base = size("doherty:test"), size(BASE)
    tell(f"image: {whole / MIB:.0f} MiB, of which Doherty {(whole - base) / MIB:.0f} MiB")
    assert (whole - base) / MIB < 150
    listed = place.stack.inside("proxy", "ls", "/opt/doherty/lib/python3.11/site-packages")
    assert not {"torch", "mypy", "pip", "vllm", "sglang"} & set(listed.split())


def test_a_stream_reaches_the_official_client(place: Place) -> None:
    with openai.OpenAI(base_url=f"{place.url}/v1", api_key="none", max_retries=0) as client:
        stream = client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": "hi"}], max_tokens=20, stream=True
        )
        parts = [chunk.choices[0].delta.content for chunk in stream if chunk.choices]
        assert len([part for part in parts if part]) == 20
        assert [model.id for model in client.models.list()] == ["demo"]
        batches = client.batches.list()
        assert batches.data == []


def test_the_fleet_is_two_replicas_that_nobody_outside_reaches(place: Place) -> None:
    replicas = json.loads(place.admin("/replicas"))["replicas"]
    assert [r["state"] for r in replicas] == ["ready", "ready"]
    assert all(r["url"].startswith("http://127.0.0.1:") for r in replicas)
    inspected = place.stack.engine.inspect(place.stack.running("pod")[0])
    address = inspected["NetworkSettings"]["Networks"]["doherty-test_outside"]["IPAddress"]
    for port in (8002, 8003, int(replicas[0]["url"].rpartition(":")[2])):
        probe = f"import socket; socket.create_connection(('{address}', {port}), 2)"
        with pytest.raises(AssertionError, match="refused"):
            place.stack.inside("proxy", "python3", "-c", probe)


def test_processes_may_do_little_and_leave_no_zombies(place: Place) -> None:
    stack = place.stack
    for service in ("proxy", "manager", "offline"):
        status = stack.inside(service, "cat", "/proc/1/status")
        fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        assert fields["Uid"].split() == ["10001"] * 4
        assert int(fields["CapEff"], 16) == int(fields["CapBnd"], 16) == 0
        assert fields["NoNewPrivs"] == "1"
        with pytest.raises(AssertionError, match="Read-only file system"):
            stack.inside(service, "touch", "/opt/doherty/x")
        command = stack.inside(service, "cat", "/proc/1/cmdline").split("\0")
        assert command[:3] == ["tini", "--", "doherty"]
        environment = stack.inside(service, "cat", "/proc/1/environ")
        assert place.key not in environment
    # A child whose parent has ended is process 1's, which has to look after it.
    orphan = "import os, time; os.fork() or (time.sleep(0.1), os._exit(0)); os._exit(0)"
    stack.inside("manager", "python3", "-c", orphan)
    states = (
        "from glob import glob; "
        "print(*[open(p).read().rpartition(') ')[2][0] for p in glob('/proc/[0-9]*/stat')])"
    )
    until(
        lambda: "Z" not in stack.inside("manager", "python3", "-c", states).split(),
        "the orphan is gone",
    )


def test_prometheus_scrapes_all_and_its_rules_are_loaded(place: Place) -> None:
    wanted = {"doherty-proxy", "doherty-manager", "doherty-offline", "doherty-engines"}

    def up() -> set[str]:
        found = place.query("/api/v1/query?query=up%20%3D%3D%201")["result"]
        return {sample["metric"]["job"] for sample in found}

    until(lambda: up() >= wanted, "every job is up")
    groups = place.query("/api/v1/rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    tell(f"Prometheus: {len(wanted)} jobs are up, {len(rules)} rules are loaded")
    assert {rule["type"] for rule in rules} == {"recording", "alerting"}
    until(
        lambda: all(rule["health"] in {"ok", "unknown"} for rule in rules),
        "no rule has failed",
    )


def test_a_roll_under_load_fails_no_request(place: Place) -> None:
    """Two clients of the official kind, with kept connections, and six with fresh ones."""
    stack = place.stack
    before = stack.running("proxy")
    kept = [0]

    def ask_on(client: openai.OpenAI, ended: asyncio.Event) -> None:
        while not ended.is_set():
            answer = client.chat.completions.create(
                model="demo", messages=[{"role": "user", "content": "hi"}], max_tokens=3
            )
            assert answer.choices[0].finish_reason == "length"
            kept[0] += 1

    async def run() -> tuple[Load, str, float]:
        ended = asyncio.Event()
        with openai.OpenAI(base_url=f"{place.url}/v1", api_key="none", max_retries=0) as client:
            asking = [asyncio.to_thread(ask_on, client, ended) for _ in "ab"]
            askers = asyncio.gather(*asking)
            async with Load(place.url, clients=6, max_tokens=60) as load:
                try:
                    await load.until_more(30)
                    begun_s = time.monotonic()
                    said = await asyncio.to_thread(stack.run, ROLL)
                    took_s = time.monotonic() - begun_s
                    await load.until_more(30)
                finally:
                    ended.set()
                await askers
        return load, said, took_s

    load, said, took_s = asyncio.run(run())
    assert load.failed() == [], load.summary()
    tell(
        f"roll: {took_s:.1f} s; {len(load.having(Outcome.COMPLETE))} streams and {kept[0]} answers "
        f"on kept connections, {len(load.failed())} failed"
    )
    assert "the old one has finished what it had, and is gone" in said
    after = stack.running("proxy")
    assert len(after) == 1
    assert after != before
    # Compose takes the new one for the service's own, and leaves it alone.
    stack.compose("up", "--detach", "--wait", "--no-deps", "proxy")
    assert stack.running("proxy") == after
    policy = stack.engine.inspect(after[0])["HostConfig"]["RestartPolicy"]["Name"]
    assert policy == "unless-stopped"


def test_a_roll_that_fails_changes_nothing(place: Place) -> None:
    stack = place.stack
    before = stack.running("proxy")
    told = {**stack.environment, "DOHERTY_CONFIG_FILE": "absent.yaml"}
    rolled = subprocess.run(["sh", ROLL], env=told, cwd=ROOT, capture_output=True, check=False)
    assert rolled.returncode == 1
    words = rolled.stderr.decode()
    assert "absent.yaml: cannot be read" in words
    assert "the new one did not take over; the old one serves on" in words
    assert stack.running("proxy") == before
    policy = stack.engine.inspect(before[0])["HostConfig"]["RestartPolicy"]["Name"]
    assert policy == "unless-stopped"
    with urlopen(f"{place.admin_url}/readyz", timeout=5) as answer:
        assert answer.status == 200


def test_a_roll_that_is_cut_off_leaves_one_proxy_and_a_second_at_once_is_refused(
    place: Place,
) -> None:
    stack = place.stack
    before = stack.running("proxy")

    def policy(name: str) -> str:
        found: str = stack.engine.inspect(name)["HostConfig"]["RestartPolicy"]["Name"]
        return found

    first = subprocess.Popen(["sh", ROLL], env=stack.environment, cwd=ROOT, stderr=subprocess.PIPE)
    until(lambda: policy(before[0]) == "no", "a roll has begun")
    second = subprocess.run(
        ["sh", ROLL], env=stack.environment, cwd=ROOT, capture_output=True, check=False
    )
    assert second.returncode == 1
    assert second.stderr.decode().endswith("is under way\n")
    first.terminate()
    words = first.communicate()[1].decode()
    assert first.returncode == 1
    assert "cut off; the" in words
    until(lambda: len(stack.running("proxy")) == 1, "one of them is gone")
    left = stack.running("proxy")
    assert policy(left[0]) == "unless-stopped"
    with urlopen(f"{place.admin_url}/readyz", timeout=5) as answer:
        assert answer.status == 200
    # What ended meanwhile is not taken for the new one.
    assert "is gone" in stack.run(ROLL)
    after = stack.running("proxy")
    assert len(after) == 1
    assert after[0] not in (*before, *left)


def test_a_proxy_that_is_killed_comes_back_and_one_that_stops_drains(place: Place) -> None:
    stack = place.stack
    name = stack.running("proxy")[0]

    def restarts() -> int:
        count: int = stack.engine.inspect(name)["RestartCount"]
        return count

    children_of_tini = (
        "import os\nfor pid in filter(str.isdecimal, os.listdir('/proc')):\n"
        "    if open(f'/proc/{pid}/stat').read().rpartition(') ')[2].split()[1] == '1':\n"
        "        os.kill(int(pid), 9)"
    )
    stack.inside("proxy", "python3", "-c", children_of_tini)
    until(lambda: restarts() == 1, "Docker starts it again")

    def serves() -> bool:
        try:
            return b"ready" in place.admin("/readyz")
        except OSError:
            return False

    until(serves, "it serves again")
    begun_s = time.monotonic()
    stack.compose("stop", "proxy")
    tell(f"stop of an idle proxy: {time.monotonic() - begun_s:.1f} s")
    assert stack.engine.inspect(name)["State"]["ExitCode"] == 0


def test_the_image_alone_serves_a_demo(place: Place) -> None:
    engine = place.stack.engine
    may = ("--read-only", "--cap-drop=ALL", "--tmpfs=/tmp")
    folder = "--tmpfs=/var/lib/doherty:uid=10001,gid=10001"
    name = engine.docker("run", "--detach", "--network=none", *may, folder, "doherty:test")
    ask = (
        "from urllib.request import urlopen; "
        "print(urlopen('http://127.0.0.1:8000/v1/models').read())"
    )
    try:

        def healthy() -> bool:
            status: str = engine.inspect(name)["State"]["Health"]["Status"]
            return status == "healthy"

        until(healthy, "its own check finds it healthy", 120.0)
        until(lambda: "demo" in _try(engine.docker, "exec", name, "python3", "-c", ask), "served")
        engine.docker("stop", "--time", "30", name)
        assert engine.inspect(name)["State"]["ExitCode"] == 0
    finally:
        engine.docker("rm", "--force", name)


def _try(command: Any, *words: str) -> str:
    try:
        said: str = command(*words)
    except AssertionError as error:
        return str(error)
    return said
