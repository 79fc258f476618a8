"""Simulated engines in containers of a real Docker engine, through manager and proxy."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from backends.providers.process import read_stat
from tests.fakes.docker_engine import (
    IMAGE,
    DockerEngine,
    docker_engine,
    mounts,
    reason_why_not,
)
from tests.fakes.programs import CLI, ROOT, Program, fetch, until

pytestmark = pytest.mark.skipif(bool(reason_why_not()), reason=reason_why_not())


@pytest.fixture(scope="module")
def engine() -> Iterator[DockerEngine]:
    with ExitStack() as stack:
        try:
            running = stack.enter_context(docker_engine())
        except OSError as error:
            pytest.skip(f"no Docker engine comes up here: {error}")
        yield running


class Region:
    """`doherty up` with containers."""

    def __init__(self, folder: Path, engine: DockerEngine, *pools: dict[str, Any]) -> None:
        self.folder = folder
        self.engine = engine
        self.run_dir = folder / "run"
        config = folder / "doherty.yaml"
        config.write_text(yaml.safe_dump(_config(engine, *(pools or ({},)))))
        ports = ("--port=0", "--admin-port=0", "--manager-port=0", f"--run-dir={self.run_dir}")
        self.up = Program((*CLI, "up", str(config), *ports), folder / "up.log")

    def start(self) -> None:
        self.url = self.up.until_said(r"Ready: (http://\S+)/v1")[1]
        self.manager_url = self.up.until_said(r"--manager-url (http://\S+)")[1]

    def replica(self) -> dict[str, Any]:
        try:
            told = fetch(self.manager_url + "/v1/fleet").value["replicas"][0]
        except OSError:  # the manager is being started anew
            return {}
        return dict(told)

    def serves(self, but: int = 0) -> bool:
        """Say whether a process serves, another one than `but`."""
        replica = self.replica()
        awake = "state" not in replica and not replica.get("asleep")
        return awake and replica.get("pid", 0) not in {0, but}

    def answer(self) -> int:
        body = {"model": "demo", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
        return fetch(self.url + "/v1/chat/completions", json.dumps(body).encode()).status

    def order(self, *words: str) -> None:
        program = Program(
            (*CLI, *words, "--manager-url", self.manager_url), self.folder / "order.log"
        )
        assert program.ended() == 0, program.said

    @property
    def log(self) -> str:
        return (self.run_dir / "logs/demo-0.log").read_text()


def _config(engine: DockerEngine, *pools: dict[str, Any]) -> dict[str, Any]:
    env = {"PATH": f"{sys.prefix}/bin:/usr/bin", "PYTHONPATH": str(ROOT)}
    docker = {"url": engine.url, "images": {"simulator": IMAGE}, "mounts": mounts(), "shm_mib": 64}
    args = ["--profile", "fast"]
    usual = {"engine": "simulator", "sleep": True, "args": args, "env": env, "stop_grace_secs": 5}
    return {
        "proxy": {"workers": 1, "access_log": "off"},
        "manager": {"provider": "docker", "docker": docker, "restart_backoff_secs": 0.1},
        "models": [{"name": "demo", "pools": [usual | pool for pool in pools]}],
    }


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, engine: DockerEngine) -> Iterator[Region]:
    """A region that serves, and that each test leaves serving; no container outlives it."""
    one = Region(tmp_path_factory.mktemp("docker"), engine)
    try:
        one.start()
        yield one
    finally:
        one.up.end()
        left = engine.names()
        engine.clean()
    assert left == [], "the manager left a container"


def test_a_replica_in_a_container_serves_sleeps_and_wakes(
    one: Region, engine: DockerEngine
) -> None:
    assert one.answer() == 200
    (name,) = engine.names()
    told = engine.inspect(name)
    assert told["Config"]["Labels"]["doherty.replica"] == "demo-0"
    assert one.replica()["pid"] == told["State"]["Pid"]
    assert one.replica()["engine_version"] == "1.2.3"  # the image's tag
    assert "listening on" in one.log
    one.order("sleep", "demo-0")
    until(lambda: one.replica().get("asleep"), "asleep")
    one.order("wake", "demo-0")
    until(one.serves, "awake")
    assert one.answer() == 200


def test_a_container_killed_from_outside_is_made_anew(one: Region, engine: DockerEngine) -> None:
    first = one.replica()
    engine.docker("kill", engine.names()[0])
    until(lambda: one.serves(but=first["pid"]), "another container")
    second = one.replica()
    assert second["restarts"] == first.get("restarts", 0) + 1
    assert one.answer() == 200
    engine.docker("rm", "--force", engine.names()[0])
    until(lambda: one.serves(but=second["pid"]), "a third one")
    assert len(engine.names()) == 1


def test_a_manager_after_a_killed_one_adopts_and_cleans_up(
    one: Region, engine: DockerEngine
) -> None:
    (name,) = engine.names()
    before, lines = one.replica(), one.log.count("listening on")
    label = f"doherty.run-folder={one.run_dir}"
    stray = ("--label", label, "--label", "doherty.launch=gone", "--name", "stray", IMAGE, "x")
    engine.docker("create", *stray)
    manager = int((one.run_dir / "lock").read_text())
    os.kill(manager, signal.SIGKILL)
    until(lambda: int((one.run_dir / "lock").read_text() or manager) != manager, "another one")
    until(one.serves, "adopted")
    after = one.replica()
    assert after["pid"] == before["pid"]
    assert after.get("restarts", 0) == before.get("restarts", 0)
    until(lambda: engine.names() == [name], "the stray one removed")
    assert one.log.count("listening on") == lines  # what was copied is not copied again
    assert one.answer() == 200
    os.kill(before["pid"], signal.SIGKILL)  # and its end is seen
    until(lambda: one.serves(but=before["pid"]), "made anew")


def test_a_docker_engine_that_goes_away_takes_no_replica_with_it(
    one: Region, engine: DockerEngine
) -> None:
    pid = one.replica()["pid"]
    engine.stop()
    assert read_stat(pid) is not None  # it lives on (--live-restore)
    assert one.answer() == 200
    engine.start()
    assert one.answer() == 200
    assert one.replica()["pid"] == pid
    engine.stop()
    os.kill(pid, signal.SIGKILL)  # and who dies meanwhile is found dead
    engine.start()
    until(lambda: one.serves(but=pid), "made anew")
    assert one.answer() == 200


def test_what_cannot_start_is_told_with_what_is_wrong(tmp_path: Path, engine: DockerEngine) -> None:
    before = engine.names()
    pools = (
        {"name": "missing", "image": "no-such-image:v1"},
        {"name": "ending", "args": ["--no-such-flag"]},
    )
    other = Region(tmp_path, engine, *pools)
    try:
        told = other.up.until_said(r"missing-0 waits to start again: (.*)")[1]
        assert "No such image: no-such-image:v1" in told
        assert "docker pull" in told
        told = other.up.until_said(r"ending-0 waits to start again: (.*)")[1]
        assert "exited with status 2 before it was ready" in told
        assert "--no-such-flag" in told
    finally:
        other.up.end()
    assert engine.names() == before


def test_an_engine_that_does_not_answer_is_one_line(tmp_path: Path) -> None:
    nobody = DockerEngine(tmp_path)
    config = tmp_path / "doherty.yaml"
    config.write_text(yaml.safe_dump(_config(nobody, {})))
    run = Program(
        (*CLI, "manager", "--config", str(config), "--port=0", f"--run-dir={tmp_path}/run"),
        tmp_path / "log",
    )
    assert run.ended() == 1
    (line,) = run.said.splitlines()
    assert f"the Docker engine at {nobody.url} does not answer" in line
    assert "manager.docker.url" in line
