"""Real programs of ours as child processes, for tests: started, waited for, looked into, ended.

A program's output goes to a file, so that no pipe fills up and a failing test can show its end.
Waiting is polling until a thing is so: what is waited for comes from another process.
"""

from __future__ import annotations

import json
import os
import random
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from backends.ports import PortLeases
from backends.providers.process import read_stat

ROOT = Path(__file__).parents[2]
WAIT_S = 40.0  # long enough for a machine that does much else; a test that passes never waits it
POLL_S = 0.02

_T = TypeVar("_T")

CLI = (sys.executable, "-m", "backends.cli")
PROXY = (sys.executable, "-m", "proxy")
# Speed without GPU-like waits, room for a megabyte of prompt, and no long look before the end, nor
# before SGLang sees that a client has left.
FAST = (
    *("--profile", "fast", "--max-model-len", "600000", "--kv-cache-tokens", "1000000"),
    *("--drain-poll-seconds", "0.05", "--notice-seconds", "0.2"),
)


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return our environment without settings of Doherty that the tester may have."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("DOHERTY_")}
    return {**kept, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **(extra or {})}


def until(claim: Callable[[], _T | None], what: str, wait_s: float = WAIT_S) -> _T:
    """Poll until `claim()` is true; return it. The test fails when it never is."""
    end_s = time.monotonic() + wait_s
    while True:
        value = claim()
        if value:
            return value
        if time.monotonic() > end_s:
            raise AssertionError(f"waited {wait_s:g} s in vain: {what}; last seen: {value!r}")
        time.sleep(POLL_S)


def free_port() -> int:
    """Return a port on which nobody listens, out of the range that connections are given."""
    return PortLeases(random.Random()).lease()


class Program:
    """One child process and the file with what it says."""

    def __init__(
        self,
        argv: tuple[str, ...],
        log_path: Path,
        *,
        cwd: Path = ROOT,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.log_path = log_path
        with log_path.open("wb") as log:
            self.process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=cwd,
                env=environment(env),
                start_new_session=True,
            )
        self.pid = self.process.pid

    @property
    def said(self) -> str:
        return self.log_path.read_text(errors="replace")

    def until_said(self, pattern: str) -> re.Match[str]:
        """Wait until the output has `pattern`; the test fails when the program ends before."""

        def found() -> re.Match[str] | None:
            ended = self.process.poll() is not None
            match = re.search(pattern, self.said)
            if match is None and ended:
                raise AssertionError(f"ended with {self.process.returncode}: {self.said[-2000:]}")
            return match

        return until(found, f"{pattern!r} in {self.log_path}")

    def ended(self) -> int:
        """Wait for the end; return the exit status."""
        return self.process.wait(WAIT_S)

    def end(self) -> int:
        """SIGTERM; SIGKILL when that is not enough, and then the test fails."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(WAIT_S)
            except subprocess.TimeoutExpired as error:
                self.process.kill()
                self.process.wait()
                raise AssertionError(f"deaf to SIGTERM: {self.said[-2000:]}") from error
        return self.process.returncode


@contextmanager
def running(argv: tuple[str, ...], log_path: Path) -> Iterator[Program]:
    """Run a program as long as the block."""
    program = Program(argv, log_path)
    try:
        yield program
    finally:
        program.end()


@contextmanager
def simulator_at(log_path: Path, *flags: str, model: str, port: int = 0) -> Iterator[str]:
    """Run a simulated engine; yield its URL."""
    flags = ("--port", str(port), "--model", model, *FAST, *flags)
    with running((*CLI, "simulator", *flags), log_path) as program:
        yield program.until_said(r"listening on (http://\S+)")[1]


class Endpoint(msgspec.Struct, frozen=True):
    """Where a proxy listens."""

    url: str
    admin_url: str

    @property
    def base_url(self) -> str:
        return f"{self.url}/v1"

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum of a metric's series that carry these labels."""
        return metric(fetch(self.admin_url + "/metrics").text, name, labels)


@contextmanager
def proxy_before(log_path: Path, *flags: str) -> Iterator[Endpoint]:
    """Run a proxy with `flags` on free ports; yield where it listens."""
    argv = (*PROXY, "--port=0", "--admin-port=0", "--access-log=off", *flags)
    with running(argv, log_path) as program:
        admin_url = program.until_said(r"admin listener on (http://[^\s,]+)")[1]
        yield Endpoint(program.until_said(r" listening on (http://[^\s,]+), \d+ w")[1], admin_url)


class Fetched(msgspec.Struct, frozen=True):
    """An answer, read whole."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()

    @property
    def value(self) -> Any:
        return json.loads(self.body)


def fetch(
    url: str,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
    method: str | None = None,
) -> Fetched:
    """Ask for `url` on a connection of its own; with a body it is posted."""
    authority, slash, path = url.removeprefix("http://").partition("/")
    connection = HTTPConnection(authority, timeout=WAIT_S)
    try:
        method = method or ("GET" if body is None else "POST")
        connection.request(method, slash + path, body, dict(headers or {}))
        answer = connection.getresponse()
        fields = {name.lower(): value for name, value in answer.getheaders()}
        return Fetched(answer.status, fields, answer.read())
    finally:
        connection.close()


def metric(text: str, name: str, labels: Mapping[str, str]) -> float:
    """Return the sum of the series of `name` in an exposition that carry `labels`."""
    total = 0.0
    for line in text.splitlines():
        series, _, value = line.rpartition(" ")
        known, _, given = series.partition("{")
        if known == name and all(f'{key}="{label}"' in given for key, label in labels.items()):
            total += float(value)
    return total


# --- processes that are not our children -------------------------------------------------------


class Mark(msgspec.Struct, frozen=True):
    """One process for certain: pids are given out again, with another start time."""

    pid: int
    start_ticks: int

    @property
    def alive(self) -> bool:
        stat = read_stat(self.pid)
        return stat is not None and stat.alive and stat.start_ticks == self.start_ticks


def mark(pid: int) -> Mark:
    """Return the mark of a process that runs."""
    stat = read_stat(pid)
    assert stat is not None, f"there is no process {pid}"
    return Mark(pid, stat.start_ticks)


def children(pid: int) -> list[int]:
    """Return the child processes of `pid`."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += map(int, (task / "children").read_text().split())
    return found


def kill_for_certain(pid: int) -> float:
    """SIGKILL; return the monotonic time at which its end was seen, with its sockets closed.

    A pidfd is readable when the last thread is gone. The state in /proc turns before that.
    """
    pidfd = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        seen, _, _ = select.select([pidfd], [], [], WAIT_S)
        assert seen, f"{pid} survived SIGKILL"
        return time.monotonic()
    finally:
        os.close(pidfd)
