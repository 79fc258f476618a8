"""Measures the rungs between serving and nothing, of one real engine, through Doherty.

`doherty up` is started with one replica, and told to lower and raise it as an operator would:
asleep (the engine's own calls), suspended (the driver's), both, no process but an image on disk.
Each step says how long down and up took, what was held meanwhile, and whether greedy answers and
the prefix cache are what they were; the seconds up are held against a start with warm caches in the
same run. SGLang sleeps in one way or has a small image, so it is started once for each.
`--swap N` has two models share the card, `--copies N` brings several replicas up from one image.

    python -m loadtest gpu ladder --engine vllm --model-path models/qwen3-8b --swap 10 \\
        --out ladder.txt -- --max-model-len 16384 --kv-cache-memory-bytes 3G

Weights should be those of files (`make_model.py --weights 1`): what an engine draws itself cannot
be read again, so its image would hold it. The simulator takes the engine's part without a GPU:

    python -m loadtest gpu ladder --engine simulator --gpus 0 --swap 10 -- --startup-seconds 10
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import sys
from collections.abc import Awaitable, Callable

import msgspec

from loadtest.gpu import machine, rungs, serving, stopping, swapping
from loadtest.gpu.command import add_stack_arguments, finish, run_in_folder, stack_options
from loadtest.gpu.rungs import Ladder
from loadtest.gpu.scene import QUICK, Scene
from loadtest.gpu.stack import Stack, StackOptions
from loadtest.gpu.steps import SLACK, Findings, Step, run_steps, status_of

SUMMARY = "seconds, memory and answers on each rung of the ladder, of one real engine"
SLEEPS, IMAGE = "start with warm caches", "an image, by another start"
BOTH = "start with warm caches, and an image"
SECOND = "second model on the card"

ONE_WAY = frozenset({"sglang"})  # a flag of its start says whether it sleeps with its weights

Work = Callable[[Ladder, Findings], Awaitable[None]]


def add_arguments(command: argparse.ArgumentParser) -> None:
    add_stack_arguments(command)
    add = command.add_argument
    add("--restores", type=int, default=3, help="starts from the image (default %(default)s)")
    add("--copies", type=int, default=0, help="replicas from one image at once, on as many cards")
    add("--swap", type=int, default=0, metavar="N", help="swap two models on one card N times")
    add("--gpus", default="auto", help="of the manager (default %(default)s)")
    add("--without", default="", help="leave out steps that begin with these, by commas")


def all_steps(ladder: Ladder, args: argparse.Namespace) -> list[Step]:
    """Return the steps in their order; those that come last are left out first."""
    real = args.engine != "simulator"
    start_s = serving.USUAL_START_S if real else 3.0

    def step(name: str, work: Work, usual_s: float, needs: str = serving.READY) -> Step:
        return Step(
            name=name,
            run=functools.partial(work, ladder),
            usual_s=usual_s if real else usual_s / 10,
            limit_s=usual_s * SLACK,
            needs=needs,
        )

    def starts(name: str, work: Work, usual_s: float, count: int = 1) -> Step:
        limit_s = count * (3 * start_s + args.start_timeout)
        return msgspec.structs.replace(step(name, work, usual_s), limit_s=limit_s)

    def again(name: str, *, sleep: bool, snapshot: bool) -> Step:
        work = functools.partial(rungs.start_again, sleep=sleep, snapshot=snapshot)
        return starts(name, work, 100 if snapshot else 70)

    ready = serving.ready_step(ladder.scene)
    apart = args.engine in ONE_WAY
    disk = functools.partial(rungs.from_disk, times=args.restores)
    steps = [
        msgspec.structs.replace(ready, run=functools.partial(_ready, ladder)),
        step("suspended with its cache", rungs.with_its_cache, 45),
        again(SLEEPS if apart else BOTH, sleep=True, snapshot=not apart),
        step("asleep", rungs.asleep, 25),
        step("asleep and suspended", rungs.asleep_and_suspended, 25),
        *([again(IMAGE, sleep=False, snapshot=True)] if apart else []),
        step("from disk", disk, 15.0 * args.restores),
    ]
    if args.copies:
        copies = functools.partial(rungs.copies, count=args.copies)
        steps.append(step(f"{args.copies} copies", copies, 40))
    if args.swap:
        second = functools.partial(swapping.second_model, cards=_cards(args.gpus))
        rounds = functools.partial(swapping.swap, rounds=args.swap)
        steps += [
            starts(SECOND, second, 150, count=2),
            step(f"swapped {args.swap} times", rounds, 8.0 * args.swap, SECOND),
        ]
    left_out = [name.strip() for name in args.without.split(",") if name.strip()]
    steps = [s for s in steps if not any(s.name.startswith(name) for name in left_out)]
    stop = functools.partial(stopping.drain_and_stop, ladder.scene)
    steps.append(Step(name="drain and stop", run=stop, usual_s=20, kept=True))
    return steps


async def _ready(ladder: Ladder, found: Findings) -> None:
    """The first start. Whether its caches were warm, the figure of compilation says."""
    await serving.ready(ladder.scene, found)
    starting, ready = (found.figures.get(f"engine_{state}") for state in ("starting", "ready"))
    if isinstance(starting, float) and isinstance(ready, float):
        ladder.start_s = ready - starting
    await ladder.remember(found)


def run(args: argparse.Namespace) -> int:
    try:
        options = _options(args)
    except ValueError as error:
        print(f"loadtest: {error}", file=sys.stderr)
        return 2
    return run_in_folder(args, options, lambda stack: _climb(args, stack))


def _options(args: argparse.Namespace) -> StackOptions:
    """Return what is started first: an engine that neither sleeps nor has an image."""
    for name in ("restores", "copies", "swap"):
        if getattr(args, name) < 0:
            raise ValueError(f"--{name}: expected 0 or more")
    options = stack_options(args)
    manager = {} if args.gpus == "auto" else {"gpus": args.gpus}
    pool = {"gpus": 1} if args.gpus != "auto" else {}
    return msgspec.structs.replace(options, sleep=False, manager=manager, pool=pool)


def _cards(selection: str) -> int:
    """Return how many cards the manager has; a rehearsal without any pretends to have one."""
    return len(machine.named(selection)) or len(machine.gpus()) or 1


async def _climb(args: argparse.Namespace, stack: Stack) -> int:
    scene = Scene(stack, QUICK, args.seed)
    ladder = Ladder(scene)
    scene.header |= machine.header(await asyncio.to_thread(machine.gpus))
    try:
        found = await run_steps(
            all_steps(ladder, args), args.limit_s, lambda text: print(text, flush=True)
        )
    finally:
        ladder.close()
        await scene.close()
        await stack.end()
    finish(args, "The ladder", scene.header, found)
    return status_of(found)
