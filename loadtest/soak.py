"""A million requests through a proxy, one in a hundred left by its client at some point.

Small answers, streamed and whole, on kept and new connections, as fast as the proxy takes them from
a few dozen callers. An aborted request is left while its head or its body is being sent, while it
waits for the answer, or within it, by a close or by a reset. Every other one must be answered in
full.

The memory of the proxy's workers is read at rest after the first tenth, by when every table with a
bound has filled, and again at the end: what it has grown by in between is a leak. Then gauges,
connections and descriptors must be back where they were.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import msgspec
import orjson
import uvloop

from loadtest.run import RunError
from loadtest.scripts import Script
from loadtest.storm.caller import Caller, Ending, call
from loadtest.storm.ledger import Seen, TokenReader, outcome
from loadtest.storm.load import render, request_body, script_text
from loadtest.storm.stage import Stage, stage

SUMMARY = "a million requests, some aborted: does anything leak?"
SAMPLE_EVERY = 10_000
GROWTH_MAX = 1.05
# In a shorter run, tables that have a bound are still filling when the first tenth is over: the
# index of prefixes, with what the allocator keeps beside it, levels off after some 50,000 requests.
JUDGED_FROM = 500_000
ANSWER_TIMEOUT_S = 60.0
NEW_CONNECTION_SHARE = 0.02
NOBODY: Final = "t00000000"  # stands where a request's token will
# Before a client goes that has sent a part, or waits.
LEAVE_S_MAX = 0.03
DETAILS_MAX = 20
POINTS = ("head", "body", "waiting", "stream")


class Options(msgspec.Struct, frozen=True, kw_only=True):
    requests: int = 1_000_000
    abort_share: float = 0.01
    concurrency: int = 32
    replicas: int = 2
    workers: int = 2
    seed: int = 1


class Kind(msgspec.Struct, frozen=True):
    """Requests that differ only in their token."""

    script: Script
    parts: list[bytes]  # of the octets, around the token
    head_bytes: int

    def octets(self, token: str) -> bytes:
        return token.encode().join(self.parts)


class Sample(msgspec.Struct, frozen=True):
    """The memory of the workers, together, at some moment."""

    requests: int
    rss_bytes: int
    elapsed_s: float


class Result(msgspec.Struct, kw_only=True):
    options: Options
    outcomes: dict[str, int] = {}
    aborted: dict[str, int] = {}
    details: list[str] = []
    samples: list[Sample] = []  # under load
    first: Sample | None = None  # at rest, after the first tenth
    last: Sample | None = None  # at rest, at the end
    elapsed_s: float = 0.0
    unrest: dict[str, float] = {}

    @property
    def growth(self) -> float:
        assert self.first is not None
        assert self.last is not None
        return self.last.rss_bytes / self.first.rss_bytes


def make_kind(port: int, script: Script, body_bytes: int, draw: random.Random) -> Kind:
    body = request_body(NOBODY, body_bytes, draw)
    octets = render(port, script_text(script), body)
    return Kind(script, octets.split(NOBODY.encode()), len(octets) - len(body))


class Soak:
    """The callers, and what they saw."""

    def __init__(self, running: Stage, options: Options, say: Callable[[str], None]) -> None:
        self.outcomes: Counter[str] = Counter()
        self.aborted: Counter[str] = Counter()
        self.details: list[str] = []
        self.samples: list[Sample] = []
        self._running = running
        self._options = options
        self._say = say
        self._draw = draw = random.Random(options.seed)
        self._begun_s = time.monotonic()
        port = running.port
        kinds = [(Script(token=NOBODY, stream=False, events=1), size) for size in (300, 1000, 4000)]
        kinds += [(Script(token=NOBODY, events=events), 1000) for events in (2, 5)]
        self._kinds = [make_kind(port, script, size, draw) for script, size in kinds]
        # Answers that take so long that their clients can leave them.
        late = Script(token=NOBODY, first_ms=20_000.0)
        slow = Script(token=NOBODY, events=400, pause_ms=50.0)
        self._late = make_kind(port, late, 1000, draw)
        self._slow = make_kind(port, slow, 1000, draw)
        self._large = make_kind(port, Script(token=NOBODY), 100_000, draw)

    async def run(self, numbers: range) -> None:
        shared = iter(numbers)
        async with asyncio.TaskGroup() as group:
            for _ in range(self._options.concurrency):
                group.create_task(self._caller(shared))

    async def _caller(self, numbers: Iterator[int]) -> None:
        caller: Caller | None = None
        draw, abort_share = self._draw.random, self._options.abort_share
        for number in numbers:
            if number and number % SAMPLE_EVERY == 0:
                self._sample(number)
            if caller is None or not caller.usable or draw() < NEW_CONNECTION_SHARE:
                self._leave(caller)
                caller = await call(self._running.port)
            token = f"t{number:08d}"
            if draw() < abort_share:
                await self._abort(caller, token)
            else:
                await self._ask(caller, token)
        self._leave(caller)

    async def _ask(self, caller: Caller, token: str) -> None:
        kind = self._kinds[int(self._draw.random() * len(self._kinds))]
        script = msgspec.structs.replace(kind.script, token=token)
        seen = Seen(script=script, reader=TokenReader(script), begun_s=0.0)
        seen.ending = await caller.ask(kind.octets(token), seen.reader, ANSWER_TIMEOUT_S)
        word, detail = outcome(seen)
        self.outcomes[word] += 1
        if word != "complete":
            self.details.append(f"{word}: {token}: {detail}")

    async def _abort(self, caller: Caller, token: str) -> None:
        """Begin a request and leave it."""
        point = self._draw.choice(POINTS)
        kind = {"waiting": self._late, "stream": self._slow}.get(point, self._large)
        octets = kind.octets(token)
        if point == "head":
            octets = octets[: self._draw.randrange(1, kind.head_bytes)]
        elif point == "body":
            octets = octets[: self._draw.randrange(kind.head_bytes, len(octets))]
        reader = TokenReader(msgspec.structs.replace(kind.script, token=token))
        caller.send(octets, reader)
        await asyncio.sleep(self._draw.uniform(0, LEAVE_S_MAX))
        reset = self._draw.random() < 0.5
        caller.close(reset=reset)
        ending = await caller.ended(ANSWER_TIMEOUT_S)
        if ending is Ending.LEFT and not reader.fault:
            self.aborted[f"{point}, {'reset' if reset else 'close'}"] += 1
        else:  # nothing ends these answers in so short a time
            self.outcomes["lost"] += 1
            self.details.append(f"lost: {token}: {ending.value} before it was left ({point})")

    def _leave(self, caller: Caller | None) -> None:
        if caller is not None:
            if caller.unasked_bytes:
                self.outcomes["mixed"] += 1
                self.details.append(f"mixed: {caller.unasked_bytes} octets nobody had asked for")
            caller.close()

    def _sample(self, number: int) -> None:
        sample = self.sample(number)
        self.samples.append(sample)
        if number % (10 * SAMPLE_EVERY) == 0:
            rate = number / sample.elapsed_s
            self._say(f"{number:,} requests, {rate:,.0f}/s, {sample.rss_bytes / 1e6:.1f} MB")

    def sample(self, number: int) -> Sample:
        pids = self._running.worker_pids
        return Sample(number, sum(map(rss_bytes, pids)), time.monotonic() - self._begun_s)


def rss_bytes(pid: int) -> int:
    """Return a process's resident memory. Raises `RunError` when it is gone."""
    try:
        pages = Path(f"/proc/{pid}/statm").read_text("ascii").split()[1]
    except OSError as error:
        raise RunError(f"worker {pid} is gone") from error
    return int(pages) * resource.getpagesize()


async def run_soak(options: Options, say: Callable[[str], None]) -> Result:
    """Run it all. Raises `RunError`."""
    async with stage(options.replicas, options.workers, say, brief=True) as running:
        soak = Soak(running, options, say)
        tenth = max(1, options.requests // 10)
        await soak.run(range(tenth))
        await running.unrest()
        first = soak.sample(tenth)
        rested_s = time.monotonic()
        await soak.run(range(tenth, options.requests))
        busy_s = time.monotonic() - rested_s
        unrest = await running.unrest()
        return Result(
            options=options,
            outcomes=dict(soak.outcomes),
            aborted=dict(soak.aborted),
            details=soak.details,
            samples=soak.samples,
            first=first,
            last=soak.sample(options.requests),
            elapsed_s=busy_s,
            unrest=unrest,
        )


def table(result: Result) -> str:
    """Return the result as text."""
    options, first, last = result.options, result.first, result.last
    assert first is not None
    assert last is not None
    rate = (options.requests - first.requests) / result.elapsed_s if result.elapsed_s else 0.0
    lines = [
        f"{options.requests:,} requests, {sum(result.aborted.values()):,} of them aborted, "
        f"{options.workers} workers, {options.replicas} engines, seed {options.seed}: "
        f"{rate:,.0f} requests/s",
        "answered  " + ", ".join(f"{n:,} {word}" for word, n in sorted(result.outcomes.items())),
        "aborted   " + ", ".join(f"{n:,} {word}" for word, n in sorted(result.aborted.items())),
        "",
        "requests     memory of the workers",
    ]
    every = max(1, len(result.samples) // 10)
    lines += [_row(sample, "") for sample in result.samples[every - 1 :: every]]
    lines += [_row(first, "at rest"), _row(last, f"at rest, {result.growth:.3f} times that")]
    rest = ", ".join(f"{name} {value:g}" for name, value in result.unrest.items())
    lines += ["", f"afterwards: {rest or 'gauges, connections and descriptors back to zero'}"]
    return "\n".join([*lines, *result.details[:DETAILS_MAX]])


def _row(sample: Sample, what: str) -> str:
    return f"{sample.requests:>9,}  {sample.rss_bytes / 1e6:>7.1f} MB  {what}".rstrip()


def complaints(result: Result) -> list[str]:
    """Return the promises that were broken."""
    found = [f"{n:,} {word}" for word, n in result.outcomes.items() if word != "complete"]
    found += [f"not back to zero: {name} {value:g}" for name, value in result.unrest.items()]
    if result.options.requests >= JUDGED_FROM and result.growth > GROWTH_MAX:
        found.append(f"memory grew to {result.growth:.3f} times that after the first tenth")
    return found


def add_arguments(command: argparse.ArgumentParser) -> None:
    base, add = Options(), command.add_argument
    add("--requests", type=int, help=f"in all (default {base.requests:,})")
    add("--abort-share", type=float, help=f"of them (default {base.abort_share:g})")
    add("--concurrency", type=int, help=f"callers (default {base.concurrency})")
    add("--replicas", type=int, help=f"engines (default {base.replicas})")
    add("--workers", type=int, help=f"of the proxy (default {base.workers})")
    add("--seed", type=int, help=f"of requests and aborts (default {base.seed})")
    add("--quick", action="store_true", help="3,000 requests; memory is not judged")
    add("--json", metavar="FILE", help="also write everything as JSON")
    add("--quiet", action="store_true", help="no progress")


def read_options(args: argparse.Namespace) -> Options:
    """Return what the command line asks for. Raises `ValueError`."""
    base = Options(requests=3000, abort_share=0.05) if args.quick else Options()
    names = Options.__struct_fields__
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    options = msgspec.structs.replace(base, **given)
    if min(options.requests, options.concurrency, options.replicas, options.workers) < 1:
        raise ValueError("expected whole numbers from 1")
    if not 0 <= options.abort_share <= 1:
        raise ValueError("--abort-share: expected a share from 0 to 1")
    return options


def run(args: argparse.Namespace) -> int:
    try:
        options = read_options(args)
    except ValueError as error:
        print(f"loadtest: {error}", file=sys.stderr)
        return 2

    def say(text: str) -> None:
        if not args.quiet:
            print(text, file=sys.stderr)

    result = uvloop.run(run_soak(options, say))
    print(table(result))
    if args.json:
        Path(args.json).write_bytes(
            orjson.dumps(msgspec.to_builtins(result), option=orjson.OPT_INDENT_2)
        )
    broken = complaints(result)
    for text in broken:
        print(f"loadtest: {text}", file=sys.stderr)
    return 1 if broken else 0
