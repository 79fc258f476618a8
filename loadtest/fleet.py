"""A fresh Doherty of simulated replicas, started as a user would start it, and stopped again.

Every run begins anew, with empty caches and its own ports and folder, so that nothing of the run
before is inherited.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import orjson

from loadtest.client import Client, RequestError, Target
from loadtest.replay import WallClock
from loadtest.run import RunError

MODEL = "demo"
POLL_INTERVAL_S = 0.1
POLL_TIMEOUT_S = 5.0
STOP_TIMEOUT_S = 90.0
LOG_TAIL_CHARACTERS = 2000


class FleetOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What is started for each policy."""

    policies: tuple[str, ...] = ("round_robin", "prefix")
    replicas: int = 4
    profile: str = "h200-8b"
    workers: int = 1
    repeat: int = 1
    kv_cache_tokens: int = 0  # 0: the profile's own
    max_model_len: int = 131_072  # the shipped trace's longest prompt has 123,192
    time_scale: float = 1.0
    stream_interval: int = 0  # 0: the simulator's own
    start_timeout: float = 120.0
    doherty: str = ""  # the command; empty: the one installed beside this Python


class Ports(msgspec.Struct, frozen=True, kw_only=True):
    proxy: int
    admin: int
    manager: int


class Fleet(msgspec.Struct, frozen=True, kw_only=True):
    """A running Doherty: where it listens, and the process that holds it all."""

    ports: Ports
    pid: int
    workers: int
    folder: Path  # of its configuration and logs


def simulator_args(options: FleetOptions) -> list[str]:
    """Return the arguments of each simulated engine."""
    args = ["--profile", options.profile, "--max-model-len", str(options.max_model_len)]
    if options.kv_cache_tokens:
        args += ["--kv-cache-tokens", str(options.kv_cache_tokens)]
    if options.time_scale != 1:
        args += ["--time-scale", f"{options.time_scale:g}"]
    if options.stream_interval:
        args += ["--stream-interval", str(options.stream_interval)]
    return args


def fleet_config(policy: str, options: FleetOptions, ports: Ports, run_dir: str) -> dict[str, Any]:
    """Return the configuration of one run: nothing but the policy differs between runs."""
    pool = {
        "engine": "simulator",
        "replicas": options.replicas,
        "args": simulator_args(options),
        "start_timeout_secs": options.start_timeout,
    }
    return {
        "proxy": {
            "port": ports.proxy,
            "admin_port": ports.admin,
            "policy": policy,
            "workers": options.workers,
            "access_log": "off",
        },
        "manager": {"port": ports.manager, "run_dir": run_dir},
        "models": [{"name": MODEL, "pools": [pool]}],
    }


def find_doherty(command: str) -> list[str]:
    """Return the command line of `doherty`. Raises `RunError` when there is none."""
    if command:
        return shlex.split(command)
    beside = Path(sys.executable).with_name("doherty")
    found = str(beside) if beside.is_file() else shutil.which("doherty")
    if found is None:
        raise RunError("no command `doherty`; install the project, or name it with --doherty")
    return [found]


def free_ports() -> Ports:
    """Return three ports that were free a moment ago; held together, so that they differ."""
    with contextlib.ExitStack() as held:
        numbers = []
        for _ in range(3):
            holder = held.enter_context(socket.socket())
            holder.bind(("127.0.0.1", 0))
            numbers.append(int(holder.getsockname()[1]))
    return Ports(proxy=numbers[0], admin=numbers[1], manager=numbers[2])


def fleet(policy: str, options: FleetOptions) -> contextlib.AbstractAsyncContextManager[Fleet]:
    """A Doherty with `policy`, ready to serve; stopped at the end. Its logs stay if it failed."""
    return launched(lambda ports, folder: fleet_config(policy, options, ports, folder), options)


@contextlib.asynccontextmanager
async def launched(
    configure: Callable[[Ports, str], dict[str, Any]], options: FleetOptions
) -> AsyncIterator[Fleet]:
    """The same, of any configuration; of `options` count the replicas to wait for, and workers."""
    command = find_doherty(options.doherty)
    ports = free_ports()
    folder = Path(tempfile.mkdtemp(prefix="doherty-compare-"))
    config = folder / "doherty.yaml"
    value = configure(ports, str(folder / "run"))
    config.write_bytes(orjson.dumps(value, option=orjson.OPT_INDENT_2))  # JSON is YAML
    failed = False
    process: asyncio.subprocess.Process | None = None
    try:
        process = await _start([*command, "up", str(config)], folder / "up.log")
        await _until_ready(process, ports, options, folder)
        yield Fleet(ports=ports, pid=process.pid, workers=options.workers, folder=folder)
    except RunError:
        failed = True
        raise
    finally:
        stopped = process is None or await _stop(process)
        if process is None or (stopped and not failed):
            await asyncio.to_thread(shutil.rmtree, folder)
    if not stopped:
        raise RunError(f"`doherty up` did not stop in {STOP_TIMEOUT_S:g} s; see {folder}")


# Its offline service takes any port: several fleets may be measured at a time.
ANY_OFFLINE_PORT: Final = {"DOHERTY_OFFLINE_PORT": "0"}


async def _start(command: Sequence[str], log: Path) -> asyncio.subprocess.Process:
    with open(log, "wb") as output:  # noqa: ASYNC230 - once, before anything is measured
        try:
            return await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the replay, which then stops this
                env={**os.environ, **ANY_OFFLINE_PORT},
            )
        except OSError as error:
            raise RunError(f"{command[0]}: cannot be started: {error.strerror}") from error


async def _until_ready(
    process: asyncio.subprocess.Process, ports: Ports, options: FleetOptions, folder: Path
) -> None:
    """Wait until the proxy serves and the manager counts every replica as ready."""
    clock = WallClock()
    proxy = Client(local(ports.proxy), clock.now_s)
    manager = Client(local(ports.manager), clock.now_s)
    try:
        while not (await _proxy_ready(proxy) and await _replicas_ready(manager, options.replicas)):
            if process.returncode is not None:
                raise RunError(
                    f"`doherty up` ended with {process.returncode}: {_tail(folder / 'up.log')}"
                )
            if clock.now_s() > options.start_timeout:
                raise RunError(
                    f"not ready in {options.start_timeout:g} s; see {folder}: "
                    f"{_tail(folder / 'up.log')}"
                )
            await asyncio.sleep(POLL_INTERVAL_S)
    finally:
        proxy.close()
        manager.close()


def local(port: int) -> Target:
    return Target(host="127.0.0.1", port=port, tls=False, path_prefix="")


async def get(client: Client, path: str) -> tuple[int, bytes]:
    """Return status and body; status 0 when there was no answer."""
    try:
        async with asyncio.timeout(POLL_TIMEOUT_S):
            answer = await client.get(path)
    except (RequestError, TimeoutError):
        return 0, b""
    return answer.status, answer.body


async def _proxy_ready(client: Client) -> bool:
    status, _ = await get(client, "/readyz")
    return status == 200


class Replica(msgspec.Struct):
    """What the manager says of a replica; it leaves out what is at its default."""

    replica_id: str = ""
    state: str = "ready"
    pid: int = 0
    restarts: int = 0


class _Fleet(msgspec.Struct):
    replicas: list[Replica] = []


async def replicas(client: Client) -> list[Replica]:
    """Return the manager's replicas; empty when it does not answer."""
    status, body = await get(client, "/v1/fleet")
    if status != 200:
        return []
    try:
        return msgspec.json.decode(body, type=_Fleet).replicas
    except msgspec.DecodeError:
        return []


async def _replicas_ready(client: Client, wanted: int) -> bool:
    return sum(replica.state == "ready" for replica in await replicas(client)) >= wanted


async def _stop(process: asyncio.subprocess.Process) -> bool:
    """End the fleet in order. Returns False when it had to be killed."""
    if process.returncode is not None:
        return True
    process.terminate()
    try:
        async with asyncio.timeout(STOP_TIMEOUT_S):
            await process.wait()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
        return False
    return True


def _tail(log: Path) -> str:
    text = log.read_text("utf-8", "replace")[-LOG_TAIL_CHARACTERS:].strip()
    return text or "it said nothing"
