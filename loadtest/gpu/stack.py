"""One engine behind a Doherty, started by `doherty up` as a user would, and ended again.

Everything that is started carries a mark in its environment, by which any process that should have
ended is found, whoever its parent is by then.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import signal
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import orjson

from loadtest.client import Client, parse_url
from loadtest.fleet import ANY_OFFLINE_PORT, Ports, free_ports, get
from loadtest.run import RunError

MARK_VARIABLE = "LOADTEST_RUN"
POLL_S = 0.05
STOP_TIMEOUT_S = 90.0
COMMAND_TIMEOUT_S = 120.0
LOG_TAIL_CHARACTERS = 3000


class StackOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What is started."""

    engine: str = "simulator"
    model: str = "m"
    model_path: str = ""
    args: tuple[str, ...] = ()
    env: dict[str, str] = {}
    workers: int = 1
    start_timeout_s: float = 400.0
    doherty: str = ""  # the command; empty: this checkout's
    sleep: bool = True  # where this Doherty can put an engine to sleep
    pool: dict[str, Any] = {}  # further keys of a pool
    manager: dict[str, Any] = {}  # further keys of the manager
    others: tuple[str, ...] = ()  # further models, served by pools like the first one's


class Replica(msgspec.Struct):
    """What the manager says of a replica; it leaves out what is at its default."""

    replica_id: str = ""
    url: str = ""
    state: str = "ready"
    reason: str = ""
    pid: int = 0
    asleep: bool = False
    restarts: int = 0
    kv_events: str = ""
    kv_replay: str = ""
    kv_topic: str = ""


class _Fleet(msgspec.Struct):
    replicas: list[Replica] = []


def config_of(
    options: StackOptions, ports: Ports, run_dir: str, pool_keys: frozenset[str]
) -> dict[str, Any]:
    """Return the configuration. `pool_keys` are those that this Doherty has for a pool."""
    pool: dict[str, Any] = {
        "engine": options.engine,
        "replicas": 1,
        "args": list(options.args),
        "env": dict(options.env),
        "start_timeout_secs": options.start_timeout_s,
    }
    if options.model_path:
        pool["model_path"] = options.model_path
    if options.sleep and "sleep" in pool_keys:
        pool["sleep"] = True
    if "autoscale" in options.pool:
        del pool["replicas"]
    pool |= options.pool
    return {
        "proxy": {
            "port": ports.proxy,
            "admin_port": ports.admin,
            "workers": options.workers,
            "access_log": f"{run_dir}/access.log",
        },
        "manager": {"port": ports.manager, "run_dir": run_dir, **options.manager},
        "models": [{"name": name, "pools": [pool]} for name in (options.model, *options.others)],
    }


def pool_keys_of(schema: bytes) -> frozenset[str]:
    """Return the keys of a pool in what `doherty check --schema` prints; none when unreadable."""
    try:
        value = orjson.loads(schema)
        return frozenset(value["$defs"]["PoolConfig"]["properties"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return frozenset()


class Stack:
    """A running Doherty with one engine."""

    def __init__(self, options: StackOptions, folder: Path) -> None:
        self.options = options
        self.folder = folder
        self.ports = free_ports()
        self.mark = uuid.uuid4().hex
        self.engine_url = ""
        self.replica_id = ""
        self.process: asyncio.subprocess.Process | None = None
        self.started_s = 0.0
        self.command = shlex.split(options.doherty) or [sys.executable, "-m", "backends.cli"]

    @property
    def up_log(self) -> Path:
        return self.folder / "up.log"

    @property
    def engine_log(self) -> Path:
        return self.folder / "run" / "logs" / f"{self.replica_id or '*'}.log"

    @property
    def proxy_url(self) -> str:
        return f"http://127.0.0.1:{self.ports.proxy}"

    @property
    def manager_url(self) -> str:
        return f"http://127.0.0.1:{self.ports.manager}"

    async def start(self) -> None:
        """Write the configuration and start `doherty up`. Raises `RunError`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = await self._configure()
        self.started_s = time.monotonic()
        self.process = await self._spawn([*self.command, "up", str(path)])

    async def reload(self, options: StackOptions) -> None:
        """Have what runs read another configuration. Raises `RunError`."""
        self.options = options
        path = await self._configure()
        status, _, err = await self.run("check", str(path))
        if status:
            raise RunError(f"this Doherty does not take it: {err.strip()}")
        assert self.process is not None
        self.process.send_signal(signal.SIGHUP)

    async def _configure(self) -> Path:
        _, schema, _ = await self.run("check", "--schema")
        config = config_of(
            self.options, self.ports, str(self.folder / "run"), pool_keys_of(schema.encode())
        )
        path = self.folder / "doherty.yaml"
        path.write_bytes(orjson.dumps(config, option=orjson.OPT_INDENT_2))  # JSON is YAML
        return path

    async def _spawn(self, command: Sequence[str]) -> asyncio.subprocess.Process:
        with open(self.up_log, "wb") as output:  # noqa: ASYNC230 - once, before anything is measured
            try:
                return await asyncio.create_subprocess_exec(
                    *command,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=output,
                    stderr=asyncio.subprocess.STDOUT,
                    env={**os.environ, **ANY_OFFLINE_PORT, MARK_VARIABLE: self.mark},
                    start_new_session=True,  # Ctrl-C is for the proof, which then stops this
                )
            except OSError as error:
                raise RunError(f"{command[0]}: cannot be started: {error.strerror}") from error

    async def run(self, *arguments: str) -> tuple[int, str, str]:
        """Run another command of Doherty; return status, output and errors."""
        return await run_program((*self.command, *arguments))

    async def until_ready(self) -> dict[str, float]:
        """Wait for the engine and the proxy; return the seconds from the start to each state.

        Raises `RunError` with the end of the logs when `doherty up` ends or the time is over.
        """
        manager, admin = client(self.manager_url), client(f"http://127.0.0.1:{self.ports.admin}")
        reached: dict[str, float] = {}
        try:
            while "proxy_ready" not in reached:
                await asyncio.sleep(POLL_S)
                after_s = round(time.monotonic() - self.started_s, 3)
                self._must_live(after_s)
                for replica in await replicas(manager):
                    self.replica_id, self.engine_url = replica.replica_id, replica.url
                    reached.setdefault(f"engine_{replica.state}", after_s)
                    if replica.state == "backoff":
                        raise RunError(
                            f"the engine failed: {replica.reason}\n{self.engine_words()}"
                        )
                if "engine_ready" in reached and (await get(admin, "/readyz"))[0] == 200:
                    reached["proxy_ready"] = round(time.monotonic() - self.started_s, 3)
        finally:
            manager.close()
            admin.close()
        return reached

    def _must_live(self, after_s: float) -> None:
        assert self.process is not None
        if self.process.returncode is not None:
            status = self.process.returncode
            raise RunError(f"`doherty up` ended with {status}: {tail(self.up_log)}")
        if after_s > self.options.start_timeout_s:
            raise RunError(f"not ready after {after_s:.0f} s\n{self.engine_words()}")

    def engine_words(self) -> str:
        """Return the end of the engine's log."""
        logs = sorted(self.engine_log.parent.glob(self.engine_log.name))
        return "\n".join(tail(log) for log in logs if log.name not in ("manager.log", "proxy.log"))

    async def replica(self) -> Replica:
        """Return what the manager says of the replica now. Raises `RunError`."""
        manager = client(self.manager_url)
        try:
            for found in await replicas(manager):
                return found
        finally:
            manager.close()
        raise RunError("the manager knows no replica")

    async def stop(self) -> int:
        """End everything in order; return the status of `up`. Raises `RunError` when it hangs."""
        if self.process is None:
            return 0
        if self.process.returncode is None:
            self.process.terminate()
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                return await self.process.wait()
        except TimeoutError:
            raise RunError(f"`doherty up` had not stopped after {STOP_TIMEOUT_S:g} s") from None

    async def end(self) -> None:
        """End what is left, by force where it must be."""
        with contextlib.suppress(RunError):
            await self.stop()
        for pid in carriers(self.mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.process is not None:
            await self.process.wait()


async def run_program(words: Sequence[str]) -> tuple[int, str, str]:
    """Run a program; return status, output and errors. Raises `OSError`, `TimeoutError`."""
    process = await asyncio.create_subprocess_exec(
        *words,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(COMMAND_TIMEOUT_S):
            out, err = await process.communicate()
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        raise
    texts = [output.decode("utf-8", "replace") for output in (out, err)]
    return process.returncode or 0, texts[0], texts[1]


def client(url: str, *, explain: bool = False) -> Client:
    return Client(parse_url(url), time.perf_counter, explain=explain)


async def replicas(manager: Client) -> list[Replica]:
    """Return the manager's replicas; empty when it does not answer."""
    status, body = await get(manager, "/v1/fleet")
    if status != 200:
        return []
    try:
        return msgspec.json.decode(body, type=_Fleet).replicas
    except msgspec.DecodeError:
        return []


def carriers(mark: str) -> dict[int, str]:
    """Return the processes that carry the mark, and their command lines."""
    wanted = f"{MARK_VARIABLE}={mark}".encode()
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        with contextlib.suppress(OSError):  # gone meanwhile, or another user's
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                words = (folder / "cmdline").read_bytes().split(b"\0")
                found[int(folder.name)] = b" ".join(words).decode("utf-8", "replace").strip()
    return found


def tail(log: Path) -> str:
    try:
        text = log.read_text("utf-8", "replace")
    except OSError:
        return f"{log} cannot be read"
    return text[-LOG_TAIL_CHARACTERS:].strip() or "it said nothing"
