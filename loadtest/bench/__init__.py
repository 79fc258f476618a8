"""What a request costs a proxy: ours and its rivals, in one run on one machine.

A mock engine and a load generator, both in C and compiled on the spot, share a core or two; the
proxies have the last core to themselves, all of them started and one at a time at work. Rounds are
interleaved (A B C, A B C), so that what else the machine does meets all alike; figures are medians
with the lowest and the highest round. Processor time is the kernel's account of all of a proxy's
processes and threads, user and system; compare it rather than times on a clock, which a busy
machine stretches. Every answer is checked.

Ours is measured with its defaults, and where it is named also with one API key (ours-key), with 100
tenants of whom 64 ask, each with a key and all limits (ours-tenants), linked with another region
that has no work (ours-regions), with no access log (ours-nolog), while somebody watches its view
(ours-watched), and with traces on of which none (ours-unsampled), a tenth (ours-tenth) or all
(ours-sampled) are recorded. What a change costs is ours against ours-before, another checkout;
DOHERTY_COMPILED=off has both run their sources.

nginx, HAProxy and the routers are measured when they are installed. The routers come from PyPI into
a virtual environment of their own, made at the first use unless --no-install is given.

The exit status is 1 when a run failed or an answer was wrong; a target that is missed is said.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec
import orjson

from loadtest.bench import native, processes, targets
from loadtest.bench.rival import Rival
from loadtest.bench.rivals import all_rivals, install_routers
from loadtest.bench.scenarios import SCENARIOS, Scenario
from loadtest.bench.stand import DIRECT, Sample, Stand, Subject
from loadtest.run import RunError

SUMMARY = "what a proxied request costs, ours against rivals"
REPLICAS = 4
CACHE = Path("~/.cache/doherty-bench")  # the programs, and the routers' environment
QUICK_ROUNDS, QUICK_SECONDS, QUICK_SCALE = 1, 0.3, 0.1

_Named = TypeVar("_Named", Rival, Scenario)
_Say = Callable[[str], None]


def add_arguments(command: argparse.ArgumentParser) -> None:
    scenarios = ",".join(scenario.name for scenario in SCENARIOS)
    usual = [rival.name for rival in all_rivals(CACHE) if not rival.asked_for]
    rivals = ",".join([DIRECT, *usual])
    others = ", ".join(rival.name for rival in all_rivals(CACHE) if rival.asked_for)
    add = command.add_argument
    add("--scenarios", default=scenarios, metavar="LIST", help="default %(default)s")
    add("--rivals", default=rivals, metavar="LIST", help=f"default %(default)s; also {others}")
    add("--rounds", type=int, default=5, help="interleaved (default %(default)s)")
    add("--seconds", type=float, default=2.0, help="of each run (default %(default)s)")
    add("--rivals-venv", type=Path, metavar="FOLDER", help="where the routers from PyPI are")
    add("--before", type=Path, metavar="FOLDER", help="another checkout, which is ours-before")
    add("--no-install", action="store_true", help="leave out routers that are not there")
    add("--json", metavar="FILE", help="also write everything as JSON; - is standard output")
    add("--quick", action="store_true", help="one short round, a tenth of what is held")
    add("--quiet", action="store_true", help="no progress")


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What is measured, of whom, how often."""

    scenarios: list[Scenario]
    rivals: list[Rival]
    direct: bool
    rounds: int
    seconds: float
    scale: float


def run(args: argparse.Namespace) -> int:
    """Measure and report. Raises `RunError` when nothing could be measured."""

    def say(text: str) -> None:
        if not args.quiet:
            print(text, file=sys.stderr, flush=True)

    plan = planned(args, say)
    programs = CACHE.expanduser()
    engine_program = native.build("engine", programs)
    native.build("load", programs)
    processes.raise_descriptors()
    cores = processes.share_cores(processes.cores_here())
    folder = Path(tempfile.mkdtemp(prefix="doherty-bench-"))
    try:
        with native.engine(engine_program, REPLICAS, cores.engine) as engine:
            stand = Stand(folder, programs, engine, seconds=plan.seconds, scale=plan.scale)
            samples = list(measured(stand, plan, say))
    except KeyboardInterrupt:
        shutil.rmtree(folder)
        raise
    _report(plan, samples, args.json)
    wrong = [one for one in samples if one.errors]
    for one in wrong:
        told = ", ".join(f"{kind}: {count}" for kind, count in one.errors.items())
        print(f"failed: {one.rival}, {one.scenario}, round {one.round + 1}: {told}")
    if wrong:
        print(f"the logs are in {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


def planned(args: argparse.Namespace, say: _Say) -> Plan:
    """Return what the arguments ask for and this machine has; says what it has not."""
    if args.rounds < 1 or args.seconds <= 0:
        raise RunError("--rounds and --seconds must be above 0")
    if args.json and args.json != "-" and not Path(args.json).resolve().parent.is_dir():
        raise RunError(f"--json {args.json}: no such folder")
    scenarios = _chosen(args.scenarios, SCENARIOS, "scenario")
    names = [name.strip() for name in args.rivals.split(",") if name.strip()]
    venv = args.rivals_venv or CACHE.expanduser() / "venv"
    before = args.before.resolve() if args.before else None
    everyone = all_rivals(venv, before)
    rivals = _chosen(",".join(name for name in names if name != DIRECT), everyone, "rival")
    if not args.no_install:
        install_routers(rivals, venv, say)
    absent = [rival for rival in rivals if not rival.installed()]
    for rival in absent:
        print(f"{rival.name} is left out, it is not installed: {rival.hint}", file=sys.stderr)
    if absent == rivals and DIRECT not in names:
        raise RunError("nothing is left to measure")
    return Plan(
        scenarios=scenarios,
        rivals=[rival for rival in rivals if rival not in absent],
        direct=DIRECT in names,
        rounds=QUICK_ROUNDS if args.quick else args.rounds,
        seconds=QUICK_SECONDS if args.quick else args.seconds,
        scale=QUICK_SCALE if args.quick else 1.0,
    )


def measured(stand: Stand, plan: Plan, say: _Say) -> Iterator[Sample]:
    """Yield every run's sample: scenario by scenario, and in each the subjects turn by turn."""
    with contextlib.ExitStack() as stack:
        subjects = [Subject(stand, rival, processes.cores_here()) for rival in (None, *plan.rivals)]
        for subject in subjects:
            stack.callback(subject.close)
        for scenario in plan.scenarios:
            for number in range(min(plan.rounds, scenario.rounds_max)):
                for subject in subjects:
                    if _wanted(scenario, subject.name, plan):
                        taken = _measured_once(stand, scenario, subject)
                        say(_line(taken, scenario, number))
                        yield msgspec.structs.replace(taken, round=number)


def _wanted(scenario: Scenario, name: str, plan: Plan) -> bool:
    """The engine itself is also measured where its figure is taken off the others'."""
    if name == DIRECT:
        return scenario.above_direct or (scenario.has_direct and plan.direct)
    return name == "ours" or not scenario.ours_only


def _measured_once(stand: Stand, scenario: Scenario, subject: Subject) -> Sample:
    """Return the sample; a run that failed is one without a figure."""
    try:
        return scenario.measure(stand, subject)
    except RunError as error:
        return Sample(scenario=scenario.name, rival=subject.name, errors={str(error): 1})


def _line(taken: Sample, scenario: Scenario, number: int) -> str:
    value = "-" if taken.value is None else targets.number(taken.value)
    text = (
        f"{number + 1} {scenario.name:<9} {taken.rival:<20} {value:>8} {scenario.unit}; "
        f"{taken.rps:,.0f}/s, p50 {taken.p50_us:,.0f} us, p99 {taken.p99_us:,.0f} us, "
        f"{taken.resident_mb:.0f} MB"
    )
    notes = ", ".join(f"{name} {targets.number(of)}" for name, of in taken.notes.items())
    return f"{text}; {notes}" if notes else text


def _chosen(names: str, everything: Sequence[_Named], what: str) -> list[_Named]:
    known = {one.name: one for one in everything}
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if name not in known:
            raise RunError(f"no {what} {name}; there are {', '.join(known)}")
    return [known[name] for name in wanted]


def _report(plan: Plan, samples: Sequence[Sample], target: str | None) -> None:
    """Print the tables, and write everything where it is wanted."""
    found = targets.spreads(samples, plan.scenarios)
    judged = targets.verdicts(found, plan.scenarios)
    machine = _machine()
    if target != "-":
        names = [*([DIRECT] if plan.direct else []), *(rival.name for rival in plan.rivals)]
        print(f"{plan.rounds} rounds of {plan.seconds:g} s; {machine}")
        print(targets.figures_table(found, plan.scenarios, names))
        for line in targets.notes(samples):
            print(line)
        if judged:
            print("\n" + targets.verdicts_table(judged))
    if not target:
        return
    value = {
        "rounds": plan.rounds,
        "seconds": plan.seconds,
        "scale": plan.scale,
        "machine": machine,
        "versions": {rival.name: rival.version() for rival in plan.rivals},
        "figures": [
            {"scenario": scenario, "rival": rival, **msgspec.structs.asdict(spread)}
            for (scenario, rival), spread in found.items()
        ],
        "targets": msgspec.to_builtins(judged),
        "samples": msgspec.to_builtins(samples),
    }
    data = orjson.dumps(value, option=orjson.OPT_INDENT_2)
    if target == "-":
        print(data.decode())
    else:
        Path(target).write_bytes(data)


def _machine() -> str:
    cores = processes.share_cores(processes.cores_here())
    return (
        f"{processes.core_count()} cores: proxy on {_list(cores.proxy)}, engine on "
        f"{_list(cores.engine)}, load on {_list(cores.load)}; {platform.system()} "
        f"{platform.release()}, Python {platform.python_version()}, load average "
        f"{os.getloadavg()[0]:.1f}"
    )


def _list(cores: frozenset[int]) -> str:
    return ",".join(map(str, sorted(cores)))
