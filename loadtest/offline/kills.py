"""kill -9 of engine workers, manager and offline service in the middle of a job.

A whole Doherty (`doherty up`) with engine workers of the simulator does one job. The kills come
when so many lines are done as a seed says, at processes that the same seed chooses. At the end:

- each custom_id must be in the output or the error file, once, and none in the error file;
- what was computed must be what the job has and at most one chunk more for each kill. That is
  counted by the workers themselves, which are asked all the time, and a killed one last some
  milliseconds before its kill.

    python -m loadtest offline kills
    python -m loadtest offline kills --lines 2000 --kills 6 --chunk-lines 100
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import orjson

from loadtest.faults import command_line, descendants
from loadtest.gpu import machine
from loadtest.offline import stage
from loadtest.offline.lines import Shape, bodies, input_file
from loadtest.offline.parts import Computed, Patient, ended_workers
from loadtest.run import RunError

SUMMARY = "kill -9 of workers, manager and service during a job: each line once, little twice"
VICTIMS = ("worker", "manager", "service")
# What a process of `doherty up` has in its command line.
MARKS = {"manager": "backends.cli manager", "service": "backends.cli offline"}
MODEL = "work"
POLL_S = 0.05
LAST_SHARE = 0.95  # of the lines; later kills would find nothing to do


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """The job, and what is done to those who do it."""

    lines: int = 20_000
    kills: int = 20
    workers: int = 2
    chunk_lines: int = 500
    sequences_max: int = 128  # that a worker computes at once: it holds half as much again
    hold_s: float = 15.0  # longer than a service that keeps dying takes to come back
    profile: str = "h200-8b"
    time_scale: float = 0.5
    limit_s: float = 900.0
    seed: int = 1


class Kill(msgspec.Struct, frozen=True):
    """One kill; `done` are the lines that had results."""

    victim: str
    pid: int
    done: int
    at_s: float


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What came of the job."""

    kills: tuple[Kill, ...]
    lines: int
    answered: int  # in the output file
    failed: int  # in the error file
    missing: int
    twice: int
    computed: int
    state: str
    took_s: float
    left_running: int

    @property
    def repeated(self) -> int:
        return max(0, self.computed - self.lines)


def add_arguments(command: argparse.ArgumentParser) -> None:
    base, add = Setting(), command.add_argument
    add("--lines", type=int, default=base.lines, help="of the job (%(default)s)")
    add("--kills", type=int, default=base.kills, help="in all (%(default)s)")
    add("--workers", type=int, default=base.workers, help="engine workers (%(default)s)")
    add("--chunk-lines", type=int, default=base.chunk_lines, help="held at once (%(default)s)")
    add("--max-num-seqs", dest="sequences_max", type=int, default=base.sequences_max)
    add("--hold-s", type=float, default=base.hold_s, help="silence allowed (%(default)s)")
    add("--profile", default=base.profile, help="of the simulator (%(default)s)")
    add("--time-scale", type=float, default=base.time_scale, help="of the simulator (%(default)s)")
    add("--limit-s", type=float, default=base.limit_s, help="for the job (%(default)s)")
    add("--seed", type=int, default=base.seed)
    add("--out", metavar="FILE", help="also write the text here")
    add("--json", metavar="FILE")


def run(args: argparse.Namespace) -> int:
    setting = Setting(**{name: getattr(args, name) for name in Setting.__struct_fields__})
    if min(setting.lines, setting.workers, setting.chunk_lines) < 1 or setting.kills < 0:
        print("loadtest: expected 1 line, worker and line of a chunk or more", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="doherty-kills-") as folder:
        finding = asyncio.run(measure(setting, Path(folder)))
    text = shown(setting, finding)
    print(text)
    if args.out:
        Path(args.out).write_text(text + "\n", encoding="utf-8")
    if args.json:
        value = {"setting": msgspec.to_builtins(setting), "finding": msgspec.to_builtins(finding)}
        Path(args.json).write_bytes(orjson.dumps(value, option=orjson.OPT_INDENT_2))
    return 0 if kept(setting, finding) else 1


def plan(setting: Setting) -> list[tuple[int, str]]:
    """Return the kills: at so many lines done, and whom. Pure."""
    draw = random.Random(setting.seed)
    victims = [VICTIMS[number % len(VICTIMS)] for number in range(setting.kills)]
    draw.shuffle(victims)
    last = max(1, int(setting.lines * LAST_SHARE))
    return list(zip(sorted(draw.choices(range(last), k=setting.kills)), victims, strict=True))


def kept(setting: Setting, finding: Finding) -> bool:
    """Say whether all that is promised is so. Pure."""
    whole = (finding.state, finding.answered) == ("completed", setting.lines)
    wrong = finding.failed + finding.missing + finding.twice + finding.left_running
    return whole and not wrong and finding.repeated <= len(finding.kills) * setting.chunk_lines


def config(setting: Setting, folder: Path) -> dict[str, Any]:
    """Return the configuration of the run."""
    args = ["--profile", setting.profile, "--time-scale", f"{setting.time_scale:g}"]
    pool = {
        "engine": "simulator",
        "serves": "jobs",
        "args": [*args, "--max-num-seqs", str(setting.sequences_max)],
        "replicas": setting.workers,
    }
    ports = [stage.free_port() for _ in range(4)]
    return {
        "proxy": {"port": ports[0], "admin_port": ports[1], "access_log": "off"},
        "manager": {"port": ports[2], "run_dir": str(folder / "run")},
        "offline": {
            "port": ports[3],
            "hold_secs": setting.hold_s,
            "chunk_lines": setting.chunk_lines,
            "spare_capacity": False,
        },
        "models": [{"name": MODEL, "pools": [pool]}],
    }


async def measure(setting: Setting, folder: Path) -> Finding:
    """Do the job and the kills. Raises `RunError`."""
    shape = Shape(
        lines=setting.lines, prompt_words=(5, 60), answer_tokens=(4, 32), seed=setting.seed
    )
    content = input_file(bodies(shape, MODEL))
    async with (
        stage.whole(config(setting, folder), folder) as (urls, up_pid),
        Patient(urls["proxy"]) as proxy,
    ):
        async with Computed(urls["manager"]) as computed, asyncio.timeout(setting.limit_s):
            begun_s = time.monotonic()
            job_id = await proxy.submit(content)
            kills: list[Kill] = []
            for at, victim in plan(setting):
                done = await _until_done(proxy, job_id, at)
                pid = await _kill(victim, up_pid, computed, len(kills))
                kills.append(Kill(victim, pid, done, round(time.monotonic() - begun_s, 2)))
                print(f"{done} lines: kill -9 {victim} {pid}", file=sys.stderr, flush=True)
            batch = await proxy.until_ended(job_id)
            took_s = time.monotonic() - begun_s
            await computed.last_look()
        ids = [[row["custom_id"] for row in await proxy.rows(file_id)] for file_id in _files(batch)]
    left = await ended_workers(computed.pids)
    missing, twice = faults(setting.lines, [*ids[0], *ids[1]])
    return Finding(
        kills=tuple(kills),
        lines=setting.lines,
        answered=len(ids[0]),
        failed=len(ids[1]),
        missing=missing,
        twice=twice,
        computed=computed.total,
        state=batch["status"],
        took_s=round(took_s, 1),
        left_running=left,
    )


def faults(lines: int, ids: Sequence[str]) -> tuple[int, int]:
    """Return how many lines are in no file, and how many twice or were never asked. Pure."""
    counts = Counter(ids)
    wanted = {f"line-{number}" for number in range(lines)}
    twice = sum(count > 1 for count in counts.values())
    return len(wanted - counts.keys()), twice + len(counts.keys() - wanted)


def _files(batch: dict[str, Any]) -> tuple[str | None, str | None]:
    return batch.get("output_file_id"), batch.get("error_file_id")


async def _until_done(proxy: Patient, job_id: str, lines: int) -> int:
    while True:
        batch = await proxy.batch(job_id)
        counts = batch["request_counts"]
        done = int(counts["completed"] + counts["failed"])
        if done >= lines and batch["status"] != "validating":
            return done
        if batch["status"] in stage.ENDED:
            raise RunError(f"the job ended as {batch['status']} before all kills: {batch}")
        await asyncio.sleep(POLL_S)


async def _kill(victim: str, up_pid: int, computed: Computed, number: int) -> int:
    """Kill one; wait for it to be there, where it was killed only just now."""
    while True:
        if victim == "worker":
            pid = await computed.busiest(number)
        else:
            found = [pid for pid in descendants(up_pid) if MARKS[victim] in command_line(pid)]
            pid = found[0] if found else 0
        if pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                return pid
        await asyncio.sleep(POLL_S)


def shown(setting: Setting, finding: Finding) -> str:
    """Return the text of a run."""
    kinds = Counter(kill.victim for kill in finding.kills)
    most = len(finding.kills) * setting.chunk_lines
    return "\n".join(
        [
            f"a job of {setting.lines:,} lines on {setting.workers} engine workers "
            f"({setting.profile}), chunks of {setting.chunk_lines}, seed {setting.seed}",
            *(f"{name}: {text}" for name, text in machine.header([]).items()),
            "",
            "kill -9: " + ", ".join(f"{kinds[victim]} of {victim}" for victim in VICTIMS),
            *(
                f"  {kill.at_s:7.2f} s  {kill.done:>6,} lines done  {kill.victim}"
                for kill in finding.kills
            ),
            "",
            f"{finding.state} after {finding.took_s:g} s: {finding.answered:,} lines answered, "
            f"{finding.failed} failed, {finding.missing} missing, {finding.twice} twice",
            f"{finding.computed:,} lines computed, {finding.repeated:,} of them again "
            f"(at most {most:,}); {finding.left_running} workers left running at the end",
            "kept" if kept(setting, finding) else "BROKEN",
        ]
    )
