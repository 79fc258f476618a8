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

from backends.command_line import COMMANDS, parser_for
from proxy.help_form import parse

USAGE_STATUS, FAILURE_STATUS = 2, 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["proxy"]:
        from proxy.compile import take_core

        take_core()
        from proxy.app import main as run_proxy

        return run_proxy(arguments[1:])
    if arguments[:1] == ["simulator"]:
        from backends.simulator.app import main as run_simulator

        return run_simulator(arguments[1:])
    parser = parser_for(arguments, RUNS, _Version)
    options = parse(parser, arguments)
    run: Callable[[argparse.Namespace], int] | None = getattr(options, "run", None)
    if run is None:
        parser.print_help()
        return USAGE_STATUS
    return _guarded(run, options)


def _guarded(run: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    from backends.failure import StartError
    from backends.printing import plain, silence
    from proxy.config import ConfigError

    try:
        status = run(options)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough
        silence()
        return 0
    except ConfigError as error:
        print(plain(str(error)), file=sys.stderr)
        return USAGE_STATUS
    except StartError as error:
        print(plain(str(error)), file=sys.stderr)
        return FAILURE_STATUS
    except KeyboardInterrupt:
        return 130
    return status


class _Version(argparse.Action):
    """Looks the version up only when it is asked for."""

    @override
    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        from backends.versions import story
        from proxy.compile import PACKAGE, import_root

        root = import_root()
        print(story(str(root) if root != PACKAGE.parent else None))
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


def _check(options: argparse.Namespace) -> int:
    from datetime import UTC, datetime

    import yaml

    from backends.checking import check_cards, check_engines
    from backends.keys.checking import check_keys
    from backends.offline.setting import locked_out
    from backends.redact import redacted
    from backends.settings import manager_settings, offline_settings
    from backends.tracing import missing_exporter
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
        *filter(None, [missing_exporter(config.proxy, os.environ)]),
        *check_keys(config, os.environ, datetime.now(UTC).timestamp()),
        *check_cards(config, manager_settings(config.manager, {}, os.environ).cards),
    ]
    print(f"{options.file}: ok")
    print(yaml.safe_dump(redacted(config), sort_keys=False, allow_unicode=True), end="", flush=True)
    for warning in warnings:  # last: the file as a whole is longer than a terminal is high
        print(f"{options.file}: warning: {warning}", file=sys.stderr)
    return 0


def _printed(options: argparse.Namespace) -> str:
    """Return what is told of configuration files as such."""
    import json

    from backends.reference import reference
    from proxy.config_schema import json_schema

    if options.schema:
        return json.dumps(json_schema(), indent=2) + "\n"
    up = argparse.ArgumentParser()
    COMMANDS["up"].add(up)
    return reference(vars(up.parse_args([])))


def _plan(options: argparse.Namespace) -> int:
    from backends.planning.command import run_plan

    print(run_plan(options, os.environ))
    return 0


def _status(options: argparse.Namespace) -> int:
    from contextlib import suppress

    from backends.failure import StartError
    from backends.printing import plain, put
    from backends.scale_command import fetch_scaling
    from backends.status import fetch_fleet, table

    fleet, scaling = fetch_fleet(options.manager_url), None
    with suppress(StartError):  # a manager of a former release has no pools to tell of
        scaling = fetch_scaling(options.manager_url)
    put(plain(table(fleet, scaling)))
    return 0


def _top(options: argparse.Namespace) -> int:
    from backends.printing import put
    from backends.top.command import top

    text = top(options, os.environ)
    if text is not None:
        put(text)
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


def _compile(options: argparse.Namespace) -> int:
    from proxy.compile import main as run_compile

    return run_compile(["--force"] if options.force else [])


def _completion(options: argparse.Namespace) -> int:
    from backends.command_line import whole
    from backends.completion.shells import script

    print(script(options.shell, whole()), end="")
    return 0


RUNS: dict[str, Callable[[argparse.Namespace], int]] = {
    "up": _up,
    "manager": _manager,
    "offline": _offline,
    "top": _top,
    "status": _status,
    "scale": _scale,
    "sleep": _sleep,
    "wake": _wake,
    "reclaim": _reclaim,
    "check": _check,
    "plan": _plan,
    "compile": _compile,
    "completion": _completion,
}

if __name__ == "__main__":
    sys.exit(main())
