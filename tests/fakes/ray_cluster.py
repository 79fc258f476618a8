"""A Ray cluster on this machine, each node with an address of its own and GPUs that nobody has.

A node is all processes that carry its mark: Ray's own, actors, and the engines that these started.
So it can die as a machine does, all at once and without a word.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.fakes.programs import ROOT, environment, free_port, until

_MARK = "DOHERTY_TEST_RAY_NODE"
_numbers = itertools.count()


def reason_why_not() -> str:
    """Say why no cluster can run here; empty when one can."""
    missing = importlib.util.find_spec("ray") is None
    return "ray is not installed (pip install 'doherty[ray]')" if missing else ""


class Node:
    """One node, and all that runs on it."""

    def __init__(self, cluster: RayCluster, host: str, *flags: str) -> None:
        self.host = host
        self.mark = f"{os.getpid()}-{next(_numbers)}"
        self._log = cluster.folder / f"node-{self.mark}.log"
        argv = [str(Path(sys.executable).with_name("ray")), "start", "--block"]
        argv += ["--node-ip-address", host, "--disable-usage-stats", *flags]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment({_MARK: self.mark, **RAY_ENVIRONMENT}),
                cwd=ROOT,
                start_new_session=True,
            )

    def up(self) -> bool:
        said = self._log.read_text()
        if self.process.poll() is not None:
            raise AssertionError(f"the node {self.host} ended: {said[-2000:]}")
        return "Ray runtime started" in said

    def signal(self, number: int) -> None:
        """Signal everything on it."""
        for pid in _carriers(self.mark):
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill(self) -> None:
        """Let it die, engines and all; what is started meanwhile dies, too."""

        def dead() -> bool:
            self.signal(signal.SIGKILL)
            return not _carriers(self.mark)

        until(dead, f"node {self.host} dead")
        self.process.wait()


# The head takes a node for dead after some seconds of silence, not the half minute of its default.
RAY_ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}


class RayCluster:
    """A head, and further nodes."""

    def __init__(self, gpus: int) -> None:
        # The names of sockets in there must be short, which a folder of pytest's is not.
        self.folder = Path(tempfile.mkdtemp(prefix="dray-"))
        port = free_port()
        client_port = free_port()
        self.address = f"127.0.0.1:{port}"
        self.client_address = f"ray://127.0.0.1:{client_port}"
        self.nodes: list[Node] = []
        folder = ("--temp-dir", str(self.folder), "--include-dashboard", "false")
        has = ("--num-cpus", "16", "--num-gpus", str(gpus))
        has += ("--ray-client-server-port", str(client_port))
        self.head = Node(self, "127.0.0.1", "--head", "--port", str(port), *folder, *has)
        until(self.head.up, "the head is up")

    def add(self, host: str, *, gpus: int) -> Node:
        """Add a node; two that start together on one machine may name the same socket."""
        flags = ("--address", self.address, "--num-cpus", "16", "--num-gpus", str(gpus))
        node = Node(self, host, *flags)
        self.nodes.append(node)
        until(node.up, f"node {host} is up")
        return node

    def close(self) -> None:
        for node in (*self.nodes, self.head):
            node.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def ray_cluster(*gpus: int) -> Iterator[RayCluster]:
    """Run a cluster as long as the block, with a node for each count of GPUs; the first leads."""
    cluster = RayCluster(gpus[0])
    try:
        for number, count in enumerate(gpus[1:], start=2):
            cluster.add(f"127.0.0.{number}", gpus=count)
        yield cluster
    finally:
        cluster.close()


def _carriers(mark: str) -> list[int]:
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with suppress(OSError):
                lines = (folder / "environ").read_bytes().split(b"\0")
                if f"{_MARK}={mark}".encode() in lines:
                    found.append(int(folder.name))
    return found
