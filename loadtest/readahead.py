"""What fetching the files of a start ahead of it gains, with a page cache that has been dropped.

A command's start is recorded once, and then timed as often as asked for, in turns: cold (its files
are on the disk alone), cold with what was recorded fetched beside it, and warm. It has started when
it ends, or when --until answers.

    python -m loadtest readahead --drop all -- python3 -c 'import torch'
    python -m loadtest readahead --drop all --until http://127.0.0.1:8123/health -- \\
        vllm serve models/qwen3-8b --port 8123 --load-format dummy

`--drop all` has the kernel drop its whole cache, and needs root; `--drop FOLDER` evicts the files
below a folder, and may be given several times. `read_by_itself` is what the command waited for: the
kernel's count of blocks that it had to read from the disk.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import orjson

from loadtest.gpu import machine
from loadtest.run import RunError

SUMMARY = "files of a start fetched ahead of it, with a dropped page cache"
ALL = "all"
_DROP = Path("/proc/sys/vm/drop_caches")
KINDS = ("cold", "ahead", "warm")
COLUMNS = ("read_by_itself_mib", "fetched_mib", "fetched_in_s")


def add_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--drop", action="append", default=[], metavar="all|FOLDER", help="before a cold start")
    add("--until", default="", metavar="URL", help="it has started when this answers 200")
    add("--rounds", type=int, default=3, help="default %(default)s")
    add("--limit-s", type=float, default=600.0, help="for one start")
    add("--out", metavar="FILE", help="also write the text here")
    add("--json", metavar="FILE")
    add("start", nargs="+", metavar="-- COMMAND")


def run(args: argparse.Namespace) -> int:
    if args.rounds < 1 or not args.drop:
        print("loadtest: expected --rounds of 1 or more, and a --drop", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="doherty-reads-") as folder:
        found = _measure(args, Path(folder) / "reads.json")
    text = shown(args, found)
    print(text)
    if args.out:
        Path(args.out).write_text(text + "\n", encoding="utf-8")
    if args.json:
        Path(args.json).write_bytes(orjson.dumps(found, option=orjson.OPT_INDENT_2))
    return 0


Figures = dict[str, float]


def _measure(args: argparse.Namespace, listed: Path) -> dict[str, list[Figures]]:
    """Return the figures of each start, by kind. Raises `RunError`."""
    start(args, [])  # so that what is compiled once is compiled
    found: dict[str, list[Figures]] = {"record": [start(args, ["--record", "--list", str(listed)])]}
    for _ in range(args.rounds):
        for kind in KINDS:
            if kind != "warm":
                drop(args.drop)
            ahead = ["--list", str(listed)] if kind == "ahead" else []
            found.setdefault(kind, []).append(start(args, ahead))
            print(f"{kind}: {found[kind][-1]['took_s']:.2f} s", file=sys.stderr, flush=True)
    return found


def start(args: argparse.Namespace, further: Sequence[str]) -> Figures:
    """Have Doherty start the command; return what that took. Raises `RunError`."""
    until = ["--until", args.until] if args.until else []
    words = [sys.executable, "-m", "backends.readahead", *further, *until]
    ran = subprocess.run(  # noqa: S603 - this checkout's own program, and the user's command
        [*words, "--limit-s", str(args.limit_s), "--", *args.start],
        stdout=subprocess.PIPE,
        check=False,
    )
    if ran.returncode:
        raise RunError(f"the start ended with {ran.returncode}")
    value: Figures = orjson.loads(ran.stdout)
    return value


def drop(what: Iterable[str]) -> None:
    """Take files out of the page cache. Raises `RunError`."""
    os.sync()  # only what is on the disk can go
    for place in what:
        if place == ALL:
            try:
                _DROP.write_text("3\n")
            except OSError as error:
                raise RunError(f"{_DROP}: {error.strerror}; be root, or --drop a folder") from error
            continue
        for folder, _, names in os.walk(place):
            for name in names:
                with contextlib.suppress(OSError):
                    fd = os.open(os.path.join(folder, name), os.O_RDONLY | os.O_NONBLOCK)
                    try:
                        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                    finally:
                        os.close(fd)


def shown(args: argparse.Namespace, found: dict[str, list[Figures]]) -> str:
    """Return the text of a run, medians of its rounds."""
    recorded = found["record"][0]
    header = machine.header(machine.gpus())
    width = max(map(len, header))
    lines = ["Files of a start, fetched ahead", ""]
    lines += [f"{name:<{width}}  {text}" for name, text in header.items()]
    lines += [
        "",
        f"recorded: {recorded['files']:,.0f} files, {recorded['listed_mib']:,.0f} MiB",
        "",
    ]
    lines.append(f"{'':6}{'s':>8}{'least':>8}{'most':>8}{'waited MiB':>12}{'fetched MiB in s':>18}")
    for kind in KINDS:
        took = [each["took_s"] for each in found[kind]]
        itself, fetched, in_s = (
            statistics.median(each[name] for each in found[kind]) for name in COLUMNS
        )
        lines.append(
            f"{kind:6}{statistics.median(took):8.2f}{min(took):8.2f}{max(took):8.2f}"
            f"{itself:12,.0f}{fetched:11,.0f}{in_s:7.2f}"
        )
    return "\n".join(lines)
