"""Jobs over HTTP, as their owners see them: how fast they are done, and what they cost others."""

from __future__ import annotations

import argparse

from loadtest.command import Command
from loadtest.offline import lab, spare, throughput

SUMMARY = "jobs of many lines: how fast they are done, and what they cost others"


COMMANDS: dict[str, Command] = {
    "lab": lab,
    "spare": spare,
    "throughput": throughput,
}


def add_arguments(command: argparse.ArgumentParser) -> None:
    commands = command.add_subparsers(dest="offline_command", metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        added = commands.add_parser(
            name,
            help=module.SUMMARY,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(added)


def run(args: argparse.Namespace) -> int:
    return COMMANDS[args.offline_command].run(args)
