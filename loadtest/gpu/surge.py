"""A burst from one awake replica while the others rest: how soon all serve, and what it cost.

`doherty up` runs one scaled pool. All replicas are brought up once, then the pool may shrink to
one, and the others go to the rung that is measured: *suspended* (the driver keeps the process and
gives the GPU back), *asleep*, or *cold* (no process), against which the others are held. Requests
come at a base rate, then --factor times as often, and no answer slows them. Noted are every
request, and when the manager counted so many replicas as ready.

    python -m loadtest gpu surge --record vllm.fleet --engine vllm --model-path models/qwen3-8b \\
        --rungs suspended,cold -- --load-format dummy --kv-cache-memory-bytes 8G
    python -m loadtest gpu surge --record sim.fleet --engine simulator --gpus none --replicas 2 \\
        --rungs asleep,cold --rate 1 --burst 6 -- --startup-seconds 5

What rests holds host memory, so the KV cache on the card should be small. `gpu verdict` tells it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import sys
import time
from pathlib import Path
from typing import Any, Final

import msgspec
import orjson

from loadtest.client import Client
from loadtest.fleet import get
from loadtest.gpu.command import add_stack_arguments, run_in_folder, stack_options
from loadtest.gpu.fleet.cell import row_of
from loadtest.gpu.fleet.record import Burst, Record, RecordError
from loadtest.gpu.stack import Stack, StackOptions, client
from loadtest.run import Options, RunError, run_replay
from loadtest.traces import Arrival, Trace

SUMMARY = "a burst from one awake replica, the others at rest"
RUNGS: Final = ("suspended", "asleep", "cold", "snapshotted")
POLL_S = 0.1
BLOCK_TOKENS: Final = 512
REST_S = 180.0  # for replicas to go to rest


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What comes, and when."""

    rate: float = 4.0
    factor: float = 10.0
    before_s: float = 10.0
    burst_s: float = 20.0
    after_s: float = 10.0
    prompt_tokens: int = 2000
    output_tokens: int = 64


def add_arguments(command: argparse.ArgumentParser) -> None:
    add_stack_arguments(command)
    base, add = Load(), command.add_argument
    add("--record", required=True, metavar="FILE", help="where bursts are added")
    add("--replicas", type=int, default=4, help="at most (default %(default)s)")
    add("--rungs", default="suspended,cold", help=f"of {', '.join(RUNGS)} (default %(default)s)")
    add("--gpus", default="auto", help="of the manager (default %(default)s)")
    add("--rate", type=float, default=base.rate, help="requests a second before the burst")
    add("--factor", type=float, default=base.factor, help="of the burst (default %(default)s)")
    add("--before", type=float, default=base.before_s, metavar="S")
    add("--burst", type=float, default=base.burst_s, metavar="S")
    add("--after", type=float, default=base.after_s, metavar="S")
    add("--prompt-tokens", type=int, default=base.prompt_tokens)
    add("--output-tokens", type=int, default=base.output_tokens)
    add("--patience", type=float, default=240.0, metavar="S", help="for an answer")


def arrivals(load: Load) -> Trace:
    """Return the requests: evenly spaced, sharing nothing."""
    found, at_s, end_s = list[Arrival](), 0.0, load.before_s + load.burst_s
    count = -(-load.prompt_tokens // BLOCK_TOKENS)
    while at_s < end_s + load.after_s:
        found.append(
            Arrival(
                at_s=at_s,
                input_tokens=load.prompt_tokens,
                output_tokens=load.output_tokens,
                session=f"burst-{len(found)}",
                runs=((len(found) << 16, count),),
            )
        )
        in_burst = load.before_s <= at_s < end_s
        at_s += 1.0 / (load.rate * (load.factor if in_burst else 1.0))
    return Trace(source="burst", kind="mooncake", arrivals=tuple(found))


def pool_of(rung: str, fewest: int, most: int) -> dict[str, Any]:
    """Return the keys of the pool; what is slept or imaged has to be allowed to."""
    return {
        "target_inputs": 8,
        "max_inputs": 64,
        "sleep": rung == "asleep",
        "snapshot": rung == "snapshotted",
        "autoscale": {
            "min": fewest,
            "max": most,
            "rungs": [rung],
            "scaledown_window_secs": 2,
        },
    }


def run(args: argparse.Namespace) -> int:
    try:
        rungs = _rungs(args)
        options = stack_options(args)
        record = Record(Path(args.record))
    except (ValueError, RecordError) as error:
        print(f"loadtest: {error}", file=sys.stderr)
        return 2
    status = 0
    for rung in rungs:
        work = functools.partial(_surge, args, rung, record)
        status |= run_in_folder(args, _options(args, options, rung), work)
    return status


def _rungs(args: argparse.Namespace) -> list[str]:
    """Return where the others rest, one after the other. Raises `ValueError`."""
    rungs = [word.strip() for word in args.rungs.split(",") if word.strip()]
    if unknown := sorted(set(rungs) - set(RUNGS)):
        raise ValueError(f"--rungs: no rung '{unknown[0]}'; there are {', '.join(RUNGS)}")
    if args.replicas < 2:
        raise ValueError("--replicas: expected 2 or more, one that is awake and others")
    return rungs


def _options(args: argparse.Namespace, options: StackOptions, rung: str) -> StackOptions:
    manager = {} if args.gpus == "auto" else {"gpus": args.gpus}
    pool = pool_of(rung, args.replicas, args.replicas)
    return msgspec.structs.replace(options, sleep=rung == "asleep", manager=manager, pool=pool)


async def _surge(args: argparse.Namespace, rung: str, record: Record, stack: Stack) -> int:
    load = Load(
        rate=args.rate,
        factor=args.factor,
        before_s=args.before,
        burst_s=args.burst,
        after_s=args.after,
        prompt_tokens=args.prompt_tokens,
        output_tokens=args.output_tokens,
    )
    made = Burst(
        rung=rung,
        factor=load.factor,
        rows=[],
        ready_s=[],
        began_s=load.before_s,
        seconds=load.burst_s,
    )
    try:
        await stack.start()
        reached = await stack.until_ready()
        print(f"{rung}: first replica ready after {reached['proxy_ready']:.1f} s", flush=True)
        await _until(stack, args.start_timeout, ready=args.replicas, resting=0)
        pool = pool_of(rung, 1, args.replicas)
        await stack.reload(msgspec.structs.replace(stack.options, pool=pool))
        # What is cold rests nowhere, and is not counted.
        at_rest = 0 if rung == "cold" else args.replicas - 1
        await _until(stack, REST_S, ready=1, resting=at_rest)
        made = await _measured(made, arrivals(load), stack, args.patience)
    except RunError as error:
        made = msgspec.structs.replace(made, failure=str(error)[:2000])
        print(f"loadtest: {error}", file=sys.stderr)
    finally:
        await stack.end()
    record.add(made)
    said = ", ".join(f"{number + 1}: {at_s:.1f} s" for number, at_s in enumerate(made.ready_s))
    print(f"{rung}: {len(made.rows)} sent; replicas that serve: {said}", flush=True)
    return 1 if made.failure else 0


async def _measured(made: Burst, trace: Trace, stack: Stack, patience_s: float) -> Burst:
    options = Options(
        url=stack.proxy_url,
        model=stack.options.model,
        api="completions",
        timeout=patience_s,
        warmup="0",
        quiet=True,
    )
    ready_s: list[float] = []
    begun_s = time.monotonic()
    async with asyncio.TaskGroup() as group:
        watching = group.create_task(_watch(stack, begun_s + made.began_s, ready_s))
        run = await run_replay(trace, options)
        watching.cancel()
    sent = len(run.outcomes)
    return msgspec.structs.replace(
        made,
        rows=[row_of(outcome) for outcome in run.outcomes],
        ready_s=ready_s,
        failure=f"broken off after {sent} of {len(trace.arrivals)}" if run.interrupted else "",
    )


async def _watch(stack: Stack, burst_s: float, ready_s: list[float]) -> None:
    """Note when so many replicas were ready, since the burst began; until cancelled."""
    manager = client(stack.manager_url)
    with contextlib.closing(manager):
        while True:
            pool = await _pool(manager)
            while len(ready_s) < pool.get("ready", 0):
                ready_s.append(round(max(0.0, time.monotonic() - burst_s), 2))
            await asyncio.sleep(POLL_S)


async def _until(stack: Stack, limit_s: float, *, ready: int, resting: int) -> None:
    """Wait until the manager counts so. Raises `RunError`."""
    deadline_s = time.monotonic() + limit_s
    manager = client(stack.manager_url)
    with contextlib.closing(manager):
        while True:
            pool = await _pool(manager)
            moving = pool.get("coming", 0) + pool.get("going", 0)
            at_rest = len(pool.get("resting", {}))
            if pool.get("ready") == ready and not moving and at_rest >= resting:
                return
            if time.monotonic() > deadline_s:
                raise RunError(f"{ready} ready and {resting} at rest after {limit_s:g} s: {pool}")
            await asyncio.sleep(POLL_S)


async def _pool(manager: Client) -> dict[str, Any]:
    """Return what the manager tells of the pool; empty while it does not answer."""
    status, page = await get(manager, "/v1/scaling")
    if status != 200:
        return {}
    pools = orjson.loads(page)["pools"]
    return dict(pools[0]) if pools else {}
