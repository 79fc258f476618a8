"""Engines as containers of the Docker engine on this machine (`aiodocker`).

The engine is the local one: cards, ports, weights and page cache are this machine's, and what is
leased here must be what a container gets. What a container is, `container_form` decides; how one
lives and ends, `container`.

What runs is known to the Docker engine, which outlives this manager: containers carry the run
folder and the launch as labels. A manager that comes up asks for all of its run folder, adopts
those that the journal knows and that run, and removes the rest. One that was made while the manager
before died, and was not in the answer yet, was never started and holds nothing but its name; the
next manager finds it.

Sleep is the rung here: calls over HTTP, as ever. `docker checkpoint` is looked at and told of:
it brings back one container as itself, never several copies, and needs an engine built for
experiments, with CRIU beside it.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections.abc import AsyncIterator, Coroutine, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from aiodocker import Docker, DockerError
from aiodocker.containers import DockerContainer

from backends.engines.base import Engine, Ports
from backends.engines.probe import Program
from backends.engines.release import UNKNOWN_RELEASE
from backends.failure import StartError
from backends.journal import Journal, Launch
from backends.log import Log
from backends.providers.base import Process
from backends.providers.container import AWAY, STATUS_UNREACHED, Container, NotStartedError
from backends.providers.container_form import (
    LAUNCH_LABEL,
    RUN_FOLDER_LABEL,
    Machine,
    cache_environment,
    container_of,
    name_of,
    tag_of,
)
from backends.providers.process import boot_id, kill_remains
from backends.snapshots.base import Capability
from backends.spec import ReplicaSpec
from backends.tasks import cancel_all, spawn
from proxy.config import DockerConfig

ANSWER_S_MAX = 30.0
CONNECT_S_MAX = 5.0
FAREWELL_S_MAX = 5.0

# What Docker's errors mean for a person, by words of theirs.
_REMEDIES = (
    (
        "could not select device driver",
        "install the NVIDIA container toolkit and restart the Docker engine",
    ),
    ("executable file not found", "the image lacks the engine's program; name another image"),
    ("bind source path does not exist", "correct manager.docker.mounts"),
)


class DockerProvider:
    """Starts engines as containers and adopts those of a manager before."""

    def __init__(
        self,
        docker: Docker,
        config: DockerConfig,
        run_folder: Path,
        launches: Mapping[str, Launch],
        log: Log,
    ) -> None:
        """`launches`: those that the journal knows, by id."""
        assert config.cache_dir is not None
        self.boot_id = boot_id()
        self._docker = docker
        self._config = config
        self._run_folder = str(run_folder)
        self._launches = launches
        self._log = log
        self._log_folder = run_folder / "logs"
        self._found: dict[str, Mapping[str, Any]] = {}
        self._containers: dict[str, Container] = {}
        self._chores: set[asyncio.Task[None]] = set()
        self._inherits = tuple(sorted(cache_environment(config.cache_dir).items()))

    async def look(self) -> None:
        """Ask for what a manager before has left. Raises `DockerError` or one of `AWAY`."""
        label = f"{RUN_FOLDER_LABEL}={self._run_folder}"
        filters = msgspec.json.encode({"label": [label]}).decode()
        for container in await self._docker.containers.list(all=True, filters=filters):
            with suppress(DockerError):  # removed meanwhile
                told = await container.show()
                self._found[told["Config"]["Labels"][LAUNCH_LABEL]] = told

    def program(self, engine: Engine, spec: ReplicaSpec) -> Program:
        """Return the engine's own words: the image has what they name.

        Which release that is the image's tag says; where it does not, nobody is asked.
        """
        head = engine.command(spec, Ports(0), UNKNOWN_RELEASE).argv[:1]
        head = ("python3",) if head == (sys.executable,) else head
        return Program(head, version=tag_of(spec.image), inherits=self._inherits)

    def spawn(
        self, argv: Sequence[str], env: Mapping[str, str], launch_id: str, log_path: Path
    ) -> Process:
        """Begin to start a container; it tells by itself what became of it. Raises `OSError`."""
        launch = self._launches[launch_id]
        body = container_of(launch, argv, env, self._config, self._machine())
        self._make_cache()
        name = name_of(launch_id)
        container = self._container(launch_id, log_path, name)
        container.begin(lambda: self._make(name, body))
        return container

    def recover(self, launches: Iterable[Launch]) -> Mapping[str, Process]:
        """Adopt what runs of `launches`; all else that `look` found is removed.

        So are processes: the manager before may have had them as such.
        """
        launches = list(launches)
        adopted: dict[str, Process] = {}
        for launch in launches:
            told = self._found.get(launch.launch_id)
            if told is not None and told["State"]["Running"]:
                log_path = self._log_folder / f"{launch.replica_id}.log"
                container = self._container(launch.launch_id, log_path, told["Id"])
                container.adopt(told["State"]["Pid"])
                adopted[launch.launch_id] = container
        for launch_id in self._found.keys() - adopted.keys():
            container = self._container(launch_id, Path(os.devnull), self._found[launch_id]["Id"])
            self._chore(self._remove(launch_id, container), f"remove container of {launch_id}")
        kill_remains({launch.launch_id for launch in launches} - adopted.keys())
        self._found = {}
        return adopted

    async def close(self) -> None:
        """Let go of what runs; what is being removed gets a moment."""
        if self._chores:
            await asyncio.wait(self._chores, timeout=FAREWELL_S_MAX)
        await cancel_all(list(self._chores))
        for container in list(self._containers.values()):
            await container.close()

    async def _make(self, name: str, body: dict[str, Any]) -> str:
        try:
            container = await self._create(name, body)
        except DockerError as error:
            # Refused, or nobody was there to be asked, which aiodocker tells by what it caught.
            sure = error.status < 500 or isinstance(error.__context__, aiohttp.ClientConnectorError)
            raise NotStartedError(explain(error, self._config), made=not sure) from error
        try:
            await container.start()
        except DockerError as error:
            raise NotStartedError(explain(error, self._config), made=True) from error
        return container.id

    async def _create(self, name: str, body: dict[str, Any]) -> DockerContainer:
        try:
            return await self._docker.containers.create(body, name=name)
        except DockerError as error:
            if error.status != 404 or self._config.pull != "missing":
                raise
        self._log.tell("image_pulled", image=body["Image"], replica=name)
        await self._docker.images.pull(body["Image"])
        return await self._docker.containers.create(body, name=name)

    def _container(self, launch_id: str, log_path: Path, name: str) -> Container:
        """Return what follows the container that has this name, or this id."""
        container = Container(
            self._docker,
            name,
            log_path,
            self._log,
            lambda: self._containers.pop(launch_id, None),
        )
        self._containers[launch_id] = container
        return container

    async def _remove(self, launch_id: str, container: Container) -> None:
        await container.remove(certain=True)
        self._containers.pop(launch_id, None)

    def _machine(self) -> Machine:
        return Machine(self.boot_id, self._run_folder, os.path.exists, _cpus_of)

    def _make_cache(self) -> None:
        """Make the cache folder, the engine's user its owner where we may say so."""
        assert self._config.cache_dir is not None
        folder = Path(self._config.cache_dir)
        if folder.is_dir():
            return
        folder.mkdir(parents=True, exist_ok=True)
        uid, _, gid = (self._config.user or "").partition(":")
        if uid.isdecimal() and os.geteuid() == 0:
            os.chown(folder, int(uid), int(gid) if gid.isdecimal() else -1)

    def _chore(self, coroutine: Coroutine[Any, Any, None], name: str) -> None:
        task = spawn(coroutine, name, self._log)
        self._chores.add(task)
        task.add_done_callback(self._chores.discard)


@asynccontextmanager
async def docker_provider(
    config: DockerConfig, run_folder: Path, journal: Journal, log: Log
) -> AsyncIterator[DockerProvider]:
    """Yield a provider that has looked around. Raises `StartError`."""
    folder, config = _absolute(run_folder, config)
    # Each container keeps two connections: one waits for its end, one brings its output.
    connector = aiohttp.UnixConnector(config.url.removeprefix("unix://"), limit=0)
    timeout = aiohttp.ClientTimeout(total=ANSWER_S_MAX, sock_connect=CONNECT_S_MAX)
    session = aiohttp.ClientSession(connector=connector, timeout=timeout)
    # With a connector of its own the URL is only what stands before each path.
    docker = Docker("http://docker", connector, session, timeout)
    provider = DockerProvider(docker, config, folder, journal.live, log)
    try:
        try:
            info = await docker.system.info()
            await provider.look()
        except (DockerError, *AWAY) as error:
            raise StartError(
                f"the Docker engine at {config.url} does not answer ({error}); start it, join the "
                "group that may use its socket, or set manager.docker.url"
            ) from error
        checkpoint = checkpoint_capability(info)
        log.tell(
            "docker_engine",
            version=info.get("ServerVersion", ""),
            url=config.url,
            checkpoint=checkpoint.reason,
        )
        yield provider
    finally:
        await provider.close()
        await docker.close()
        await session.close()


def _absolute(run_folder: Path, config: DockerConfig) -> tuple[Path, DockerConfig]:
    """Return both with paths that mean the same to the Docker engine."""
    folder = run_folder.absolute()
    cache_dir = folder / (config.cache_dir or "cache")
    return folder, msgspec.structs.replace(config, cache_dir=str(cache_dir))


def checkpoint_capability(info: Mapping[str, Any]) -> Capability:
    """Say whether `docker checkpoint` can keep a warm replica here, and why not."""
    if not info.get("ExperimentalBuild"):
        return Capability(
            works=False,
            reason="the Docker engine runs without experimental features; set "
            '"experimental": true in its daemon.json',
        )
    if shutil.which("criu") is None:
        return Capability(works=False, reason="CRIU is not installed beside the Docker engine")
    return Capability(
        works=False,
        reason="`docker checkpoint` brings one container back as itself, under its old addresses; "
        "a replica from an image needs its own: use provider process for snapshots",
    )


def explain(error: DockerError, config: DockerConfig) -> str:
    """Put why a container was not started into words, with what would help."""
    text = " ".join(error.message.split())
    if error.status == 404 and "No such image" in text:
        return f"{text}; get it (docker pull), or set manager.docker.pull: missing"
    if error.status >= STATUS_UNREACHED:
        return f"the Docker engine at {config.url} does not answer"
    remedy = next((advice for words, advice in _REMEDIES if words in text), "")
    return f"its container was not started: {text}" + (f" ({remedy})" if remedy else "")


def _cpus_of(node: str) -> str:
    """Return the processors of a NUMA node; empty, so all, where the machine does not say."""
    try:
        return Path(f"/sys/devices/system/node/node{node}/cpulist").read_text().strip()
    except OSError:
        return ""
