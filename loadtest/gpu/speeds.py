"""How fast an engine is, as a client sees it: the figures that a simulator's profile is fitted to.

Times to the first token of prompts from 128 to 32,000 tokens that are new, seen before, and seen
but for their last 200 tokens; time per token at batches of 1 to 64 with contexts of 256 and 8,000;
the size of the KV cache; and how the start went. Random weights will do: they cost what real ones
cost, and answers have the length that is asked for.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import uvloop

from loadtest.client import Client, parse_url
from loadtest.gpu.direct import (
    ENGINES,
    EngineOptions,
    Running,
    add_engine_arguments,
    engine_options,
    started,
)
from loadtest.gpu.machine import command_line, this_machine, today
from loadtest.gpu.measuring import QUICK, Measured, Plan, measure
from loadtest.gpu.probing import engine_version
from loadtest.gpu.records import CHUNK_TOKENS, Recording, shown
from loadtest.report import to_json
from loadtest.run import RunError

SUMMARY = "time to first token and per token of one engine, to fit a profile to"


def add_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--engine", choices=ENGINES, default="vllm", help="default %(default)s")
    add("--url", default="", help="of an engine that runs already, instead of starting one")
    add("--gpu", default="", help="name of the card in the report (default: what nvidia-smi says)")
    add("--quantization", choices=("", "fp8"), default="", help="of the weights, on loading")
    add("--tensor-parallel", type=int, default=1, metavar="N", help="default %(default)s")
    add_engine_arguments(command)
    add_plan_arguments(command)
    add("--out", metavar="FILE", help="also write the report as text")
    add("--json", metavar="FILE", help="also write the recording, for `fit` and `fidelity`")


def add_plan_arguments(command: argparse.ArgumentParser) -> None:
    """Add what says how much is measured."""
    add = command.add_argument_group("how much").add_argument
    base = Plan()
    add("--prompts", type=sizes, default=base.prompts, metavar="N,N", help="tokens of prompts")
    add("--repeats", type=int, default=base.repeats, help="of each prompt (default %(default)s)")
    add("--batches", type=sizes, default=base.batches, metavar="N,N", help="with short contexts")
    add("--long-batches", type=sizes, default=base.long_batches, metavar="N,N", help="with 8,000")
    add("--limit-s", type=float, default=base.limit_s, help="then the rest is left out")
    add("--quick", action="store_true", help="a few seconds: shows only that everything works")


def sizes(text: str) -> tuple[int, ...]:
    """Parse numbers with commas between; nothing is none."""
    try:
        found = tuple(int(word) for word in text.split(",") if word)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"'{text}' is not like 1,2,4") from error
    if any(number < 1 for number in found):
        raise argparse.ArgumentTypeError(f"'{text}' has a number below 1")
    return tuple(sorted(set(found)))


def plan_of(args: argparse.Namespace) -> Plan:
    """Return how much is measured."""
    if args.quick:
        return QUICK
    return Plan(
        prompts=args.prompts,
        repeats=max(1, args.repeats),
        batches=args.batches,
        long_batches=args.long_batches,
        limit_s=args.limit_s,
    )


def run(args: argparse.Namespace) -> int:
    """Measure and report. Raises `RunError` when the engine does not serve."""
    recording = uvloop.run(_record(args))
    text = shown(recording)
    print(text)
    write(args.out, f"{text}\n".encode())
    write(args.json, to_json(msgspec.to_builtins(recording)))
    return 0 if recording.first_token or recording.decode else 1


def write(file: str | None, octets: bytes) -> None:
    """Write a file that was asked for. Raises `RunError` when it cannot be written."""
    if not file:
        return
    try:
        Path(file).write_bytes(octets)
    except OSError as error:
        raise RunError(f"{file}: cannot be written: {error.strerror}") from error


async def _record(args: argparse.Namespace) -> Recording:
    quantization, parallel = args.quantization, args.tensor_parallel
    if args.url:
        async with client_of(args.url) as client:
            measured = await measure(client, plan_of(args), time.time_ns(), say)
            version = await engine_version(client)
        return _recording(args, measured, version, None)
    options = engine_options(args, args.engine, quantization=quantization, tensor_parallel=parallel)
    return _recording(args, *(await measured_start(options, plan_of(args), say)))


async def measured_start(
    options: EngineOptions, plan: Plan, told: Callable[[str], None]
) -> tuple[Measured, str, Running]:
    """Start an engine, carry out a plan on it, and stop it."""
    async with started(options) as running:
        told(f"{options.engine}: ready after {running.ready_s:.1f} s")
        async with client_of(running.url) as client:
            measured = await measure(client, plan, time.time_ns(), told)
            return measured, await engine_version(client), running


@contextlib.asynccontextmanager
async def client_of(url: str) -> AsyncIterator[Client]:
    """A client to one engine. Raises `RunError` for what is no URL."""
    try:
        target = parse_url(url)
    except ValueError as error:
        raise RunError(str(error)) from error
    client = Client(target, time.monotonic)
    try:
        yield client
    finally:
        client.close()


def _recording(
    args: argparse.Namespace, measured: Measured, version: str, running: Running | None
) -> Recording:
    machine = this_machine()
    name = f"{args.engine} (simulated)" if args.rehearse else args.engine
    return Recording(
        engine=name,
        version=version,
        gpu=args.gpu or machine.hardware,
        driver=machine.driver,
        software=machine.software,
        model=Path(args.model_path).name or "as served",
        weights=args.quantization or "bf16",
        tensor_parallel=args.tensor_parallel,
        date=today(),
        command=f"{command_line()}\n{'':<10}{running.command}" if running else command_line(),
        kv_cache_tokens=measured.kv_cache_tokens,
        chunk_tokens=running.chunk_tokens if running else CHUNK_TOKENS,
        ready_s=running.ready_s if running else 0.0,
        phases=running.phases if running else (),
        first_token=tuple(measured.first_token),
        decode=tuple(measured.decode),
        left_out=tuple(measured.left_out),
    )


def say(text: str) -> None:
    """Tell of progress."""
    print(text, file=sys.stderr, flush=True)
