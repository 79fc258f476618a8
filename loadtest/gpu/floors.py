"""The planner against the truth: time per token of one answer, predicted and measured.

Each configuration (engine, tensor parallelism, weights) is started with random weights and answers
one prompt of 128 tokens with 256, three times; the median stands beside the floor (the bytes that
must be read, at the full bandwidth) and the prediction of `doherty plan`. Then the planner's one
constant of each engine is fitted to what was measured, by least squares of relative errors, and
the predictions are shown again. Promised: then each is within 25 %.

Configurations that fit beside each other are started together, and measured one after another;
--together N lets N of them share a card, since an engine that waits takes nothing but memory. What
another run measured of single answers (of this command, `speeds` or `paths`) is taken in by
--measured FILE, and not measured again.

A rehearsal has the simulator in the engines' place, which has one speed whatever its cards and
weights. So it asks for no cards, and its figures are held against nothing.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import uvloop

from loadtest.gpu import predictions
from loadtest.gpu.abreast import abreast, visible_devices
from loadtest.gpu.direct import (
    ENGINES,
    EngineOptions,
    Running,
    add_engine_arguments,
    engine_options,
    neighbour_words,
)
from loadtest.gpu.machine import Machine, command_line, this_machine, today
from loadtest.gpu.paths import names_of
from loadtest.gpu.predictions import (
    Configuration,
    Outlook,
    OutlookError,
    Row,
    placed,
    read_outlook,
    read_rows,
    report,
    waves,
)
from loadtest.gpu.probing import Probe, engine_version, model_name
from loadtest.gpu.speeds import client_of, say, sizes, write
from loadtest.report import to_json
from loadtest.run import RunError

SUMMARY = "time per token beside the planner's floor and prediction"
PROMPT_TOKENS = 128
ANSWER_TOKENS = 256
REPEATS = 3
PLAN_TIMEOUT_S = 60.0
WEIGHTS = ("bf16", "fp8")


def add_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--engines", type=names_of(ENGINES), default=ENGINES, metavar="E,E", help="default: both")
    add("--tp", type=sizes, default=(1, 2, 4), metavar="N,N", help="default: 1,2,4")
    add(
        "--weights",
        type=names_of(WEIGHTS),
        default=WEIGHTS,
        metavar="W,W",
        help="default: bf16,fp8",
    )
    add("--gpu", default="", metavar="TYPE", help="for the planner (default: by nvidia-smi)")
    add("--gpus", type=int, default=0, metavar="N",
        help="cards to use (default: all; in a rehearsal the largest of --tp)")  # fmt: skip
    add("--together", type=int, default=1, metavar="N", help="engines on a card (default 1)")
    add("--fp8-model-path", default="", help="a folder in FP8 already (default: on loading)")
    add("--predictions", default="", metavar="FILE", help="what `doherty plan --json` said")
    add("--measured", action="append", default=[], metavar="FILE", help="rows of an earlier run")
    add_engine_arguments(command)
    add("--answer-tokens", type=int, default=ANSWER_TOKENS, help="default %(default)s")
    add("--limit-s", type=float, default=560.0, help="no start after that (default %(default)s)")
    add("--out", metavar="FILE", help="also write the report as text")
    add("--json", metavar="FILE", help="also write the rows, for --measured")


def run(args: argparse.Namespace) -> int:
    """Measure, compare and fit. Returns 1 when a prediction is too far off or a start failed."""
    machine = this_machine()
    if args.rehearse:
        args.gpus = args.gpus or max(args.tp, default=1)
    try:
        rows = [row for file in args.measured for row in read_rows(file)]
        outlook = _read_outlook(args.predictions) if args.predictions else _planned(args, machine)
    except OutlookError as error:
        print(f"loadtest: {error}", file=sys.stderr)
        return 2
    known = {row.configuration for row in rows if row.token_ms}
    rows += uvloop.run(_measured(args, machine, known))
    facts = {
        "date": today(),
        "hardware": machine.hardware,
        "driver": machine.driver,
        "software": ", ".join(f"{name} {text}" for name, text in machine.software.items()),
        "model": Path(args.model_path).name,
        "engines": "rehearsed: the simulator in their place" if args.rehearse else "",
        "command": command_line(),
    }
    text, kept = report(facts, rows, outlook, rehearsed=args.rehearse)
    print(text)
    write(args.out, f"{text}\n".encode())
    write(args.json, to_json({"rows": msgspec.to_builtins(rows), "facts": facts}))
    return 0 if kept else 1


def _read_outlook(file: str) -> Outlook:
    try:
        return read_outlook(Path(file).read_bytes())
    except OSError as error:
        raise OutlookError(f"{file}: cannot be read: {error.strerror}") from error


def _planned(args: argparse.Namespace, machine: Machine) -> Outlook:
    """Return what the planner says; nothing when it fails, because what is measured can be held
    against a plan at any time, and cards cannot be had at any time."""
    gpu = args.gpu or predictions.gpu_type(machine.gpus)
    try:
        return read_outlook(_plan(args, gpu))
    except OutlookError as error:
        say(f"no predictions: {error}; give --predictions with the rows afterwards")
        return Outlook(predictions=[], gpu=gpu)


def _plan(args: argparse.Namespace, gpu: str) -> bytes:
    lacking = {"--model-path": args.model_path, "--gpu": gpu}
    if names := [name for name, value in lacking.items() if not value]:
        raise OutlookError(f"the planner needs {' and '.join(names)}")
    command = [sys.executable, "-m", "backends.cli", "plan", args.model_path, "--gpu", gpu]
    command += ["--class", "online", "--json"]
    try:
        done = subprocess.run(  # noqa: S603 - our own program
            command, capture_output=True, timeout=PLAN_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise OutlookError(f"`doherty plan` took over {PLAN_TIMEOUT_S:g} s") from error
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip()[-500:]
        raise OutlookError(f"`doherty plan` ended with {done.returncode}: {said}")
    return done.stdout


async def _measured(
    args: argparse.Namespace, machine: Machine, known: set[Configuration]
) -> list[Row]:
    every = [
        Configuration(engine, parallel, weights)
        for engine in args.engines
        for parallel in args.tp
        for weights in args.weights
    ]
    wanted = [each for each in every if each not in known]
    cards = args.gpus or len(machine.gpus)
    deadline_s = time.monotonic() + args.limit_s
    runnable, rows = predictions.that_fit(wanted, cards)
    for wave in waves(runnable, cards, args.together):
        if time.monotonic() > deadline_s:
            rows += [predictions.not_run(each, "the time was up") for each in wave]
            continue
        say(f"starting {', '.join(each.text for each in wave)}")
        rows += await _wave(args, wave)
    return rows


async def _wave(args: argparse.Namespace, wave: Sequence[Configuration]) -> list[Row]:
    """Start configurations beside each other, each on its own cards; measure one by one."""
    cards = visible_devices()[: args.gpus or len(this_machine().gpus) or None]
    options = [
        options_for(args, each, ",".join(devices))
        for each, devices in zip(wave, placed(wave, cards), strict=True)
    ]

    async def use(place: int, running: Running) -> Row:
        row = await _one(wave[place], running, args.answer_tokens)
        return msgspec.structs.replace(row, gpu=this_machine().hardware)

    rows = []
    for each, found in zip(wave, await abreast(options, use), strict=True):
        row = predictions.failed(each, str(found)) if isinstance(found, RunError) else found
        say(f"{each.text}: {row.failure or f'{row.token_ms:.2f} ms a token'}")
        rows.append(row)
    return rows


def options_for(args: argparse.Namespace, each: Configuration, devices: str) -> EngineOptions:
    """Return how a configuration is started."""
    more: dict[str, object] = {"devices": devices, "tensor_parallel": each.tensor_parallel}
    if each.weights == "fp8" and args.fp8_model_path:
        more["model_path"] = args.fp8_model_path
    elif each.weights == "fp8":
        more["quantization"] = "fp8"
    options = engine_options(args, each.engine, **more)
    words = () if args.rehearse else neighbour_words(each.engine, args.together)
    return msgspec.structs.replace(options, args=(*options.args, *words))


async def _one(each: Configuration, running: Running, answer_tokens: int) -> Row:
    async with client_of(running.url) as client:
        probe = Probe(client, await model_name(client), time.time_ns())
        prompt = probe.prompt(PROMPT_TOKENS)
        await probe.ask(prompt, answer_tokens // 2)  # everything has run once
        found = await probe.decode([prompt], answer_tokens, REPEATS)
        return Row(
            configuration=each,
            version=await engine_version(client),
            token_ms=found.token_ms,
            ready_s=running.ready_s,
        )
