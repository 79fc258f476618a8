"""Who routes: ours by its command line, and what others would take, in front of the same engines.

Each gets what it is made for. Ours is the proxy alone, which learns of engines what it can: their
gauges, and their KV events where they publish any. nginx goes round. SGLang's router follows its
own tree of prompts. vLLM's hashes the session, which it is told by a header that nobody else gets,
because nobody else needs it.

The routers of others come from a folder with `bin/` in it: a virtual environment here, what
`loadtest/gpu/pack_rivals.py` made on a machine without a package index.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import msgspec

from loadtest.bench import processes
from loadtest.bench.rival import Site
from loadtest.bench.rivals import Nginx, Router, nginx_config
from loadtest.client import Client, parse_url
from loadtest.gpu.fleet import plan
from loadtest.gpu.fleet.engines import EVENTS_PORT, REPLAY_PORT, ask
from loadtest.gpu.gauges import proxy_series, total
from loadtest.run import RunError

START_S = 40.0
POLL_S = 0.1
# It rests when it takes less than this share of a core. Ours reads first all that the engines have
# told of their caches since they were started, cell after cell.
REST_SHARE, REST_LOOK_S, REST_S = 0.05, 0.5, 10.0
STOP_S = 10.0
OUR_POLICY = {
    plan.OURS: "prefix",
    plan.OURS_DEAF: "prefix",
    plan.OURS_RR: "round_robin",
    plan.OURS_LEAST: "least_load",
}


class Programs(msgspec.Struct, frozen=True, kw_only=True):
    """Where the routers are, and how many workers ours has."""

    folder: Path  # with bin/sglang-router, bin/vllm-router, and perhaps bin/nginx
    workers: int = 2
    doherty_events: bool = True

    def available(self) -> tuple[str, ...]:
        """Return the arms that can be run here."""
        missing = set()
        if nginx_of(self) is None:
            missing.add(plan.NGINX)
        for arm, name in ((plan.SGLANG, "sglang-router"), (plan.VLLM, "vllm-router")):
            if not (self.folder / "bin" / name).exists():
                missing.add(arm)
        return tuple(arm for arm in plan.ARMS if arm not in missing)


def nginx_of(programs: Programs) -> str | None:
    """Return nginx: the carried one, else this machine's."""
    carried = programs.folder / "bin" / "nginx"
    if carried.exists():
        return str(carried)
    return shutil.which("nginx") or shutil.which("nginx", path="/usr/local/sbin:/usr/sbin:/sbin")


def command_of(arm: str, site: Site, urls: Sequence[str], programs: Programs) -> list[str]:
    """Return what starts a router, after writing what it reads."""
    if arm in OUR_POLICY:
        events = ["--kv-events", "off"]
        if programs.doherty_events and arm != plan.OURS_DEAF:
            events = ["--kv-events-port", str(EVENTS_PORT)]
            events += ["--kv-events-replay-port", str(REPLAY_PORT)]
        return [
            *(sys.executable, "-m", "proxy", "--host", "127.0.0.1"),
            *("--port", str(site.port), "--admin-port", str(site.spare_port)),
            *(
                "--workers",
                str(programs.workers),
                "--access-log",
                "off",
                "--policy",
                OUR_POLICY[arm],
                *events,
            ),
            *("--worker-urls", *urls),
        ]
    if arm == plan.NGINX:
        program = nginx_of(programs)
        assert program is not None
        config = site.folder / "nginx.conf"
        text = nginx_config(site, access_log=False)
        servers = "".join(f"    server {url.removeprefix('http://')};\n" for url in urls)
        head, _, rest = text.partition("upstream engines {\n")
        config.write_text(f"{head}upstream engines {{\n{servers}{rest}")
        return [program, "-p", str(site.folder), "-c", str(config)]
    name, words, policy = (
        ("sglang-router", ["launch"], "cache_aware")
        if arm == plan.SGLANG
        else ("vllm-router", [], "consistent_hash")
    )
    router = Router(arm, programs.folder, [name, *words], policy)
    made = router.command(site)
    return [*made[: made.index("--worker-urls")], "--worker-urls", *urls]


class Running(msgspec.Struct, frozen=True, kw_only=True):
    """A router that answers."""

    url: str
    pid: int
    admin_url: str = ""  # of ours

    async def by_events(self) -> float | None:
        """Return of how many replicas ours knows the cache by its KV events; None: not ours."""
        if not self.admin_url:
            return None
        admin = Client(parse_url(self.admin_url), time.perf_counter)
        with contextlib.closing(admin):
            found = await proxy_series(admin)
        return total(found, "doherty_replica_cache_source", source="events")

    def used(self) -> tuple[float, float]:
        """Return processor seconds so far, and resident MiB, of all its processes."""
        seconds = mib = 0.0
        for pid in processes.family(self.pid):
            with contextlib.suppress(RunError, OSError):
                seconds += processes.processor_ns(pid) / 1e9
                mib += processes.resident_bytes(pid) / (1 << 20)
        return seconds, mib


@contextlib.asynccontextmanager
async def running(
    arm: str, urls: Sequence[str], folder: Path, programs: Programs
) -> AsyncIterator[Running]:
    """A router in front of the engines, which has answered; ended at the end. Raises `RunError`."""
    port, spare = _free_ports(2)
    site = Site(folder=folder, port=port, spare_port=spare, engine_ports=())
    command = command_of(arm, site, urls, programs)
    log = folder / f"{arm}.log"
    process = _start(command, log)
    try:
        url = f"http://127.0.0.1:{port}"
        await _until_it_answers(arm, url, process, log, replicas=len(urls))
        admin_url = f"http://127.0.0.1:{spare}" if arm in OUR_POLICY else ""
        router = Running(url=url, pid=process.pid, admin_url=admin_url)
        await _until_it_rests(router)
        yield router
    finally:
        await asyncio.to_thread(_stop, process)


def _start(command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        try:
            return subprocess.Popen(  # noqa: S603 - a router of `command_of`
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise RunError(f"{command[0]}: cannot be started: {error.strerror}") from error


async def _until_it_answers(
    arm: str, url: str, process: subprocess.Popen[bytes], log: Path, *, replicas: int
) -> None:
    """Wait until as many requests in a row are answered as there are replicas."""
    client, since_s, good = Client(parse_url(url), time.perf_counter), time.monotonic(), 0
    with contextlib.closing(client):
        while good < replicas:
            if process.poll() is not None:
                raise RunError(f"{arm} ended with {process.returncode}: {_words(log)}")
            if time.monotonic() - since_s > START_S:
                raise RunError(f"{arm} does not answer after {START_S:g} s: {_words(log)}")
            good = good + 1 if await ask(client, "hello", 1) == 200 else 0
            if not good:
                await asyncio.sleep(POLL_S)


async def _until_it_rests(router: Running) -> None:
    """Wait until what its start gave it to do is done, or for so long."""
    until_s, used_s = time.monotonic() + REST_S, router.used()[0]
    while time.monotonic() < until_s:
        await asyncio.sleep(REST_LOOK_S)
        before_s, used_s = used_s, router.used()[0]
        if used_s - before_s < REST_SHARE * REST_LOOK_S:
            return


def _words(log: Path) -> str:
    return log.read_text("utf-8", "replace")[-2000:].strip() or "it said nothing"


def _stop(process: subprocess.Popen[bytes]) -> None:
    _signal(process, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_S)
    _signal(process, signal.SIGKILL)  # what it started and left
    process.wait()


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def versions(programs: Programs) -> dict[str, str]:
    """Return the version of each router of others that is here, as it tells it."""
    asked: dict[str, Callable[[], str]] = {}
    nginx = nginx_of(programs)
    if nginx is not None:
        asked["nginx"] = lambda: Nginx("nginx", access_log=False).version()
    found = {}
    for name, tell in asked.items():
        with contextlib.suppress(OSError):
            found[name] = tell()
    for meta in sorted(programs.folder.glob("**/*_router-*.dist-info")):
        name, _, version = meta.name.removesuffix(".dist-info").partition("-")
        found[name] = version
    return found
