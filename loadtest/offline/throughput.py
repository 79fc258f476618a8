"""A job through Doherty against the bare engine that is given the same lines in one call.

Everything is the simulator's, in real time, as processes: the offline service with its store, one
engine worker, and for the yardstick `python -m backends.offline.bare`. Two jobs:

- different prompts: tokens a second through Doherty over those of the bare engine, counted from
  when the job was validated to when its last line was answered (prompts and answers; every line has
  to be in the output file once). Promised: 0.97 or more;
- prompts that share beginnings, more of them than the KV cache holds, in no order: Doherty does the
  lines in the order of their prefixes, so it is compared with the bare engine in the order of the
  file, and with the bare engine in sorted order.

    python -m loadtest offline throughput
    python -m loadtest offline throughput --lines 20000 --out throughput.txt
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import orjson

from loadtest.gpu import machine
from loadtest.offline import stage
from loadtest.offline.lines import Shape, bodies, input_file, sorted_by_prefix
from loadtest.run import RunError

SUMMARY = "tokens a second of a job, against the bare engine given the same lines in one call"
RATIO_MIN = 0.97
MODEL = "m"


class Bare(msgspec.Struct, frozen=True):
    """What `backends.offline.bare` prints."""

    lines: int
    failed: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    seconds: float
    tokens_per_s: float


class Row(msgspec.Struct, frozen=True):
    """One way of doing a job."""

    job: str
    way: str
    tokens_per_s: float
    seconds: float
    cached: float  # part of the prompt tokens
    whole_s: float  # from asking for the batch to its end; of the bare engine the same as seconds


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """What is simulated and how much of it."""

    lines: int = 6000
    shared_lines: int = 1200
    profile: str = "h200-8b"
    sequences_max: int = 256
    kv_cache_tokens: int = 120_000  # of which 256 lines of the first job take 90,000
    prefixes: int = 40  # of some 3,600 tokens each: a quarter more than the cache holds
    prefix_words: int = 3000
    chunk_lines: int = 2000
    time_scale: float = 1.0
    limit_s: float = 900.0
    seed: int = 1


def add_arguments(command: argparse.ArgumentParser) -> None:
    base, add = Setting(), command.add_argument
    add("--lines", type=int, default=base.lines, help="of the first job (%(default)s)")
    add("--shared-lines", type=int, default=base.shared_lines, help="of the second (%(default)s)")
    add("--profile", default=base.profile, help="of the simulator (%(default)s)")
    add("--max-num-seqs", dest="sequences_max", type=int, default=base.sequences_max)
    add("--kv-cache-tokens", type=int, default=base.kv_cache_tokens)
    add("--prefixes", type=int, default=base.prefixes, help="of the second job (%(default)s)")
    add("--prefix-words", type=int, default=base.prefix_words, help="of each (%(default)s)")
    add("--chunk-lines", type=int, default=base.chunk_lines, help="held at once (%(default)s)")
    add("--time-scale", type=float, default=base.time_scale, help="of the simulator (%(default)s)")
    add("--limit-s", type=float, default=base.limit_s, help="for one job (%(default)s)")
    add("--seed", type=int, default=base.seed)
    add("--out", metavar="FILE", help="also write the text here")
    add("--json", metavar="FILE")


def run(args: argparse.Namespace) -> int:
    fields = {name: getattr(args, name) for name in Setting.__struct_fields__}
    setting = Setting(**fields)
    if min(setting.lines, setting.shared_lines, setting.chunk_lines) < 1:
        print("loadtest: expected 1 line or more", file=sys.stderr)
        return 2
    begun_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="doherty-offline-") as folder:
        rows = asyncio.run(measure(setting, Path(folder)))
    text = shown(setting, rows, time.monotonic() - begun_s)
    print(text)
    if args.out:
        Path(args.out).write_text(text + "\n", encoding="utf-8")
    if args.json:
        value = {"setting": msgspec.to_builtins(setting), "rows": msgspec.to_builtins(rows)}
        Path(args.json).write_bytes(orjson.dumps(value, option=orjson.OPT_INDENT_2))
    return 0 if ratio(rows, "different", "bare") >= RATIO_MIN else 1


async def measure(setting: Setting, folder: Path) -> list[Row]:
    """Do everything, one after another. Raises `RunError`."""
    different = bodies(Shape(lines=setting.lines, seed=setting.seed), MODEL)
    shared = bodies(
        Shape(
            lines=setting.shared_lines,
            prompt_words=(20, 60),
            answer_tokens=(16, 64),
            prefixes=setting.prefixes,
            prefix_words=setting.prefix_words,
            seed=setting.seed,
        ),
        MODEL,
    )
    return [
        await bare(setting, folder, "different", "bare", input_file(different)),
        await through(setting, folder, "different", input_file(different)),
        await bare(setting, folder, "shared", "bare", input_file(shared)),
        await bare(setting, folder, "shared", "bare, sorted", input_file(sorted_by_prefix(shared))),
        await through(setting, folder, "shared", input_file(shared)),
    ]


def engine_flags(setting: Setting) -> list[str]:
    """Return the simulator's."""
    flags = ["--profile", setting.profile, "--max-num-seqs", str(setting.sequences_max)]
    flags += ["--kv-cache-tokens", str(setting.kv_cache_tokens)]
    return [*flags, "--time-scale", str(setting.time_scale)]


async def bare(setting: Setting, folder: Path, job: str, way: str, content: bytes) -> Row:
    """Give the bare engine all lines at once. Raises `RunError`."""
    path = folder / "bare.jsonl"
    path.write_bytes(content)
    command = ["-m", "backends.offline.bare", "--engine", "simulator", "--model", MODEL]
    found = await run_bare(
        [sys.executable, *command, "--input", str(path), "--", *engine_flags(setting)],
        setting.limit_s,
    )
    cached = found.cached_tokens / max(1, found.prompt_tokens)
    return _told(Row(job, way, found.tokens_per_s, found.seconds, cached, found.seconds))


async def run_bare(command: Sequence[str], limit_s: float) -> Bare:
    """Run a yardstick; return the figures of its last line. Raises `RunError`."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(limit_s):
            out, err = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        raise RunError(f"the bare engine was not done in {limit_s:g} s") from None
    if process.returncode:
        raise RunError(f"the bare engine failed: {err.decode('utf-8', 'replace')[-2000:].strip()}")
    found = msgspec.json.decode(out.splitlines()[-1], type=Bare)
    if found.failed:
        raise RunError(f"the bare engine could not do {found.failed} of {found.lines} lines")
    return found


async def through(setting: Setting, folder: Path, job: str, content: bytes) -> Row:
    """Do the lines as a job. Raises `RunError`."""
    place = folder / job
    place.mkdir()
    log = place / "worker.log"
    async with stage.service(place, {"chunk_lines": setting.chunk_lines}) as url:
        port = stage.free_port()
        command = ["-m", "backends.offline.worker", "--engine", "simulator", "--model", MODEL]
        command += ["--desk", url, "--worker-id", "worker-1", "--port", str(port)]
        command += ["--chunk-lines", str(setting.chunk_lines), "--", *engine_flags(setting)]
        async with stage.program([sys.executable, *command], log) as process:
            await stage.until_healthy(f"http://127.0.0.1:{port}", process, log, 60.0)
            async with stage.alive(process, log):
                course = await stage.do_job(url, content, setting.limit_s)
    if course.failed:
        raise RunError(f"{course.failed} of {course.lines} lines failed")
    cached = course.cached_tokens / max(1, course.prompt_tokens)
    took_s = course.answered_s - course.running_s
    return _told(Row(job, "Doherty", course.tokens_per_s, took_s, cached, course.ended_s))


def _told(row: Row) -> Row:
    print(f"{row.job}, {row.way}: {row.tokens_per_s:,.0f} tokens/s", file=sys.stderr, flush=True)
    return row


def ratio(rows: Sequence[Row], job: str, way: str) -> float:
    """Return Doherty's tokens a second over those of another way."""
    rates = {row.way: row.tokens_per_s for row in rows if row.job == job}
    return rates["Doherty"] / rates[way]


def shown(setting: Setting, rows: Sequence[Row], took_s: float) -> str:
    """Return the text of a run."""
    lines = [
        f"job throughput on the simulator: {setting.profile}, "
        f"{setting.sequences_max} sequences, {setting.kv_cache_tokens:,} tokens of KV cache, "
        f"chunks of {setting.chunk_lines}",
        *(f"{name}: {text}" for name, text in machine.header([]).items()),
        f"{took_s:.0f} s in all",
        "",
        f"{'job':<12}{'way':<15}{'tokens/s':>10}{'seconds':>9}{'cached':>8}{'whole s':>9}",
    ]
    lines += [
        f"{row.job:<12}{row.way:<15}{row.tokens_per_s:>10,.0f}{row.seconds:>9.2f}"
        f"{row.cached:>8.1%}{row.whole_s:>9.2f}"
        for row in rows
    ]
    lines += [
        "",
        f"{setting.lines} different lines, Doherty over bare: "
        f"{ratio(rows, 'different', 'bare'):.3f} (promised {RATIO_MIN})",
        f"{setting.shared_lines} lines that share {setting.prefixes} beginnings of "
        f"{setting.prefix_words} words: {ratio(rows, 'shared', 'bare'):.2f} times the bare engine "
        f"in the file's order, {ratio(rows, 'shared', 'bare, sorted'):.3f} of it in sorted order",
    ]
    return "\n".join(lines)
