"""A replica dies and the proxy is rolled while users go on, which is an operator's ordinary day.

`doherty up` runs with simulated replicas. Locust's users chat with it all the while and give it
batch jobs. A third into the run the replica with most to do is killed (-9); two thirds into it
`doherty up` is told to replace its proxy by a new process (SIGUSR2). A request may fail only if the
killed replica had it; every line of every job comes back once. Locust's table, what happened when,
and a page with the curves are left in a folder.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import datetime
import os
import platform
import re
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

from loadtest.client import Client
from loadtest.faults import command_line, descendants
from loadtest.fleet import (
    Fleet,
    FleetOptions,
    Ports,
    Replica,
    fleet_config,
    get,
    launched,
    local,
    replicas,
)
from loadtest.operate_page import Second, page
from loadtest.replay import WallClock
from loadtest.run import RunError

SUMMARY = "Locust's users for some minutes, with a replica killed and the proxy rolled meanwhile"
LOCUSTFILE = Path(__file__).with_name("locustfile.py")
SERVED_BY = "x-doherty-replica"
POLL_INTERVAL_S = 0.1
PATIENCE_S = 60.0
END_TIMEOUT_S = 150.0  # Locust lets open answers come to their ends
POLICY = "prefix"
COUNTED = re.compile(r"^ *(Aggregated|JOB +/v1/batches) +(\d+) +\d+\(", re.MULTILINE)
FAILED = re.compile(r"^(\d+) +((?:GET|POST|JOB) /.*)$", re.MULTILINE)
PROXY = re.compile(r" -m proxy(\.worker)? ")  # its supervisor, its workers


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """The load and the fleet."""

    duration: float = 300.0
    users: int = 40
    replicas: int = 3
    workers: int = 2
    doherty: str = ""
    out: str = ""
    report: str = ""


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Something that was done, and how long it took until all was as before."""

    at_s: float  # since the start of the load
    what: str
    took_s: float
    then: str


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """One line of Locust's error report."""

    error: str  # with the row that it is of
    count: int

    def excused(self, killed: str) -> bool:
        """What it had begun may have been computed, so nobody repeats it."""
        return self.error.endswith(f"(served by {killed})")


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What the run showed."""

    killed: str
    events: tuple[Event, ...]
    failures: tuple[Failure, ...]
    seconds: tuple[Second, ...]
    table: str
    requests: int
    jobs: int

    @property
    def unexcused(self) -> int:
        return sum(failure.count for failure in self.failures if not failure.excused(self.killed))

    @property
    def kept_promises(self) -> bool:
        return self.requests > 0 and self.jobs > 0 and self.unexcused == 0


def add_arguments(command: argparse.ArgumentParser) -> None:
    base, add = Options(), command.add_argument
    add("--duration", type=float, default=base.duration, help="s of load (default %(default)g)")
    add("--users", type=int, default=base.users, help="who chat (default %(default)s)")
    add("--replicas", type=int, default=base.replicas, help="default %(default)s")
    add("--workers", type=int, default=base.workers, help="of the proxy (default %(default)s)")
    add("--doherty", default=base.doherty, metavar="COMMAND", help="default: the one installed")
    add("--out", default=base.out, metavar="FOLDER", help="write locust.txt and locust.html there")
    add("--report", default=base.report, metavar="FILE", help="also keep Locust's own page (1 MB)")


def run(args: argparse.Namespace) -> int:
    options = Options(**{name: vars(args)[name] for name in Options.__struct_fields__})
    if options.out and not Path(options.out).is_dir():
        raise RunError(f"--out {options.out}: no such folder")
    with tempfile.TemporaryDirectory(prefix="loadtest-operate-") as folder:
        finding = asyncio.run(measure(options, Path(folder)))
    head = heading(options)
    text = f"{head}\n\n{report(finding)}\n"
    print(text, end="")
    if options.out:
        marks = [(event.at_s, event.what) for event in finding.events]
        (Path(options.out) / "locust.txt").write_text(text)
        (Path(options.out) / "locust.html").write_text(page(text, finding.seconds, marks))
    return 0 if finding.kept_promises else 1


async def measure(options: Options, folder: Path) -> Finding:
    """Run everything. Raises `RunError` when Doherty or Locust does not do as it is told."""
    fleet_options = FleetOptions(
        replicas=options.replicas, workers=options.workers, doherty=options.doherty
    )

    def configure(ports: Ports, run_dir: str) -> dict[str, Any]:
        config = fleet_config(POLICY, fleet_options, ports, run_dir)
        config["proxy"]["expose_routing"] = True  # so that failures tell who had the request
        return config

    async with launched(configure, fleet_options) as running:
        clock = WallClock()
        start_s = time.time()
        locust = await _start_locust(running, options, folder)
        try:
            await clock.sleep_until(options.duration / 3)
            kill, killed = await _kill(running, clock)
            await clock.sleep_until(options.duration * 2 / 3)
            roll = await _roll(running, clock)
            async with asyncio.timeout(options.duration / 3 + END_TIMEOUT_S):
                output, _ = await locust.communicate()
        except TimeoutError:
            raise RunError("Locust did not end in time") from None
        finally:
            if locust.returncode is None:
                locust.kill()
                await locust.wait()
    table = tables_in(output.decode())
    if not table:
        raise RunError(f"Locust made no table: {output.decode()[-2000:].strip()}")
    return finding_of(folder, table, killed, (kill, roll), start_s)


async def _start_locust(
    running: Fleet, options: Options, folder: Path
) -> asyncio.subprocess.Process:
    one_giver = '{"user_class_name": "BatchUser", "fixed_count": 1}'
    arguments = [
        *("-f", str(LOCUSTFILE), "--host", f"http://127.0.0.1:{running.ports.proxy}"),
        *("--headless", "--only-summary", "--users", str(options.users + 1), "--spawn-rate", "10"),
        *("--run-time", f"{options.duration:g}s", "--config-users", one_giver),
        *("--csv", str(folder / "locust"), "--csv-full-history"),
        *("--served-by-header", SERVED_BY, "--batch-lines", "50"),
        *(("--html", options.report) if options.report else ()),
        *("ChatUser", "BatchUser"),
    ]
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "locust", *arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )


async def _kill(running: Fleet, clock: WallClock) -> tuple[Event, str]:
    """Kill the replica with most to do; wait until another process stands in its place."""
    manager = Client(local(running.ports.manager), clock.now_s)
    try:
        victim, had = await _busiest(running, manager, clock)
        at_s = clock.now_s()
        os.kill(victim.pid, signal.SIGKILL)
        await _until(clock, lambda: _stands(manager, victim), f"{victim.replica_id} to be back")
    finally:
        manager.close()
    name = victim.replica_id
    what = f"kill -9 of {name}, which had {had} requests"
    then = "another process of it was ready"
    return Event(at_s=at_s, what=what, took_s=clock.now_s() - at_s, then=then), name


async def _busiest(running: Fleet, manager: Client, clock: WallClock) -> tuple[Replica, int]:
    """Return the replica with most requests, and how many; wait for one that has any."""
    start_s = clock.now_s()
    while True:
        known = {replica.replica_id: replica for replica in await replicas(manager) if replica.pid}
        busy = {name: count for name, count in (await _inflight(running, clock)).items() if count}
        busy = {name: count for name, count in busy.items() if name in known}
        if busy:
            name = max(busy, key=lambda name: (busy[name], name))
            return known[name], busy[name]
        if clock.now_s() - start_s > PATIENCE_S:
            raise RunError(f"no replica had a request for {PATIENCE_S:g} s")
        await asyncio.sleep(POLL_INTERVAL_S)


async def _stands(manager: Client, victim: Replica) -> bool:
    ready = {r.replica_id: r.pid for r in await replicas(manager) if r.state == "ready"}
    return ready.get(victim.replica_id, victim.pid) != victim.pid


class _Busy(msgspec.Struct):
    replica_id: str
    inflight: int = 0


class _Page(msgspec.Struct):
    replicas: list[_Busy] = []


async def _inflight(running: Fleet, clock: WallClock) -> dict[str, int]:
    admin = Client(local(running.ports.admin), clock.now_s)
    try:
        status, body = await get(admin, "/replicas")
    finally:
        admin.close()
    if status != 200:
        raise RunError(f"/replicas of the proxy answered {status or 'nothing'}")
    return {r.replica_id: r.inflight for r in msgspec.json.decode(body, type=_Page).replicas}


async def _roll(running: Fleet, clock: WallClock) -> Event:
    """Have the proxy replaced; wait until the old one's last worker has gone."""
    old = _proxy_processes(running.pid)
    at_s = clock.now_s()
    os.kill(running.pid, signal.SIGUSR2)

    async def replaced() -> bool:
        now = _proxy_processes(running.pid)
        return bool(now) and not old & now

    await _until(clock, replaced, "the old proxy to leave")
    took_s = clock.now_s() - at_s
    then = "the old processes had given their last answer and ended"
    return Event(at_s=at_s, what="SIGUSR2: the proxy is rolled", took_s=took_s, then=then)


def _proxy_processes(pid: int) -> set[int]:
    return {found for found in descendants(pid) if PROXY.search(command_line(found))}


async def _until(clock: WallClock, claim: Any, what: str) -> None:
    start_s = clock.now_s()
    while not await claim():
        if clock.now_s() - start_s > PATIENCE_S:
            raise RunError(f"waited {PATIENCE_S:g} s for {what}")
        await asyncio.sleep(POLL_INTERVAL_S)


# --- what Locust left -----------------------------------------------------------------------------


def tables_in(output: str) -> str:
    """Return what Locust printed after its log: tables, and the lines of the locustfile."""
    lines = output.splitlines()
    log = re.compile(r"\[\d{4}-\d\d-\d\d ")
    first = next((n for n, line in enumerate(lines) if line.startswith("Type ")), len(lines))
    kept = [line.rstrip() for line in lines[first:] if not log.match(line)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip()


def finding_of(
    folder: Path, table: str, killed: str, events: tuple[Event, ...], start_s: float
) -> Finding:
    """Read the tables as printed: Locust does not write its files once more at the end."""
    counts = {row[0].split()[0]: int(row[1]) for row in COUNTED.findall(table)}
    failures = tuple(
        Failure(count=int(count), error=error.strip()) for count, error in FAILED.findall(table)
    )
    return Finding(
        killed=killed,
        events=events,
        failures=failures,
        seconds=seconds_of(_rows(folder / "locust_stats_history.csv"), start_s),
        table=table,
        requests=counts.get("Aggregated", 0),
        jobs=counts.get("JOB", 0),
    )


def seconds_of(history: Sequence[dict[str, str]], start_s: float) -> tuple[Second, ...]:
    """Return the curves: requests and failures of all rows, waits of the first tokens alone."""
    found: dict[int, dict[str, float]] = {}
    for row in history:
        second = found.setdefault(int(row["Timestamp"]), {})
        if row["Name"] == "Aggregated":
            second["requests"] = float(row["Requests/s"])
            second["failures"] = float(row["Failures/s"])
        elif row["Type"] == "TTFT" and row["95%"] != "N/A":
            second["ttft_p95_ms"] = float(row["95%"])
    return tuple(
        Second(
            at_s=at - start_s,
            requests_per_s=seen.get("requests", 0.0),
            failures_per_s=seen.get("failures", 0.0),
            ttft_p95_ms=seen.get("ttft_p95_ms", 0.0),
        )
        for at, seen in sorted(found.items())
    )


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as lines:
        return list(csv.DictReader(lines))


def heading(options: Options) -> str:
    changed = {
        f"--{name} {value:g}"
        for name in ("duration", "users", "replicas", "workers")
        if (value := getattr(options, name)) != getattr(Options(), name)
    }
    versions = f"doherty {version('doherty')}, Locust {version('locust')}"
    return "\n".join(
        [
            f"date      {datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
            f"hardware  {os.cpu_count()} cores ({platform.machine()}), no GPU: simulated replicas",
            f"versions  {versions}, Python {platform.python_version()}",
            f"command   {' '.join(['python -m loadtest operate', *sorted(changed)])}",
            f"load      {options.users} users who chat, one who gives batch jobs; "
            f"{options.replicas} replicas, {options.workers} workers of the proxy",
        ]
    )


def report(finding: Finding) -> str:
    """Return what happened, as text."""
    lines = [
        f"at {event.at_s:5.1f} s  {event.what}; {event.took_s:.1f} s later {event.then}"
        for event in finding.events
    ]
    excused = sum(failure.count for failure in finding.failures) - finding.unexcused
    lines.append(
        f"{finding.requests} requests and {finding.jobs} batch jobs; failed: {excused} that "
        f"{finding.killed} had when it was killed, {finding.unexcused} others"
    )
    return "\n".join([*lines, "", finding.table])
