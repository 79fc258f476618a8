"""`doherty batch`: submit, list, status, watch, results, cancel.

What a person asked for goes to standard output, and how it gets on to standard error, so that a
result can be piped. A job is the service's as soon as it is submitted: interrupting a command that
watches leaves it running.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final, TextIO

import orjson

from backends.failure import StartError
from backends.offline.client.aio import DEFAULT_URL
from backends.offline.client.bar import line, story, table
from backends.offline.client.errors import InputError, OfflineError
from backends.offline.client.lines import LINE_BYTES_MAX, endpoint_of
from backends.offline.client.spool import Spool
from backends.offline.client.sync import Client, Job
from backends.offline.client.values import Progress
from backends.offline.validation import ENDPOINTS, LineReader, Piece

REFRESH_S = 0.5  # of the bar on a terminal
TELL_S = 10.0  # between lines where there is none
PIECE_BYTES = 256 * 1024
LISTED = 20
USAGE_STATUS, FAILURE_STATUS, INTERRUPTED_STATUS = 2, 1, 130
_METADATA = re.compile(r"([^=]+)=(.*)", re.DOTALL)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands."""
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    submit = _command(commands, "submit", _submit, "upload requests and have them done")
    submit.add_argument(
        "file",
        metavar="FILE",
        help="JSON Lines: lines of a batch, or bare request bodies; -: stdin",
    )
    submit.add_argument(
        "--endpoint",
        choices=ENDPOINTS,
        metavar="PATH",
        help=f"one of {', '.join(ENDPOINTS)} (default: by the first line)",
    )
    submit.add_argument(
        "--window", default="24h", metavar="TIME", help="time for it (default: 24h)"
    )
    submit.add_argument(
        "--metadata", action="append", default=[], type=_pair, metavar="KEY=VALUE", help="to keep"
    )
    submit.add_argument("--watch", action="store_true", help="stay until it has ended")
    _command(commands, "list", _list, "show the last batches")
    status = _command(commands, "status", _status, "show one batch, or the last ones")
    status.add_argument("id", nargs="?", metavar="ID")
    results = _command(commands, "results", _results, "print the answers, in the order of lines")
    results.add_argument("-o", "--output", metavar="FILE", help="write them there")
    results.add_argument("--errors", action="store_true", help="the lines that failed instead")
    results.add_argument(
        "--follow", action="store_true", help="print them as they come, until it has ended"
    )
    watch = _command(commands, "watch", _watch, "show how a batch gets on, until it has ended")
    cancel = _command(commands, "cancel", _cancel, "have no more lines of a batch done")
    for command in (results, watch, cancel):
        command.add_argument("id", metavar="ID")


def _command(
    commands: Any, name: str, run: Callable[[Client, argparse.Namespace], int], text: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.add_argument(
        "--url",
        default=os.environ.get("DOHERTY_URL", DEFAULT_URL),
        help=f"the proxy (default: {DEFAULT_URL}) [DOHERTY_URL]",
    )
    parser.add_argument("--api-key", metavar="KEY", help="key to ask with [DOHERTY_API_KEY]")
    parser.set_defaults(run=lambda options: _guarded(run, options))
    return parser


def _pair(text: str) -> tuple[str, str]:
    match = _METADATA.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(f"'{text}' is not KEY=VALUE")
    return match[1], match[2]


def _guarded(run: Callable[[Client, argparse.Namespace], int], options: argparse.Namespace) -> int:
    """Run a command; what a person can do something about becomes one line."""
    key = options.api_key or os.environ.get("DOHERTY_API_KEY")
    try:
        client = Client(options.url, key, patience_s=10.0)
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return USAGE_STATUS
    with client:
        try:
            return run(client, options)
        except InputError as error:
            sys.stderr.write(f"{options.file}: {error}; nothing was submitted\n")
            return USAGE_STATUS
        except OfflineError as error:
            raise StartError(str(error)) from error
        except BrokenPipeError:
            raise
        except OSError as error:  # of the file that is read or written, which may be the output
            where = error.filename or "the output"
            raise StartError(f"{where}: {error.strerror or error}") from error


def _submit(client: Client, options: argparse.Namespace) -> int:
    try:
        source = _opened(options.file)
    except OSError as error:
        sys.stderr.write(f"{options.file}: {error.strerror}\n")
        return USAGE_STATUS
    with source as file:
        lines = _lines_of(file)
        first = next(lines, None)
        endpoint = options.endpoint or (endpoint_of(first.octets or b"") if first else None)
        if first is None or endpoint is None:
            problem = "there is no request" if first is None else "say which --endpoint it is for"
            sys.stderr.write(f"{options.file}: {problem}\n")
            return USAGE_STATUS
        with Spool(endpoint) as spool:
            for piece in itertools.chain((first,), lines):
                if piece.octets is None:
                    raise InputError(piece.line, f"more than {LINE_BYTES_MAX} bytes")
                spool.add_text(piece.line, piece.octets)
            name = "stdin.jsonl" if options.file == "-" else Path(options.file).name
            job = client.submit(
                spool, window=options.window, metadata=dict(options.metadata), name=_plain(name)
            )
    sys.stdout.write(f"{job.id}\n")
    sys.stdout.flush()
    return _watched(job) if options.watch else 0


def _opened(name: str) -> contextlib.AbstractContextManager[BinaryIO]:
    if name == "-":
        return contextlib.nullcontext(sys.stdin.buffer)
    return open(name, "rb")


def _lines_of(file: BinaryIO) -> Iterator[Piece]:
    reader = LineReader(LINE_BYTES_MAX)
    while octets := file.read(PIECE_BYTES):
        yield from reader.feed(octets)
    yield from reader.end()


def _plain(name: str) -> str:
    """Return a file's name that can stand in a header."""
    return re.sub(r'[^\x20-\x7e]|["\\]', "_", name)


def _list(client: Client, _: argparse.Namespace) -> int:
    shown = list(itertools.islice(client.jobs(), LISTED))
    sys.stdout.write(table(shown) + "\n")
    return 0


def _status(client: Client, options: argparse.Namespace) -> int:
    if options.id is None:
        return _list(client, options)
    sys.stdout.write(story(client.job(options.id).progress()) + "\n")
    return 0


def _watch(client: Client, options: argparse.Namespace) -> int:
    return _watched(client.job(options.id))


def _watched(job: Job) -> int:
    shown: Final = _Terminal(sys.stderr) if sys.stderr.isatty() else _Plain(sys.stderr)
    told: str | None = None
    try:
        while not (progress := job.progress()).ended:
            shown.show(progress)
            if progress.problem and progress.problem != told:
                shown.end()
                sys.stderr.write(f"{progress.problem}\n")
            told = progress.problem
            time.sleep(REFRESH_S)
    except KeyboardInterrupt:
        shown.end()
        sys.stderr.write(f"{job.id} goes on; see it with: doherty batch watch {job.id}\n")
        return INTERRUPTED_STATUS
    shown.show(progress)
    shown.end()
    for problem in progress.problems:
        sys.stderr.write(f"{problem} ({problem.code})\n")
    return 0 if progress.succeeded else FAILURE_STATUS


class _Terminal:
    """A line that is written over."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def show(self, progress: Progress) -> None:
        text = line(progress, shutil.get_terminal_size().columns)
        self._stream.write(f"\r\x1b[K{text}")
        self._stream.flush()

    def end(self) -> None:
        self._stream.write("\n")


class _Plain:
    """A line when the state changes, and now and then between."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._state, self._told_s = "", 0.0

    def show(self, progress: Progress) -> None:
        if progress.state != self._state or time.monotonic() - self._told_s >= TELL_S:
            self._state, self._told_s = progress.state, time.monotonic()
            self._stream.write(line(progress) + "\n")
            self._stream.flush()

    def end(self) -> None:
        """Nothing is left open."""


def _results(client: Client, options: argparse.Namespace) -> int:
    job = client.job(options.id)
    results = job.results(ordered=not options.follow, follow=options.follow)
    try:
        target = _target(options.output)
    except OSError as error:
        sys.stderr.write(f"{options.output}: {error.strerror}\n")
        return USAGE_STATUS
    with target as out:
        for result in results:
            if result.ok != options.errors:
                out.write(orjson.dumps(result.line, option=orjson.OPT_APPEND_NEWLINE))
                if options.follow:
                    out.flush()
        out.flush()
    return 0


def _target(name: str | None) -> contextlib.AbstractContextManager[BinaryIO]:
    if name is None and sys.stdout is None:
        raise StartError("standard output is closed; name a file with --output")
    return contextlib.nullcontext(sys.stdout.buffer) if name is None else open(name, "wb")


def _cancel(client: Client, options: argparse.Namespace) -> int:
    sys.stdout.write(story(client.job(options.id).cancel()) + "\n")
    return 0
