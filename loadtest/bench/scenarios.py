"""What is measured, each as a short run against one subject.

The closed loop costs processor time per request or per streamed event; the open one, begun by the
clock, shows times; the others hold connections and weigh the processes.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from loadtest.bench import bodies, processes
from loadtest.bench.rivals import Running
from loadtest.bench.stand import MEBIBYTE, Sample, Shape, Stand, Subject, resident_mb, sample

SETTLE_S = 0.05  # what a proxy does right after an answer, its log for one, belongs to the run

OPEN_RATE = 200  # requests a second
OPEN_SECONDS_MIN = 5.0  # 1,000 requests: ten are above the p99
IDLE_CLIENTS = 10_000
IDLE_IN_FLIGHT = 64  # while they make their one request
DESCRIPTORS_SPARE = 1_000
HELD_STREAMS = 1_000
# All are still under way when the last one has begun.
HELD_EVENTS, HELD_EVENTS_MIN, HELD_PACE_MS = 40, 6, 250
PLACED_CONNECTIONS = 16
PLACED_SIZES = ("1kb", "16kb")

Measure = Callable[[Stand, Subject], Sample]


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """A column of the table."""

    name: str
    caption: str
    unit: str
    measure: Measure
    rounds_max: int = 1000
    above_direct: bool = False  # the figure is what comes on top of the engine itself
    has_direct: bool = True  # measured of the engine itself, too
    ours_only: bool = False


def _processor(name: str, shape: Shape) -> Measure:
    """Processor time per request, or per event of a stream, with all connections busy."""

    def measure(stand: Stand, subject: Subject) -> Sample:
        return processor(name, shape, stand, subject.kept())

    return measure


def processor(name: str, shape: Shape, stand: Stand, to: Running) -> Sample:
    warm = stand.load(to, stand.options(to, shape) | {"requests": max(shape.connections, 64)})
    options = stand.options(to, shape) | {"seconds": stand.seconds}
    taken = stand.engine.counts().requests
    before = processes.processor_of(to.pids())
    report = stand.load(to, options)
    time.sleep(SETTLE_S)
    after = processes.processor_of(to.pids())
    units = (report.events if shape.events else report.requests) or 1
    used_us = {
        f"{place} {processes.name(pid)}": round((ns - before.get(pid, 0)) / 1000 / units, 3)
        for place, (pid, ns) in enumerate(after.items())
    }
    return msgspec.structs.replace(
        sample(name, to, warm, report),
        value=processes.spent_ns(before, after) / 1000 / units if to.pid else None,
        by_process=used_us,
        by_replica=_since(stand, taken),
    )


def first_octet(stand: Stand, subject: Subject) -> Sample:
    """Time from when a request was due to the first octet of the answer's body."""
    to, shape = subject.kept(), Shape(size="16kb", connections=64)
    warm = stand.load(to, stand.options(to, shape) | {"requests": 200})
    report = stand.load(to, stand.options(to, shape) | _by_the_clock(stand))
    return msgspec.structs.replace(sample("ttfb", to, warm, report), value=report.first_us.p50)


def upload(stand: Stand, subject: Subject) -> Sample:
    """How much later the slowest hundredth of others is while 16 MB bodies are taken in."""
    to, shape = subject.kept(), Shape(size="1kb", connections=64)
    path = bodies.write_upload(stand.folder)
    warm = stand.load(to, stand.options(to, shape) | {"requests": 200})
    alone = stand.load(to, stand.options(to, shape) | _by_the_clock(stand))
    options = stand.options(to, shape) | _by_the_clock(stand) | {"upload": path}
    beside = stand.load(to, options)
    return msgspec.structs.replace(
        sample("upload", to, warm, alone, beside),
        value=(beside.latency_us.p99 - alone.latency_us.p99) / 1000,
        notes={"alone_p99_ms": alone.latency_us.p99 / 1000, "uploads": beside.uploads},
    )


def idle_clients(stand: Stand, subject: Subject) -> Sample:
    """The memory of a fresh proxy whose clients have had an answer each and stay connected."""
    # Each may take a second descriptor, for its engine, while it asks.
    possible = (processes.descriptors_max() - DESCRIPTORS_SPARE) // 2
    clients = max(1, int(min(IDLE_CLIENTS, possible) * stand.scale))
    limits = {"requests": clients, "concurrency": IDLE_IN_FLIGHT, "hold": 1}
    with subject.fresh() as to:
        options = stand.options(to, Shape(size="1kb", connections=clients)) | limits
        weighed = _weigh("idle", stand, to, options, wanted=0)
    open_at_end = weighed.notes["open"]
    errors = dict(weighed.errors)
    if open_at_end < clients:
        errors["connections not kept"] = clients - int(open_at_end)
    return msgspec.structs.replace(weighed, errors=errors)


def held_streams(stand: Stand, subject: Subject) -> Sample:
    """The memory of a fresh proxy in the middle of so many streams."""
    count = max(1, int(HELD_STREAMS * stand.scale))
    events = max(HELD_EVENTS_MIN, int(HELD_EVENTS * stand.scale))
    shape = Shape(size="1kb", connections=count, events=events, pace_ms=HELD_PACE_MS)
    with subject.fresh() as to:
        options = stand.options(to, shape) | {"requests": count}
        return _weigh("streams", stand, to, options, wanted=count)


def _weigh(name: str, stand: Stand, to: Running, options: dict[str, object], wanted: int) -> Sample:
    """Weigh the processes while `options` hold; `wanted` requests must be under way then."""
    empty_mb = resident_mb(to)
    seen: dict[str, float] = {}

    def look(under_way: int) -> None:
        seen["under_way"] = under_way
        seen["resident_mb"] = resident_mb(to)
        seen["shared_once_mb"] = sum(map(processes.proportional_bytes, to.pids())) / MEBIBYTE

    report = stand.holding(to, options, look)
    weighed = sample(name, to, report)
    errors = dict(weighed.errors)
    if seen["under_way"] != wanted:
        errors["requests not held"] = abs(wanted - int(seen["under_way"]))
    return msgspec.structs.replace(
        weighed,
        value=seen["resident_mb"],
        errors=errors,
        notes={**seen, "empty_mb": empty_mb, "open": float(report.open)},
    )


def workers(stand: Stand, subject: Subject) -> Sample:
    """Requests a second of two workers over those of one, each time of a fresh proxy."""
    shape = Shape(size="1kb", connections=64)
    found = []
    for count in (1, 2):
        with subject.fresh(count) as to:
            found.append(processor("workers", shape, stand, to))
    one, two = found
    enough = processes.cores_allow(2)
    return msgspec.structs.replace(
        two,
        value=two.rps / one.rps if enough and one.rps else None,
        errors={**one.errors, **two.errors},
        notes={
            "rps_of_1": one.rps,
            "rps_of_2": two.rps,
            "us_of_1": one.value or 0.0,
            "us_of_2": two.value or 0.0,
            "cores": float(processes.core_count()),
        },
    )


def placement(stand: Stand, subject: Subject) -> Sample:
    """The share of requests that two workers give, the second time, to the replica of the first.

    One is sent after the other, so that load has no say, and in connections that both workers have
    some of: who takes the second has been told of the first by the other, as often as not.
    """
    reports, different, total = [], {}, 0
    with subject.fresh(2) as to:
        for size in PLACED_SIZES:
            options = stand.options(to, Shape(size=size, connections=PLACED_CONNECTIONS))
            limits = {"requests": bodies.SIZES[size].count, "concurrency": 1, "placement": 1}
            first, second = (stand.load(to, options | limits | {"tag": 0}) for _ in range(2))
            same = sum(map(int.__eq__, first.placement, second.placement))
            different[f"different_{size}"] = len(first.placement) - same
            total += len(first.placement)
            reports += [first, second]
        found = sample("placement", to, *reports)
    places = {place for report in reports for place in report.placement}
    return msgspec.structs.replace(
        found,
        value=100 * (1 - sum(different.values()) / total),
        notes=different | {"of": total, "replicas": len(places)},
    )


def _by_the_clock(stand: Stand) -> dict[str, object]:
    return {"rate": OPEN_RATE, "seconds": max(stand.seconds, OPEN_SECONDS_MIN * stand.scale)}


def _since(stand: Stand, before: list[int]) -> list[int]:
    after = stand.engine.counts().requests
    return [now - then for now, then in zip(after, before, strict=True)]


def _of_processor(name: str, caption: str, unit: str, shape: Shape) -> Scenario:
    return Scenario(name=name, caption=caption, unit=unit, measure=_processor(name, shape))


def _of_memory(name: str, caption: str, measure: Measure) -> Scenario:
    return Scenario(
        name=name, caption=caption, unit="MB", measure=measure, rounds_max=2, has_direct=False
    )


def _of_ours(name: str, caption: str, unit: str, measure: Measure) -> Scenario:
    return Scenario(
        name=name, caption=caption, unit=unit, measure=measure, has_direct=False, ours_only=True
    )


SCENARIOS = (
    _of_processor("1kb", "1 KB", "us/request", Shape(size="1kb")),
    _of_processor("16kb", "16 KB", "us/request", Shape(size="16kb")),
    _of_processor("128kb", "128 KB", "us/request", Shape(size="128kb")),
    _of_processor("burst", "burst", "us/event", Shape(events=500)),
    _of_processor(
        "paced", "each 10 ms", "us/event", Shape(events=100, pace_ms=10, connections=100)
    ),
    Scenario(
        name="ttfb",
        caption="first byte",
        unit="added us",
        measure=first_octet,
        above_direct=True,
    ),
    Scenario(name="upload", caption="16 MB upload", unit="p99 + ms", measure=upload),
    _of_memory("idle", "idle clients", idle_clients),
    _of_memory("streams", "held streams", held_streams),
    _of_ours("workers", "2 workers", "x rps", workers),
    _of_ours("placement", "placement", "% same", placement),
)
