"""A proxy and its engines on this machine, started as a user would, and all that can break them.

Engines listen below the range that the kernel takes local ports from: an engine that is killed must
get its port back, and thousands of connections are opened meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec

from loadtest.client import Client
from loadtest.faults import command_line, descendants
from loadtest.fleet import get, local
from loadtest.run import RunError
from loadtest.scripts import Journal, Line, Order

ENGINE_PORTS = range(20_000, 32_768)
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0
POLL_INTERVAL_S = 0.02
REST_TIMEOUT_S = 15.0
LOG_TAIL_CHARACTERS = 2000
# What is 0 in a proxy that nobody asks anything.
GAUGES_AT_REST = (
    "requests_in_flight",
    "leases",
    "client_connections",
    "request_bodies_bytes",
    "upstream_connections",
    "replica_inflight",
    "replica_queued_tokens",
    "replica_suspect",
)
# What is 0 in a proxy that has no fault and kept its workers.
COUNTERS_OF_FAULTS = ("internal_errors_total", "worker_restarts_total", "unsolicited_answers_total")

_SAMPLE = re.compile(r"^doherty_(\w+)(?:\{[^}]*\})? ([0-9.e+-]+)$", re.MULTILINE)


class EngineProcess:
    """One place for an engine: its port stays, its process comes and goes."""

    def __init__(self, port: int, journal: Path, *, brief: bool) -> None:
        self.port = port
        self._journal = Journal(journal)
        self._brief = ["--brief"] if brief else []
        self._process: asyncio.subprocess.Process | None = None

    @property
    def name(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "loadtest.scripted_engine", "--orders"),
            *("--port", str(self.port), "--journal", str(self._journal.path), *self._brief),
            stdin=asyncio.subprocess.PIPE,
        )

    async def until_listening(self, since_s: float) -> float:
        """Return when the process that was started after `since_s` began to listen."""
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline_s:
            stamps = [line.at_s for line in self.lines() if line.what == "listening"]
            if stamps and stamps[-1] >= since_s:
                return stamps[-1]
            await asyncio.sleep(POLL_INTERVAL_S)
        raise RunError(f"the engine on port {self.port} did not start")

    def lines(self) -> list[Line]:
        return self._journal.lines()

    def signal(self, number: int) -> float:
        """Send a signal; return the moment just before."""
        now_s = time.monotonic()
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(number)
        return now_s

    async def kill(self) -> float:
        """End the process as a crash would; return the moment."""
        at_s = self.signal(signal.SIGKILL)
        if self._process is not None:
            await self._process.wait()
        return at_s

    async def obeys(self, order: Order) -> None:
        """Give an order and wait until it has been followed."""
        taken = sum(line.what == "obeyed" for line in self.lines())
        self.order(order)
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while sum(line.what == "obeyed" for line in self.lines()) == taken:
            if time.monotonic() > deadline_s:
                raise RunError(f"the engine on port {self.port} obeys no order")
            await asyncio.sleep(POLL_INTERVAL_S / 10)

    def order(self, order: Order) -> None:
        process = self._process
        if process is not None and process.stdin is not None and process.returncode is None:
            process.stdin.write(msgspec.json.encode(order) + b"\n")


class Stage(msgspec.Struct, frozen=True):
    """A running proxy in front of running engines."""

    port: int
    admin_port: int
    engines: list[EngineProcess]
    supervisor_pid: int
    worker_pids: list[int]
    descriptors: dict[int, int]  # of each worker, before the first request

    def journal(self) -> list[Line]:
        return [line for engine in self.engines for line in engine.lines()]

    async def metrics(self) -> dict[str, float]:
        """Return the proxy's figures by name, added up over labels."""
        client = Client(local(self.admin_port), time.monotonic)
        try:
            status, page = await get(client, "/metrics")
        finally:
            client.close()
        if status != 200:
            raise RunError(f"/metrics answered {status}")
        return read_metrics(page.decode())

    async def unrest(self) -> dict[str, float]:
        """Wait until the proxy is at rest, or for long enough; return what is not as it was.

        The engines close what is idle, so that nobody waits for the proxy to close it in its time.
        """
        for engine in self.engines:
            await engine.obeys(Order(do="hang_up"))
        deadline_s = time.monotonic() + REST_TIMEOUT_S
        while True:
            left = self._unrest(await self.metrics())
            if not left or time.monotonic() > deadline_s:
                return left
            await asyncio.sleep(0.2)

    def _unrest(self, metrics: dict[str, float]) -> dict[str, float]:
        left = {name: metrics[name] for name in GAUGES_AT_REST if metrics[name]}
        left |= {name: metrics[name] for name in COUNTERS_OF_FAULTS if metrics[name]}
        for pid, baseline in self.descriptors.items():
            more = descriptor_count(pid) - baseline
            if more > 0:
                left[f"descriptors of worker {pid}"] = more
        return left


def read_metrics(page: str) -> dict[str, float]:
    """Return the sum of each metric's series."""
    sums: dict[str, float] = defaultdict(float)
    for name, value in _SAMPLE.findall(page):
        sums[name] += float(value)
    return sums


def descriptor_count(pid: int) -> int:
    """Return how many descriptors a process holds; 0 when it is gone."""
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0


def free_ports(count: int, among: range, draw: random.Random) -> list[int]:
    """Return ports that were free a moment ago; held together, so that they differ."""
    with contextlib.ExitStack() as held:
        ports: list[int] = []
        for port in draw.sample(among, len(among)):
            holder = held.enter_context(socket.socket())
            try:
                holder.bind(("127.0.0.1", port))
            except OSError:
                continue
            ports.append(port)
            if len(ports) == count:
                return ports
    raise RunError(f"fewer than {count} free ports in {among.start} to {among.stop - 1}")


@contextlib.asynccontextmanager
async def stage(
    replicas: int, workers: int, say: Callable[[str], None], *, brief: bool = False
) -> AsyncIterator[Stage]:
    """A proxy with its engines, ready to serve; stopped at the end. Its log stays if it failed.

    `brief` engines do not write each request down.
    """
    folder = Path(tempfile.mkdtemp(prefix="doherty-storm-"))
    ports = free_ports(replicas + 2, ENGINE_PORTS, random.Random())
    port, admin_port, *engine_ports = ports
    engines = [
        EngineProcess(number, folder / f"engine-{index}", brief=brief)
        for index, number in enumerate(engine_ports)
    ]
    proxy: asyncio.subprocess.Process | None = None
    failed = False
    try:
        say(f"starting {replicas} engines and a proxy with {workers} workers")
        for engine in engines:
            await engine.start()
        for engine in engines:
            await engine.until_listening(0.0)
        flags = ["--port", str(port), "--admin-port", str(admin_port), "--workers", str(workers)]
        urls = [f"http://{engine.name}" for engine in engines]
        with open(folder / "proxy.log", "wb") as log:  # noqa: ASYNC230 - once, before the load
            proxy = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "proxy", "--worker-urls", *urls, *flags),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,  # the access log
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the load, which then stops this
            )
        await _until_ready(proxy, admin_port, replicas, workers, folder)
        pids = [pid for pid in descendants(proxy.pid) if "proxy.worker" in command_line(pid)]
        counts = {pid: descriptor_count(pid) for pid in pids}
        yield Stage(port, admin_port, engines, proxy.pid, pids, counts)
    except* (RunError, OSError) as failures:  # OSError: the proxy takes no connections
        failed = True
        raise RunError(f"{_first(failures)}; see {folder}") from failures
    finally:
        await _stop(proxy)
        for engine in engines:
            await engine.kill()
        if not failed:
            shutil.rmtree(folder)


def _first(failures: BaseExceptionGroup[Exception]) -> Exception:
    first = failures.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first


async def _until_ready(
    proxy: asyncio.subprocess.Process, admin_port: int, replicas: int, workers: int, folder: Path
) -> None:
    client = Client(local(admin_port), time.monotonic)
    deadline_s = time.monotonic() + START_TIMEOUT_S
    try:
        while True:
            status, page = await get(client, "/metrics")
            metrics = read_metrics(page.decode())
            if status == 200 and metrics["workers"] == workers:
                status, page = await get(client, "/replicas")
                if page.count(b'"state": "ready"') == replicas:
                    return
            if proxy.returncode is not None or time.monotonic() > deadline_s:
                text = (folder / "proxy.log").read_text("utf-8", "replace")
                raise RunError(f"the proxy is not ready: {text[-LOG_TAIL_CHARACTERS:].strip()}")
            await asyncio.sleep(POLL_INTERVAL_S)
    finally:
        client.close()


async def _stop(proxy: asyncio.subprocess.Process | None) -> None:
    if proxy is None or proxy.returncode is not None:
        return
    proxy.terminate()
    try:
        async with asyncio.timeout(STOP_TIMEOUT_S):
            await proxy.wait()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(proxy.pid, signal.SIGKILL)
        await proxy.wait()
