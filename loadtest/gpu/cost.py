"""What the proxy costs on the real path: time to first token and time per token, both ways.

One client process asks one engine, directly and through the proxy, in turn and in random order: the
same cached prompts, so that the engine's own time is short and steady, streamed. In each round
every cell (a prompt size at a concurrency) is asked three times: directly, directly again, through
the proxy. *Directly again* is the control: what it differs by is noise. The streams of a crowd
begin at moments that are drawn, the same on each way, as those of clients that know nothing of each
other.

The client is the same code on both ways (a socket, no JSON for tokens); what it costs itself is in
all three. Time per token is taken at each event after the first. Promised are p50 within 1 ms and
p99 within 3 ms.

The step is judged by all sizes together, for each concurrency: a single cell has a few dozen first
tokens, and where the engine's own times scatter by more than the limit they say nothing of 1 ms; it
is UNDECIDED there, in its row, and counts for nothing. Of the eight pooled differences (two
concurrencies, two metrics, p50 and p99) one whose interval lies wholly beyond its limit fails the
step. To pass, every one must have its upper end within: since all are needed, a promise that is not
kept passes in about one of forty runs at most (2.5 % lie above an interval of 95 %), however many
are asked for. A kept one fails as rarely for each difference that is just at its limit, and never
for those far from it. Between the two the step is NOT RUN, undecided, with the intervals; more
--cost-pairs and --cost-s narrow them.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import itertools
import random
import sys
from collections.abc import Sequence

import msgspec
import uvloop
from typing_extensions import override

from loadtest.client import Client, RequestError
from loadtest.gpu import asks, machine, paired, serving, stopping
from loadtest.gpu.asks import COMPLETIONS
from loadtest.gpu.command import (
    add_stack_arguments,
    finish,
    run_in_folder,
    stack_options,
)
from loadtest.gpu.paired import Comparison, Judgement
from loadtest.gpu.scene import Measure, Scene
from loadtest.gpu.stack import Stack, client
from loadtest.gpu.steps import Finding, Findings, Step, run_steps, status_of
from loadtest.run import RunError
from loadtest.wire import AnswerReader

SUMMARY = "what the proxy adds to each token, direct against through it"
ARMS = ("direct", "again", "proxied")
P50_LIMIT_MS, P99_LIMIT_MS = 1.0, 3.0
ANSWER_TIMEOUT_S = 60.0
SPREAD_S = 0.05  # over which the streams of a crowd begin: clients do not ask all at once
FIRST, GAP = "first token", "per token"
POOLED = "all sizes x "
QUICK_ROUNDS = 6


class CostOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How much is asked."""

    sizes: tuple[int, ...] = (32, 1024, 8192)
    concurrencies: tuple[int, ...] = (1, 8)
    pairs: int = 200  # of each cell, as far as the time goes
    seconds: float = 120.0
    tokens: int = 12  # of an answer
    seed: int = 1

    @property
    def usual_s(self) -> float:
        return self.seconds + 5


class Cell(msgspec.Struct, frozen=True):
    """One sort of request."""

    size: int
    concurrency: int

    @property
    def name(self) -> str:
        return f"{self.size} tokens x {self.concurrency}"


class Samples(msgspec.Struct):
    """Of one cell and arm: for each round what each of its streams took, in ms."""

    first: list[list[float]] = []
    gaps: list[list[float]] = []


Table = dict[Cell, dict[str, Samples]]


class GapReader(AnswerReader):
    """An answer whose every event's arrival is kept."""

    __slots__ = ("at_s",)

    def __init__(self) -> None:
        super().__init__()
        self.at_s: list[float] = []

    @override
    def feed(self, data: bytes, now_s: float) -> bool:
        complete = super().feed(data, now_s)
        self.at_s.extend([now_s] * (self.content_events - len(self.at_s)))
        return complete


def options_of(args: argparse.Namespace) -> CostOptions:
    """Return what the command line asks for."""
    base = CostOptions(seed=args.seed)
    pairs, seconds = args.cost_pairs or base.pairs, args.cost_s or base.seconds
    if getattr(args, "quick", False):
        base = msgspec.structs.replace(base, sizes=(32, 1024), tokens=8)
        pairs, seconds = args.cost_pairs or QUICK_ROUNDS, args.cost_s or 5.0
    return msgspec.structs.replace(base, pairs=pairs, seconds=seconds)


def plan(options: CostOptions, draw: random.Random) -> list[list[tuple[Cell, str]]]:
    """Return the rounds: every cell and arm in each, in random order.

    A cell of n streams counts n pairs a round, so it is in one round of n only.
    """
    rounds = []
    for number in range(options.pairs):
        due = [
            (Cell(size, concurrency), arm)
            for size in options.sizes
            for concurrency in options.concurrencies
            if number % concurrency == 0
            for arm in ARMS
        ]
        draw.shuffle(due)
        rounds.append(due)
    return rounds


async def one(target: Client, body: bytes, delay_s: float = 0.0) -> tuple[float, list[float]]:
    """Ask once; return the ms to the first token and between the others. Raises `RunError`."""
    if delay_s:
        await asyncio.sleep(delay_s)
    reader, begun_s = GapReader(), target.now_s()
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            await target.post(COMPLETIONS, body, reader=reader)
    except (RequestError, TimeoutError) as error:
        raise RunError(f"{type(error).__name__}: {error}") from error
    asks.read_answer(reader, begun_s, 0.0)
    at = reader.at_s
    return 1e3 * (at[0] - begun_s), [
        1e3 * (later - earlier) for earlier, later in itertools.pairwise(at)
    ]


async def measure(
    targets: dict[str, Client], model: str, options: CostOptions
) -> tuple[Table, int]:
    """Ask everything; return what was taken, and how many rounds there was time for."""
    draw, loop = random.Random(options.seed), asyncio.get_running_loop()
    cells = [Cell(size, count) for size in options.sizes for count in options.concurrencies]
    prompts = {cell: [asks.ids(cell.size, draw) for _ in range(cell.concurrency)] for cell in cells}
    table: Table = {cell: {arm: Samples() for arm in ARMS} for cell in cells}

    async def crowd(
        cell: Cell, arm: str, tokens: int, delays_s: Sequence[float] = (0.0,)
    ) -> list[tuple[float, list[float]]]:
        asked = [
            one(targets[arm], asks.completion(model, prompt, tokens), delay_s)
            for prompt, delay_s in zip(prompts[cell], itertools.cycle(delays_s), strict=False)
        ]
        return await asyncio.gather(*asked)

    for cell in cells:  # into the cache
        await crowd(cell, ARMS[0], 1)
    deadline_s, done = loop.time() + options.seconds, 0
    for due in plan(options, draw):
        if loop.time() > deadline_s:
            break
        for cell, arm in due:
            delays_s = [0.0]
            if cell.concurrency > 1:  # its connections may have been idle too long: open them
                await crowd(cell, arm, 1)
                same = random.Random(f"{options.seed} {done} {cell.name}")  # for each arm
                delays_s = [same.uniform(0, SPREAD_S) for _ in range(cell.concurrency)]
            taken = await crowd(cell, arm, options.tokens, delays_s)
            samples = table[cell][arm]
            samples.first.append([first for first, _ in taken])
            samples.gaps.append([gap for _, gaps in taken for gap in gaps])
        done += 1
    return table, done


def compared(table: Table, draw: random.Random) -> dict[tuple[str, str], Comparison]:
    """Return each cell's comparison by its name and metric, and those of all sizes together."""
    groups: dict[str, list[Cell]] = {cell.name: [cell] for cell in table}
    for cell in table:
        groups.setdefault(f"{POOLED}{cell.concurrency}", []).append(cell)
    result = {}
    for name, cells in groups.items():
        for metric in (FIRST, GAP):
            relative = name.startswith(POOLED)
            direct, again, proxied = (
                _rounds(table, cells, arm, metric, relative=relative) for arm in ARMS
            )
            if paired.flat(proxied):
                result[name, metric] = paired.compare(direct, again, proxied, draw)
    return result


def _rounds(
    table: Table, cells: Sequence[Cell], arm: str, metric: str, *, relative: bool
) -> list[list[float]]:
    """Return the rounds of an arm. A relative first token is taken from its cell's own median, so
    that the sizes can be put together without their differences counting as spread.
    """
    found: list[list[float]] = []
    for cell in cells:
        taken = table[cell][arm]
        if metric == GAP:
            found += taken.gaps
            continue
        every = paired.flat([one for name in ARMS[:2] for one in table[cell][name].first])
        base = paired.quantile(sorted(every), paired.P50) if every and relative else 0.0
        found += [[value - base for value in one] for one in taken.first]
    return found


def judgements(
    result: dict[tuple[str, str], Comparison],
) -> dict[tuple[str, str], tuple[Judgement, Judgement]]:
    """Judge p50 and p99 of each."""
    return {
        key: (
            paired.judge(one.p50, one.control_p50, P50_LIMIT_MS, one.samples, 20),
            paired.judge(one.p99, one.control_p99, P99_LIMIT_MS, one.samples, 100),
        )
        for key, one in result.items()
    }


def shown(result: dict[tuple[str, str], Comparison]) -> str:
    """Return the table: differences in ms, their intervals, and the control beside them."""
    lines = [
        "ms; +: proxied less direct (interval of 95 %), control: direct again less direct;",
        "a first token of all sizes is relative to the direct median of its size (-: the zero)",
        f"{'':<33}{'n':>6}{'direct p50':>11}{'p99':>8}{'p50 +':>8}{'':>17}{'p99 +':>8}{'':>17}"
        f"{'paired +':>9}{'control p50':>12}{'p99':>8}{'paired':>8}",
    ]
    verdicts = judgements(result)
    for (name, metric), one in result.items():
        word = " ".join(
            f"{which} {verdict.value}"
            for which, verdict in zip(("p50", "p99"), verdicts[name, metric], strict=True)
            if verdict is not Judgement.KEPT
        )
        relative = metric == FIRST and name.startswith(POOLED)
        p50 = "-" if relative else f"{one.p50_direct:.3f}"
        lines.append(
            f"{name + ', ' + metric:<33}{one.samples:>6}{p50:>11}"
            f"{one.p99_direct:>{'+' if relative else ''}8.3f}"
            f"{one.p50.value:>8.3f}{_interval(one.p50):>17}"
            f"{one.p99.value:>8.3f}{_interval(one.p99):>17}{one.paired_p50:>9.3f}"
            f"{one.control_p50:>12.3f}{one.control_p99:>8.3f}{one.control_paired_p50:>8.3f}"
            f"  {word}".rstrip()
        )
    return "\n".join(lines)


def _interval(found: paired.Difference) -> str:
    return f"[{found.low:.3f}, {found.high:.3f}]"


async def step(options: CostOptions, scene: Scene, found: Findings) -> None:
    """Measure on the running stack."""
    await measured(scene.stack.engine_url, scene.stack.proxy_url, scene.model, options, found)


async def measured(
    direct_url: str, proxy_url: str, model: str, options: CostOptions, found: Findings
) -> None:
    """Measure both ways, and judge."""
    direct, again, proxied = client(direct_url), client(direct_url), client(proxy_url)
    targets = dict(zip(ARMS, (direct, again, proxied), strict=True))
    try:
        table, rounds = await measure(targets, model, options)
    finally:
        for target in targets.values():
            target.close()
    result = compared(table, random.Random(options.seed))
    found.figures["rounds"] = rounds
    found.table = shown(result)
    found.data = [
        {"cell": name, "metric": metric, **msgspec.to_builtins(one)}
        for (name, metric), one in result.items()
    ]
    conclude(result, found)


def conclude(result: dict[tuple[str, str], Comparison], found: Findings) -> None:
    """Judge the step by the pooled rows; of single cells only tell how many are beyond."""
    beyond = 0
    for (name, metric), verdicts in judgements(result).items():
        if not name.startswith(POOLED):
            beyond += verdicts.count(Judgement.BROKEN)
            continue
        one = result[name, metric]
        promises = (("p50", one.p50, P50_LIMIT_MS), ("p99", one.p99, P99_LIMIT_MS))
        for (which, taken, limit_ms), verdict in zip(promises, verdicts, strict=True):
            text = (
                f"{name}, {metric}: {which} {taken.value:+.3f} ms {_interval(taken)}, "
                f"within {limit_ms:g}: {verdict.value}"
            )
            found.claim(verdict is not Judgement.BROKEN, text)
            if verdict in (Judgement.UNDECIDED, Judgement.TOO_FEW):
                found.undecided.append(text)
    found.figures["single_cells_beyond"] = beyond


# --- the command of its own -----------------------------------------------------------------------


def add_arguments(command: argparse.ArgumentParser) -> None:
    add_stack_arguments(command)
    base, add = CostOptions(), command.add_argument
    add("--direct", default="", metavar="URL", help="a running engine, with --proxy")
    add("--proxy", default="", metavar="URL", help="a running Doherty in front of it")
    add("--cost-pairs", type=int, default=base.pairs, help="of each cell (default %(default)s)")
    add("--cost-s", type=float, default=base.seconds, help="at most so long (default %(default)s)")
    add("--quick", action="store_true", help="a small measure")


def run(args: argparse.Namespace) -> int:
    if bool(args.direct) != bool(args.proxy):
        print("loadtest: --direct and --proxy go together", file=sys.stderr)
        return 2
    if args.direct:
        return uvloop.run(_running(args))
    try:
        options = stack_options(args)
    except ValueError as error:
        print(f"loadtest: {error}", file=sys.stderr)
        return 2
    return run_in_folder(args, options, lambda stack: _started(args, stack))


async def _running(args: argparse.Namespace) -> int:
    header = machine.header(await asyncio.to_thread(machine.gpus))
    options = options_of(args)

    async def work(found: Findings) -> None:
        await measured(args.direct, args.proxy, args.model, options, found)

    return await _told(args, [Step(name="cost", run=work, usual_s=options.usual_s)], header)


async def _started(args: argparse.Namespace, stack: Stack) -> int:
    scene, options = Scene(stack, Measure(), args.seed), options_of(args)
    scene.header |= machine.header(await asyncio.to_thread(machine.gpus))
    steps = [
        serving.ready_step(scene),
        Step(
            name="cost",
            run=functools.partial(step, options, scene),
            usual_s=options.usual_s,
            needs=serving.READY,
        ),
        Step(
            name="drain and stop",
            run=functools.partial(stopping.drain_and_stop, scene),
            usual_s=20,
            kept=True,
        ),
    ]
    try:
        return await _told(args, steps, scene.header)
    finally:
        await scene.close()
        await stack.end()


async def _told(args: argparse.Namespace, steps: list[Step], header: dict[str, str]) -> int:
    found: list[Finding] = await run_steps(
        steps, args.limit_s, lambda text: print(text, flush=True)
    )
    finish(args, "Cost", header, found)
    return status_of(found)
