"""What is measured, each as one short run against one rival.

A run of the closed loop costs processor time per request or per streamed event; a run of the open
loop shows times to the first octet; the others hold connections and weigh the process. What a run
finds is a `Sample`: one figure in the scenario's unit, and all that was seen beside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from loadtest.bench import bodies, native, processes
from loadtest.bench.rivals import Running

SETTLE_S = 0.05  # what a proxy does right after an answer, its log for one, belongs to the run
TAG_STEP = 1 << 22  # more requests than a run has
MEBIBYTE = 1024 * 1024

OPEN_RATE = 200  # requests a second
OPEN_SECONDS_MIN = 5.0  # 1,000 requests: ten are above the p99
IDLE_CLIENTS = 10_000
IDLE_IN_FLIGHT = 64  # while they make their one request
HELD_STREAMS = 1_000
HELD_EVENTS, HELD_PACE_MS = 50, 200  # all are still under way when the last one has begun


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """What one run found. No value: it could not be measured, or not of this rival."""

    scenario: str
    rival: str
    round: int
    value: float | None
    requests: int = 0
    rps: float = 0.0
    processor_us: float = 0.0  # per unit, of all processes
    per_process_us: list[float] = []  # the same of each, parents first
    resident_mb: float = 0.0
    p50_us: float = 0.0
    p99_us: float = 0.0
    first_p50_us: float = 0.0
    first_p99_us: float = 0.0
    by_replica: list[int] = []
    errors: dict[str, int] = {}
    notes: dict[str, float] = {}


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """What a load looks like."""

    size: str = "1kb"
    connections: int = 16
    events: int = 0  # of each stream; 0: plain answers
    pace_ms: int = 0


class Bench:
    """All that the runs of a benchmark share."""

    def __init__(
        self, folder: Path, programs: Path, engine: native.Engine, cores: processes.Cores
    ) -> None:
        self.folder = folder
        self.engine = engine
        self.cores = cores
        self.seconds = 2.0
        self.scale = 1.0  # of how many connections are held
        self._load_program = native.build("load", programs)
        self._tag = 0

    def options(self, to: Running, shape: Shape) -> dict[str, object]:
        """Return the load generator's options for `shape`, and tell the engine of its streams."""
        if shape.events:
            self.engine.streams(shape.events, shape.pace_ms)
        self._tag += TAG_STEP
        path = bodies.write_requests(self.folder, shape.size, stream=shape.events > 0)
        return {
            "port": to.port,
            "bodies": path,
            "connections": shape.connections,
            "events": shape.events,
            "tag": self._tag,
        }

    def load(self, what: str, options: Mapping[str, object]) -> native.Report:
        with native.load(self._load_program, self.cores.load, what, options) as under_way:
            return under_way.report()

    def holding(
        self, what: str, options: Mapping[str, object], look: Callable[[], None]
    ) -> native.Report:
        """Run a load, and `look` when all requests are begun and answered at least in part."""
        with native.load(self._load_program, self.cores.load, what, options) as under_way:
            under_way.until_ready()
            look()
            return under_way.report()


Measure = Callable[[Bench, Running], Sample]


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """A column of the table."""

    name: str
    caption: str
    unit: str
    measure: Measure
    fresh: bool = False  # wants a proxy that has done nothing before
    rounds_max: int = 1000
    above_direct: bool = False  # the figure is what comes on top of the engine itself
    ours_only: bool = False


def processor(name: str, shape: Shape) -> Measure:
    """Processor time per request, or per event of a stream, with all connections busy."""

    def measure(bench: Bench, to: Running) -> Sample:
        what = f"{name}, {to.name}"
        warm = bench.load(what, bench.options(to, shape) | {"requests": max(shape.connections, 64)})
        options = bench.options(to, shape) | {"seconds": bench.seconds}
        taken = bench.engine.counts().requests
        before = processes.processor_of(to.pids())
        report = bench.load(what, options)
        time.sleep(SETTLE_S)
        after = processes.processor_of(to.pids())
        units = (report.events if shape.events else report.requests) or 1
        spent = processes.spent_ns(before, after) / 1000 / units
        each = [(used - before.get(pid, 0)) / 1000 / units for pid, used in after.items()]
        return msgspec.structs.replace(
            sample(name, to, report, warm),
            value=spent if to.pid else None,
            processor_us=spent,
            per_process_us=[round(one, 3) for one in each],
            by_replica=_taken(bench, taken),
        )

    return measure


def first_octet(name: str, shape: Shape) -> Measure:
    """Time to the first octet of the answer's body, requests begun by the clock."""

    def measure(bench: Bench, to: Running) -> Sample:
        what = f"{name}, {to.name}"
        warm = bench.load(what, bench.options(to, shape) | {"requests": 200})
        seconds = max(bench.seconds, OPEN_SECONDS_MIN * bench.scale)
        options = bench.options(to, shape) | {"seconds": seconds, "rate": OPEN_RATE}
        report = bench.load(what, options)
        return msgspec.structs.replace(sample(name, to, report, warm), value=report.first_us.p50)

    return measure


def sample(name: str, to: Running, report: native.Report, *more: native.Report) -> Sample:
    """Return what `report` and the process say, without the scenario's own figure."""
    errors: dict[str, int] = {}
    for one in (report, *more):
        for kind, count in one.errors.items():
            errors[kind] = errors.get(kind, 0) + count
    return Sample(
        scenario=name,
        rival=to.name,
        round=0,
        value=None,
        requests=report.requests,
        rps=report.rps,
        resident_mb=resident_mb(to),
        p50_us=report.latency_us.p50,
        p99_us=report.latency_us.p99,
        first_p50_us=report.first_us.p50,
        first_p99_us=report.first_us.p99,
        errors=errors,
    )


def resident_mb(to: Running) -> float:
    return sum(processes.resident_bytes(pid) for pid in to.pids()) / MEBIBYTE


def _taken(bench: Bench, before: list[int]) -> list[int]:
    after = bench.engine.counts().requests
    return [now - then for now, then in zip(after, before, strict=True)]


def _processor_scenario(name: str, caption: str, unit: str, shape: Shape) -> Scenario:
    return Scenario(name=name, caption=caption, unit=unit, measure=processor(name, shape))


_BURST = Shape(events=500)
_PACED = Shape(events=100, pace_ms=10, connections=100)
SCENARIOS = (
    _processor_scenario("1kb", "1 KB", "us/request", Shape(size="1kb")),
    _processor_scenario("16kb", "16 KB", "us/request", Shape(size="16kb")),
    _processor_scenario("128kb", "128 KB", "us/request", Shape(size="128kb")),
    _processor_scenario("burst", "burst", "us/event", _BURST),
    _processor_scenario("paced", "one each 10 ms", "us/event", _PACED),
    Scenario(
        name="ttfb",
        caption="first byte, added",
        unit="us, p50",
        measure=first_octet("ttfb", Shape(size="16kb", connections=64)),
        above_direct=True,
    ),
)
