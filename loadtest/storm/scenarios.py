"""The three questions beside the storm: deliveries, stalls, and the way back after a restart."""

from __future__ import annotations

import asyncio
import itertools
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from typing import get_args

import msgspec

from loadtest.run import RunError
from loadtest.scripts import How, Order, Point, Script
from loadtest.storm.caller import Ending, call
from loadtest.storm.ledger import Seen, TokenReader, outcome
from loadtest.storm.load import Load, draw_script, render, request_body, script_text
from loadtest.storm.stage import Stage

ASK_TIMEOUT_S = 30.0
ASK_INTERVAL_S = 0.01
BACK_TIMEOUT_S = 60.0
# Larger than what sockets hold, so that half of it is a half and not all.
LONG_BODY_BYTES = 4_000_000
SHORT_BODY_BYTES = 2_000
POINTS: tuple[str, ...] = ("connect", *[point for point in get_args(Point) if point])
HOWS: tuple[How, ...] = get_args(How)
# Where no octet of an answer has come, the client is told that it may try again.
UNANSWERED = ("head", "half_body", "body")

Case = tuple[int, bool, bool, How]


class Delivery(msgspec.Struct, frozen=True, kw_only=True):
    """What came of requests whose engine failed at one point."""

    point: str
    requests: int
    deliveries: dict[int, int]  # how many requests were delivered how often
    outcomes: dict[str, int]
    broken: int  # requests that were delivered twice, or ended otherwise than they must


class Back(msgspec.Struct, frozen=True, kw_only=True):
    """How long after an engine's port was open again it served again."""

    outage_s: float
    first_s: float  # from the port to the first 200
    last_failure_s: float  # from the port to the last failure; 0: none


class Stall(msgspec.Struct, frozen=True, kw_only=True):
    """What came of streams whose engines were stopped for a while."""

    seconds: float
    streams: int
    complete: int
    outcomes: dict[str, int]


async def deliveries(stage: Stage, repeats: int, every: int, seed: int) -> list[Delivery]:
    """Have engines fail at every point, on new and on kept connections, of both kinds of answer."""
    return [
        await _deliveries_at(stage, point, list(_cases(point, repeats))[::every], seed)
        for point in POINTS
    ]


def _cases(point: str, repeats: int) -> Iterator[Case]:
    """Yield how an engine fails, and whether in a stream and on a connection that is used again."""
    keepings = (False,) if point == "connect" else (True, False)
    return itertools.product(range(repeats), (True, False), keepings, HOWS)


async def _deliveries_at(stage: Stage, point: str, cases: list[Case], seed: int) -> Delivery:
    outcomes: Counter[str] = Counter()
    broken = 0
    tokens = []
    draw = random.Random(f"{seed}:{point}")
    for number, stream, kept, how in cases:
        token = f"d-{point}-{number}-{how}-{stream:d}{kept:d}"
        script = Script(
            token=token,
            stream=stream,
            pad=100,
            point="" if point == "connect" else point,  # type: ignore[arg-type]
            how=how,
        )
        size = LONG_BODY_BYTES if point == "half_body" else SHORT_BODY_BYTES
        word = await _deliver(stage, script, request_body(token, size, draw), kept=kept)
        outcomes[word] += 1
        broken += word not in expected(point)
        tokens.append(token)
    counts = delivery_counts(stage)
    made = Counter(counts.get(token, 0) for token in tokens)
    # A connection that was closed before anything was said on it delivers nothing, and may be
    # followed by one that does.
    broken += sum(n for times, n in made.items() if times > 1 or (times < 1 and point != "connect"))
    return Delivery(
        point=point,
        requests=len(tokens),
        deliveries=dict(made),
        outcomes=dict(outcomes),
        broken=broken,
    )


def expected(point: str) -> tuple[str, ...]:
    """Return the ends that a request may have whose engine fails there."""
    if point == "connect":
        return ("complete", "failed")
    return ("failed",) if point in UNANSWERED else ("cut: event", "cut: close")


async def _deliver(stage: Stage, script: Script, body: bytes, *, kept: bool) -> str:
    await _until_unsuspected(stage)
    if not script.point:
        await _refuse(stage, script.how, 1)
    caller = await call(stage.port)
    try:
        if kept:  # leave the engine with a connection that the proxy will use again
            good = Script(token=f"{script.token}-good")
            reader = TokenReader(good)
            request = render(stage.port, script_text(good), b'{"model":"demo"}')
            ending = await caller.ask(request, reader, ASK_TIMEOUT_S)
            if ending is not Ending.WHOLE or reader.status != 200:
                raise RunError(f"a request without a fault was answered {reader.status}")
        seen = Seen(script=script, reader=TokenReader(script), begun_s=time.monotonic())
        seen.ending = await caller.ask(
            render(stage.port, script_text(script), body), seen.reader, ASK_TIMEOUT_S
        )
        return outcome(seen)[0]
    finally:
        caller.close()
        if not script.point:
            await _refuse(stage, script.how, 0)


async def _refuse(stage: Stage, how: How, count: int) -> None:
    """Let every engine but one refuse connections, and leave the proxy none that it has."""
    for engine in stage.engines:
        await engine.obeys(Order(do="hang_up"))
    for engine in stage.engines[1:]:
        await engine.obeys(Order(do="refuse", how=how, count=count))


async def _until_unsuspected(stage: Stage) -> None:
    """Each case begins with engines that the proxy thinks well."""
    deadline_s = time.monotonic() + BACK_TIMEOUT_S
    while (await stage.metrics())["replica_suspect"]:
        if time.monotonic() > deadline_s:
            raise RunError("an engine that answers is still suspect")
        await asyncio.sleep(ASK_INTERVAL_S)


def delivery_counts(stage: Stage) -> Counter[str]:
    """Return how often each request was given to an engine."""
    return Counter(line.token for line in stage.journal() if line.what == "head")


async def stall(stage: Stage, streams: int, seconds: float, seed: int) -> Stall:
    """Stop every engine in the middle of all streams, and let them go on."""
    scripts = [
        msgspec.structs.replace(
            draw_script(seed, number)[0],
            token=f"s{number}",
            stream=True,
            framing="chunked",
            first_ms=0.0,
            events=20,
            pause_ms=25.0,
            crc=0,
        )
        for number in range(streams)
    ]
    draw = random.Random(seed)
    load = Load(stage.port, [(one, request_body(one.token, 500, draw)) for one in scripts], seed)
    async with asyncio.TaskGroup() as group:
        run = group.create_task(load.run(streams))
        while not _all_begun(load, streams):
            await asyncio.sleep(ASK_INTERVAL_S)
            if run.done():
                break
        for engine in stage.engines:
            engine.signal(signal.SIGSTOP)
        await asyncio.sleep(seconds)
        for engine in stage.engines:
            engine.signal(signal.SIGCONT)
    outcomes = Counter(outcome(seen)[0] for seen in load.seen)
    return Stall(
        seconds=seconds,
        streams=streams,
        complete=outcomes["complete"],
        outcomes=dict(outcomes),
    )


def _all_begun(load: Load, streams: int) -> bool:
    return len(load.seen) == streams and all(seen.reader.count for seen in load.seen)


async def back(stage: Stage, outage_s: float) -> Back:
    """Kill every engine; after a while start one, and ask until it answers, and a while longer."""
    for engine in stage.engines:
        await engine.kill()
    asked = _Asking(stage.port)
    async with asyncio.TaskGroup() as group:
        group.create_task(asked.run())
        try:
            await asyncio.sleep(outage_s)
            since_s = time.monotonic()
            await stage.engines[0].start()
            open_s = await stage.engines[0].until_listening(since_s)
            await asked.until_well(open_s)
        finally:
            asked.stop()
    for engine in stage.engines[1:]:
        await engine.start()
    for engine in stage.engines[1:]:
        await engine.until_listening(since_s)
    await _until_unsuspected(stage)
    first_s = min(at_s for at_s in asked.good_s if at_s >= open_s)
    return Back(
        outage_s=outage_s,
        first_s=first_s - open_s,
        last_failure_s=max([0.0, *(at_s - open_s for at_s in asked.bad_s)]),
    )


class _Asking:
    """A client that asks again and again, each time on a new connection, to meet every worker."""

    WELL = 20  # answers of 200 in a row: both workers have given some

    def __init__(self, port: int) -> None:
        self.good_s: list[float] = []
        self.bad_s: list[float] = []
        self._port = port
        self._row = 0
        self._stopped = False

    async def run(self) -> None:
        script = Script(token=str(self._port), events=1)
        request = render(self._port, script_text(script), b'{"model":"demo"}')
        while not self._stopped:
            caller = await call(self._port)
            reader = TokenReader(script)
            ending = await caller.ask(request, reader, ASK_TIMEOUT_S)
            caller.close()
            good = ending is Ending.WHOLE and reader.status == 200
            (self.good_s if good else self.bad_s).append(caller.ended_s)
            self._row = self._row + 1 if good else 0
            await asyncio.sleep(ASK_INTERVAL_S)

    async def until_well(self, open_s: float) -> None:
        deadline_s = open_s + BACK_TIMEOUT_S
        while self._row < self.WELL:
            if time.monotonic() > deadline_s:
                raise RunError(
                    f"no {self.WELL} answers of 200 in a row {BACK_TIMEOUT_S:g} s "
                    "after the engine's port was open"
                )
            await asyncio.sleep(ASK_INTERVAL_S)

    def stop(self) -> None:
        self._stopped = True
