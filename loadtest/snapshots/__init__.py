"""A start from an image against a cold one, by real dumps and real processes (CRIU, root).

An engine that starts slowly by real work (imports, a table of a gigabyte built hash by hash, whose
entries decide its answers) is started cold, dumped, and restored again and again, by the command
`doherty snapshot` as an operator would use it. Each start is timed from the command to the first
whole answer. What must hold:

* a restored copy answers at least ten times sooner than a cold start, every time;
* every answer, of copies alone, of two at once, and beside one under load, is the cold start's;
* one bit flipped in an image is found before the copy runs.

Then a manager is given the same engine in a pool with `snapshot: true`. It makes an image by
itself; its replica is killed and must come back from the image, again and again; and once a bit of
the image has been flipped, it must come back by a cold start, with nobody's help.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from pathlib import Path

import msgspec
import orjson

from loadtest.snapshots.managed import managed
from loadtest.snapshots.report import Finding, table
from loadtest.snapshots.stage import Stage

SUMMARY = "starts from an image on disk against cold ones (needs CRIU)"


class Options(msgspec.Struct, frozen=True, kw_only=True):
    tables_mib: int = 1024
    restores: int = 20
    pairs: int = 3
    loaded: int = 5
    kills: int = 3
    judge_gain: bool = True


def add_arguments(command: argparse.ArgumentParser) -> None:
    base = Options()
    add = command.add_argument
    add("--tables-mib", type=int, default=base.tables_mib, help="of the engine (%(default)s)")
    add("--restores", type=int, default=base.restores, help="in a row (%(default)s)")
    add("--quick", action="store_true", help="a small engine and few restores; gain not judged")
    add("--json", metavar="FILE", help="also write the findings as JSON")


def run(args: argparse.Namespace) -> int:
    options = Options(tables_mib=args.tables_mib, restores=args.restores)
    if args.quick:
        options = Options(tables_mib=1, restores=1, pairs=1, loaded=1, kills=1, judge_gain=False)
    finding = asyncio.run(measure(options))
    print(table(finding))
    if args.json:
        Path(args.json).write_bytes(orjson.dumps(msgspec.to_builtins(finding)))
    return 0 if finding.kept_promises else 1


async def measure(options: Options) -> Finding:
    """Run all of it. Raises `RunError`."""
    with tempfile.TemporaryDirectory(prefix="doherty-snapshots-") as name:
        folder = Path(name)
        stage = Stage(folder, options.tables_mib)
        await stage.probe()
        cold_s = await stage.cold()
        made = await stage.create()
        restored_s = [await stage.restored() for _ in range(options.restores)]
        paired_s = [await stage.two_at_once() for _ in range(options.pairs)]
        loaded_s, load_answers = await stage.beside_load(options.loaded)
        damage, damage_s = await stage.damaged()
        revivals_s, fallback_s = await managed(stage, Path(name, "managed"), options.kills)
        return Finding(
            tables_mib=options.tables_mib,
            cold_s=cold_s,
            dump_s=made["dump_s"],
            image_mib=int(made["image_bytes"]) // 2**20,
            restored_s=tuple(restored_s),
            paired_s=tuple(paired_s),
            loaded_s=tuple(loaded_s),
            load_answers=load_answers,
            answers=stage.answers,
            wrong=stage.wrong,
            damage=damage,
            damage_s=damage_s,
            revivals_s=revivals_s,
            fallback_s=fallback_s,
            judge_gain=options.judge_gain,
        )
