"""The test stand: the engine, the load, the subjects, and what one run against one finds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import msgspec

from loadtest.bench import bodies, native, processes
from loadtest.bench.rival import Rival
from loadtest.bench.rivals import NotRunningError, Running, running

TAG_STEP = 1 << 20  # more requests than a run has; the number has 32 bits
MEBIBYTE = 1024 * 1024
DIRECT = "direct"  # no proxy: the engine itself


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """What one run found. No value: it could not be measured, or not of this subject."""

    scenario: str
    rival: str
    round: int = 0
    value: float | None = None
    requests: int = 0
    rps: float = 0.0
    p50_us: float = 0.0
    p99_us: float = 0.0
    first_p50_us: float = 0.0
    first_p99_us: float = 0.0
    resident_mb: float = 0.0
    by_process: dict[str, float] = {}  # the value's shares
    by_replica: list[int] = []
    errors: dict[str, int] = {}
    notes: dict[str, float] = {}


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """What a load looks like."""

    size: str = "1kb"
    connections: int = 16
    events: int = 0  # of each stream; 0: plain answers
    pace_ms: int = 0


class Stand:
    """What all runs of a benchmark share."""

    def __init__(
        self,
        folder: Path,
        programs: Path,
        engine: native.Engine,
        *,
        seconds: float,
        scale: float = 1.0,
    ) -> None:
        """`scale` shrinks what is held and how long the clock's loads take, for a quick look."""
        self.folder = folder
        self.engine = engine
        self.seconds = seconds
        self.scale = scale
        self._load_program = native.build("load", programs)
        self._tag = 0

    def options(self, to: Running, shape: Shape) -> dict[str, object]:
        """Return the load generator's options for `shape`, and tell the engine of its streams."""
        if shape.events:
            self.engine.streams(shape.events, shape.pace_ms)
        self._tag += TAG_STEP
        return {
            "port": to.port,
            "bodies": bodies.write_requests(
                self.folder, shape.size, stream=shape.events > 0, keys=to.keys
            ),
            "connections": shape.connections,
            "events": shape.events,
            "tag": self._tag % (1 << 32),
        }

    def load(self, to: Running, options: Mapping[str, object]) -> native.Report:
        return self.holding(to, options, None)

    def holding(
        self,
        to: Running,
        options: Mapping[str, object],
        look: Callable[[int], None] | None,
    ) -> native.Report:
        """Run a load. When all requests are begun and answered at least in part, `look`.

        It is told how many are still under way.
        """
        with native.load(self._load_program, to.load_cores, to.name, options) as under_way:
            if look is not None:
                look(under_way.until_ready())
            return under_way.report()


class Subject:
    """A rival, or the engine itself, as it is measured: kept running, or started anew."""

    def __init__(self, stand: Stand, rival: Rival | None, cores: frozenset[int]) -> None:
        """`cores` are all that may be used; `rival` None is the engine itself."""
        self.name = DIRECT if rival is None else rival.name
        self._stand = stand
        self._rival = rival
        self._cores = cores
        self._kept = contextlib.ExitStack()
        self._running: Running | None = None
        self._starts = 0
        self.broken = ""  # why it could not be started

    def kept(self) -> Running:
        """Return the one that runs since its first use."""
        if self._running is None:
            self._running = self._kept.enter_context(self.fresh())
        return self._running

    def close(self) -> None:
        self._kept.close()
        self._running = None

    @contextlib.contextmanager
    def fresh(self, workers: int = 1) -> Iterator[Running]:
        """One that has done nothing yet, stopped at the end; a core is its own for each worker."""
        engine = self._stand.engine
        cores = processes.share_cores(self._cores, workers)
        if self._rival is None:
            yield Running(name=DIRECT, port=engine.ports[0], load_cores=cores.load)
            return
        if self.broken:
            raise NotRunningError(self.broken)
        self._starts += 1
        folder = self._stand.folder / f"{self.name}-{self._starts}"
        with contextlib.ExitStack() as stack:
            try:
                up = stack.enter_context(running(self._rival, folder, engine.ports, cores, workers))
            except NotRunningError as error:
                self.broken = str(error)
                raise
            yield up


def sample(scenario: str, to: Running, *reports: native.Report) -> Sample:
    """Return what a run's reports say, the last one's times, without the scenario's figure."""
    errors: dict[str, int] = {}
    for one in reports:
        for kind, count in one.errors.items():
            errors[kind] = errors.get(kind, 0) + count
    last = reports[-1]
    return Sample(
        scenario=scenario,
        rival=to.name,
        requests=last.requests,
        rps=last.rps,
        p50_us=last.latency_us.p50,
        p99_us=last.latency_us.p99,
        first_p50_us=last.first_us.p50,
        first_p99_us=last.first_us.p99,
        resident_mb=resident_mb(to),
        errors=errors,
    )


def resident_mb(to: Running) -> float:
    return sum(processes.resident_bytes(pid) for pid in to.pids()) / MEBIBYTE
