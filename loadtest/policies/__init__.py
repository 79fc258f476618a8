"""Which replica should have taken it: routing policies in virtual time, on the same replicas.

Recorded requests are placed by the project's own policy (`doherty`: `proxy.core` itself, not a
copy), by the rules that other routers publish, and by oracles that see true caches and true
remaining work. Replicas are a model of continuous batching with chunked prefill and a prefix cache
(`--model mixed`) or a plain queue (`--model serial`); see `loadtest.policies.engines`.

Relative figures only. A rule is what its router publishes as we read it, not the product. Rules
that read events of the engines' caches get the truth with no delay. Left out is what the wire
brings: every answer streams and tells its usage, none fails, no client leaves, and what a rule or
the proxy itself costs takes no time. Another `--seed` moves
p95 and p99 by one or two percent, where lots are drawn by more: smaller differences are none.

example:
  python -m loadtest policies conversation --policies round_robin,llm-d,doherty,oracle --load 0.9
  python -m loadtest policies conversation --targets --processes 2
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from loadtest import plot, report
from loadtest.policies import charts, decisions, rivals, tables, targets
from loadtest.policies.cells import Burst, Cell, Figures, Source, check_policy, workload_of
from loadtest.policies.chains import POINTS
from loadtest.policies.runner import Result, Task, label, run_tasks
from loadtest.policies.synthetic import SYNTHETIC
from loadtest.policies.workload import Picked
from loadtest.traces import TraceError

MODELS = ("mixed", "serial")
SUMMARY = "routing policies against rivals and oracles, on modelled replicas in virtual time"
DEFAULT = (*rivals.RIVALS, "priced", "doherty", "greedy", "oracle")


def add_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("traces", nargs="*", default=["conversation"], metavar="TRACE",
        help=f"files, a shipped trace, or {', '.join(SYNTHETIC)}")  # fmt: skip
    add("--policies", type=_words, default=DEFAULT,
        help=f"of {', '.join(rivals.POLICIES)}; doherty, doherty:early, doherty:NAME")  # fmt: skip
    add("--targets", action="store_true", help="the cells behind the targets, and what was reached")
    add("--decisions", action="store_true", help="what one decision costs, by number of replicas")
    add("--json", metavar="FILE", help="also write everything as JSON; - is standard output")
    add("--plot", metavar="FILE", help="also draw it, as .png or .svg")
    add("--processes", type=_counts, default=(1,), metavar="N", help="runs side by side")
    add("--quiet", action="store_true", help="no progress")
    add = command.add_argument_group("the fleet, where lists are combined").add_argument
    add("--replicas", type=_counts, default=(8,), help="default 8")
    add("--cache", type=_counts, default=(1_000_000,), metavar="TOKENS", help="of KV, per replica")
    add("--model", choices=MODELS, help="of a replica (default: mixed; of targets: both)")
    add("--slow", type=_number, default=1.0, metavar="SPEED", help="of one; nobody is told")
    add("--burst", type=_burst, metavar="FACTOR:SECONDS:BEFORE",
        help="arrivals come so much faster; the rest of the replicas are SECONDS away")  # fmt: skip
    add = command.add_argument_group("the load").add_argument
    add("--load", type=_numbers, default=(0.75,), help="that round robin would have (default 0.75)")
    add("--users", type=_counts, default=(96,), help="of a closed loop (default 96)")
    add("--limit", type=_count, default=0, metavar="N", help="requests of each trace")
    add("--turns", type=_count, default=40, help="of a session at most (default 40)")
    add("--after", type=_count, default=0, metavar="N", help="left out (default: a tenth)")
    add(
        "--goodput", type=_number, default=0.0, metavar="S", help="find the rate with TTFT p95 of S"
    )
    add("--seed", type=int, default=7)
    add = command.add_argument_group("the proxies").add_argument
    add(
        "--proxies", type=_counts, default=(1,), metavar="K", help="that requests come to by chance"
    )
    add("--sharing", choices=("all", "none"), default="all", help="of decisions, between them")
    add("--note-delay", type=_number, default=0.005, metavar="S", help="until others hear of one")
    add("--scrape", type=_or_none, default=1.0, metavar="S", help="of gauges; 0: none (default 1)")
    add("--believed", type=_numbers, default=(1.0,), help="capacity of a cache, in true ones")
    add("--points", choices=POINTS, default="chain", help="of the prefix chain")


def run(args: argparse.Namespace) -> int:
    """Run the command. Returns 0; 1 when a target was missed; 2 when it cannot begin as asked."""
    try:
        for policy in args.policies:
            check_policy(policy)
        if args.plot:
            plot.check(args.plot)
        _check_folder(args.json)
        sources = [source_of(name, args, args.users[0]) for name in args.traces]
        for source in sources:
            workload_of(source)
    except (TraceError, plot.PlotError, ValueError) as error:
        print(f"loadtest: {error}", file=sys.stderr)
        return 2
    if args.decisions:
        costs = decisions.measure(sources[0])
        _print(decisions.table(costs), args)
        _write({"decisions": msgspec.to_builtins(costs)}, args)
        return 0
    if args.targets:
        models = (args.model,) if args.model else MODELS
        verdicts = targets.judge(sources, models, args.processes[0], _sayer(args))
        _print(targets.table(verdicts), args)
        _write({"targets": msgspec.to_builtins(verdicts)}, args)
        return 0 if all(verdict.kept for verdict in verdicts) else 1
    return _experiment(args)


def _check_folder(path: str | None) -> None:
    if path and path != "-" and not Path(path).resolve().parent.is_dir():
        raise ValueError(f"--json {path}: no such folder")


def _experiment(args: argparse.Namespace) -> int:
    cells = cells_of(args)
    tasks = [
        Task(cell=cell, policy=policy, ttft_s_max=args.goodput)
        for cell in cells
        for policy in args.policies
    ]
    results = run_tasks(tasks, args.processes[0], _sayer(args))
    shown: dict[Cell, list[Figures]] = {}
    values = []
    for cell in cells:
        found: dict[str, Result] = {
            policy: results[Task(cell=cell, policy=policy, ttft_s_max=args.goodput)]
            for policy in args.policies
        }
        figures = [value for value in found.values() if isinstance(value, Figures)]
        rates = {k: value for k, value in found.items() if isinstance(value, float)}
        if figures:
            shown[cell] = figures
            _print(tables.cell_table(cell, figures), args)
        if rates:
            _print(tables.goodput_table(cell, rates, args.goodput), args)
        values.append(
            {
                "cell": msgspec.to_builtins(cell),
                "label": label(cell),
                "figures": [msgspec.to_builtins(value) for value in figures],
                "goodput": rates,
            }
        )
    _write({"cells": values}, args)
    if args.plot and shown:
        charts.draw(shown, args.plot)
    return 0


def cells_of(args: argparse.Namespace) -> list[Cell]:
    """Return the cells that the lists on the command line span, in their order."""
    lists = (args.traces, args.users, args.replicas, args.cache, args.load, args.proxies,
             args.believed)  # fmt: skip
    cells = []
    for name, users, replicas, cache, load, proxies, believed in itertools.product(*lists):
        cells.append(
            Cell(
                source=source_of(name, args, users),
                replicas=replicas,
                cache_tokens=cache,
                load=load,
                model=args.model or MODELS[0],
                proxies=proxies,
                sharing=args.sharing,
                note_delay_s=args.note_delay,
                scrape_s=args.scrape,
                believed=believed,
                slow=args.slow,
                burst=args.burst,
                after=args.after,
                points=args.points,
                seed=args.seed,
            )
        )
    return cells


def source_of(name: str, args: argparse.Namespace, users: int) -> Source:
    return Source(name=name, picked=Picked(limit=args.limit, users=users, turns_max=args.turns))


def _sayer(args: argparse.Namespace) -> Callable[[str], None]:
    def say(text: str) -> None:
        if not args.quiet:
            print(text, file=sys.stderr)

    return say


def _print(text: str, args: argparse.Namespace) -> None:
    print(text, file=sys.stderr if args.json == "-" else sys.stdout, flush=True)


def _write(value: dict[str, Any], args: argparse.Namespace) -> None:
    if args.json == "-":
        sys.stdout.buffer.write(report.to_json(value))
    elif args.json:
        Path(args.json).write_bytes(report.to_json(value))


# --- what may be written on the command line ------------------------------------------------------


def _words(text: str) -> tuple[str, ...]:
    words = tuple(word.strip() for word in text.split(",") if word.strip())
    if not words or len(words) != len(set(words)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list such as round_robin,doherty")
    return words


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _or_none(text: str) -> float:
    return 0.0 if text == "0" else _number(text)


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(_number(word) for word in _words(text))


def _count(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return value


def _counts(text: str) -> tuple[int, ...]:
    return tuple(_count(word) for word in _words(text))


def _burst(text: str) -> Burst:
    words: Sequence[str] = text.split(":")
    if len(words) != 3:
        raise argparse.ArgumentTypeError(f"{text!r} is not FACTOR:SECONDS:BEFORE, such as 2:15:4")
    factor, cold_s, before = words
    return Burst(factor=_number(factor), cold_s=_or_none(cold_s), before=_count(before))
