"""What the commands that start an engine share: their arguments, and where their text goes."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import orjson
import uvloop

from loadtest.gpu.stack import Stack, StackOptions
from loadtest.gpu.steps import Finding, report
from loadtest.run import RunError

ENGINES = ("vllm", "sglang", "simulator")


def add_stack_arguments(command: argparse.ArgumentParser) -> None:
    """Add what says which engine is started, and where the text goes."""
    base, add = StackOptions(), command.add_argument
    add("--engine", choices=ENGINES, default=base.engine, help="default %(default)s")
    add("--model", default=base.model, help="name that clients ask for (default %(default)s)")
    add("--model-path", default="", help="folder or hub id of the weights")
    add("--env", action="append", default=[], metavar="NAME=VALUE", help="of the engine")
    add("--workers", type=int, default=base.workers, help="of the proxy (default %(default)s)")
    add("--start-timeout", type=float, default=base.start_timeout_s, metavar="S")
    add("--no-sleep", action="store_true", help="start the engine without sleep mode")
    add("--doherty", default="", metavar="COMMAND", help="default: this checkout's")
    add("--limit-s", type=float, default=0.0, metavar="N", help="for all; 0: as long as it takes")
    add("--seed", type=int, default=1, help="of prompts and orders")
    add("--out", metavar="FILE", help="also write the text here")
    add("--json", metavar="FILE", help="write everything as JSON")
    add("--logs", metavar="FOLDER", help="keep configuration and logs here")
    add("engine_args", nargs="*", metavar="-- ARG", help="arguments of the engine")


def stack_options(args: argparse.Namespace) -> StackOptions:
    """Return what the command line asks for. Raises `ValueError`."""
    pairs = [item.partition("=") for item in args.env]
    if wrong := [name for name, equals, _ in pairs if not name or not equals]:
        raise ValueError(f"--env {wrong[0]}: expected NAME=VALUE")
    if args.engine != "simulator" and not args.model_path:
        raise ValueError("--model-path: a real engine needs a folder or a hub id")
    return StackOptions(
        engine=args.engine,
        model=args.model,
        model_path=args.model_path,
        args=tuple(args.engine_args),
        env={name: value for name, _, value in pairs},
        workers=args.workers,
        start_timeout_s=args.start_timeout,
        doherty=args.doherty,
        sleep=not args.no_sleep,
    )


def run_in_folder(
    args: argparse.Namespace,
    options: StackOptions,
    work: Callable[[Stack], Coroutine[Any, Any, int]],
) -> int:
    """Give `work` a stack, and a folder for it that is kept when asked for."""
    folder = Path(args.logs) if args.logs else Path(tempfile.mkdtemp(prefix="doherty-gpu-"))
    try:
        return uvloop.run(work(Stack(options, folder.resolve())))
    except ValueError as error:
        print(f"loadtest: {error}", file=sys.stderr)
        return 2
    finally:
        if not args.logs:
            shutil.rmtree(folder, ignore_errors=True)


def finish(
    args: argparse.Namespace, title: str, header: dict[str, str], found: list[Finding]
) -> None:
    """Write the text and the JSON where they are wanted. Raises `RunError`."""
    text = report(f"{title}: {args.engine}", header, found)
    print()
    print("\n".join(text.splitlines()[: len(header) + 2]))
    print(text.splitlines()[-1])
    try:
        if args.out:
            Path(args.out).write_text(text, encoding="utf-8")
        if args.json:
            value = {"header": header, "findings": [_plain(finding) for finding in found]}
            Path(args.json).write_bytes(orjson.dumps(value, option=orjson.OPT_INDENT_2))
    except OSError as error:
        raise RunError(f"{error.filename}: cannot be written: {error.strerror}") from error


def _plain(finding: Finding) -> dict[str, object]:
    return {name: getattr(finding, name) for name in finding.__struct_fields__}
