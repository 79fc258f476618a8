"""The parser of the command `doherty`: each command's flags, in one form.

Only the flags of the command that is called are made, since some of them come from modules that
take long to import: `doherty --help` answers at once. `whole` makes them all, for what has to know
every flag: shell completion, and the tests.
"""

# ruff: noqa: PLC0415  # see above

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from typing_extensions import override

from backends.arguments import port_number, replica_count
from backends.command_words import GROUPS, ROOT, WORDS, group_of
from proxy.help_form import HelpForm, dress, subparsers

DESCRIPTION = "One OpenAI-compatible endpoint in front of many SGLang and vLLM replicas."
CLASSES = ("online", "semi-online", "offline")
SHELLS = ("bash", "zsh", "fish")
MANAGER_URL, MANAGER_URL_VARIABLE = "http://127.0.0.1:8002", "DOHERTY_MANAGER_URL"


class Command(NamedTuple):
    """One command: its line in the list, and what adds its flags."""

    summary: str
    add: Callable[[argparse.ArgumentParser], None]


class RootParser(argparse.ArgumentParser):
    """Lists the commands in groups, which argparse has for flags only."""

    @override
    def format_help(self) -> str:
        form = HelpForm(self.prog)
        form.add_usage(self.usage, [], ())
        form.add_text(self.description)
        listed = [(name, purpose) for name, _, purpose in subparsers(self)]
        for title in (*GROUPS, "further"):
            lines = [f"  {name:<12}{text}" for name, text in listed if group_of(name) == title]
            if lines:
                form.add_text("\n".join((f"{title}:", *lines)))
        form.start_section("options")
        form.add_arguments(self._optionals._group_actions)  # noqa: SLF001  # argparse's own list
        form.end_section()
        form.add_text(self.epilog)
        return form.format_help()


def parser_for(
    arguments: Sequence[str],
    runs: Mapping[str, Callable[[argparse.Namespace], int]],
    version: type[argparse.Action],
) -> argparse.ArgumentParser:
    """Return the parser with the flags of the command that is called."""
    called = next((word for word in arguments if not word.startswith("-")), "")
    return _built(lambda name: name == called, runs, version)


def whole() -> argparse.ArgumentParser:
    """Return the parser with all flags of all commands; it runs none."""
    return _built(lambda _: True, {}, _Ended)


class _Ended(argparse.Action):
    """In place of what prints versions, where lines are only read."""

    @override
    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        parser.exit()


def _built(
    wanted: Callable[[str], bool],
    runs: Mapping[str, Callable[[argparse.Namespace], int]],
    version: type[argparse.Action],
) -> argparse.ArgumentParser:
    root = RootParser(prog="doherty", description=DESCRIPTION, usage="%(prog)s COMMAND [FLAGS]")
    root.add_argument("--version", action=version, nargs=0, help="print versions and exit")
    commands = root.add_subparsers(
        prog="doherty", metavar="COMMAND", parser_class=argparse.ArgumentParser
    )
    for name, command in COMMANDS.items():
        parser = commands.add_parser(name, help=command.summary)
        if wanted(name):
            command.add(parser)
            if name in runs:
                parser.set_defaults(run=runs[name])
            _dress_all(name, parser, command.summary)
    root.epilog = "examples:\n" + "\n".join(f"  {line}" for line in ROOT.examples)
    return root


def _dress_all(path: str, parser: argparse.ArgumentParser, purpose: str) -> None:
    if path in WORDS and parser.formatter_class is not HelpForm:
        dress(parser, WORDS[path], purpose)
    for name, command, words in subparsers(parser):
        _dress_all(f"{path} {name}", command, words)


def _add_up(parser: argparse.ArgumentParser) -> None:
    from proxy.flags import add_flags

    parser.add_argument("config", nargs="?", metavar="CONFIG", help=_CONFIG)
    ours = parser.add_argument_group("manager and offline service")
    _add_manager_place(ours, "--manager-host", "--manager-port")
    ours.add_argument("--run-dir", metavar="FOLDER", help=_RUN_DIR)
    ours.add_argument(
        "--offline",
        action=argparse.BooleanOptionalAction,
        help="serve /v1/files and /v1/batches (default: as configured, which is yes) "
        "[DOHERTY_OFFLINE]",
    )
    ours.add_argument(
        "--offline-port",
        type=port_number,
        metavar="PORT",
        help="port of that service (default: 8003, any if the manager's is 0) "
        "[DOHERTY_OFFLINE_PORT]",
    )
    add_flags(parser)


def _add_manager(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help=_CONFIG)
    _add_manager_place(parser, "--host", "--port")
    parser.add_argument("--run-dir", metavar="FOLDER", help=_RUN_DIR)
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


def _add_manager_place(parser: Any, host: str, port: str) -> None:
    parser.add_argument(
        host,
        dest="manager_host",
        metavar="HOST",
        help="address of the manager's API (default: 127.0.0.1) [DOHERTY_MANAGER_HOST]",
    )
    parser.add_argument(
        port,
        dest="manager_port",
        type=port_number,
        metavar="PORT",
        help="its port; 0 takes a free one (default: 8002) [DOHERTY_MANAGER_PORT]",
    )


def _add_offline(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", metavar="CONFIG", help=_CONFIG)
    parser.add_argument(
        "--host",
        dest="offline_host",
        metavar="HOST",
        help="address to listen on (default: 127.0.0.1) [DOHERTY_OFFLINE_HOST]",
    )
    parser.add_argument(
        "--port",
        dest="offline_port",
        type=port_number,
        metavar="PORT",
        help="its port; 0 takes a free one (default: 8003) [DOHERTY_OFFLINE_PORT]",
    )
    parser.add_argument(
        "--store",
        dest="offline_store",
        metavar="STORE",
        help="SQLite file or postgresql:// URL (default: offline.db in the run folder) "
        "[DOHERTY_STORE]",
    )
    parser.add_argument("--run-dir", metavar="FOLDER", help=_RUN_DIR)
    parser.add_argument("--manager-url", metavar="URL", help="manager that keeps engine workers")
    parser.add_argument("--proxy-url", metavar="URL", help="proxy to send lines to in spare times")


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", nargs="?", metavar="FILE", help="YAML file")
    parser.add_argument("--schema", action="store_true", help="print the file's JSON schema")
    parser.add_argument(
        "--reference", action="store_true", help="print all of its keys as Markdown"
    )
    asked = parser.add_argument_group("explain what holds for a tenant, or for one key")
    asked.add_argument("--tenant", default="", metavar="NAME", help="a tenant of the file")
    asked.add_argument("--key", default="", metavar="ID", help="id or name of a key")
    asked.add_argument("--keys", metavar="FILE", help="file of keys (default: proxy.keys_path)")
    asked.add_argument("--model", default="", metavar="NAME", help="when it asks for this model")
    asked.add_argument(
        "--class", dest="work_class", default="", choices=CLASSES, help="when it asks for this one"
    )


def _add_scale(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pool", nargs="?", metavar="POOL", help="tell of this one, and why")
    parser.add_argument(
        "replicas", nargs="?", type=replica_count, metavar="N", help="replicas that it is to have"
    )
    _add_manager_url(parser)


def _add_reclaim(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("in_s", nargs="?", type=float, metavar="SECONDS", help="that are left")
    parser.add_argument("--gpus", metavar="LIST", help="these only, such as 0,1")
    parser.add_argument("--cancel", action="store_true", help="nothing will be, after all")
    _add_manager_url(parser)


def _add_sleep(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--level",
        type=int,
        choices=(1, 2),
        help="1 keeps the weights in host memory, 2 reads them anew (default: 1, where it can)",
    )
    parser.add_argument(
        "--rung",
        choices=("asleep", "suspended"),
        default="asleep",
        help="suspended: its process stands still and others may have its GPU (default: asleep)",
    )
    _add_wake(parser)


def _add_wake(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("replica", metavar="REPLICA", help="its id in `doherty status`")
    _add_manager_url(parser)


def _add_manager_url(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--manager-url",
        default=os.environ.get(MANAGER_URL_VARIABLE, MANAGER_URL),
        metavar="URL",
        help=f"the manager (default: {MANAGER_URL}) [{MANAGER_URL_VARIABLE}]",
    )


def _add_proxy(parser: argparse.ArgumentParser) -> None:
    from proxy.flags import add_all

    add_all(parser)


def _add_simulator(parser: argparse.ArgumentParser) -> None:
    from backends.simulator.flags import add_flags

    add_flags(parser)


def _add_compile(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="also where nothing has changed")


def _add_completion(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS, help="for which shell")


def _add_batch(parser: argparse.ArgumentParser) -> None:
    from backends.offline.client.command import add_flags

    add_flags(parser)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    from backends.planning.command import add_flags

    add_flags(parser)


def _add_snapshot(parser: argparse.ArgumentParser) -> None:
    from backends.snapshots.commands import add_flags

    add_flags(parser)


def _add_keys(parser: argparse.ArgumentParser) -> None:
    from backends.keys.commands import add_flags

    add_flags(parser)


def _add_top(parser: argparse.ArgumentParser) -> None:
    from backends.top.flags import add_flags

    add_flags(parser)


_CONFIG = "YAML file (default: a demo of two simulated replicas) [DOHERTY_CONFIG]"
_RUN_DIR = "folder for journal, logs and jobs (default: .doherty) [DOHERTY_RUN_DIR]"
COMMANDS: dict[str, Command] = {
    "up": Command("start everything: manager, replicas, proxy", _add_up),
    "proxy": Command("run the data plane alone", _add_proxy),
    "manager": Command("run the control plane alone", _add_manager),
    "offline": Command("serve files and batches alone", _add_offline),
    "simulator": Command("run one engine server that needs no GPU", _add_simulator),
    "top": Command("watch a running proxy: replicas, queues, decisions", _add_top),
    "status": Command("show the replicas of a running manager", _add_manager_url),
    "scale": Command("show how pools are scaled, or set a pool's size", _add_scale),
    "sleep": Command("free the GPU memory of a replica, keep its process", _add_sleep),
    "wake": Command("have a resting replica serve again", _add_wake),
    "reclaim": Command("say that the machine or GPUs will be taken away", _add_reclaim),
    "keys": Command("API keys: create, list, rotate, revoke", _add_keys),
    "batch": Command("have many requests done: submit, watch, results", _add_batch),
    "check": Command("check a configuration file", _add_check),
    "plan": Command("plan a launch: GPUs, format, limits, and why", _add_plan),
    "snapshot": Command("images of warm replicas: make, list, try", _add_snapshot),
    "compile": Command("translate the data path to machine code (C compiler)", _add_compile),
    "completion": Command("print completions for bash, zsh or fish", _add_completion),
}
