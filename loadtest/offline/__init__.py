"""Jobs over HTTP, as their owners see them: their speed, their cost to others, kills amid them."""

from __future__ import annotations

import argparse

from loadtest.command import Command
from loadtest.offline import jobs, kills, lab, spare, throughput

SUMMARY = "jobs of many lines: their speed, their cost to others, kills amid them"


COMMANDS: dict[str, Command] = {
    "jobs": jobs,
    "kills": kills,
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
        )
        module.add_arguments(added)


def run(args: argparse.Namespace) -> int:
    return COMMANDS[args.offline_command].run(args)
