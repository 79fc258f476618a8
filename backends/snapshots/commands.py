"""`doherty snapshot`: what works here, images made and tried by hand, and what is on the disk.

A manager makes and restores images by itself where a pool says `snapshot: true`; `create REPLICA`
has it make one of a replica that serves. The other commands work on the same folder, beside a
manager or without one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from backends.arguments import mebibytes, port_number
from backends.failure import StartError
from backends.log import Log
from backends.operate import make_image
from backends.snapshots.base import SnapshotError
from backends.snapshots.by_hand import Ask, create, restore
from backends.snapshots.criu import CriuSnapshots
from backends.snapshots.store import Held

FOLDER_VARIABLE = "DOHERTY_SNAPSHOT_DIR"
FOLDER = ".doherty/snapshots"  # where a manager has them unless it is told otherwise
_MIB = 1024 * 1024
_HEADINGS = ("ID", "POOL", "MODEL", "ENGINE", "MIB", "AGE", "STATE")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add what `doherty snapshot` takes."""
    parser.description = "Images of warm replicas on disk: a start in the time that reading takes."
    commands = parser.add_subparsers(metavar="ACTION", title="actions", dest="action")
    commands.add_parser("probe", help="say whether snapshots work on this machine, and else why")
    _add_create(commands.add_parser("create", help="dump a replica, or a command once it serves"))
    commands.add_parser("list", help="show the images")
    verify = commands.add_parser("verify", help="read every byte of images")
    verify.add_argument("snapshot", nargs="*", metavar="ID", help="(default: all)")
    again = commands.add_parser("restore", help="start a copy, say how long it took, keep it")
    again.add_argument("snapshot", metavar="ID", help="of an image")
    again.add_argument("--once", action="store_true", help="end it as soon as it has answered")
    _add_asking(again)
    prune = commands.add_parser("prune", help="remove what is damaged, unfinished, too old or much")
    prune.add_argument(
        "--mib-max", type=mebibytes, default=0, metavar="N", help="disk space to keep to"
    )
    for command in commands.choices.values():
        command.add_argument(
            "--dir",
            default=os.environ.get(FOLDER_VARIABLE, FOLDER),
            metavar="FOLDER",
            help=f"folder of the images (default: {FOLDER}) [{FOLDER_VARIABLE}]",
        )
        command.add_argument("--json", action="store_true", help="one JSON value on stdout")
    parser.set_defaults(run=run, parser=parser)


def _add_create(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--pool", default="by-hand", metavar="NAME", help="to list it under (default: %(default)s)"
    )
    parser.add_argument("--model", default="", metavar="NAME", help="what it serves, for the list")
    parser.add_argument(
        "--port", type=port_number, metavar="PORT", help="where the command will listen"
    )
    _add_asking(parser)
    parser.add_argument(
        "--manager-url",
        default=os.environ.get("DOHERTY_MANAGER_URL", "http://127.0.0.1:8002"),
        metavar="URL",
        help="the manager of REPLICA (default: http://127.0.0.1:8002) [DOHERTY_MANAGER_URL]",
    )
    parser.add_argument(
        "what",
        nargs="*",
        metavar="REPLICA | -- COMMAND",
        help="a replica of the manager, by its id in `doherty status`; or, with --port, an engine "
        "that listens on all addresses (--host 0.0.0.0) of the cell that it gets",
    )


def _add_asking(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ready", default="/health", metavar="PATH", help="answers 200 (default: %(default)s)"
    )
    parser.add_argument(
        "--timeout", type=float, default=600.0, metavar="S", help="s until then (default: 600)"
    )


def run(options: argparse.Namespace) -> int:
    """Do one action; return the exit status. Raises `StartError`."""
    actions: dict[str, Callable[[argparse.Namespace, CriuSnapshots], int]] = {
        "probe": _probe,
        "create": _create,
        "list": _list,
        "verify": _verify,
        "restore": _restore,
        "prune": _prune,
    }
    if options.action is None:
        options.parser.print_help()
        return 2
    snapshots = CriuSnapshots(Path(options.dir), tell=Log().caution)
    try:
        return actions[options.action](options, snapshots)
    except SnapshotError as error:
        raise StartError(str(error)) from error


def _probe(options: argparse.Namespace, snapshots: CriuSnapshots) -> int:
    found = snapshots.probe()
    _say(
        options,
        {"works": found.works, "reason": found.reason},
        f"snapshots work here: {found.reason}" if found.works else f"no: {found.reason}",
    )
    return 0 if found.works else 1


def _create(options: argparse.Namespace, snapshots: CriuSnapshots) -> int:
    command = options.what[1:] if options.what[:1] == ["--"] else options.what
    if options.port is None and len(command) == 1:
        image, text = make_image(options.manager_url, command[0], _progress)
        facts = {"snapshot": image.snapshot, "image_bytes": image.image_bytes}
        _say(options, facts, text)
        return 0
    if options.port is None or not command:
        raise StartError(
            "what is to be dumped? doherty snapshot create REPLICA, or "
            "doherty snapshot create --port PORT -- COMMAND"
        )
    ask = Ask(options.port, options.ready, options.timeout)
    made, cold_s = asyncio.run(
        create(snapshots, command, ask, (options.pool, options.model), _progress)
    )
    figures = {
        "snapshot": made.snapshot_id,
        "cold_s": round(cold_s, 3),
        "dump_s": round(made.dump_s, 3),
        "image_bytes": made.image_bytes,
    }
    text = f"{made.snapshot_id}: {made.image_bytes // _MIB} MiB, served after {cold_s:.1f} s"
    _say(options, figures, f"{text}, dumped in {made.dump_s:.2f} s")
    return 0


def _restore(options: argparse.Namespace, snapshots: CriuSnapshots) -> int:
    snapshots.store.open()
    held = snapshots.store.look(options.snapshot)
    if held.manifest is None:
        raise StartError(f"{held.name} cannot be restored: {held.problem}")
    snapshot = held.manifest.snapshot(snapshots.store.folder / held.name)

    def told(url: str, seconds: float) -> None:
        text = f"restored in {seconds:.2f} s, serving on {url}"
        _say(options, {"url": url, "seconds": round(seconds, 3)}, text)

    ask = Ask(snapshot.port, options.ready, options.timeout)
    return asyncio.run(restore(snapshots, snapshot, ask, told, once=options.once))


def _list(options: argparse.Namespace, snapshots: CriuSnapshots) -> int:
    snapshots.store.open()
    rows = [_row(held) for held in snapshots.store.held()]
    widths = [max(map(len, column)) for column in zip(_HEADINGS, *rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (_HEADINGS, *rows)
    ]
    names = [heading.lower() for heading in _HEADINGS]
    _say(options, [dict(zip(names, row, strict=True)) for row in rows], "\n".join(lines))
    return 0


def _row(held: Held) -> tuple[str, ...]:
    made = held.manifest
    if made is None:
        return (held.name, "", "", "", "", "", held.problem)
    key = made.key
    age_s = max(0.0, time.time() - made.made_at_s)
    words = f"{age_s / 3600:.1f} h" if age_s >= 3600 else f"{age_s:.0f} s"
    state = f"damaged: {held.problem}" if held.problem else "whole as far as sizes tell"
    engine = f"{key.engine} {key.engine_version}".strip()
    size = str(made.image_bytes // _MIB)
    return (held.name, key.pool, key.model, engine, size, words, state)


def _verify(options: argparse.Namespace, snapshots: CriuSnapshots) -> int:
    snapshots.store.open()
    names = options.snapshot or [held.name for held in snapshots.store.held()]
    problems = {name: snapshots.store.verify(name) for name in names}
    lines = [f"{name}: {problem or 'whole'}" for name, problem in problems.items()]
    _say(options, problems, "\n".join(lines) or "no images")
    return 1 if any(problems.values()) else 0


def _prune(options: argparse.Namespace, snapshots: CriuSnapshots) -> int:
    snapshots.store.open()
    removed = snapshots.prune(bytes_max=options.mib_max * _MIB)
    lines = [f"{name}: {why}" for name, why in removed.items()]
    _say(options, removed, "\n".join(lines) or "nothing to remove")
    return 0


def _say(options: argparse.Namespace, facts: object, text: str) -> None:
    """Print an outcome, as JSON where that is asked for; progress goes to standard error."""
    sys.stdout.write((json.dumps(facts) if options.json else text) + "\n")
    sys.stdout.flush()


def _progress(what: str, share: float) -> None:
    sys.stderr.write(f"{what} {share:.0%}\n")
    sys.stderr.flush()
