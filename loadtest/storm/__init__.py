"""Thousands of streams through a proxy whose engines are killed, reset, half-closed and stalled.

A proxy and scripted engines are started; streams of every framing, and some answers that are no
streams, run through it while faults strike, both drawn from the seed. Each request ends as one of

* complete      all events came, in order, and the end; of an answer that is no stream, all octets;
* cut           visibly: by an error event, or by a close or reset within the answer;
* failed        502 with x-should-retry, whole: an engine had been given it and had not answered;
* lost          any other failure, no end at all, or one of the above although no fault had struck
                this request. Must never happen;
* mixed, duplicated, reordered, spoiled    an event of another request, one that had come before,
                one out of order, or one with other octets. Must never happen;
* silent        HTTP says complete, and events or `[DONE]` are missing. Must never happen.

*twice* counts requests that engines were given more than once, *bodies* those that an engine got
with other octets than were sent. Afterwards the proxy must be as it was: no request, lease, busy
connection or descriptor left. How soon cuts are seen is shown and not judged: it is the machine's
affair, too. *direct* are a few streams without a proxy between, which meet the same faults.

Further scenarios: `deliveries` (an engine fails at every point of an exchange: each request reaches
one engine, once), `stall` (every engine is stopped for 2 s: every stream completes), `restart`
(from the moment that an engine's port is open again to the first 200).
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import orjson
import uvloop

from loadtest.storm import scenarios
from loadtest.storm.ledger import Strike, Strikes, Tally, direct_latencies, judge
from loadtest.storm.load import Load, Witness, draw_script
from loadtest.storm.report import SCENARIOS, Options, Result, complaints, table
from loadtest.storm.stage import Stage, stage
from loadtest.storm.weather import Weather, draw_faults

SUMMARY = "streams under kills, resets, half-closes and stalls of the engines"
SAY_EVERY = 1000
WITNESSES = 3  # streams without a proxy between, of each engine
# A small measure of everything, in seconds.
QUICK = Options(
    streams=200,
    faults=6,
    concurrency=50,
    replicas=3,
    pace=3.0,
    repeats=1,
    cases_every=4,
    stall_streams=10,
    stall=0.3,
    outages=(0.3,),
)


def add_arguments(command: argparse.ArgumentParser) -> None:
    base, add = Options(), command.add_argument
    add("--scenario", default=",".join(SCENARIOS), help="which ones (default: %(default)s)")
    add("--streams", type=int, help=f"in all (default {base.streams})")
    add("--faults", type=int, help=f"among them (default {base.faults})")
    add("--concurrency", type=int, help=f"streams at a time (default {base.concurrency})")
    add("--replicas", type=int, help=f"engines (default {base.replicas})")
    add("--workers", type=int, help=f"of the proxy (default {base.workers})")
    add("--seed", type=int, help=f"of scripts and faults (default {base.seed})")
    add("--outages", help="s, of `restart`, such as 1,1,600 (default 5 of 1 s, one of 30 s)")
    add("--quick", action="store_true", help="a small measure of everything, in seconds")
    add("--json", metavar="FILE", help="also write everything as JSON")
    add("--quiet", action="store_true", help="no progress")


def read_options(args: argparse.Namespace) -> Options:
    """Return what the command line asks for. Raises `ValueError`."""
    names = ("streams", "faults", "concurrency", "replicas", "workers", "seed")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    wrong = [name for name, value in given.items() if value < (0 if name == "faults" else 1)]
    if wrong:
        raise ValueError(f"--{wrong[0]}: expected a whole number from 1")
    if args.outages is not None:
        given["outages"] = tuple(float(text) for text in args.outages.split(","))
    chosen = tuple(args.scenario.split(","))
    if unknown := [name for name in chosen if name not in SCENARIOS]:
        raise ValueError(f"--scenario {unknown[0]}: expected of {', '.join(SCENARIOS)}")
    base = QUICK if args.quick else Options()
    return msgspec.structs.replace(base, scenarios=chosen, **given)


def run(args: argparse.Namespace) -> int:
    try:
        options = read_options(args)
    except ValueError as error:
        print(f"loadtest: {error}", file=sys.stderr)
        return 2

    def say(text: str) -> None:
        if not args.quiet:
            print(text, file=sys.stderr)

    result = uvloop.run(run_scenarios(options, say))
    print(table(result))
    if args.json:
        Path(args.json).write_bytes(
            orjson.dumps(msgspec.to_builtins(result, str_keys=True), option=orjson.OPT_INDENT_2)
        )
    broken = complaints(result)
    for text in broken:
        print(f"loadtest: {text}", file=sys.stderr)
    return 1 if broken else 0


async def run_scenarios(options: Options, say: Callable[[str], None]) -> Result:
    """Run them on one proxy, one after the other. Raises `RunError`."""
    result = Result(options=options)
    async with stage(options.replicas, options.workers, say) as running:
        if "storm" in options.scenarios:
            result.storm = await _storm(running, options, say)
        if "deliveries" in options.scenarios:
            say("deliveries: engines fail at every point")
            result.deliveries = await scenarios.deliveries(
                running, options.repeats, options.cases_every, options.seed
            )
        if "stall" in options.scenarios:
            say(f"stall: engines stop for {options.stall:g} s")
            result.stall = await scenarios.stall(
                running, options.stall_streams, options.stall, options.seed
            )
        if "restart" in options.scenarios:
            for outage_s in options.outages:
                say(f"restart: engines are away for {outage_s:g} s")
                result.restarts.append(await scenarios.back(running, outage_s))
        result.unrest = await running.unrest()
    return result


async def _storm(running: Stage, options: Options, say: Callable[[str], None]) -> Tally:
    scripts = [draw_script(options.seed, number, options.pace) for number in range(options.streams)]
    load = Load(running.port, scripts, options.seed)
    faults = draw_faults(options.faults, options.streams, options.replicas, options.seed)
    weather = Weather(faults, running.engines)

    def on_begin(number: int) -> None:
        weather.note_begin(number)
        if number and number % SAY_EVERY == 0:
            say(f"storm: {number:,} of {options.streams:,} begun")

    witness = Witness([engine.port for engine in running.engines], options.pace)
    async with asyncio.TaskGroup() as group:
        group.create_task(witness.run(WITNESSES))
        async with asyncio.TaskGroup() as storm:
            storm.create_task(weather.run())
            storm.create_task(load.run(options.concurrency, on_begin))
        witness.end()
    lines = running.journal()
    cuts = {line.token: Strike(line.at_s, line.detail) for line in lines if line.what == "cut"}
    strikes = Strikes(requests=cuts, replicas=weather.kills)
    tally = judge(
        load.seen,
        strikes,
        scenarios.delivery_counts(running),
        sum(line.what == "spoiled" for line in lines),
    )
    tally.direct_s = direct_latencies(witness.seen, strikes)
    if load.unasked_bytes:
        tally.counts["mixed"] += 1
        tally.details.append(f"mixed: {load.unasked_bytes} octets came that nobody had asked for")
    return tally
