"""Runs in front of real engines, on a machine with GPUs: what is proved there, and what it costs.

Each command starts what it needs as a user would, judges on the wire, and writes a text that says
when, where, with which versions and by which command it was made. Without a GPU the simulator takes
the engine's part, so that a run can be rehearsed; the text then says so.
"""

from __future__ import annotations

import argparse

from loadtest.command import Command
from loadtest.gpu import (
    cost,
    fidelity,
    fit,
    fleet,
    floors,
    ladder,
    offline,
    paths,
    prove,
    speeds,
    surge,
    verdict,
)

SUMMARY = "real engines: proofs, costs, floors, calibration"


COMMANDS: dict[str, Command] = {
    "cost": cost,
    "fidelity": fidelity,
    "fit": fit,
    "fleet": fleet,
    "floors": floors,
    "ladder": ladder,
    "offline": offline,
    "paths": paths,
    "prove": prove,
    "speeds": speeds,
    "surge": surge,
    "verdict": verdict,
}


def add_arguments(command: argparse.ArgumentParser) -> None:
    commands = command.add_subparsers(dest="gpu_command", metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        added = commands.add_parser(
            name,
            help=module.SUMMARY,
            description=module.__doc__,
        )
        module.add_arguments(added)


def run(args: argparse.Namespace) -> int:
    return COMMANDS[args.gpu_command].run(args)
