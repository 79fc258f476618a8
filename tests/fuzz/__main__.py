"""Fuzzing of the readers that meet octets from outside.

    python -m tests.fuzz run TARGET --seconds 120    coverage-guided, needs the extra `fuzz`
    python -m tests.fuzz keep TARGET FOLDER          keep what such a run found as seeds
    python -m tests.fuzz cost [TARGET] [--corpus D]  processor time of each kept input
    python -m tests.fuzz seeds FOLDER                write the seeds that are made from the vectors
    python -m tests.fuzz flood                       what a head in 64-octet pieces costs
    python -m tests.fuzz cuts                        every two cuts of every short vector

An input that breaks a law is written to `tests/fuzz/crashes/TARGET`, which the tests replay.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path


def main() -> int:
    as_it_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("tests.fuzz", description=__doc__, formatter_class=as_it_is)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("target")
    run.add_argument("--seconds", type=int, default=120)
    run.add_argument("--corpus", type=Path, help="keep what was found in this folder")
    keep = commands.add_parser("keep")
    keep.add_argument("target")
    keep.add_argument("corpus", type=Path)
    cost = commands.add_parser("cost")
    cost.add_argument("target", nargs="?")
    cost.add_argument("--corpus", type=Path, help="files to time beside the kept ones")
    commands.add_parser("seeds").add_argument("folder", type=Path)
    commands.add_parser("flood")
    commands.add_parser("cuts")
    args = parser.parse_args()
    if args.command == "run":
        # Before the modules under test are imported: they are instrumented as they load.
        from tests.fuzz import guided

        return guided.run(args.target, args.seconds, args.corpus)
    from tests.fuzz import keeping, measure

    match args.command:
        case "keep":
            return keeping.keep(args.target, args.corpus)
        case "cost":
            return measure.cost(args.target, args.corpus)
        case "flood":
            return measure.flood()
        case "cuts":
            return measure.cuts()
        case _:
            return _write_seeds(args.folder)


def _write_seeds(folder: Path) -> int:
    from tests.fuzz.targets import TARGETS

    for name, target in TARGETS.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for octets in target.seeds():
            file_name = hashlib.sha1(octets, usedforsecurity=False).hexdigest()
            (folder / name / file_name).write_bytes(octets)
    return 0


if __name__ == "__main__":
    sys.exit(main())
