"""Proves on the wire that a Doherty in front of one real engine does what it says.

`doherty up` is started with one replica of the engine, as a user would, and judged from outside:
that it comes up, that the official client is served, that cached tokens are reported and predicted,
that the engine's KV events are heard and understood and its KV memory is followed, that a client
that leaves stops the engine's work, that a sleeping engine wakes with the same answers, what the
proxy costs, and that at the end nothing is left. Each step ends as PASS, FAIL or NOT RUN; a run
goes on after a failure, leaves out its last steps when --limit-s is short, and returns 1 if any
step failed.

    python -m loadtest gpu prove --engine vllm --model-path models/qwen3-8b --out vllm.txt \\
        -- --load-format dummy --max-model-len 40960

Arguments after `--` are the engine's. The simulator takes the engine's part where there is no GPU:

    python -m loadtest gpu prove --engine simulator -- --dialect sglang
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import sys
from collections.abc import Awaitable, Callable

from loadtest.gpu import caching, cost, extra, leaving, machine, serving, sleeping, stopping
from loadtest.gpu.command import (
    add_stack_arguments,
    finish,
    run_in_folder,
    stack_options,
)
from loadtest.gpu.scene import QUICK, Measure, Scene
from loadtest.gpu.stack import Stack
from loadtest.gpu.steps import Findings, Step, run_steps, status_of

SUMMARY = "one real engine behind the proxy, judged on the wire"


def add_arguments(command: argparse.ArgumentParser) -> None:
    add_stack_arguments(command)
    add = command.add_argument
    add("--steps", default="", help="only these, by name, separated by commas")
    add("--without", default="", help="leave these out")
    add("--quick", action="store_true", help="a small measure of everything")
    add("--cost-pairs", type=int, default=0, help="pairs of each cell of the cost step")
    add("--cost-s", type=float, default=0.0, help="time of the cost step")
    add(
        "--also",
        action="append",
        default=[],
        metavar="COMMAND",
        help="run this before the end; {engine}, {proxy} and {model} are filled in",
    )
    add("--also-s", type=float, default=60.0, help="what each of them usually takes")


Work = Callable[[Scene, Findings], Awaitable[None]]


def all_steps(scene: Scene, args: argparse.Namespace) -> list[Step]:
    """Return the steps in their order; those that come last are left out first."""
    costs = cost.options_of(args)

    def step(name: str, work: Work, usual_s: float, *, spare: bool = False) -> Step:
        run = functools.partial(work, scene)
        return Step(name=name, run=run, usual_s=usual_s, needs=serving.READY, spare=spare)

    steps = [
        serving.ready_step(scene),
        step("official client", serving.official_client, 3),
        step("whole answer", serving.whole_answer, 2),
        step("cached again", serving.cached_again, 2),
        step("conversation", serving.conversation, 5),
        step("prediction", caching.prediction, 30),
        step("events heard", caching.events_heard, 3),
        step("evictions", caching.evictions, 25, spare=True),
        step("occupancy", caching.occupancy, 15),
        step("left mid-prefill", leaving.mid_prefill, 15),
        step("left mid-stream", leaving.mid_stream, 8),
        step("sleep and wake", sleeping.sleep_and_wake, 30),
        step("cost", functools.partial(cost.step, costs), costs.usual_s),
    ]
    for command in args.also:
        work = functools.partial(extra.run_command, command)
        steps.append(step(f"also: {command.split(' --')[0]}", work, args.also_s))
    stop = functools.partial(stopping.drain_and_stop, scene)
    steps.append(Step(name="drain and stop", run=stop, usual_s=20, kept=True))
    return steps


def chosen(steps: list[Step], only: str, without: str) -> list[Step]:
    """Return the steps that were asked for, the first and the last always. Raises `ValueError`."""
    names = {step.name for step in steps}
    asked = {name.strip() for name in only.split(",") if name.strip()}
    left = {name.strip() for name in without.split(",") if name.strip()}
    if unknown := sorted((asked | left) - names):
        raise ValueError(f"no step '{unknown[0]}'; there are {', '.join(sorted(names))}")
    kept = [step for step in steps[1:-1] if (not asked or step.name in asked)]
    return [steps[0], *(step for step in kept if step.name not in left), steps[-1]]


def run(args: argparse.Namespace) -> int:
    try:
        options = stack_options(args)
    except ValueError as error:
        print(f"loadtest: {error}", file=sys.stderr)
        return 2
    return run_in_folder(args, options, lambda stack: _prove(args, stack))


async def _prove(args: argparse.Namespace, stack: Stack) -> int:
    scene = Scene(stack, QUICK if args.quick else Measure(), args.seed)
    steps = chosen(all_steps(scene, args), args.steps, args.without)
    scene.header |= machine.header(await asyncio.to_thread(machine.gpus))
    try:
        found = await run_steps(steps, args.limit_s, lambda text: print(text, flush=True))
    finally:
        await scene.close()
        await stack.end()
    finish(args, "Proofs", scene.header, found)
    return status_of(found)
