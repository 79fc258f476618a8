"""What a proxy is to those it serves while others behave badly, and while it is short of means.

Each scenario starts a proxy of one worker before a scripted engine, lays siege to it, and prints
its figures beside their gates. A promise (a status that is due, nothing lost, nothing held
afterwards) is kept or BROKEN on any machine, and one that is broken fails the command. A time or a
share of a processor is met or missed: on a busy machine it says little.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final, Protocol

import msgspec
import uvloop

from loadtest.report import to_json
from loadtest.siege.events import first_event
from loadtest.siege.findings import Finding, kept_promises, table
from loadtest.siege.gone import clients_gone
from loadtest.siege.heads import head_flood
from loadtest.siege.idle import keep_alive_races
from loadtest.siege.slow import slow_bodies, slow_heads, slow_readers
from loadtest.siege.starved import descriptors_gone, memory_cap

SUMMARY = "slow, broken, vanishing and too many clients; descriptors and memory run out"


class Scenario(Protocol):
    def __call__(self, *, quick: bool) -> Awaitable[Finding]: ...


SCENARIOS: Final[dict[str, Scenario]] = {
    "slow-heads": slow_heads,
    "slow-bodies": slow_bodies,
    "slow-readers": slow_readers,
    "head-flood": head_flood,
    "descriptors": descriptors_gone,
    "memory": memory_cap,
    "first-event": first_event,
    "gone": clients_gone,
    "keep-alive": keep_alive_races,
}


def add_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("scenarios", nargs="*", metavar="SCENARIO", help=f"of {', '.join(SCENARIOS)}; default: all")
    add("--quick", action="store_true", help="a few seconds in all, enough for the promises")
    add("--json", metavar="FILE", help="also write the figures as JSON; - is standard output")


def run(args: argparse.Namespace) -> int:
    """Lay siege as asked. Returns 1 when a promise is broken, 2 for an unknown scenario."""
    unknown = [name for name in args.scenarios if name not in SCENARIOS]
    if unknown:
        print(f"loadtest: no scenario {unknown[0]!r}; there are {', '.join(SCENARIOS)}",
              file=sys.stderr)  # fmt: skip
        return 2
    chosen = args.scenarios or list(SCENARIOS)
    out = sys.stderr if args.json == "-" else sys.stdout
    findings = uvloop.run(
        _all(
            chosen, lambda finding: print(table([finding]), file=out, flush=True), quick=args.quick
        )
    )
    if args.json:
        _write(args.json, findings)
    if not kept_promises(findings):
        print("loadtest: a promise is broken", file=sys.stderr)
        return 1
    return 0


async def _all(names: list[str], told: Callable[[Finding], None], *, quick: bool) -> list[Finding]:
    findings = []
    for name in names:
        finding = await SCENARIOS[name](quick=quick)
        told(finding)
        findings.append(finding)
    return findings


def _write(file: str, findings: list[Finding]) -> None:
    octets = to_json({"findings": [msgspec.to_builtins(finding) for finding in findings]})
    if file == "-":
        sys.stdout.buffer.write(octets)
    else:
        Path(file).write_bytes(octets)
