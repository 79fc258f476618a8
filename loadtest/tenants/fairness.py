"""What a tenant that floods takes from another, and what each gets for its weight.

A whole Doherty with simulated replicas, in real time; two tenants send prompts that share nothing.
First one floods alone: that is the capacity, in prompt and completion tokens a second. One whose
load is a part of its share of that (`--load`) is then watched

* alone      nobody else sends;
* at share   the other sends as much;
* flood      the other sends ten times its share (`--times`);
* as one     the same, and all of it under one tenant's key: what there is without tenants.

Told are its times to the first token, and how the 99th percentile under the flood compares with
both undisturbed ones. Then both flood, at weights 1:1 and 1:3, and the tokens that each was given
are held against them, as are the longest waits. At last one tenant sends 95 % of the capacity
online, with and without a flood of offline work: what that got done, and what it cost.

The cells alternate, `--repeat` times, and medians are told; every one runs on the same processes,
one after the other, and what is still waiting at its end is cancelled.

    python -m loadtest fairness
    python -m loadtest fairness --repeat 1 --seconds 12 --cells alone,flood
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import orjson
import uvloop

from loadtest.fleet import launched
from loadtest.measure import quantile
from loadtest.run import RunError
from loadtest.tenants.stage import DOHERTY, Setting, configuration, fleet_options, key_of
from loadtest.tenants.traffic import COMPLETE, Course, Record, Sender, send

SUMMARY = "what a tenant that floods takes from another, and tokens given against weights"
WEIGHTS = {"flooder": 1.0, "other": 1.0, "triple": 3.0}
CELLS = ("alone", "at share", "flood", "as one", "1:1", "1:3", "online", "with offline")
RATIO_MAX = 1.2
SHARE_ERROR_MAX = 0.05
ONLINE_LOAD = 0.95
PAUSE_S = 2.0


class Options(Setting, frozen=True, kw_only=True):
    """The load, and how long it lasts."""

    load: float = 0.8  # of its share, of the tenant that is watched
    times: float = 10.0
    prompts: tuple[int, ...] = (1000, 2000, 4000, 8000)
    output_tokens: int = 100
    seconds: float = 30.0  # of each cell
    warm: float = 12.0  # of those, not measured: what a newcomer has in hand is spent by then
    repeat: int = 3
    cells: tuple[str, ...] = CELLS
    seed: int = 1


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """What one sender had in one cell."""

    cell: str
    sender: str
    requests: int  # that began in the measured time
    complete: int
    refused: int
    tokens_per_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    ttft_max_s: float


def add_arguments(command: argparse.ArgumentParser) -> None:
    base, add = Options(), command.add_argument
    add("--replicas", type=int, default=base.replicas, help="simulated (default %(default)s)")
    add("--workers", type=int, default=base.workers, help="of the proxy (default %(default)s)")
    add("--profile", default=base.profile, help="of the simulated engines (default %(default)s)")
    add("--time-scale", type=float, default=base.time_scale, help="simulated seconds a second")
    add("--max-inputs", type=int, default=base.max_inputs, help="of a replica; 0: no limit")
    add("--chunk-tokens", type=int, default=base.chunk_tokens, help="of prompts in a step")
    add("--load", type=float, default=base.load, help="of its share, of the other (%(default)s)")
    add("--times", type=float, default=base.times, help="its share that the flooder sends")
    add("--output-tokens", type=int, default=base.output_tokens, help="of each answer")
    add("--prompts", type=_numbers, default=base.prompts, help="tokens, by commas")
    add("--seconds", type=float, default=base.seconds, help="of each cell (default %(default)s)")
    add("--warm", type=float, default=base.warm, help="of those, not measured (%(default)s)")
    add("--repeat", type=int, default=base.repeat, help="of all cells (default %(default)s)")
    add("--cells", type=_words, default=base.cells, help=f"of {', '.join(CELLS)} (all)")
    add("--seed", type=int, default=base.seed, help="of arrivals and sizes")
    add("--doherty", default=DOHERTY, metavar="COMMAND", help="default: this Python's")
    add("--json", metavar="FILE", help="also write everything as JSON")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(","))


def run(args: argparse.Namespace) -> int:
    """Run all cells. Raises `RunError`."""
    given = {name: getattr(args, name) for name in Options.__struct_fields__ if hasattr(args, name)}
    options = Options(**given)
    if unknown := set(options.cells) - set(CELLS):
        raise RunError(f"--cells: no cell '{min(unknown)}'; there are {', '.join(CELLS)}")
    capacity, cells = uvloop.run(run_all(options))
    print(table(capacity, cells, options))
    verdict = judge(cells)
    print("\n".join(verdict.lines))
    if args.json:
        Path(args.json).write_bytes(orjson.dumps([msgspec.to_builtins(cell) for cell in cells]))
    return 0 if verdict.kept else 1


async def run_all(options: Options) -> tuple[float, list[Cell]]:
    """Return the capacity in tokens a second, and all cells. Raises `RunError`."""
    found: list[Cell] = []
    async with launched(
        lambda ports, folder: configuration(options, WEIGHTS, ports, folder),
        fleet_options(options),
    ) as running:
        port = running.ports.proxy
        capacity = await _capacity(port, options)
        for turn in range(options.repeat):
            for name in options.cells:
                print(f"turn {turn + 1}: {name}", file=sys.stderr)
                senders = senders_of(name, capacity, options)
                course = Course(name=name, seconds=options.seconds, seed=options.seed + turn)
                seen = await send(port, senders, course)
                found += [look(name, each.name, seen, options) for each in senders]
                await asyncio.sleep(PAUSE_S)
    return capacity, found


async def _capacity(port: int, options: Options) -> float:
    """Return how many tokens a second come of a flood, after a first one that warms all up."""
    flood = Sender(
        name="all",
        key=key_of("flooder"),
        rate=40.0 * options.replicas * options.time_scale,
        prompts=options.prompts,
        output_tokens=options.output_tokens,
    )
    await send(port, [flood], Course(name="warm", seconds=options.seconds, seed=0))
    await asyncio.sleep(PAUSE_S)
    seen = await send(port, [flood], Course(name="capacity", seconds=options.seconds, seed=0))
    await asyncio.sleep(PAUSE_S)
    capacity = look("capacity", "all", seen, options).tokens_per_s
    if not capacity:
        fates = {record.fate for record in seen[0]}
        raise RunError(f"nothing was answered: {', '.join(sorted(fates))}")
    return capacity


def senders_of(cell: str, capacity: float, options: Options) -> list[Sender]:
    """Return who sends in a cell."""
    mean = statistics.fmean(options.prompts) + options.output_tokens
    share = capacity / 2.0 / mean  # requests a second of one of two equals

    def sender(name: str, tenant: str, rate: float, tier: str = "") -> Sender:
        return Sender(
            name=name,
            key=key_of(tenant),
            rate=rate,
            prompts=options.prompts,
            output_tokens=options.output_tokens,
            tier=tier,
        )

    load, flood = options.load * share, options.times * share
    other = sender("other", "other", load)
    match cell:
        case "alone":
            return [other]
        case "at share":
            return [other, sender("flooder", "flooder", load)]
        case "flood":
            return [other, sender("flooder", "flooder", flood)]
        case "as one":
            return [sender("other", "flooder", load), sender("flooder", "flooder", flood)]
        case "1:1":
            return [sender(name, name, flood) for name in ("flooder", "other")]
        case "1:3":
            return [sender(name, name, flood) for name in ("flooder", "triple")]
        case _:
            online = sender("other", "other", 2.0 * ONLINE_LOAD * share)
            offline = sender("offline", "other", flood, "flex")
            return [online] if cell == "online" else [online, offline]


def look(cell: str, name: str, seen: tuple[list[Record], float, float], options: Options) -> Cell:
    """Return the figures of one sender: of requests that began in the measured time.

    One whose first token has not come by the end has waited at least until then.
    """
    records, begun_s, ended_s = seen
    mine = [record for record in records if record.sender == name]
    from_s = begun_s + options.warm
    late_s = ended_s - PAUSE_S  # those that began later had no time to be answered
    measured = [record for record in mine if from_s <= record.due_s < late_s]
    waits = [
        (record.first_s or ended_s) - record.due_s
        for record in measured
        if not record.fate.startswith("failed")
    ]
    tokens = [r.tokens for r in mine if r.fate == COMPLETE and r.ended_s >= from_s]
    return Cell(
        cell=cell,
        sender=name,
        requests=len(measured),
        complete=sum(record.fate == COMPLETE for record in measured),
        refused=sum(record.fate.startswith("failed") for record in measured),
        tokens_per_s=sum(tokens) / (ended_s - from_s),
        ttft_p50_s=quantile(waits, 0.5) or 0.0,
        ttft_p99_s=quantile(waits, 0.99) or 0.0,
        ttft_max_s=max(waits, default=0.0),
    )


class Verdict(msgspec.Struct, frozen=True):
    """What was promised, and whether it was kept, in lines for people."""

    kept: bool
    lines: tuple[str, ...]


def judge(cells: Sequence[Cell]) -> Verdict:
    """Hold the figures against the promises."""
    kept, lines = True, []
    flood = _median(cells, "flood", "other", "ttft_p99_s")
    for base in ("alone", "at share"):
        undisturbed = _median(cells, base, "other", "ttft_p99_s")
        if flood and undisturbed:
            lines.append(f"p99 under the flood / {base}: {flood / undisturbed:.2f}")
            kept = kept and (base == "alone" or flood <= RATIO_MAX * undisturbed)
    for cell, name, weight in (("1:1", "other", 1.0), ("1:3", "triple", 3.0)):
        one = _median(cells, cell, "flooder", "tokens_per_s")
        other = _median(cells, cell, name, "tokens_per_s")
        if one and other:
            error = other / (one + other) / (weight / (weight + 1.0)) - 1.0
            lines.append(f"tokens at weights {cell}: 1:{other / one:.2f}, share {error:+.1%}")
            kept = kept and abs(error) <= SHARE_ERROR_MAX
    offline = _median(cells, "with offline", "offline", "tokens_per_s")
    if offline is not None:
        lines.append(f"offline beside {ONLINE_LOAD:.0%} online: {offline:.0f} tokens/s")
        kept = kept and offline > 0.0
    return Verdict(kept, tuple(lines))


def _median(cells: Sequence[Cell], cell: str, sender: str, figure: str) -> float | None:
    values = [getattr(c, figure) for c in cells if (c.cell, c.sender) == (cell, sender)]
    return statistics.median(values) if values else None


def table(capacity: float, cells: Sequence[Cell], options: Options) -> str:
    """Return the medians of all cells."""
    lines = [
        f"capacity {capacity:.0f} tokens/s, {options.replicas} replicas, "
        f"{options.workers} workers, {options.repeat} x {options.seconds:g} s",
        "cell          sender    requests  complete  refused  tokens/s    p50 s    p99 s    max s",
    ]
    for key in dict.fromkeys((cell.cell, cell.sender) for cell in cells):
        mine = [cell for cell in cells if (cell.cell, cell.sender) == key]
        middle = [
            statistics.median(getattr(cell, figure) for cell in mine)
            for figure in ("requests", "complete", "refused", "tokens_per_s", "ttft_p50_s",
                           "ttft_p99_s", "ttft_max_s")
        ]  # fmt: skip
        counts = "  ".join(f"{value:>8.0f}" for value in middle[:4])
        waits = "  ".join(f"{value:>7.3f}" for value in middle[4:])
        lines.append(f"{key[0]:<12}  {key[1]:<8}  {counts}  {waits}")
    return "\n".join(lines)
