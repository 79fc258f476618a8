"""The two C programs: compiled on the spot, started, spoken to.

They are compiled once for each content of their sources, into the folder of the run or a cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

import msgspec

from loadtest.bench.processes import on_cores
from loadtest.run import RunError

SOURCES = Path(__file__).with_name("native")
COMPILER = "cc"
CONTROL_TIMEOUT_S = 10.0
LOAD_GRACE_S = 120.0  # beyond the time that a load was asked to take


class Times(msgspec.Struct, frozen=True):
    """Quantiles in microseconds."""

    p50: float = 0.0
    p90: float = 0.0
    p99: float = 0.0
    p999: float = 0.0
    max: float = 0.0


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What the load generator says at the end."""

    requests: int
    seconds: float
    rps: float
    events: int
    octets: int
    uploads: int
    reconnects: int
    open: int
    latency_us: Times
    first_us: Times
    errors: dict[str, int]
    placement: list[int] = []


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine took: by replica, in octets, and the answers that nobody waited for."""

    requests: list[int]
    body_octets: int
    abandoned: int


def compiler() -> str:
    """Return the C compiler. Raises `RunError` if there is none."""
    found = shutil.which(COMPILER)
    if found is None:
        raise RunError(
            f"no C compiler `{COMPILER}` to build the engine and the load generator with; "
            "install one (apt-get install gcc libc6-dev)"
        )
    return found


def build(name: str, folder: Path) -> Path:
    """Return the program made of `name`.c, compiled into `folder` unless it is there already."""
    source = SOURCES / f"{name}.c"
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:16]
    program = folder / f"{name}-{digest}"
    if program.exists():
        return program
    folder.mkdir(parents=True, exist_ok=True)
    fresh = program.with_suffix(f".{os.getpid()}")
    done = subprocess.run(
        [compiler(), "-O2", "-o", str(fresh), str(source)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RunError(f"{source.name} cannot be compiled: {done.stderr.strip()}")
    fresh.rename(program)  # whole, or not there: two runs may build at a time
    return program


class Engine:
    """The running mock engine."""

    def __init__(self, ports: list[int]) -> None:
        self.ports = ports

    @property
    def urls(self) -> list[str]:
        return [f"http://127.0.0.1:{port}" for port in self.ports]

    def streams(self, events: int, pace_ms: int) -> None:
        """Have streams from now on bring so many events, one each `pace_ms` or all at once."""
        self._ask(f"/control?events={events}&pace_ms={pace_ms}")

    def counts(self) -> Counts:
        return msgspec.json.decode(self._ask("/counts"), type=Counts)

    def _ask(self, path: str) -> bytes:
        client = http.client.HTTPConnection("127.0.0.1", self.ports[0], timeout=CONTROL_TIMEOUT_S)
        with contextlib.closing(client):
            client.request("GET", path)
            return client.getresponse().read()


@contextlib.contextmanager
def engine(program: Path, replicas: int, cores: frozenset[int]) -> Iterator[Engine]:
    """A mock engine of so many replicas; it ends with its standard input."""
    with _piped([str(program), str(replicas)], cores) as process:
        try:
            line = _pipe(process.stdout).readline()
            if not line:
                raise RunError(f"the mock engine ended with {process.wait()}")
            yield Engine([int(port) for port in line.split()])
        finally:
            _pipe(process.stdin).close()
            try:
                process.wait(CONTROL_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()


class Load:
    """A load under way."""

    def __init__(self, process: subprocess.Popen[bytes], what: str) -> None:
        self._process = process
        self._what = what

    def until_ready(self) -> int:
        """Wait until all requests are begun and partly answered; return how many go on."""
        word, _, count = _pipe(self._process.stdout).readline().partition(b" ")
        if word != b"ready":
            raise RunError(f"{self._what}: the load generator ended with {self._process.wait()}")
        return int(count)

    def report(self) -> Report:
        """Let go of what is held, wait for the end, and return what was seen."""
        _pipe(self._process.stdin).close()
        self._process.stdin = None
        try:
            output, _ = self._process.communicate(timeout=LOAD_GRACE_S)
        except subprocess.TimeoutExpired as error:
            raise RunError(f"{self._what}: the load did not end") from error
        if self._process.returncode:
            raise RunError(f"{self._what}: the load generator ended with an error")
        return msgspec.json.decode(output.splitlines()[-1], type=Report)


@contextlib.contextmanager
def load(
    program: Path, cores: frozenset[int], what: str, options: Mapping[str, object]
) -> Iterator[Load]:
    """A load generator with `options`; killed if it is left early. `what` names it in errors."""
    command = [str(program), *(f"{name}={value}" for name, value in options.items())]
    with _piped(command, cores) as process:
        try:
            yield Load(process, what)
        finally:
            if process.poll() is None:
                process.kill()


def _piped(command: list[str], cores: frozenset[int]) -> subprocess.Popen[bytes]:
    with on_cores(cores):
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None  # it was asked for
    return stream
