"""The command `doherty`.

Each subcommand imports what it needs when it runs, so that `--help` and `--version` answer at once.
What goes wrong for a reason that a person can remove is one line on standard error and a status: 2
for the command line and the configuration, 1 for a run that failed.
"""

# ruff: noqa: PLC0415  # see above

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from typing_extensions import override

from backends.arguments import port_number, replica_count

DESCRIPTION = "One OpenAI-compatible endpoint in front of many SGLang and vLLM replicas."
EPILOG = "`doherty COMMAND --help` tells more. `doherty up` alone serves two simulated replicas."
USAGE_STATUS, FAILURE_STATUS = 2, 1
CLASSES = ("online", "semi-online", "offline")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["proxy"]:
        from proxy.app import main as run_proxy

        return run_proxy(arguments[1:])
    if arguments[:1] == ["compile"]:
        from proxy.compile import main as run_compile

        return run_compile(arguments[1:])
    if arguments[:1] == ["simulator"]:
        from backends.simulator.app import main as run_simulator

        return run_simulator(arguments[1:])
    parser = _parser(arguments[:1])
    options = parser.parse_args(arguments)
    run: Callable[[argparse.Namespace], int] | None = getattr(options, "run", None)
    if run is None:
        parser.print_help()
        return USAGE_STATUS
    return _guarded(run, options)


def _guarded(run: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    from backends.failure import StartError
    from proxy.config import ConfigError

    try:
        status = run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough; Python would complain once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ConfigError as error:
        print(error, file=sys.stderr)
        return USAGE_STATUS
    except StartError as error:
        print(error, file=sys.stderr)
        return FAILURE_STATUS
    except KeyboardInterrupt:
        return 130
    return status


def _parser(command: Sequence[str]) -> argparse.ArgumentParser:
    """Return the parser; the flags of the proxy are read only for the command that takes them."""
    parser = argparse.ArgumentParser(prog="doherty", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(metavar="COMMAND", title="commands")
    up = commands.add_parser("up", help="start everything: manager, replicas, proxy")
    up.add_argument("config", nargs="?", metavar="CONFIG", help="YAML file (default: a demo)")
    up.set_defaults(run=_up)
    if list(command) == ["up"]:
        _add_up_flags(up)
    commands.add_parser("proxy", help="run the data plane alone")
    commands.add_parser("compile", help="translate the data path to machine code (C compiler)")
    _add_manager_flags(commands.add_parser("manager", help="run the control plane alone"))
    _add_offline_flags(commands.add_parser("offline", help="serve files and batches alone"))
    _add_batch(commands, command)
    commands.add_parser("simulator", help="run one engine server that needs no GPU")
    _add_check(commands)
    plan = commands.add_parser("plan", help="plan a launch: GPUs, format, limits, and why")
    plan.set_defaults(run=_plan)
    if list(command) == ["plan"]:
        from backends.planning.command import add_flags

        add_flags(plan)
    _add_snapshot(commands, command)
    _add_keys(commands, command)
    status = commands.add_parser("status", help="show the replicas of a running manager")
    _add_manager_url(status)
    status.set_defaults(run=_status)
    _add_top(commands, command)
    _add_scale(commands)
    _add_reclaim(commands)
    sleep = commands.add_parser("sleep", help="free the GPU memory of a replica, keep its process")
    sleep.add_argument(
        "--level",
        type=int,
        choices=(1, 2),
        help="1 keeps the weights in host memory, 2 reads them anew (default: 1, where it can)",
    )
    sleep.add_argument(
        "--rung",
        choices=("asleep", "suspended"),
        default="asleep",
        help="suspended: its process stands still and others may have its GPU (default: asleep)",
    )
    wake = commands.add_parser("wake", help="have a resting replica serve again")
    for turn, run in ((sleep, _sleep), (wake, _wake)):
        turn.add_argument("replica", metavar="REPLICA", help="its id in `doherty status`")
        _add_manager_url(turn)
        turn.set_defaults(run=run)
    return parser


def _add_check(commands: Any) -> None:
    check = commands.add_parser("check", help="check a configuration file")
    check.add_argument("file", nargs="?", metavar="FILE")
    check.add_argument("--schema", action="store_true", help="print the file's JSON schema")
    check.add_argument("--reference", action="store_true", help="print all of its keys as Markdown")
    _add_question(check)
    check.set_defaults(run=_check)


def _add_batch(commands: Any, command: Sequence[str]) -> None:
    batch = commands.add_parser("batch", help="have many requests done: submit, watch, results")
    if list(command) == ["batch"]:
        from backends.offline.client.command import add_flags

        add_flags(batch)


def _add_snapshot(commands: Any, command: Sequence[str]) -> None:
    snapshot = commands.add_parser("snapshot", help="images of warm replicas: make, list, try")
    if list(command) == ["snapshot"]:
        from backends.snapshots.commands import add_flags

        add_flags(snapshot)


def _add_keys(commands: Any, command: Sequence[str]) -> None:
    keys = commands.add_parser("keys", help="API keys: create, list, rotate, revoke")
    if list(command) == ["keys"]:
        from backends.keys.commands import add_flags

        add_flags(keys)


def _add_top(commands: Any, command: Sequence[str]) -> None:
    top = commands.add_parser("top", help="watch a running proxy, its replicas and queues")
    top.set_defaults(run=_top)
    if list(command) == ["top"]:
        from backends.top.flags import add_flags

        add_flags(top)


def _add_scale(commands: Any) -> None:
    scale = commands.add_parser("scale", help="show how pools are scaled, or set a pool's size")
    scale.add_argument("pool", nargs="?", metavar="POOL", help="tell of this one, and why")
    scale.add_argument(
        "replicas", nargs="?", type=replica_count, metavar="N", help="replicas that it is to have"
    )
    _add_manager_url(scale)
    scale.set_defaults(run=_scale)


def _add_reclaim(commands: Any) -> None:
    reclaim = commands.add_parser("reclaim", help="say that the machine or GPUs will be taken away")
    reclaim.add_argument("in_s", nargs="?", type=float, metavar="SECONDS", help="that are left")
    reclaim.add_argument("--gpus", metavar="LIST", help="these only, such as 0,1")
    reclaim.add_argument("--cancel", action="store_true", help="nothing will be, after all")
    _add_manager_url(reclaim)
    reclaim.set_defaults(run=_reclaim)


def _add_manager_url(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--manager-url",
        default=os.environ.get("DOHERTY_MANAGER_URL", "http://127.0.0.1:8002"),
        metavar="URL",
        help="(default: %(default)s)",
    )


def _add_up_flags(parser: argparse.ArgumentParser) -> None:
    from proxy.flags import add_flags

    add_flags(parser)
    parser.add_argument("--manager-host", metavar="HOST", help="address of the manager's API")
    parser.add_argument("--manager-port", type=port_number, metavar="PORT", help="its port; 0: any")
    parser.add_argument("--run-dir", metavar="FOLDER", help="folder for journal and logs")
    parser.add_argument(
        "--offline",
        action=argparse.BooleanOptionalAction,
        help="serve /v1/files and /v1/batches (default: as configured, which is yes)",
    )
    parser.add_argument(
        "--offline-port",
        type=port_number,
        metavar="PORT",
        help="port of that service (default: as configured, else any if the manager's is 0)",
    )


def _add_manager_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="YAML file (default: a demo)")
    parser.add_argument("--host", dest="manager_host", metavar="HOST", help="address of the API")
    parser.add_argument(
        "--port", dest="manager_port", type=port_number, metavar="PORT", help="its port"
    )
    parser.add_argument("--run-dir", metavar="FOLDER", help="folder for journal and logs")
    ends = parser.add_mutually_exclusive_group()
    ends.add_argument(
        "--detach-on-exit",
        action="store_true",
        help="leave the replicas running at the end; the next manager adopts them",
    )
    ends.add_argument(
        "--sweep",
        action="store_true",
        help="stop what an earlier manager of the run folder left running, and end",
    )
    parser.set_defaults(run=_manager)


def _add_offline_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="YAML file (default: a demo)")
    parser.add_argument("--host", dest="offline_host", metavar="HOST", help="address to listen on")
    parser.add_argument(
        "--port", dest="offline_port", type=port_number, metavar="PORT", help="its port; 0: any"
    )
    parser.add_argument(
        "--store", dest="offline_store", metavar="STORE", help="SQLite file or postgresql:// URL"
    )
    parser.add_argument("--run-dir", metavar="FOLDER", help="folder of the store, if that is none")
    parser.add_argument("--manager-url", metavar="URL", help="manager that keeps engine workers")
    parser.add_argument("--proxy-url", metavar="URL", help="proxy to send lines to in spare times")
    parser.set_defaults(run=_offline)


class _Version(argparse.Action):
    """Looks the version up only when it is asked for."""

    @override
    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        from importlib.metadata import version

        print(f"doherty {version('doherty')}")
        parser.exit()


def _up(options: argparse.Namespace) -> int:
    import asyncio

    from backends.settings import plan_of
    from backends.up import up

    return asyncio.run(up(plan_of(vars(options), os.environ)))


def _manager(options: argparse.Namespace) -> int:
    import asyncio

    from backends.serve import serve
    from backends.settings import manager_config_of

    config, path = manager_config_of(vars(options), os.environ)
    return asyncio.run(
        serve(config, path, detach_on_exit=options.detach_on_exit, sweep=options.sweep)
    )


def _offline(options: argparse.Namespace) -> int:
    import asyncio

    from backends.offline.service import serve_offline
    from backends.offline.setting import Setting
    from backends.settings import offline_config_of

    config, path = offline_config_of(vars(options), os.environ)
    setting = Setting(
        config=config,
        config_path=path,
        manager_url=options.manager_url or config.proxy.manager_url,
        proxy_url=options.proxy_url,
    )
    return asyncio.run(serve_offline(setting))


def _add_question(check: argparse.ArgumentParser) -> None:
    words = "explain what holds for a tenant, or for one key"
    asked = check.add_argument_group(words)
    asked.add_argument("--tenant", default="", metavar="NAME")
    asked.add_argument("--key", default="", metavar="ID", help="id or name of a key")
    asked.add_argument("--keys", metavar="FILE", help="file of keys (default: proxy.keys_path)")
    asked.add_argument("--model", default="", metavar="NAME", help="when it asks for this model")
    asked.add_argument("--class", dest="work_class", default="", choices=CLASSES)


def _check(options: argparse.Namespace) -> int:
    from datetime import UTC, datetime

    import yaml

    from backends.checking import check_cards, check_engines
    from backends.keys.checking import check_keys
    from backends.offline.setting import locked_out
    from backends.redact import redacted
    from backends.settings import manager_settings, offline_settings
    from proxy import tls
    from proxy.config import load_config

    if options.schema or options.reference:
        print(_printed(options), end="")
        return 0
    if options.file is None:
        print("which file? doherty check FILE, or doherty check --schema", file=sys.stderr)
        return USAGE_STATUS
    config = load_config(options.file)
    if any((options.tenant, options.key, options.keys, options.model, options.work_class)):
        from backends.access_report import explain

        print(explain(options, config, os.environ))
        return 0
    offline_settings(config.offline, {}, os.environ)
    warnings = [
        *tls.check(config.proxy, datetime.now(UTC)),
        *check_engines(config, options.file, os.environ),
        *filter(None, [locked_out(config.offline, config.proxy)]),
        *check_keys(config, os.environ, datetime.now(UTC).timestamp()),
        *check_cards(config, manager_settings(config.manager, {}, os.environ).cards),
    ]
    for warning in warnings:
        print(f"{options.file}: warning: {warning}", file=sys.stderr)
    print(f"{options.file}: ok")
    print(yaml.safe_dump(redacted(config), sort_keys=False, allow_unicode=True), end="")
    return 0


def _printed(options: argparse.Namespace) -> str:
    """Return what is told of configuration files as such."""
    import json

    from backends.reference import reference
    from proxy.config_schema import json_schema

    if options.schema:
        return json.dumps(json_schema(), indent=2) + "\n"
    up = argparse.ArgumentParser()
    _add_up_flags(up)
    return reference(vars(up.parse_args([])))


def _plan(options: argparse.Namespace) -> int:
    from backends.planning.command import run_plan

    print(run_plan(options, os.environ))
    return 0


def _status(options: argparse.Namespace) -> int:
    from contextlib import suppress

    from backends.failure import StartError
    from backends.scale_command import fetch_scaling
    from backends.status import fetch_fleet, table

    fleet, scaling = fetch_fleet(options.manager_url), None
    with suppress(StartError):  # a manager of a former release has no pools to tell of
        scaling = fetch_scaling(options.manager_url)
    print(table(fleet, scaling))
    return 0


def _top(options: argparse.Namespace) -> int:
    from backends.top.command import top

    text = top(options, os.environ)
    if text is not None:
        print(text)
    return 0


def _reclaim(options: argparse.Namespace) -> int:
    from backends.reclaim_command import reclaim

    print(reclaim(options.manager_url, options.in_s, options.gpus, cancel=options.cancel))
    return 0


def _scale(options: argparse.Namespace) -> int:
    from backends.scale_command import scale

    print(scale(options.manager_url, options.pool, options.replicas))
    return 0


def _sleep(options: argparse.Namespace) -> int:
    from backends.ladder import Rung
    from backends.operate import fall_asleep

    rung = Rung(options.rung)
    print(fall_asleep(options.manager_url, options.replica, options.level, rung))
    return 0


def _wake(options: argparse.Namespace) -> int:
    from backends.operate import wake

    print(wake(options.manager_url, options.replica))
    return 0


if __name__ == "__main__":
    sys.exit(main())
