"""The command line: `python -m loadtest replay TRACE` and `python -m loadtest compare TRACE`."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from loadtest import (
    bench,
    burst,
    explain,
    faults,
    gpu,
    guessing,
    keys,
    offline,
    operate,
    plot,
    policies,
    readahead,
    regions,
    report,
    scaling,
    sdk,
    siege,
    snapshots,
    soak,
    storm,
    upgrade,
)
from loadtest.client import parse_url
from loadtest.command import Command
from loadtest.compare import broken_promises, compare, in_engine_seconds
from loadtest.fleet import FleetOptions
from loadtest.help_form import RootParser, dress
from loadtest.measure import warmup_count
from loadtest.policies import beside, claims_lab, regions_lab
from loadtest.run import Options, Run, RunError, complaint, load_trace, run_replay
from loadtest.scaling import pool
from loadtest.scaling import regions as regions_day
from loadtest.tenants import deadlines, fairness
from loadtest.tenants import limits as tenant_limits
from loadtest.tenants import proxies as tenant_proxies
from loadtest.traces import Trace, TraceError

COMMANDS: dict[str, Command] = {
    "bench": bench,
    "burst": burst,
    "claims-lab": claims_lab,
    "deadlines": deadlines,
    "explain": explain,
    "fairness": fairness,
    "gpu": gpu,
    "guessing": guessing,
    "keys": keys,
    "offline": offline,
    "operate": operate,
    "policies": policies,
    "pool": pool,
    "readahead": readahead,
    "regions": regions,
    "regions-day": regions_day,
    "regions-lab": regions_lab,
    "scaling": scaling,
    "sdk": sdk,
    "siege": siege,
    "snapshots": snapshots,
    "soak": soak,
    "storm": storm,
    "tenants-limits": tenant_limits,
    "tenants-proxies": tenant_proxies,
    "upgrade": upgrade,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns 0, 1 when the run failed, 2 when it could not begin as asked."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command == "faults":
        with _terminated_as_by_ctrl_c():
            return _faults(args)
    if args.command in COMMANDS:
        try:
            with _terminated_as_by_ctrl_c():
                return COMMANDS[args.command].run(args)
        except RunError as error:
            print(f"loadtest: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return 130
    try:
        options = Options(**_fields(args, Options))
        _check(args, options)
        trace = load_trace(options)
    except (TraceError, plot.PlotError, ValueError) as error:
        print(f"loadtest: {error}", file=sys.stderr)
        return 2
    command = _compare if args.command == "compare" else _replay
    try:
        with _terminated_as_by_ctrl_c():
            return command(args, options, trace)
    except RunError as error:
        print(f"loadtest: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


@contextlib.contextmanager
def _terminated_as_by_ctrl_c() -> Iterator[None]:
    """Let SIGTERM end the run in order too: a comparison has a fleet to stop.

    Under nohup, and behind `&` in a script, SIGINT is ignored from the start; then SIGTERM would be
    swallowed with it.
    """
    interrupt = signal.getsignal(signal.SIGINT)
    if interrupt is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, interrupt)


def _check(args: argparse.Namespace, options: Options) -> None:
    """Raise `ValueError` or `PlotError` for what would otherwise fail after the replay."""
    warmup_count(options.warmup, 1)
    parse_url(options.url)
    if options.api_key is not None and not re.fullmatch(r"[!-~]+", options.api_key):
        raise ValueError("--api-key: expected plain ASCII without spaces")
    if args.plot:
        plot.check(args.plot)
    if args.json and args.json != "-" and not Path(args.json).resolve().parent.is_dir():
        raise ValueError(f"--json {args.json}: no such folder")


def _replay(args: argparse.Namespace, options: Options, trace: Trace) -> int:
    run = uvloop.run(run_replay(trace, options))
    _print(report.run_table(run), args)
    _write(args, report.run_value(run))
    if args.plot:
        plot.draw({run.label: [run]}, f"Replay of {options.trace}", args.plot)
    return _exit_code([run], {run.label: options.url})


def _compare(args: argparse.Namespace, options: Options, trace: Trace) -> int:
    fleet_options = FleetOptions(**_fields(args, FleetOptions))
    try:
        _check_lab(args, fleet_options, trace)
    except ValueError as error:
        print(f"loadtest: {error}", file=sys.stderr)
        return 2
    runs = uvloop.run(compare(trace, options, fleet_options, lambda text: _say(text, args)))
    title = f"{options.trace}, {trace.request_count:,} requests at speed {options.speed:g}"
    title += f", {fleet_options.replicas} replicas {fleet_options.profile}"
    _print(f"{title}\n{report.comparison_table(runs)}", args)
    settings = {**options.shown(), **msgspec.structs.asdict(fleet_options)}
    values = {policy: [report.run_value(run) for run in made] for policy, made in runs.items()}
    _write(args, {"settings": settings, "runs": values})
    if args.plot:
        plot.draw(runs, title, args.plot)
    broken = broken_promises(runs)
    for text in broken:
        print(f"loadtest: {text}", file=sys.stderr)
    if any(run.interrupted for repeats in runs.values() for run in repeats):
        return 130
    if args.lab and not _beside_the_lab(args, options, fleet_options, trace, runs):
        broken.append("another order in the lab")
    return 1 if broken else 0


def _check_lab(args: argparse.Namespace, fleet_options: FleetOptions, trace: Trace) -> None:
    """Raise `ValueError` for what the lab cannot do beside."""
    if not args.lab:
        return
    beside.check(fleet_options.policies)
    if trace.closed_loop:
        raise ValueError("--lab: expected a trace with times of arrival")
    if fleet_options.profile != FleetOptions().profile or not fleet_options.kv_cache_tokens:
        raise ValueError("--lab: needs the usual profile, and --kv-cache-tokens")


def _beside_the_lab(
    args: argparse.Namespace,
    options: Options,
    fleet_options: FleetOptions,
    trace: Trace,
    runs: dict[str, list[Run]],
) -> bool:
    """Show the order of the policies here and in the lab. Returns whether it is the same."""
    setting = beside.Setting(
        replicas=fleet_options.replicas,
        workers=fleet_options.workers,
        kv_cache_tokens=fleet_options.kv_cache_tokens,
        speed=options.speed,
        time_scale=fleet_options.time_scale,
    )
    seen = in_engine_seconds(runs, fleet_options.time_scale)
    compared = beside.compare(seen, beside.in_the_lab(trace, list(runs), setting))
    _print(f"\n{beside.table(compared)}", args)
    return not compared.disagreements


def _faults(args: argparse.Namespace) -> int:
    options = faults.FaultOptions(**_fields(args, faults.FaultOptions))
    fleet_options = FleetOptions(**_fields(args, FleetOptions))
    try:
        findings = uvloop.run(
            faults.run_faults(options, fleet_options, lambda text: _say(text, args))
        )
    except RunError as error:
        print(f"loadtest: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    _print(faults.table(findings), args)
    _write(args, {"findings": [msgspec.to_builtins(finding) for finding in findings]})
    if not faults.kept_promises(findings):
        print("loadtest: requests were lost or silently cut", file=sys.stderr)
        return 1
    return 0


def _exit_code(runs: Sequence[Run], names: dict[str, str]) -> int:
    problems = [p for run in runs if (p := complaint(run.outcomes, names[run.label]))]
    for problem in problems:
        print(f"loadtest: {problem}", file=sys.stderr)
    if any(run.interrupted for run in runs):
        return 130
    return 1 if problems else 0


def _print(text: str, args: argparse.Namespace) -> None:
    print(text, file=sys.stderr if args.json == "-" else sys.stdout)


def _say(text: str, args: argparse.Namespace) -> None:
    if not args.quiet:
        print(text, file=sys.stderr)


def _write(args: argparse.Namespace, value: dict[str, Any]) -> None:
    if args.json == "-":
        sys.stdout.buffer.write(report.to_json(value))
    elif args.json:
        Path(args.json).write_bytes(report.to_json(value))


def _fields(args: argparse.Namespace, struct: type[msgspec.Struct]) -> dict[str, Any]:
    given = vars(args)
    return {name: given[name] for name in struct.__struct_fields__ if name in given}


def _parser() -> argparse.ArgumentParser:
    parser = RootParser(
        prog="python -m loadtest",
        usage="%(prog)s COMMAND [FLAGS]",
        description="Load, faults and comparisons for any OpenAI-compatible server; and what the "
        "project's own claims rest on.",
    )
    commands = parser.add_subparsers(
        dest="command",
        required=True,
        metavar="COMMAND",
        prog="python -m loadtest",
        parser_class=argparse.ArgumentParser,
    )
    for name, text in (
        ("replay", "send a trace's requests to a running server"),
        ("compare", "send them to a fresh simulated fleet for each policy"),
    ):
        sentence = f"{text[0].upper()}{text[1:]}."
        command = commands.add_parser(name, help=text, description=sentence)
        command.add_argument("trace", help="a file (.jsonl, .csv, .xz) or a shipped trace's name")
        if name == "replay":
            _add_server(command)
        else:
            _add_fleet(command)
        _add_choice(command)
        _add_sending(command)
        _add_reporting(command)
    command = commands.add_parser(
        "faults",
        help="kill -9 a replica, the manager and a proxy worker under load",
        description=faults.__doc__,
    )
    _add_faults(command)
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, help=module.SUMMARY, description=module.__doc__)
        module.add_arguments(command)
    dress(parser)
    return parser


def _add_faults(command: argparse.ArgumentParser) -> None:
    base, add = faults.FaultOptions(), command.add_argument
    add("--victims", type=_names, default=base.victims, help="default: all three")
    add("--replicas", type=_positive_int, default=3, help="default %(default)s")
    add("--workers", type=_positive_int, default=2, help="of the proxy (default %(default)s)")
    add("--rate", type=_positive, default=base.rate, help="requests begun a second")
    add("--output-tokens", type=_positive_int, default=base.output_tokens, help="of each answer")
    add("--before", type=_positive, default=base.before, help="s of load before the kill")
    add("--after", type=_positive, default=base.after, help="s of load after it")
    add("--profile", default=FleetOptions().profile, help="of the simulated engines")
    add("--doherty", default="", metavar="COMMAND", help="default: the one installed")
    add("--json", metavar="FILE", help="also write everything as JSON; - is standard output")
    add("--quiet", action="store_true", help="no progress")


def _add_server(command: argparse.ArgumentParser) -> None:
    command.add_argument("--url", default=Options().url, help="default %(default)s")
    command.add_argument("--model", help="default: the first of /v1/models")
    key = os.environ.get("OPENAI_API_KEY") or None  # as the official client takes it
    command.add_argument("--api-key", default=key, help="bearer token (default: OPENAI_API_KEY)")
    command.add_argument("--label", help="what reports call this run (default: the trace)")


def _add_fleet(command: argparse.ArgumentParser) -> None:
    base = FleetOptions()
    add = command.add_argument
    add("--policies", type=_names, default=base.policies, help="in order; the first is the base")
    add("--replicas", type=_positive_int, default=base.replicas, help="default %(default)s")
    add("--profile", default=base.profile, help="of the simulated engines (default %(default)s)")
    add("--workers", type=_positive_int, default=base.workers, help="of the proxy")
    add("--kv-cache-tokens", type=_positive_int, default=0, help="per replica (default: profile's)")
    add("--max-model-len", type=_positive_int, default=base.max_model_len, help="tokens")
    add("--time-scale", type=_positive, default=1.0, help="simulated seconds a second")
    add("--stream-interval", type=_positive_int, default=0, help="tokens a chunk")
    add("--repeat", type=_positive_int, default=1, help="runs of each policy, interleaved")
    add("--lab", action="store_true", help="the order of the policies in the lab beside it")
    add("--start-timeout", type=_positive, default=base.start_timeout, help="s, until ready")
    add("--doherty", default="", metavar="COMMAND", help="default: the one installed")


def _add_choice(command: argparse.ArgumentParser) -> None:
    add = command.add_argument_group("which requests").add_argument
    add("--limit", type=_positive_int, default=0, metavar="N", help="only so many requests")
    add("--offset", type=_count, default=0, metavar="N", help="leave out so many (or sessions)")
    add("--duration", type=_positive, default=0.0, metavar="S", help="send for so many seconds")
    add("--max-input-tokens", type=_positive_int, default=0, help="leave out longer prompts")
    add("--max-output-tokens", type=_positive_int, default=0, help="cut longer answers")
    add("--output-tokens-scale", type=_positive, default=1.0, help="multiplies answers' lengths")
    add("--seed", type=int, default=0, help="another seed is another text for every block")
    add("--bytes-per-token", type=_positive_int, default=4, help="default %(default)s")


def _add_sending(command: argparse.ArgumentParser) -> None:
    base = Options()
    add = command.add_argument_group("how they are sent").add_argument
    add("--speed", type=_positive, default=1.0, help="2: in half the time")
    add("--users", type=_positive_int, default=base.users, help="sessions at a time (default 16)")
    add("--think-max", type=_positive, default=base.think_max, help="s; longer pauses are cut")
    add("--api", choices=("chat", "completions"), default="chat", help="default %(default)s")
    add("--timeout", type=_positive, default=base.timeout, help="s, for a whole answer")
    add("--concurrency-max", type=_positive_int, default=base.concurrency_max)
    add("--session-header", action="store_true", help="send x-session-id")
    add("--no-ignore-eos", dest="ignore_eos", action="store_false", help="answers may end early")


def _add_reporting(command: argparse.ArgumentParser) -> None:
    add = command.add_argument_group("what is reported").add_argument
    add("--warmup", default="10%", help="first part left out: a number or share (default 10%%)")
    add("--json", metavar="FILE", help="also write everything as JSON; - is standard output")
    add("--plot", metavar="FILE", help="also draw it, as .png or .svg")
    add("--quiet", action="store_true", help="no progress")


def _checked(convert: Callable[[str], Any], test: Callable[[Any], bool], wanted: str) -> Any:
    def parse(text: str) -> Any:
        try:
            value = convert(text)
        except ValueError:
            value = None
        if value is None or not test(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return parse


def _finite_positive(value: float) -> bool:
    return 0 < value < math.inf


def _split(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


_positive = _checked(float, _finite_positive, "a number above 0")
_positive_int = _checked(int, lambda v: v >= 1, "a whole number from 1")
_count = _checked(int, lambda v: v >= 0, "a whole number from 0")
_names = _checked(_split, lambda v: len(v) == len(set(v)) > 0, "a list such as round_robin,prefix")

if __name__ == "__main__":
    sys.exit(main())
