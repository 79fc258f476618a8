"""`doherty up` as a person runs it, and every process of it that a test may want to kill."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.fakes.programs import CLI, Mark, Program, children, fetch, mark, metric, until

REPLICAS, WORKERS = 3, 2
POLL_S = 0.02
# A tenth of the fast profile's speed: a token in 10 ms, so that a stream of 30 takes a third of a
# second and a kill finds streams under way, at a rate that two busy cores can bear.
CONFIG = f"""\
proxy: {{workers: {WORKERS}, expose_routing: true, access_log: 'off'}}
models:
  - name: demo
    pools:
      - engine: simulator
        replicas: {REPLICAS}
        args: [--profile, fast, --time-scale, '0.1']
        stop_grace_secs: 20
"""


class Whole:
    """One run of `doherty up` in a folder, on free ports unless `flags` say otherwise."""

    def __init__(self, folder: Path, *flags: str, log_name: str = "up.log") -> None:
        self.run_dir = folder / "run"
        config = folder / "doherty.yaml"
        config.write_text(CONFIG)
        argv = (*CLI, "up", str(config), f"--run-dir={self.run_dir}")
        ports = ("--port=0", "--admin-port=0", "--manager-port=0")
        self.up = Program((*argv, *ports, *flags), folder / log_name)

    def start(self) -> None:
        """Wait until everything is up, and learn where it is."""
        self.url = self.up.until_said(r"Ready: (http://\S+)/v1")[1]
        self.admin_url = self.up.until_said(r"admin +(http://\S+)")[1]
        self.manager_url = self.up.until_said(r"--manager-url (http://\S+)")[1]
        self.until_whole()

    def until_whole(self) -> None:
        """Wait until all replicas are ready, in the manager's eyes and in the proxy's."""
        until(lambda: self.ready_in(self.manager_url + "/v1/fleet") == REPLICAS, "manager's fleet")
        until(lambda: self.ready_in(self.admin_url + "/replicas") == REPLICAS, "proxy's fleet")
        until(lambda: self.metric("doherty_workers") == WORKERS, "workers")

    @staticmethod
    def ready_in(url: str) -> int:
        """Return the number of ready replicas on a page that lists them."""
        try:
            listed = fetch(url).value["replicas"]
        except (OSError, json.JSONDecodeError):
            return 0
        # The manager's page leaves out what is as usual.
        states = [(r.get("state", "ready"), r.get("suspect", False)) for r in listed]
        return states.count(("ready", False))

    def metric(self, name: str) -> float:
        return metric(fetch(self.admin_url + "/metrics").text, name, {})

    def until_at_rest(self) -> None:
        """Every lease is back, no exchange is open, every client is gone."""
        for name in (
            "doherty_requests_in_flight",
            "doherty_replica_inflight",
            "doherty_replica_queued_tokens",
            "doherty_client_connections",
        ):
            until(lambda name=name: self.metric(name) == 0, f"{name} is 0")  # type: ignore[misc]

    # --- processes -----------------------------------------------------------------------------

    def fleet(self) -> dict[str, Any]:
        """Return the manager's snapshot."""
        return dict(fetch(self.manager_url + "/v1/fleet").value)

    def replica_pids(self) -> dict[str, int]:
        return {r["replica_id"]: r["pid"] for r in self.fleet()["replicas"]}

    def restarts(self) -> dict[str, int]:
        return {r["replica_id"]: r.get("restarts", 0) for r in self.fleet()["replicas"]}

    def manager_pid(self) -> int:
        return int((self.run_dir / "lock").read_text())

    def proxy_pid(self) -> int:
        return int((self.run_dir / "proxy.pid").read_text().split()[0])

    def offline_pid(self) -> int:
        return int((self.run_dir / "offline.pid").read_text().split()[0])

    def worker_pids(self) -> list[int]:
        return children(self.proxy_pid())

    def marks(self) -> list[Mark]:
        """Return every process of this run."""
        replicas = list(self.replica_pids().values())
        services = [self.manager_pid(), self.offline_pid(), self.proxy_pid()]
        return [mark(pid) for pid in (self.up.pid, *services, *self.worker_pids(), *replicas)]


@contextmanager
def whole(folder: Path) -> Iterator[Whole]:
    """Run `doherty up` as long as the block; nothing of it outlives the block."""
    with no_orphans() as marks:
        started = Whole(folder)
        try:
            started.start()
            marks.extend(started.marks())
            yield started
            if started.up.process.poll() is None:
                marks.extend(started.marks())  # what was started again meanwhile
        finally:
            started.up.end()


@contextmanager
def no_orphans() -> Iterator[list[Mark]]:
    """Collect marks of processes; those that run at the end are killed, and fail the test."""
    marks: list[Mark] = []
    try:
        yield marks
    finally:
        left = [process for process in set(marks) if process.alive]
        for process in left:
            os.kill(process.pid, signal.SIGKILL)
    assert not left, f"left running: {left}"


def until_gone(marks: list[Mark]) -> None:
    until(lambda: not any(process.alive for process in marks), f"the end of {marks}")


def client_ports_of(pid: int, server_port: int) -> set[int]:
    """Return the ports of the clients whose connections to `server_port` this process holds."""
    links = (os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir())
    inodes = {link[8:-1] for link in links if link.startswith("socket:[")}
    ports = set()
    for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        local, remote, inode = fields[1], fields[2], fields[9]
        if inode in inodes and int(local.partition(":")[2], 16) == server_port:
            ports.add(int(remote.partition(":")[2], 16))
    return ports
