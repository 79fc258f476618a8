"""Tables, intervals, targets and the lab's word from what `gpu fleet` left: no GPU is needed.

    python -m loadtest gpu verdict vllm.fleet --out loadtest/results/fleet-h200-vllm.txt

Several files are read as one: what was measured in several calls whose file did not travel. Ends
with 1 when a target was missed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from loadtest.gpu.fleet.planned import read_plan
from loadtest.gpu.fleet.record import Burst, CellRecord, Record, RecordError, read
from loadtest.gpu.fleet.report import text_of

SUMMARY = "tables and targets from what `gpu fleet` recorded"


def add_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("records", nargs="+", metavar="FILE", help="written by `gpu fleet` or `gpu surge`")
    add("--out", metavar="FILE", help="also write the text here")
    add("--conversation-trace", default="", help="where that trace lies here, if elsewhere")
    add("--agents-trace", default="", help="where that trace lies here, if elsewhere")
    add("--plan", metavar="FILE", help="of `doherty plan MODEL --json`: foretells several cards")


def _all_of(paths: list[Path]) -> Record:
    """Return the entries of all files. Raises `RecordError`."""
    found = [read(path) for path in paths]
    for path, entries in zip(paths, found, strict=True):
        if not any(isinstance(entry, CellRecord | Burst) for entry in entries):
            raise RecordError(
                f"{path}: holds no cell and no burst yet; "
                f"the call of `gpu fleet` or `gpu surge` that began it goes on when it is repeated"
            )
    record = Record(paths[0])
    record.entries = [entry for entries in found for entry in entries]
    return record


def run(args: argparse.Namespace) -> int:
    try:
        record = _all_of([Path(name) for name in args.records])
        plan = read_plan(args.plan) if args.plan else {}
        text, missed = text_of(record.moved(args.conversation_trace, args.agents_trace), plan)
        if args.out:
            Path(args.out).write_text(text, encoding="utf-8")
    except RecordError as error:
        print(f"loadtest: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"loadtest: {error.filename}: cannot be written: {error.strerror}", file=sys.stderr)
        return 2
    print(text, end="")
    return 1 if missed else 0
