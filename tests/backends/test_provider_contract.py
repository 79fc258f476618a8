"""What every provider promises, shown by processes, containers and actors of a cluster alike."""

from __future__ import annotations

import asyncio
import gc
import io
import os
import re
import signal
import sys
import uuid
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path

import msgspec
import pytest

from backends.engines.base import HOST, UNPLACED
from backends.journal import Ended, Journal, Launch
from backends.log import Log
from backends.providers import choice
from backends.providers.base import Process, Provider
from backends.providers.process import find_carriers, kill_remains, read_stat
from proxy.config import Config, parse_config
from tests.fakes import docker_engine, ray_cluster
from tests.fakes.docker_engine import DockerEngine
from tests.fakes.programs import free_port
from tests.fakes.ray_cluster import RayCluster

SLEEPER = "import os,time; print('pid', os.getpid(), flush=True); time.sleep(600)"
# A server and its core, as engines are: the core deaf to an order to end.
FAMILY = """
import os, signal, subprocess, sys, time
core = 'import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)'
child = subprocess.Popen([sys.executable, '-c', core])
print('core', child.pid, 'pid', os.getpid(), flush=True)
time.sleep(600)
"""

WAIT_S = 30.0


@pytest.fixture(scope="module")
def docker() -> Iterator[DockerEngine]:
    if problem := docker_engine.reason_why_not():
        pytest.skip(problem)
    with ExitStack() as stack:
        try:
            engine = stack.enter_context(docker_engine.docker_engine())
        except OSError as error:
            pytest.skip(f"no Docker engine comes up here: {error}")
        yield engine


@pytest.fixture(scope="module")
def ray() -> Iterator[RayCluster]:
    if problem := ray_cluster.reason_why_not():
        pytest.skip(problem)
    with ray_cluster.ray_cluster(64) as cluster:
        yield cluster


class Ground:
    """A run folder, and managers' providers on it, one after another."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.folder = Path(config.manager.run_dir)
        (self.folder / "logs").mkdir(parents=True)
        self.journal = Journal(self.folder / "journal")
        self.told = io.StringIO()
        self.launches: set[str] = set()
        self.elsewhere = config.manager.provider == "ray"
        self._stack = AsyncExitStack()
        self.provider: Provider

    async def open(self) -> None:
        opened = choice.open_provider(self.config, self.journal, Log(self.told))
        self.provider = await self._stack.enter_async_context(opened)

    async def again(self, *processes: Process, dies: int = 0) -> None:
        """Let the manager go as one that is killed: nobody is told, and another comes up.

        `dies`: what is killed while there is none.
        """
        for process in processes:
            process.release()
        await self._leave()
        if dies:
            os.kill(dies, signal.SIGKILL)
            await until(lambda: not alive(dies))
        self._stack = AsyncExitStack()
        await self.open()

    async def close(self) -> None:
        """Whatever a failed test has left carries the id of its launch, wherever it runs."""
        kill_remains(self.launches)
        await until(lambda: not find_carriers(self.launches))
        await self._leave()
        self.journal.close()

    async def _leave(self) -> None:
        """Close it; aiodocker leaves the answers of cancelled questions to the garbage."""
        await self._stack.aclose()
        with warnings.catch_warnings(action="ignore", category=ResourceWarning):
            gc.collect()

    def launch(self) -> Launch:
        launch = Launch(
            launch_id=uuid.uuid4().hex,
            replica_id=f"m-{len(self.journal.live)}",
            launch_hash="",
            engine="simulator",
            model="m",
            pool="m",
            port=free_port(),
            stop_grace_s=1.0,
            starts=1,
            at_s=0.0,
            host=UNPLACED if self.elsewhere else HOST,
            image=docker_engine.IMAGE if self.config.manager.provider == "docker" else "",
            gpus_wanted=1 if self.elsewhere else 0,
        )
        self.journal.append(launch)
        self.launches.add(launch.launch_id)
        return launch

    def spawn(self, script: str, *args: str, launch: Launch | None = None) -> Process:
        launch = launch or self.launch()
        argv = (sys.executable, "-c", script, *args)
        return self.provider.spawn(argv, {"ANSWER": "42"}, launch.launch_id, self.log(launch))

    def log(self, launch: Launch) -> Path:
        return self.folder / "logs" / f"{launch.replica_id}.log"

    async def said(self, launch: Launch, pattern: str) -> re.Match[str]:
        path = self.log(launch)

        def found() -> re.Match[str] | None:
            return re.search(pattern, path.read_text()) if path.exists() else None

        await until(lambda: found() is not None)
        match = found()
        assert match is not None
        return match


async def until(claim: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not claim():
            await asyncio.sleep(0.02)


async def end_of(process: Process) -> str:
    async with asyncio.timeout(WAIT_S):
        return await asyncio.shield(process.exited)


def alive(pid: int) -> bool:
    stat = read_stat(pid)
    return stat is not None and stat.alive


@pytest.fixture(params=["process", "docker", pytest.param("ray", marks=pytest.mark.faults)])
async def ground(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Ground]:
    provider: str = request.param
    text = f"manager: {{provider: {provider}, run_dir: '{tmp_path}'}}"
    config = parse_config(text, "test")
    settings = config.manager
    if provider == "docker":
        engine: DockerEngine = request.getfixturevalue("docker")
        images, mounts = {"simulator": docker_engine.IMAGE}, tuple(docker_engine.mounts())
        changed = {"url": engine.url, "images": images, "mounts": mounts, "shm_mib": 16}
        settings = msgspec.structs.replace(
            settings, docker=msgspec.structs.replace(settings.docker, **changed)
        )
    if provider == "ray":
        cluster: RayCluster = request.getfixturevalue("ray")
        changed = {"address": cluster.address, "namespace": tmp_path.name}
        settings = msgspec.structs.replace(
            settings, ray=msgspec.structs.replace(settings.ray, **changed)
        )
    ground = Ground(msgspec.structs.replace(config, manager=settings))
    await ground.open()
    yield ground
    await ground.close()


async def test_it_gets_its_words_and_its_environment_and_its_end_is_told(ground: Ground) -> None:
    script = (
        "import os, sys; print(sys.argv[1], len(sys.argv[2]), os.environ['ANSWER'],"
        "os.environ['DOHERTY_LAUNCH_ID'], 'RAY_JOB_ID' in os.environ); sys.exit(3)"
    )
    launch = ground.launch()
    process = ground.spawn(script, "two words", "x" * 100_000, launch=launch)
    assert await end_of(process) == "exited with status 3"
    words = f"two words 100000 42 {launch.launch_id} False"
    assert words in ground.log(launch).read_text()


async def test_all_that_it_said_is_in_its_log_by_the_time_its_end_is_told(ground: Ground) -> None:
    launch = ground.launch()
    script = "for n in range(6000): print(f'line {n:05} ' + 'é' * 20)"
    assert await end_of(ground.spawn(script, launch=launch)) == "exited with status 0"
    lines = [line for line in ground.log(launch).read_text().splitlines() if line[:4] == "line"]
    assert [line[5:10] for line in lines] == [f"{n:05}" for n in range(6000)]
    assert {line[11:] for line in lines} == {"é" * 20}


async def test_a_signal_reaches_all_of_it_and_nothing_outlives_its_end(ground: Ground) -> None:
    launch = ground.launch()
    process = ground.spawn(FAMILY, launch=launch)
    core = int((await ground.said(launch, r"core (\d+)"))[1])
    process.signal_group(signal.SIGTERM)
    assert await end_of(process) == "killed by SIGTERM"
    if ground.config.manager.provider != "docker":  # there it has a number of its own
        await until(lambda: not alive(core))


async def test_one_that_is_killed_from_outside_is_told(ground: Ground) -> None:
    launch = ground.launch()
    process = ground.spawn(SLEEPER, launch=launch)
    told = int((await ground.said(launch, r"pid (\d+)"))[1])
    os.kill(process.pid or told, signal.SIGKILL)
    assert await end_of(process) == "killed by SIGKILL"


async def test_a_program_that_is_not_there_is_told_by_its_name(ground: Ground) -> None:
    launch = ground.launch()
    words = (("no-such-engine", "serve"), {"PATH": "/usr/bin"}, launch.launch_id)
    try:
        how = await end_of(ground.provider.spawn(*words, ground.log(launch)))
    except OSError as error:
        how = str(error)
    log = ground.log(launch).read_text() if ground.log(launch).exists() else ""
    assert "no-such-engine" in how + log  # the init of a container says it there


async def test_the_next_manager_goes_on_with_it_and_its_log(ground: Ground) -> None:
    launch = ground.launch()
    script = "import sys, time\nwhile True: print('tick', flush=True); time.sleep(0.2)"
    process = ground.spawn(script, launch=launch)
    await ground.said(launch, "tick\ntick")
    await ground.again(process)
    found = ground.provider.recover([launch])
    (same,) = found.values()
    before = ground.log(launch).read_text().count("tick")
    await until(lambda: ground.log(launch).read_text().count("tick") > before)
    assert same.pid == process.pid
    same.signal_group(signal.SIGKILL)
    assert await end_of(same) in {"killed by SIGKILL", "exited"}  # it is no child of this one


async def test_one_that_was_started_unseen_is_found_once(ground: Ground) -> None:
    """The manager died between the start and its note."""
    launch = ground.launch()
    process = ground.spawn(SLEEPER, launch=launch)
    await ground.said(launch, "pid")
    await ground.again(process)
    (same,) = ground.provider.recover([launch]).values()
    await asyncio.sleep(0.3)
    assert ground.log(launch).read_text().count("pid") == 1
    same.signal_group(signal.SIGKILL)
    await end_of(same)


async def test_what_ended_while_nobody_looked_is_not_alive(ground: Ground) -> None:
    launch = ground.launch()
    process = ground.spawn(SLEEPER, launch=launch)
    pid = int((await ground.said(launch, r"pid (\d+)"))[1])
    await ground.again(process, dies=process.pid or pid)
    for found in ground.provider.recover([launch]).values():  # if it is there, then to tell its end
        assert await end_of(found) == "killed by SIGKILL"


async def test_what_the_journal_does_not_know_is_ended(ground: Ground) -> None:
    if ground.config.manager.provider == "process":
        pytest.skip("a process is known by the journal alone")
    launch = ground.launch()
    process = ground.spawn(SLEEPER, launch=launch)
    pid = int((await ground.said(launch, r"pid (\d+)"))[1])
    pid = process.pid or pid
    ground.journal.append(Ended(launch.launch_id, "forgotten"))
    await ground.again(process)
    assert ground.provider.recover([]) == {}
    await until(lambda: not alive(pid))


async def test_one_that_is_let_go_runs_on(ground: Ground) -> None:
    launch = ground.launch()
    process = ground.spawn(SLEEPER, launch=launch)
    pid = int((await ground.said(launch, r"pid (\d+)"))[1])
    pid = process.pid or pid
    process.release()
    await ground.again()
    assert alive(pid)
    for found in ground.provider.recover([launch]).values():
        found.signal_group(signal.SIGKILL)
        await end_of(found)
    await until(lambda: not alive(pid))
