"""A burst over real processes: a pool of simulators that is scaled, an open loop, a step in it.

A whole Doherty runs with one pool. Requests begin at a base rate, from one moment at `--step` times
that, and after a while at the base rate again; no answer slows them. Who decides how many replicas
there are is one of

* ours       the manager itself, by the pool's `autoscale`;
* knative    the pod autoscaler of Knative, and
* tracking   that of Kubernetes, from outside: they read GET /v1/scaling as often as the originals
             look, and set the size of a pool that is not scaled by POST /v1/pools/POOL/scale;
* static     nobody: `--peak` of them all the time, as many as the burst needs.

All aim at the same, and all start replicas that take `--starts` seconds; those that scale may have
twice the peak. Told are requests lost (anything but a whole answer), times to the first token of
those that began in the burst, how many replicas there were at most, how often their number turned
round, and what was paid: replica-seconds, of each from its start to its end.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import math
import sys
from collections.abc import Callable
from typing import Any

import msgspec
import orjson
import uvloop

from loadtest.client import Client, RequestError
from loadtest.faults import outcome
from loadtest.fleet import MODEL, Fleet, FleetOptions, Ports, get, launched, local
from loadtest.measure import quantile
from loadtest.replay import WallClock
from loadtest.run import RunError
from loadtest.scaling.laws import Knative, Tracking
from loadtest.scaling.world import Seen
from loadtest.wire import AnswerReader

SUMMARY = "a step of load on a scaled pool of simulators, by our law and by others'"
LAWS = ("static", "ours", "knative", "tracking")
SAMPLE_S = 0.25
ANSWER_S_MAX = 120.0
TARGET_INPUTS, MAX_INPUTS = 4, 8
PROMPT_WORDS = 60
TOKENS_A_CHUNK = 50  # so that reading the answers costs this machine little


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """The load, and how it is met."""

    laws: tuple[str, ...] = LAWS
    starts: tuple[float, ...] = (2.0, 15.0)
    steps: tuple[float, ...] = (10.0,)
    rate: float = 1.5  # requests begun a second before the step
    output_tokens: int = 200
    before_s: float = 20.0
    burst_s: float = 60.0
    after_s: float = 80.0
    peak: int = 4  # replicas of static; the others may have twice as many
    doherty: str = ""


class Request(msgspec.Struct):
    """One request as the client saw it."""

    begun_s: float
    first_s: float = 0.0
    fate: str = "open"


class Sample(msgspec.Struct, frozen=True):
    """How many replicas there were."""

    at_s: float
    serving: int  # or on their way to it
    paid: int  # those, and the ones that end


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What came of one law, start time and step."""

    law: str
    start_s: float
    step: float
    requests: int
    lost: int
    details: tuple[str, ...]
    ttft_p50_s: float | None
    ttft_p99_s: float | None
    replicas_max: int
    turns: int
    replica_s: float


class Told(Seen):
    """A pool as its manager tells of it, for laws that look from outside."""

    __slots__ = ()

    def __init__(self, at_s: float, observation: dict[str, Any]) -> None:
        self.at_s = at_s
        self.in_flight = observation["in_flight"]
        self.in_flight_tokens = observation["in_flight_tokens"]
        self.queued = observation["queued"]
        self.queued_tokens = observation["queued_tokens"]
        self.arrivals_total = observation["arrivals_total"]
        self.refused_total = observation["refused_total"]
        self.kv_used_ratio = observation["kv_used_ratio"]
        self.ready = observation["ready"]
        self.coming_in_s = tuple(observation["coming_in_s"])
        self.start_s = observation["start_s"]


def add_arguments(command: argparse.ArgumentParser) -> None:
    base, add = Options(), command.add_argument
    add("--laws", type=_words, default=base.laws, help=f"of {', '.join(LAWS)} (default: all)")
    add("--starts", type=_numbers, default=base.starts, help="s that a replica takes (2,15)")
    add("--steps", type=_numbers, default=base.steps, help="times the base rate (default 10)")
    add("--rate", type=float, default=base.rate, help="requests a second before (%(default)s)")
    add("--output-tokens", type=int, default=base.output_tokens, help="of each answer")
    add("--before", dest="before_s", type=float, default=base.before_s, help="s before the step")
    add("--burst", dest="burst_s", type=float, default=base.burst_s, help="s of the step")
    add("--after", dest="after_s", type=float, default=base.after_s, help="s after it")
    add("--peak", type=int, default=base.peak, help="replicas of static (default %(default)s)")
    add("--doherty", default="", metavar="COMMAND", help="default: the one installed")
    add("--json", metavar="FILE", help="also write everything as JSON")


def run(args: argparse.Namespace) -> int:
    """Run every cell. Raises `RunError`."""
    given = {name: getattr(args, name) for name in Options.__struct_fields__}
    options = Options(**given)
    if unknown := set(options.laws) - set(LAWS):
        raise RunError(f"--laws: no law '{min(unknown)}'; there are {', '.join(LAWS)}")
    findings = uvloop.run(run_cells(options, lambda text: print(text, file=sys.stderr)))
    print(table(findings))
    if args.json:
        with open(args.json, "wb") as file:
            file.write(orjson.dumps([msgspec.to_builtins(finding) for finding in findings]))
    return 1 if any(finding.lost for finding in findings) else 0


async def run_cells(options: Options, say: Callable[[str], None]) -> list[Finding]:
    """Return a finding for each start time, step and law. Raises `RunError`."""
    findings = []
    for start_s in options.starts:
        for step in options.steps:
            for law in options.laws:
                say(f"{law}: start {start_s:g} s, step {step:g} x")
                findings.append(await run_cell(law, start_s, step, options))
    return findings


async def run_cell(law: str, start_s: float, step: float, options: Options) -> Finding:
    """Run one law once. Raises `RunError`."""
    count = options.peak if law == "static" else 1
    fleet_options = FleetOptions(
        replicas=count, doherty=options.doherty, start_timeout=60.0 + 10 * start_s
    )

    def configure(ports: Ports, folder: str) -> dict[str, Any]:
        return configuration(law, start_s, options, ports, folder)

    requests: list[Request] = []
    samples: list[Sample] = []
    async with launched(configure, fleet_options) as running, contextlib.AsyncExitStack() as stack:
        clock = WallClock()
        client = Client(local(running.ports.proxy), clock.now_s)
        stack.callback(client.close)
        async with asyncio.TaskGroup() as chores:
            own = [chores.create_task(_sample(running, clock, samples))]
            if law in {"knative", "tracking"}:
                own.append(chores.create_task(_control(law, 2 * options.peak, running, clock)))
            async with asyncio.TaskGroup() as group:
                await _load(client, clock, requests, step, options, group)
            for chore in own:
                chore.cancel()
    return judge(law, start_s, step, requests, samples, options)


def configuration(
    law: str, start_s: float, options: Options, ports: Ports, folder: str
) -> dict[str, Any]:
    """Return the configuration of one run: nothing but who decides differs between laws."""
    args = ["--startup-seconds", f"{start_s:g}", "--stream-interval", str(TOKENS_A_CHUNK)]
    pool: dict[str, Any] = {
        "engine": "simulator",
        "target_inputs": TARGET_INPUTS,
        "max_inputs": MAX_INPUTS,
        "args": args,
    }
    if law == "ours":
        pool["autoscale"] = {"min": 1, "max": 2 * options.peak, "rungs": ["cold"]}
    else:
        pool["replicas"] = options.peak if law == "static" else 1
    return {
        "proxy": {"port": ports.proxy, "admin_port": ports.admin, "access_log": "off"},
        "manager": {"port": ports.manager, "run_dir": folder},
        "models": [{"name": MODEL, "pools": [pool]}],
    }


def arrivals(step: float, options: Options) -> list[float]:
    """Return when requests begin: evenly, and `step` times as often in the burst."""
    times, at_s = [], 0.0
    end_s = options.before_s + options.burst_s
    while at_s < end_s + options.after_s:
        times.append(at_s)
        rate = options.rate * (step if options.before_s <= at_s < end_s else 1.0)
        at_s += 1.0 / rate
    return times


async def _load(
    client: Client,
    clock: WallClock,
    requests: list[Request],
    step: float,
    options: Options,
    group: asyncio.TaskGroup,
) -> None:
    start_s = clock.now_s()
    for number, due_s in enumerate(arrivals(step, options)):
        await asyncio.sleep(max(0.0, start_s + due_s - clock.now_s()))
        request = Request(begun_s=clock.now_s())
        requests.append(request)
        group.create_task(_one(client, request, number, options.output_tokens))


async def _one(client: Client, request: Request, number: int, output_tokens: int) -> None:
    reader = AnswerReader()
    try:
        async with asyncio.timeout(ANSWER_S_MAX):
            await client.post("/v1/chat/completions", body(number, output_tokens), reader=reader)
        request.fate = ": ".join(filter(None, outcome(reader, streamed=True)))
    except RequestError as error:
        request.fate = error.kind
    except TimeoutError:
        request.fate = f"no end in {ANSWER_S_MAX:g} s"
    request.first_s = reader.first_content_s


def body(number: int, output_tokens: int) -> bytes:
    """Return a request that shares nothing with others."""
    prompt = f"{number} " * PROMPT_WORDS
    return orjson.dumps(
        {
            "model": MODEL,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": output_tokens,
            "ignore_eos": True,
            "stream": True,
        }
    )


async def _pool(manager: Client) -> dict[str, Any] | None:
    """Return what the manager tells of the pool; None: it does not answer."""
    status, page = await get(manager, "/v1/scaling")
    return dict(orjson.loads(page)["pools"][0]) if status == 200 else None


async def _sample(running: Fleet, clock: WallClock, samples: list[Sample]) -> None:
    manager = Client(local(running.ports.manager), clock.now_s)
    with contextlib.closing(manager):
        while True:
            pool = await _pool(manager)
            if pool is not None:
                serving = pool["ready"] + pool["coming"]
                samples.append(Sample(clock.now_s(), serving, serving + pool["going"]))
            await asyncio.sleep(SAMPLE_S)


async def _control(law: str, most: int, running: Fleet, clock: WallClock) -> None:
    """Scale the pool from outside."""
    target = float(TARGET_INPUTS)
    made = Knative(target, 1, most) if law == "knative" else Tracking(target, 1, most)
    manager = Client(local(running.ports.manager), clock.now_s)
    with contextlib.closing(manager):
        size = 1
        while True:
            pool = await _pool(manager)
            if pool is not None:
                wanted = made.desired(Told(clock.now_s(), pool["observation"]))
                if wanted != size:
                    path = f"/v1/pools/{pool['pool']}/scale?replicas={wanted}"
                    await manager.post(path, b"")
                    size = wanted
            await asyncio.sleep(made.tick_s)


def judge(
    law: str,
    start_s: float,
    step: float,
    requests: list[Request],
    samples: list[Sample],
    options: Options,
) -> Finding:
    """Return the figures of one run."""
    began_s = requests[0].begun_s
    from_s, to_s = began_s + options.before_s, began_s + options.before_s + options.burst_s
    whole = [request for request in requests if request.fate == "complete"]
    waits = [r.first_s - r.begun_s for r in whole if from_s <= r.begun_s < to_s]
    during = [sample for sample in samples if sample.at_s >= began_s]
    return Finding(
        law=law,
        start_s=start_s,
        step=step,
        requests=len(requests),
        lost=len(requests) - len(whole),
        details=tuple(sorted({r.fate for r in requests if r.fate != "complete"})),
        ttft_p50_s=quantile(waits, 0.5),
        ttft_p99_s=quantile(waits, 0.99),
        replicas_max=max((sample.serving for sample in during), default=0),
        turns=turns([sample.serving for sample in during]),
        replica_s=paid_s(during),
    )


def turns(sizes: list[int]) -> int:
    """Return how often a size that had moved one way moved the other."""
    count, last = 0, 0
    for before, after in itertools.pairwise(sizes):
        way = (after > before) - (after < before)
        if way:
            count += last == -way
            last = way
    return count


def paid_s(samples: list[Sample]) -> float:
    """Return the replica-seconds of these samples."""
    pairs = itertools.pairwise(samples)
    return sum(before.paid * (after.at_s - before.at_s) for before, after in pairs)


def table(findings: list[Finding]) -> str:
    """Return the findings as text, static's replica-seconds as the measure."""
    head = "start  step  law       requests  lost  TTFT p50  TTFT p99  most  turns  replica-s"
    lines = [head]
    for each in findings:
        p50, p99 = (_seconds(value) for value in (each.ttft_p50_s, each.ttft_p99_s))
        lines.append(
            f"{each.start_s:3g} s  {each.step:4g}  {each.law:8s}  {each.requests:8d}  "
            f"{each.lost:4d}  {p50:>8s}  {p99:>8s}  {each.replicas_max:4d}  {each.turns:5d}  "
            f"{each.replica_s:9.0f}"
        )
        lines += [f"  lost: {detail}" for detail in each.details]
    return "\n".join(lines)


def _seconds(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.2f} s"


def _words(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.split(",")))


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in _words(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers") from error
