"""Three regions on one machine, far from each other: what stays, what travels, what is lost."""

from __future__ import annotations

import argparse

from loadtest.command import Command
from loadtest.regions import live

SUMMARY = "three regions on one machine: what stays, what travels, what is lost when links break"

COMMANDS: dict[str, Command] = {
    "live": live,
}


def add_arguments(command: argparse.ArgumentParser) -> None:
    commands = command.add_subparsers(dest="regions_command", metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        added = commands.add_parser(
            name,
            help=module.SUMMARY,
            description=module.__doc__,
        )
        module.add_arguments(added)


def run(args: argparse.Namespace) -> int:
    return COMMANDS[args.regions_command].run(args)
