"""The command `python -m backends.offline.bare`: all lines in one call, with nobody in between.

What a worker reaches through the desk is judged against this: the same engine, in the same form, is
given every line of a file at once, and the time until the last answer counts. No desk, no chunks,
no reports.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from backends.log import Log
from backends.offline.line_engine import EngineError, LineEngine
from backends.offline.work import Line, Result
from backends.offline.worker import ENGINES, make_engine
from backends.offline.worker_loop import FEED_LINES


class InputLine(msgspec.Struct, frozen=True):
    """A line of a batch's input file, as far as it matters here."""

    url: str
    body: msgspec.Raw


class Figures(msgspec.Struct, frozen=True):
    """What came of all lines together."""

    lines: int
    failed: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    seconds: float
    tokens_per_s: float


def read_lines(text: bytes) -> list[Line]:
    """Return the lines of an input file. Raises `ValueError`."""
    read = [msgspec.json.decode(line, type=InputLine) for line in text.splitlines() if line]
    return [Line("bare", number, line.url, line.body) for number, line in enumerate(read)]


def figures_of(results: Sequence[Result], seconds: float) -> Figures:
    """Return the sums."""
    prompts = sum(result.prompt_tokens for result in results)
    answers = sum(result.completion_tokens for result in results)
    return Figures(
        lines=len(results),
        failed=sum(result.status >= 400 for result in results),
        prompt_tokens=prompts,
        cached_tokens=sum(result.cached_tokens for result in results),
        completion_tokens=answers,
        seconds=round(seconds, 3),
        tokens_per_s=round((prompts + answers) / seconds, 1),
    )


async def measure(engine: LineEngine, lines: Sequence[Line]) -> Figures:
    """Load the model and do all lines. Raises `EngineError`."""
    await engine.start()
    try:
        begun_s = time.perf_counter()
        doing = []
        for line in lines:
            doing.append(asyncio.ensure_future(engine.do(line)))
            if not len(doing) % FEED_LINES:
                await asyncio.sleep(0)  # the first are computed while the others are still read
        results = await asyncio.gather(*doing)
        return figures_of(results, time.perf_counter() - begun_s)
    finally:
        await engine.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Print the figures as JSON; return the exit code."""
    own, rest = list(sys.argv[1:] if argv is None else argv), []
    if "--" in own:
        at = own.index("--")
        own, rest = own[:at], own[at + 1 :]
    parser = argparse.ArgumentParser(
        prog="python -m backends.offline.bare",
        description="Do all lines of an input file in one call and print the figures.",
        epilog="Arguments after -- are the engine's.",
        allow_abbrev=False,
    )
    parser.add_argument("--engine", choices=ENGINES, required=True)
    parser.add_argument("--model", required=True, help="the name that lines ask for")
    parser.add_argument("--model-path", default="", help="where its weights are (the name)")
    parser.add_argument("--input", type=Path, required=True, help="a batch's input file")
    options = parser.parse_args(own)
    try:
        lines = read_lines(options.input.read_bytes())
    except OSError as error:
        parser.error(f"--input: {options.input}: {error.strerror}")
    except ValueError as error:
        parser.error(f"--input: {options.input} is no input file of a batch: {error}")

    async def run() -> Figures:
        engine = make_engine(options.engine, options.model, options.model_path, rest, Log())
        return await measure(engine, lines)

    try:
        figures = asyncio.run(run())
    except EngineError as error:
        sys.stderr.write(f"bare: {error}\n")
        return 1
    sys.stdout.write(msgspec.json.encode(figures).decode() + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
