"""How a pool should have grown: scaling laws in virtual time, under the same bursts.

The project's own control law (`backends.scaling` itself, not a copy) beside Knative's autoscaler,
target tracking as Kubernetes does it, as many replicas as the peak needs, an oracle that knows the
future and has the same start time, and capacity that is there at once. Replicas are a model of one
engine (`loadtest.scaling.replicas`); requests wait in front of them and bind late. Loads are steps,
noise, waves, a step whose caches fill, and 29 minutes of a public code assistant.

Relative figures only: nothing fails, no client leaves, every start takes its time exactly, and what
is told of a pool is true and new. Figures are means over `--seeds` (a trace is what it is, and runs
once): of a single one, a rival that happened to have a replica too many before a step is ahead.

example:
  python -m loadtest scaling --loads step10,noise --starts 15
  python -m loadtest scaling --check --processes 2
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path

import msgspec

from loadtest.scaling.cells import LAWS, Cell, Figures, mean_of, run_cell
from loadtest.scaling.judge import Miss, cell_table, misses, summary
from loadtest.scaling.loads import LOADS

SUMMARY = "laws of scaling under bursts, against rivals and an oracle, in virtual time"


def add_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--loads", type=_loads, default=tuple(LOADS), metavar="NAMES", help=f"of {','.join(LOADS)}")
    add("--starts", type=_starts, default=(2.0, 15.0, 60.0), metavar="S", help="default 2,15,60")
    add("--seeds", type=_seeds, default=(7, 8, 9), metavar="N", help="default 7,8,9")
    add("--check", action="store_true", help="status 1 where a target is missed")
    add("--processes", type=int, default=1, metavar="N", help="cells side by side")
    add("--json", metavar="FILE", help="also write everything as JSON")


def run(args: argparse.Namespace) -> int:
    """Run the command. Returns 0, or 1 where `--check` found a target missed."""
    missed: list[Miss] = []
    found: list[tuple[Cell, dict[str, Figures]]] = []
    cells = [Cell(load, start_s) for load, start_s in product(args.loads, args.starts)]
    for cell, figures in _run(cells, args.seeds, max(1, args.processes)):
        print(cell_table(cell, figures), end="\n\n", flush=True)
        missed += misses(cell, figures)
        found.append((cell, figures))
    print(summary(missed, len(cells)))
    if args.json:
        Path(args.json).write_bytes(msgspec.json.encode({"cells": found, "missed": missed}))
    return 1 if args.check and missed else 0


def _run(
    cells: list[Cell], seeds: tuple[int, ...], processes: int
) -> Iterator[tuple[Cell, dict[str, Figures]]]:
    compared = partial(compare, seeds=seeds)
    if processes == 1:
        yield from map(compared, cells)
        return
    with multiprocessing.get_context("spawn").Pool(processes) as workers:
        yield from workers.imap(compared, cells)


def compare(cell: Cell, seeds: tuple[int, ...]) -> tuple[Cell, dict[str, Figures]]:
    """Return what each law came to in one cell, in the mean over some seeds."""
    seeds = seeds[:1] if LOADS[cell.load].recorded else seeds
    cells = [cell.seeded(seed) for seed in seeds]
    return cell, {law: mean_of([run_cell(one, law) for one in cells]) for law in LAWS}


def _seeds(text: str) -> tuple[int, ...]:
    words = text.split(",")
    if not all(word.isdecimal() for word in words):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 7,8,9")
    return tuple(int(word) for word in words)


def _loads(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    unknown = [name for name in names if name not in LOADS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no load {unknown[0]!r}; there are {', '.join(LOADS)}")
    return names


def _starts(text: str) -> tuple[float, ...]:
    try:
        starts = tuple(float(word) for word in text.split(","))
    except ValueError:
        starts = ()
    if not starts or not all(0 < start_s <= 600 for start_s in starts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of seconds such as 2,15,60")
    return starts
