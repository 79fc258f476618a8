"""Measures routers in front of one fleet of real engines, cell by cell, resumable.

Four replicas are started (or taken over from the last call), their capacity is measured once, and
then cells are run in the order of what they decide, until --budget-s: caches emptied, a router
started, a trace replayed in open loop at a share of the capacity. Every cell is added to --record
at once; a second call with the same file goes on. `gpu verdict FILE` makes the tables.

    python -m loadtest gpu fleet --engine vllm --model-path models/qwen3-8b --record vllm.fleet \\
        --rivals /opt/rivals --kept /tmp/fleet.json --budget-s 560
    python -m loadtest gpu fleet --engine simulator --record sim.fleet --seconds 15 \\
        --sessions-share 1 --plan "conversation:0.9:ours,ours_round_robin"
    python -m loadtest gpu verdict sim.fleet

Events and shapes are cells, too: --plan "conversation:0.6:ours:kill" kills an engine,
"...:backfill" fills the rest with offline work, --tensor-parallel 2 --replicas 2 has other shapes
under the arrivals of the first one's loads. deploy/guides/gpu-fleet.md is the plan of a whole run.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import uvloop

from loadtest.gpu import machine
from loadtest.gpu.fleet import ahead, engines, judge, load, plan, rivals
from loadtest.gpu.fleet.cell import Place, capacity, run_cell
from loadtest.gpu.fleet.engines import FleetOptions, Shape
from loadtest.gpu.fleet.record import CellKey, Record, RecordError, Row, Setting, Versions
from loadtest.run import RunError
from loadtest.traces import Trace, TraceError

SUMMARY = "routers in front of one fleet of real engines, cell by cell"
ENGINES = ("vllm", "sglang", "simulator")
CELL_OVERHEAD_S = 14.0  # emptied caches, a router's start and end, the last answers

Say = Callable[[str], None]


def add_arguments(command: argparse.ArgumentParser) -> None:
    base, choice, add = FleetOptions(), load.Choice(), command.add_argument
    add("--record", required=True, metavar="FILE", help="where cells are added, and looked up")
    add("--engine", choices=ENGINES, default=base.engine, help="default %(default)s")
    add("--dialect", choices=("vllm", "sglang"), default=base.dialect, help="of the simulator")
    add("--model-path", default="", help="folder of the model")
    add("--replicas", type=int, default=base.shape.replicas, help="default %(default)s")
    add("--tensor-parallel", type=int, default=1, help="cards of a replica (default 1)")
    add("--kv-cache-tokens", type=int, default=base.kv_cache_tokens, help="of a replica")
    add("--time-scale", type=float, default=1.0, help="of the simulator")
    add("--start-timeout", type=float, default=base.start_timeout_s, metavar="S")
    add("--rivals", default="", metavar="FOLDER", help="with bin/sglang-router and so on")
    add("--workers", type=int, default=2, help="of our proxy (default %(default)s)")
    add("--no-events", action="store_true", help="our proxy hears no KV events")
    add("--conversation-trace", default=choice.conversation, metavar="TRACE")
    add("--agents-trace", default="", metavar="TRACE", help="of coding agents; none: left out")
    add("--sessions-share", type=int, default=choice.sessions_share, metavar="N",
        help="one session in N takes part (default %(default)s)")  # fmt: skip
    add("--max-input-tokens", type=int, default=choice.input_tokens_max)
    add("--max-output-tokens", type=int, default=choice.output_tokens_max)
    add("--seconds", type=float, default=60.0, help="of a cell, a fifth of it warm-up")
    add("--capacity-s", type=float, default=30.0, help="of the measurement of capacity")
    add("--repeats", type=int, default=3, help="of each cell, on other sessions")
    add("--plan", default="", help="WORKLOAD:LOAD:ARM,ARM[:EVENT];... instead of all cells")
    add("--budget-s", type=float, default=0.0, help="no cell begins that would pass it; 0: all")
    add("--kept", metavar="FILE", help="engines stay, and the next call finds them by this file")
    add("--start", action="store_true", help="only start what --kept then names; waits for nothing")
    add("--foretell", action="store_true", help="only print what the lab says of these cells")
    add("--end", action="store_true", help="end the engines that --kept names, and do nothing else")
    add("--logs", metavar="FOLDER", help="keep logs here")
    add("engine_args", nargs="*", metavar="-- ARG", help="further arguments of the engine")


def options_of(args: argparse.Namespace) -> FleetOptions:
    """Return which engines are started. Raises `ValueError`."""
    if args.engine != "simulator" and not (args.model_path or args.foretell or args.end):
        raise ValueError("--model-path: a real engine needs a folder or a hub id")
    for name in ("replicas", "tensor_parallel", "workers", "sessions_share", "repeats"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')}: expected 1 or more")
    if args.seconds <= 0 or args.capacity_s <= 0:
        raise ValueError("--seconds and --capacity-s: expected more than 0")
    if (args.start or args.end) and not args.kept:
        raise ValueError("--start and --end: name the file of the engines with --kept")
    return FleetOptions(
        engine=args.engine,
        dialect=args.dialect,
        model_path=args.model_path,
        shape=Shape(args.replicas, args.tensor_parallel),
        kv_cache_tokens=args.kv_cache_tokens,
        time_scale=args.time_scale,
        args=tuple(args.engine_args),
        start_timeout_s=args.start_timeout,
    )


def setting_of(args: argparse.Namespace) -> Setting:
    return Setting(
        engine=args.engine,
        kv_cache_tokens=args.kv_cache_tokens,
        conversation=args.conversation_trace,
        agents=args.agents_trace,
        sessions_share=args.sessions_share,
        input_tokens_max=args.max_input_tokens,
        output_tokens_max=args.max_output_tokens,
        seconds=args.seconds,
        workers=args.workers,
        time_scale=args.time_scale,
        shape=Shape(args.replicas, args.tensor_parallel).text,
    )


def cells_of(args: argparse.Namespace, shape: str) -> list[CellKey]:
    """Return the cells in their order. Raises `ValueError`."""
    if args.plan:
        return plan.written_order(args.plan, args.repeats, shape)
    cells = plan.default_order(args.repeats, shape)
    return [cell for cell in cells if args.agents_trace or cell.workload != load.AGENTS]


def run(args: argparse.Namespace) -> int:
    begun_s = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - begun_s:6.1f} s  {text}", flush=True)

    try:
        options = options_of(args)
        if args.end:
            return uvloop.run(engines.end_kept(Path(args.kept)))
        cells = cells_of(args, options.shape.text)
        if args.foretell:
            print(ahead.foretell(cells, _choice(args), setting_of(args), options.manners))
            return 0
        record = _record(args)
    except (ValueError, RecordError, TraceError) as error:
        print(f"loadtest: {error}", file=sys.stderr)
        return 2
    folder = Path(args.logs) if args.logs else Path(tempfile.mkdtemp(prefix="doherty-fleet-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return uvloop.run(_measure(args, options, cells, record, folder, say))
    except (TraceError, RecordError) as error:
        raise RunError(str(error)) from error
    finally:
        if not args.logs and not args.kept:
            shutil.rmtree(folder, ignore_errors=True)


def _record(args: argparse.Namespace) -> Record:
    """Open the record; what it was begun with must be the same now."""
    record, setting = Record(Path(args.record)), setting_of(args)
    if record.setting is None:
        header = machine.header(machine.gpus())
        record.add(
            Setting(
                **{**{n: getattr(setting, n) for n in setting.__struct_fields__}, "header": header}
            )
        )
    elif not record.setting.same(setting):
        raise RecordError(f"{args.record}: begun with another setting; name another file")
    return record


def _programs(args: argparse.Namespace) -> rivals.Programs:
    return rivals.Programs(
        folder=Path(args.rivals or "/nonexistent"),
        workers=args.workers,
        doherty_events=not args.no_events,
    )


async def _measure(
    args: argparse.Namespace,
    options: FleetOptions,
    cells: list[CellKey],
    record: Record,
    folder: Path,
    say: Say,
) -> int:
    programs, kept = _programs(args), Path(args.kept) if args.kept else None
    arms = programs.available()
    left_out = [arm for arm in plan.ARMS if arm not in arms]
    if left_out:
        say(f"not installed here: {', '.join(left_out)}")
    begun_s = time.monotonic()
    if args.start:
        started = await engines.spawned(options, folder, kept)
        say(f"started: {len(started)} replicas, see {args.kept}")
        return 0
    fleet = await engines.begin(options, folder, kept, say)
    place = Place(fleet=fleet, programs=programs, folder=folder, seconds=args.seconds, say=say)
    deadline_s = begun_s + args.budget_s if args.budget_s else float("inf")
    try:
        await _note_versions(fleet, programs, record)
        todo = list(plan.left_to_do(cells, record.done(), arms))
        return await _cells(args, todo, record, place, deadline_s)
    finally:
        fleet.close()
        if kept is None:
            await engines.end(fleet.engines)


async def _note_versions(fleet: engines.Fleet, programs: rivals.Programs, record: Record) -> None:
    """Add what takes part and was not told yet: rivals may come with a later call."""
    found = rivals.versions(programs)
    if version := await fleet.version():
        found[fleet.options.engine] = version
    if new := {name: told for name, told in found.items() if record.versions.get(name) != told}:
        record.add(Versions(of=new))


async def _cells(
    args: argparse.Namespace,
    todo: list[CellKey],
    record: Record,
    place: Place,
    deadline_s: float,
) -> int:
    failed = 0
    for count, key in enumerate(todo):
        if time.monotonic() + args.seconds + CELL_OVERHEAD_S > deadline_s:
            place.say(f"no time left for {len(todo) - count} cells, the next: {key.text}")
            break
        trace = load.arrivals_of(_choice(args), key.workload, key.repeat)
        scale = await _scale(args, key, trace, record, place)
        made = await run_cell(key, trace, scale, place)
        record.add(made)
        failed += bool(made.failure)
        place.say(_line(made.failure, key, len(made.rows), made.measured))
    return 1 if failed else 0


def _choice(args: argparse.Namespace) -> load.Choice:
    return load.Choice(
        conversation=args.conversation_trace,
        agents=args.agents_trace,
        sessions_share=args.sessions_share,
        input_tokens_max=args.max_input_tokens,
        output_tokens_max=args.max_output_tokens,
    )


async def _scale(
    args: argparse.Namespace, key: CellKey, trace: Trace, record: Record, place: Place
) -> float:
    """Return the compression of the cell; the capacity is measured where nobody has yet.

    Another shape gets the arrivals of the first one, whose capacity must be in the record.
    """
    first = record.setting.shape if record.setting else key.shape
    workload = load.paced_by(key.workload)
    shape = first if record.capacity(workload, first) else key.shape
    known = record.capacity(workload, shape)
    if known is None:
        paced = load.arrivals_of(_choice(args), workload, key.repeat)
        known = await capacity(shape, workload, paced, place, args.capacity_s)
        record.add(known)
    replicas = int(shape.partition("x")[0])
    return load.scale_for(
        trace,
        key.load * replicas * known.uncached_tokens_per_s,
        seconds=args.seconds,
        replicas=replicas,
        cache_tokens=args.kv_cache_tokens,
    )


def _line(failure: str, key: CellKey, sent: int, measured: list[Row]) -> str:
    """Return a cell in a line, for who watches."""
    if failure:
        return f"{key.text}: FAILED: {failure.splitlines()[0][:160]}"
    errors = sum(bool(row.error) for row in measured)
    p50, p99 = (judge.ttft(share)(measured) for share in (0.5, 0.99))
    return (
        f"{key.text}: {sent} sent, {errors} errors, TTFT p50 {p50:.3f} p99 {p99:.3f} s, "
        f"hit {judge.hit(measured):.3f}"
    )
