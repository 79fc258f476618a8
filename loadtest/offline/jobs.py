"""Real prompts as jobs, through a whole Doherty with an engine worker of the simulator.

- `mtbench 1`: the first turns of 80 questions; `mtbench 2`: the second turns, each after the answer
  that the first job gave, as a user of batches would do it;
- `miniswe`: every prompt of 20 runs of a coding agent, each with all that came before it in its
  run, in the order in which they were recorded. Their beginnings are long and shared.

Each job goes through the proxy as a file and a batch, and is read back. Promised: each line is in
the output file, once, and no line failed.

    python -m loadtest offline jobs
    python -m loadtest offline jobs --limit 20 --profile fast
"""

from __future__ import annotations

import argparse
import asyncio
import lzma
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import orjson

from loadtest.formats import find_trace, read_trace
from loadtest.gpu import machine
from loadtest.offline import stage
from loadtest.offline.lines import input_file
from loadtest.offline.parts import Patient
from loadtest.run import RunError
from loadtest.traces import Trace

SUMMARY = "real prompts as jobs: two-turn questions, a coding agent's runs"
MODEL = "work"
ANSWER_TOKENS = 256  # of a question's answer, at most


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """What is done, on what."""

    limit: int = 0  # lines of each job; 0: all
    profile: str = "h200-8b"
    time_scale: float = 1.0
    kv_cache_tokens: int = 500_000
    max_model_len: int = 131_072
    limit_s: float = 600.0  # for each job


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One job, done."""

    job: str
    lines: int
    wrong: int  # that failed, are missing, or there twice
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    seconds: float  # from the upload to the end

    @property
    def tokens_per_s(self) -> float:
        return (self.prompt_tokens + self.completion_tokens) / self.seconds


class _Question(msgspec.Struct):
    turns: list[str]


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: dict[str, Any] | None = None

    @property
    def cached_tokens(self) -> int:
        return int((self.prompt_tokens_details or {}).get("cached_tokens") or 0)


def add_arguments(command: argparse.ArgumentParser) -> None:
    base, add = Setting(), command.add_argument
    add("--limit", type=int, default=base.limit, help="lines of each job (default: all)")
    add("--profile", default=base.profile, help="of the simulator (%(default)s)")
    add("--time-scale", type=float, default=base.time_scale, help="of the simulator (%(default)s)")
    add("--kv-cache-tokens", type=int, default=base.kv_cache_tokens)
    add("--max-model-len", type=int, default=base.max_model_len)
    add("--limit-s", type=float, default=base.limit_s, help="for each job (%(default)s)")
    add("--out", metavar="FILE", help="also write the text here")
    add("--json", metavar="FILE")


def run(args: argparse.Namespace) -> int:
    setting = Setting(**{name: getattr(args, name) for name in Setting.__struct_fields__})
    if setting.limit < 0:
        print("loadtest: --limit: expected 0 or more", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="doherty-jobs-") as folder:
        rows = asyncio.run(measure(setting, Path(folder)))
    text = shown(setting, rows)
    print(text)
    if args.out:
        Path(args.out).write_text(text + "\n", encoding="utf-8")
    if args.json:
        value = {"setting": msgspec.to_builtins(setting), "rows": msgspec.to_builtins(rows)}
        Path(args.json).write_bytes(orjson.dumps(value, option=orjson.OPT_INDENT_2))
    return 1 if any(row.wrong for row in rows) else 0


# --- requests, as values -------------------------------------------------------------------------


def questions() -> list[list[str]]:
    """Return the turns of each question."""
    text = lzma.decompress(find_trace("mtbench_questions").read_bytes())
    return [msgspec.json.decode(row, type=_Question).turns for row in text.splitlines()]


def first_turns(asked: Sequence[Sequence[str]]) -> list[dict[str, object]]:
    """Return a request for the first turn of each question."""
    return [chat([turns[0]], ANSWER_TOKENS) for turns in asked]


def second_turns(
    asked: Sequence[Sequence[str]], answers: Mapping[str, Any]
) -> list[dict[str, object]]:
    """Return a request for the second turn of each; `answers` to the first by custom id."""
    said = [answers[f"line-{number}"]["choices"][0]["message"] for number in range(len(asked))]
    return [
        chat([turns[0], answer["content"], turns[1]], ANSWER_TOKENS)
        for turns, answer in zip(asked, said, strict=True)
    ]


def prompts(trace: Trace) -> list[dict[str, object]]:
    """Return a request for each prompt of a recorded text."""
    return [chat(arrival.texts, arrival.output_tokens) for arrival in trace.arrivals]


def chat(texts: Sequence[str], answer_tokens: int) -> dict[str, object]:
    """Return a chat: user and assistant in turn."""
    roles = ("user", "assistant")
    messages = [{"role": roles[place % 2], "content": text} for place, text in enumerate(texts)]
    return {"model": MODEL, "messages": messages, "max_tokens": answer_tokens}


# --- the run -------------------------------------------------------------------------------------


def config(setting: Setting, folder: Path) -> dict[str, Any]:
    """Return the configuration of the run."""
    args = ["--profile", setting.profile, "--time-scale", f"{setting.time_scale:g}"]
    args += ["--kv-cache-tokens", str(setting.kv_cache_tokens)]
    args += ["--max-model-len", str(setting.max_model_len)]
    pool = {"engine": "simulator", "serves": "jobs", "args": args, "replicas": 1}
    ports = [stage.free_port() for _ in range(4)]
    return {
        "proxy": {"port": ports[0], "admin_port": ports[1], "access_log": "off"},
        "manager": {"port": ports[2], "run_dir": str(folder / "run")},
        "offline": {"port": ports[3], "spare_capacity": False},
        "models": [{"name": MODEL, "pools": [pool]}],
    }


async def measure(setting: Setting, folder: Path) -> list[Row]:
    """Do the jobs, one after another. Raises `RunError`."""
    most = setting.limit or None
    asked = questions()[:most]
    recorded = prompts(read_trace("miniswe"))[:most]
    async with (
        stage.whole(config(setting, folder), folder) as (urls, _),
        Patient(urls["proxy"]) as proxy,
    ):
        first, answers = await _do(proxy, "mtbench 1", first_turns(asked), setting)
        if first.wrong:
            return [first]
        second, _ = await _do(proxy, "mtbench 2", second_turns(asked, answers), setting)
        third, _ = await _do(proxy, "miniswe", recorded, setting)
    return [first, second, third]


async def _do(
    proxy: Patient, job: str, requests: list[dict[str, object]], setting: Setting
) -> tuple[Row, dict[str, Any]]:
    """Do one job; return its figures, and the answers by custom id."""
    begun_s = time.monotonic()
    try:
        async with asyncio.timeout(setting.limit_s):
            batch = await proxy.until_ended(await proxy.submit(input_file(requests), job))
    except TimeoutError:
        raise RunError(f"{job} was not done in {setting.limit_s:g} s") from None
    seconds = time.monotonic() - begun_s
    if batch["status"] != "completed":
        raise RunError(f"{job} ended as {batch['status']}: {batch.get('errors')}")
    rows = await proxy.rows(batch["output_file_id"])
    good = {row["custom_id"]: row["response"]["body"] for row in rows}
    used = [msgspec.convert(body["usage"], _Usage) for body in good.values()]
    row = Row(
        job=job,
        lines=len(requests),
        wrong=abs(len(requests) - len(good)) + len(rows) - len(good),
        prompt_tokens=sum(usage.prompt_tokens for usage in used),
        cached_tokens=sum(usage.cached_tokens for usage in used),
        completion_tokens=sum(usage.completion_tokens for usage in used),
        seconds=round(seconds, 2),
    )
    print(f"{job}: {row.lines} lines in {row.seconds:g} s", file=sys.stderr, flush=True)
    return row, good


def shown(setting: Setting, rows: Sequence[Row]) -> str:
    """Return the text of a run."""
    lines = [
        f"real prompts as jobs on one engine worker ({setting.profile}, "
        f"time scale {setting.time_scale:g}, {setting.kv_cache_tokens:,} tokens of KV cache)",
        *(f"{name}: {text}" for name, text in machine.header([]).items()),
        "",
        f"{'job':<12}{'lines':>6}{'wrong':>7}{'prompt tokens':>15}{'cached':>8}"
        f"{'answer tokens':>15}{'seconds':>9}{'tokens/s':>10}",
    ]
    lines += [
        f"{row.job:<12}{row.lines:>6}{row.wrong:>7}{row.prompt_tokens:>15,}"
        f"{row.cached_tokens / max(1, row.prompt_tokens):>8.1%}{row.completion_tokens:>15,}"
        f"{row.seconds:>9.2f}{row.tokens_per_s:>10,.0f}"
        for row in rows
    ]
    return "\n".join(lines)
