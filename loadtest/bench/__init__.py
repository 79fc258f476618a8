"""What a request costs a proxy: ours and its rivals, in one run on one machine.

A mock engine and a load generator, both in C and compiled on the spot, share a core or two; the
proxies have the last core to themselves, all of them started and one at a time at work. Rounds are
interleaved (A B C, A B C), so that what else the machine does meets all alike; figures are medians
with the lowest and the highest round. Processor time is the proxy's own by the kernel's account,
all of its processes and threads, user and system; compare it rather than times on a clock, which a
busy machine stretches. Every answer is checked.

The exit status is 1 when a run failed or an answer was wrong; a target that is missed is said.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec
import orjson

from loadtest.bench import native, processes, targets
from loadtest.bench.rivals import Rival, Running, all_rivals, running
from loadtest.bench.scenarios import SCENARIOS, Bench, Sample, Scenario
from loadtest.run import RunError

_Named = TypeVar("_Named", Rival, Scenario)

SUMMARY = "what a proxied request costs, ours against rivals"
REPLICAS = 4
DIRECT = "direct"
VENV = Path("~/.cache/doherty-bench/venv")
PROGRAMS = Path("~/.cache/doherty-bench")


def add_arguments(command: argparse.ArgumentParser) -> None:
    names = ",".join(scenario.name for scenario in SCENARIOS)
    rivals = ",".join([DIRECT, *(rival.name for rival in all_rivals(VENV))])
    add = command.add_argument
    add("--scenarios", default=names, metavar="LIST", help="default %(default)s")
    add("--rivals", default=rivals, metavar="LIST", help="default: all, %(default)s")
    add("--rounds", type=int, default=5, help="interleaved (default %(default)s)")
    add("--seconds", type=float, default=2.0, help="of each run (default %(default)s)")
    add("--rivals-venv", type=Path, default=VENV.expanduser(), metavar="FOLDER", help="the routers")
    add("--json", metavar="FILE", help="also write every run as JSON; - is standard output")
    add("--quick", action="store_true", help="one short round")
    add("--quiet", action="store_true", help="no progress")


def run(args: argparse.Namespace) -> int:
    """Measure and report. Raises `RunError` when nothing could be measured."""
    scenarios = _chosen(args.scenarios, SCENARIOS, "scenario")
    everyone = all_rivals(args.rivals_venv)
    wanted = [name for name in args.rivals.split(",") if name]
    rivals = _chosen(",".join(name for name in wanted if name != DIRECT), everyone, "rival")
    for rival in [rival for rival in rivals if not rival.installed()]:
        print(f"{rival.name} is left out, it is not installed: {rival.hint}", file=sys.stderr)
        rivals.remove(rival)
    rounds, seconds = (1, 0.3) if args.quick else (args.rounds, args.seconds)
    say = (lambda text: None) if args.quiet else (lambda text: print(text, file=sys.stderr))
    processes.raise_descriptors()
    cores = processes.share_cores(os.sched_getaffinity(0))
    folder = Path(tempfile.mkdtemp(prefix="doherty-bench-"))
    with native.engine(native.build("engine", PROGRAMS.expanduser()), REPLICAS, cores.engine) as up:
        bench = Bench(folder, PROGRAMS.expanduser(), up, cores)
        bench.seconds = seconds
        bench.scale = 0.1 if args.quick else 1.0
        samples = list(_measured(bench, scenarios, rivals, DIRECT in wanted, rounds, say))
    shown = (
        [DIRECT, *(rival.name for rival in rivals)]
        if DIRECT in wanted
        else [rival.name for rival in rivals]
    )
    found = targets.spreads(samples, scenarios)
    judged = targets.verdicts(found, scenarios)
    text = targets.figures_table(found, scenarios, shown)
    if judged:
        text += "\n\n" + targets.verdicts_table(judged)
    if args.json != "-":
        print(text)
    _write(args.json, samples, judged)
    wrong = [one for one in samples if one.errors]
    for one in wrong:
        print(f"{one.rival}, {one.scenario}: {one.errors}", file=sys.stderr)
    shutil.rmtree(folder)
    return 1 if wrong else 0


def _measured(
    bench: Bench,
    scenarios: Sequence[Scenario],
    rivals: Sequence[Rival],
    direct: bool,
    rounds: int,
    say: Callable[[str], None],
) -> Iterator[Sample]:
    """Yield every run's sample: scenario by scenario, and in each the rivals turn by turn."""
    with contextlib.ExitStack() as started:
        lasting = [Running(name=DIRECT, port=bench.engine.ports[0])] if direct else []
        for rival in rivals:
            say(f"starting {rival.name}")
            lasting.append(started.enter_context(_running(bench, rival, "lasting")))
        for scenario in scenarios:
            for number in range(min(rounds, scenario.rounds_max)):
                for to in lasting:
                    taken = scenario.measure(bench, to)
                    say(_line(taken, scenario, number))
                    yield msgspec.structs.replace(taken, round=number)


def _running(bench: Bench, rival: Rival, name: str) -> contextlib.AbstractContextManager[Running]:
    folder = bench.folder / f"{rival.name}-{name}"
    return running(rival, folder, bench.engine.ports, bench.cores.proxy)


def _line(taken: Sample, scenario: Scenario, number: int) -> str:
    value = "-" if taken.value is None else targets.number(taken.value)
    return (
        f"{number + 1} {scenario.name:<7} {taken.rival:<20} {value:>8} {scenario.unit}, "
        f"{taken.rps:,.0f}/s, p50 {taken.p50_us:,.0f} us, {taken.resident_mb:.0f} MB"
    )


def _chosen(names: str, everything: Sequence[_Named], what: str) -> list[_Named]:
    known = {one.name: one for one in everything}
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if name not in known:
            raise RunError(f"no {what} {name}; there are {', '.join(known)}")
    return [known[name] for name in wanted]


def _write(
    target: str | None, samples: Sequence[Sample], judged: Sequence[targets.Verdict]
) -> None:
    if not target:
        return
    value = {"samples": msgspec.to_builtins(samples), "targets": msgspec.to_builtins(judged)}
    data = orjson.dumps(value, option=orjson.OPT_INDENT_2)
    if target == "-":
        print(data.decode())
    else:
        Path(target).write_bytes(data)
