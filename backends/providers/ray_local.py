"""A Ray cluster of this machine alone, for who has no other.

It must outlive a manager that is killed, as engines do, so it is no child of Ray's client library
but a process like an engine: a session of its own, and an identity that the run folder remembers.
It ends with the manager that stops in order, unless engines are left to run. One that ends by
itself takes its engines along; another one is started at the same address, where the bridge looks
for it.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from hashlib import sha256
from pathlib import Path

import msgspec

from backends.failure import StartError
from backends.log import Log
from backends.logfile import last_lines
from backends.providers.process import (
    LocalProcess,
    ProcessProvider,
    boot_id,
    kill_remains,
    read_stat,
)
from backends.tasks import cancel_all, spawn
from proxy.config import RayConfig

LOCAL = "local"
UP_S_MAX = 60.0
DOWN_S_MAX = 2.0  # nothing runs there any more that would have to end in order
POLL_S = 0.1
AGAIN_S = 10.0


class Head(msgspec.Struct, frozen=True):
    """The cluster's leading process, as the run folder remembers it."""

    address: str
    pid: int
    start_ticks: int
    boot_id: str


class LocalCluster:
    """The head, by which all of the cluster is ended."""

    def __init__(self, address: str, process: LocalProcess, path: Path) -> None:
        self.address = address
        self.kept = False  # something runs there that is to run on
        self.process = process
        self._path = path

    async def keep(self, config: RayConfig, log: Log) -> None:
        """Start the head again whenever it has ended."""
        while True:
            how = await asyncio.shield(self.process.exited)
            log.fault("ray_head_ended", address=self.address, how=how)
            await asyncio.to_thread(kill_remains, {_name(self._path.parent)})
            try:
                again = await _start(config, self._path.parent, self._path, self.address)
            except StartError as error:
                log.fault("ray_head_missing", address=self.address, problem=str(error))
                await asyncio.sleep(AGAIN_S)
                continue
            self.process = again.process
            log.tell("ray_head_started", address=self.address)

    async def close(self) -> None:
        if self.kept:
            self.process.release()
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            if not self.process.exited.done():
                self.process.signal_group(number)
                await asyncio.wait({self.process.exited}, timeout=DOWN_S_MAX)
        self.process.release()
        kill_remains({_name(self._path.parent)})  # its daemons have groups of their own
        self._path.unlink(missing_ok=True)
        await asyncio.to_thread(shutil.rmtree, _folder(self._path.parent), ignore_errors=True)


@asynccontextmanager
async def local_cluster(
    config: RayConfig, run_folder: Path, log: Log
) -> AsyncIterator[LocalCluster | None]:
    """Yield the cluster of this machine; None: another one is wanted. Raises `StartError`."""
    if config.address != LOCAL:
        yield None
        return
    path = run_folder / "ray-head.json"
    cluster = _remembered(path)
    if cluster is None:
        cluster = await _start(config, run_folder, path, f"127.0.0.1:{_free_port()}")
        log.tell("ray_head_started", address=cluster.address)
    keeping = spawn(cluster.keep(config, log), "keep the head of Ray", log)
    try:
        yield cluster
    finally:
        await cancel_all([keeping])
        await cluster.close()


def _remembered(path: Path) -> LocalCluster | None:
    with suppress(OSError, msgspec.MsgspecError):
        head = msgspec.json.decode(path.read_bytes(), type=Head)
        stat = read_stat(head.pid) if head.boot_id == boot_id() else None
        if stat is not None and stat.alive and stat.start_ticks == head.start_ticks:
            process = LocalProcess(head.pid, head.start_ticks, _name(path.parent), owned=False)
            return LocalCluster(head.address, process, path)
    return None


async def _start(config: RayConfig, run_folder: Path, path: Path, address: str) -> LocalCluster:
    log_path = run_folder / "logs" / "ray-head.log"
    command = _command(address, config, run_folder)
    try:
        process = ProcessProvider().spawn(
            command, _environment(config), _name(run_folder), log_path
        )
    except OSError as error:
        raise StartError(f"no local Ray cluster can be started: {command[0]}: {error}") from error
    assert isinstance(process, LocalProcess)
    cluster = LocalCluster(address, process, path)
    head = Head(address, process.pid, process.start_ticks, boot_id())
    path.write_bytes(msgspec.json.encode(head))  # noqa: ASYNC240  # nobody waits for us yet
    if not await _comes_up(cluster, process):
        await cluster.close()
        said = " | ".join(last_lines(log_path, 3))
        raise StartError(f"no local Ray cluster comes up: {said}; see {log_path}")
    return cluster


async def _comes_up(cluster: LocalCluster, process: LocalProcess) -> bool:
    loop = asyncio.get_running_loop()
    end_s = loop.time() + UP_S_MAX
    while not process.exited.done() and loop.time() < end_s:
        if _listens(cluster.address):
            return True
        await asyncio.sleep(POLL_S)
    return False


def _command(address: str, config: RayConfig, run_folder: Path) -> list[str]:
    host, _, port = address.partition(":")
    beside = Path(sys.executable).with_name("ray")
    argv = [str(beside) if beside.exists() else "ray", "start", "--head", "--block"]
    argv += ["--node-ip-address", host, "--port", port, "--temp-dir", str(_folder(run_folder))]
    argv += ["--include-dashboard", "false", "--disable-usage-stats"]
    if config.local_gpus is not None:
        argv += ["--num-gpus", str(config.local_gpus)]
    return argv


def _environment(config: RayConfig) -> dict[str, str]:
    """Return the environment of the head, which is also that of its engines."""
    own = {k: v for k, v in os.environ.items() if not k.startswith("DOHERTY_")}
    return own | {"RAY_AUTH_MODE": config.auth, "RAY_USAGE_STATS_ENABLED": "0"}


def _name(run_folder: Path) -> str:
    """Return what all processes of the cluster are known by."""
    return "ray-" + sha256(str(run_folder.absolute()).encode()).hexdigest()[:8]


def _folder(run_folder: Path) -> Path:
    """Return where Ray keeps its sockets, whose names must be short (unix(7): 108 octets)."""
    return Path(tempfile.gettempdir()) / f"doherty-{_name(run_folder)}"


def _listens(address: str) -> bool:
    host, _, port = address.partition(":")
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((host, int(port))) == 0


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port
