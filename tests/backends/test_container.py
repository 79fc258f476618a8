"""A container's life as it is told, against a Docker engine that a test holds in its hand."""

from __future__ import annotations

import asyncio
import io
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiodocker import DockerError

from backends.log import Log
from backends.providers import container as subject
from backends.providers.container import Container, NotStartedError, stamped

AWAY = DockerError(900, "Cannot connect to Docker Engine")
NOT_THERE = DockerError(404, "No such container")


class FakeContainer:
    """What aiodocker gives for a name; `failures` are raised by a call, one after another."""

    def __init__(self, docker: FakeDocker, name: str) -> None:
        self.docker = docker
        self.id = name

    async def show(self) -> dict[str, Any]:
        self.docker.asked("show")
        return {"State": self.docker.state}

    async def wait(self) -> None:
        self.docker.asked("wait")
        await self.docker.ended.wait()

    async def kill(self, *, signal: str) -> None:
        self.docker.asked(f"kill {signal}")

    async def delete(self, *, force: bool, v: bool) -> None:
        self.docker.asked("delete")

    async def log(self, **options: Any) -> AsyncIterator[str]:
        self.docker.since.append(options["since"])
        self.docker.asked("log")
        seconds, _, rest = options["since"].partition(".")
        since_ns = int(seconds) * 10**9 + int(rest)
        for line in self.docker.lines:
            if stamped(line)[0] >= since_ns:  # as Docker does
                yield line
        await self.docker.ended.wait()


class FakeDocker:
    """One container, whatever it is called."""

    def __init__(self) -> None:
        self.containers = self
        self.state: dict[str, Any] = {"Running": True, "Pid": 0, "ExitCode": 0}
        self.ended = asyncio.Event()
        self.failures: dict[str, list[Exception]] = {}
        self.calls: list[str] = []
        self.lines: list[str] = []
        self.since: list[str] = []

    def container(self, name: str) -> FakeContainer:
        return FakeContainer(self, name)

    def asked(self, what: str) -> None:
        self.calls.append(what)
        failures = self.failures.get(what.split(maxsplit=1)[0], [])
        if failures:
            raise failures.pop(0)

    def end(self, code: int) -> None:
        self.state = {"Running": False, "Pid": 0, "ExitCode": code}
        self.ended.set()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "PAUSE_S", 0.001)


@pytest.fixture
def docker() -> FakeDocker:
    return FakeDocker()


@pytest.fixture
async def one(docker: FakeDocker, tmp_path: Path) -> AsyncIterator[Container]:
    container: Any = Container(
        docker,  # type: ignore[arg-type]
        "doherty-a",
        tmp_path / "m-0.log",
        Log(io.StringIO()),
        lambda: docker.calls.append("retired"),
    )
    yield container
    await container.close()


async def made() -> str:
    return "id"


def failing(error: Exception) -> Callable[[], Any]:
    async def make() -> str:
        raise error

    return make


async def until(claim: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not claim():
            await asyncio.sleep(0.001)


async def test_its_end_is_told_once_its_last_lines_are_here(
    docker: FakeDocker, one: Container, tmp_path: Path
) -> None:
    docker.lines = ["2026-11-26T22:22:58.000000007Z hello\n"]
    one.begin(made)
    await until(lambda: "log" in docker.calls)
    docker.end(137)
    assert await one.exited == "killed by SIGKILL"
    log = tmp_path / "m-0.log"
    assert log.read_text() == "hello\n"
    assert log.stat().st_mtime_ns == 1795731778_000000007
    assert docker.calls[-2:] == ["delete", "retired"]


async def test_what_the_log_has_is_not_asked_for_again(
    docker: FakeDocker, one: Container, tmp_path: Path
) -> None:
    line = "2026-11-26T22:22:58.000000007Z hello\n"
    docker.lines = [line]
    docker.failures["wait"] = [AWAY, aiohttp.ClientError()]
    one.begin(made)
    await until(lambda: "log" in docker.calls)
    docker.lines = [line, "2026-11-26T22:22:59.000000001Z again\n"]
    docker.end(0)
    await one.exited
    assert docker.since[0] == "0.000000000"
    assert docker.since[1] == "1795731778.000000007"
    assert (tmp_path / "m-0.log").read_text() == "hello\nagain\n"


async def test_an_adopted_one_goes_on_where_its_log_ends(
    docker: FakeDocker, one: Container, tmp_path: Path
) -> None:
    (tmp_path / "m-0.log").write_text("before\n")
    os.utime(tmp_path / "m-0.log", ns=(5, 3_000000004))
    one.adopt(0)
    await until(lambda: bool(docker.since))
    assert docker.since == ["3.000000004"]


async def test_silence_is_not_an_end(docker: FakeDocker, one: Container) -> None:
    docker.failures["wait"] = [AWAY, aiohttp.ServerDisconnectedError(), TimeoutError()]
    one.begin(made)
    await until(lambda: docker.calls.count("wait") >= 4)
    assert not one.exited.done()
    docker.failures["show"] = [AWAY, DockerError(500, "busy")]
    docker.end(1)
    assert await one.exited == "exited with status 1"


async def test_one_that_somebody_removed_has_ended(docker: FakeDocker, one: Container) -> None:
    one.begin(made)
    await until(lambda: "wait" in docker.calls)
    docker.failures["show"] = [NOT_THERE]
    docker.failures["delete"] = [NOT_THERE]
    docker.ended.set()
    assert await one.exited == "its container was removed by somebody else"


async def test_a_start_that_was_refused_is_told_at_once(docker: FakeDocker, one: Container) -> None:
    one.begin(failing(NotStartedError("No such image", made=False)))
    assert await one.exited == "No such image"
    assert docker.calls == ["retired"]


@pytest.mark.parametrize(
    "error",
    [NotStartedError("no start", made=True), aiohttp.ServerDisconnectedError(), AWAY],
    ids=["half", "cut", "away"],
)
async def test_a_start_whose_outcome_nobody_saw_is_undone_before_it_is_told(
    docker: FakeDocker, one: Container, error: Exception
) -> None:
    docker.failures["delete"] = [AWAY, TimeoutError(), AWAY]
    one.begin(failing(error))
    assert await one.exited
    assert docker.calls.count("delete") == 4
    assert docker.calls[-1] == "retired"


async def test_what_runs_is_not_given_up_while_it_cannot_be_removed(
    docker: FakeDocker, one: Container
) -> None:
    docker.failures["delete"] = [DockerError(500, "busy")] * 3
    one.begin(failing(NotStartedError("no start", made=True)))
    await until(lambda: docker.calls.count("delete") == 4)
    assert await one.exited == "no start"


async def test_what_is_dead_and_cannot_be_removed_is_litter(
    docker: FakeDocker, one: Container
) -> None:
    docker.state["Running"] = False
    docker.failures["delete"] = [DockerError(500, "device busy")] * 9
    one.begin(failing(NotStartedError("no start", made=True)))
    assert await one.exited == "no start"
    assert docker.calls.count("delete") == 1


async def test_a_signal_reaches_it_when_the_docker_engine_is_back(
    docker: FakeDocker, one: Container
) -> None:
    docker.failures["kill"] = [AWAY, AWAY]
    one.begin(made)
    await until(lambda: "wait" in docker.calls)
    one.signal_group(signal.SIGTERM)
    await until(lambda: docker.calls.count("kill SIGTERM") == 3)
    docker.end(0)
    await one.exited
    one.signal_group(signal.SIGKILL)
    await asyncio.sleep(0)
    assert "kill SIGKILL" not in docker.calls


async def test_a_signal_reaches_one_that_is_let_go_of(docker: FakeDocker, one: Container) -> None:
    """A manager that comes up kills what it does not know, and keeps no account of it."""
    one.adopt(0)
    one.signal_group(signal.SIGKILL)
    one.release()
    await until(lambda: "kill SIGKILL" in docker.calls)


async def test_one_that_is_ended_while_it_starts_is_not_left(
    docker: FakeDocker, one: Container
) -> None:
    reached = asyncio.Event()

    async def slow() -> str:
        reached.set()
        await asyncio.sleep(3600)
        return "id"

    one.begin(slow)
    await reached.wait()
    assert one.pid == 0
    one.signal_group(signal.SIGTERM)
    assert await one.exited == "ended before its container was started"
    assert docker.calls == ["delete", "retired"]
