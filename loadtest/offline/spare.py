"""What a job on spare capacity costs those who are served online, and what it gets done.

A whole Doherty (`doherty up`) with simulated replicas, in real time. Requests begin in an open
loop, at moments drawn from a seed (Poisson), with and without a job that is there for as long as
they are; runs alternate, each on a fresh Doherty. Told side by side: time to the first token and
between tokens, of all online requests of the measured time; tokens of the job a second;
replica-seconds, which are the same, since the replicas are there anyway. Every line of the job must
be in one of its files, once: those that were done when it was cancelled at the end, and the others.
Promised: online p99 rises by a tenth at most, and no online request is lost.

Durations are the simulated machine's: `--time-scale 0.25` has it run at a quarter of its speed, so
that what the machine under the test adds counts a quarter.

    python -m loadtest offline spare
    python -m loadtest offline spare --lines 5000 --seconds 60 --rate 4
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import itertools
import random
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import orjson
from typing_extensions import override

from loadtest.client import Client, RequestError
from loadtest.faults import outcome
from loadtest.fleet import MODEL, FleetOptions, Ports, launched, local
from loadtest.measure import quantile
from loadtest.offline import stage
from loadtest.offline.lines import Shape, bodies, input_file
from loadtest.replay import WallClock
from loadtest.run import RunError
from loadtest.wire import AnswerReader

SUMMARY = "online latency with and without a job on spare capacity, and the job's tokens a second"
RISE_MAX = 1.10
ANSWER_S_MAX = 120.0
JOB_END_S = 120.0


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """The load, and what meets it. Rates and seconds are of this machine's clock."""

    lines: int = 50_000
    rate: float = 3.0  # online requests begun a second
    seconds: float = 120.0  # measured
    before: float = 15.0  # so long online load, and the job, run before that
    pairs: int = 2
    replicas: int = 2
    prompt_words: int = 300
    output_tokens: int = 100
    profile: str = "h200-8b"
    time_scale: float = 0.25
    target_inputs: int = 0
    doherty: str = ""
    seed: int = 1


class Request(msgspec.Struct):
    """One online request as its client saw it."""

    begun_s: float
    first_s: float = 0.0
    gaps_s: list[float] = []
    fate: str = "open"


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What came of one way, over all of its runs."""

    job: bool
    requests: int
    lost: tuple[str, ...]
    ttft_p50_s: float
    ttft_p99_s: float
    gap_p50_s: float
    gap_p99_s: float
    job_tokens_per_s: float  # prompts and answers
    job_lines: int  # done in the measured time
    replica_s: float


class TimedReader(AnswerReader):
    """One that notes when tokens came."""

    __slots__ = ("times_s",)

    def __init__(self) -> None:
        super().__init__()
        self.times_s: list[float] = []

    @override
    def feed(self, data: bytes, now_s: float) -> bool:
        before = self.content_events
        whole = super().feed(data, now_s)
        if self.content_events > before:
            self.times_s.append(now_s)
        return whole


class Run(msgspec.Struct):
    """What one run collects."""

    requests: list[Request] = []
    tokens: int = 0
    lines: int = 0


def add_arguments(command: argparse.ArgumentParser) -> None:
    base, add = Setting(), command.add_argument
    add("--lines", type=int, default=base.lines, help="of the job (default %(default)s)")
    add("--rate", type=float, default=base.rate, help="online requests a second (%(default)s)")
    add("--seconds", type=float, default=base.seconds, help="measured (default %(default)s)")
    add("--before", type=float, default=base.before, help="s of load before that (%(default)s)")
    add("--pairs", type=int, default=base.pairs, help="runs of each way (default %(default)s)")
    add("--replicas", type=int, default=base.replicas, help="default %(default)s")
    add("--prompt-words", type=int, default=base.prompt_words, help="of online requests")
    add("--output-tokens", type=int, default=base.output_tokens, help="of each online answer")
    add("--profile", default=base.profile, help="of the simulated engines (default %(default)s)")
    add("--time-scale", type=float, default=base.time_scale, help="simulated seconds a second")
    add("--target-inputs", type=int, default=base.target_inputs, help="of the pool; 0: none")
    add("--doherty", default="", metavar="COMMAND", help="default: this Python's")
    add("--seed", type=int, default=base.seed, help="of arrivals and lines")
    add("--json", metavar="FILE", help="also write everything as JSON")


def run(args: argparse.Namespace) -> int:
    """Run all pairs. Raises `RunError`."""
    setting = Setting(**{name: getattr(args, name) for name in Setting.__struct_fields__})
    findings = asyncio.run(run_pairs(setting))
    print(table(findings, setting))
    if args.json:
        Path(args.json).write_bytes(orjson.dumps([msgspec.to_builtins(each) for each in findings]))
    return 0 if kept(findings) else 1


async def run_pairs(setting: Setting) -> list[Finding]:
    """Return a finding without the job and one with it. Raises `RunError`."""
    runs: dict[bool, list[Run]] = {False: [], True: []}
    for pair in range(setting.pairs):
        for job in (False, True):
            print(f"pair {pair + 1}: {'with' if job else 'without'} the job", file=sys.stderr)
            runs[job].append(await run_once(setting, job=job, seed=setting.seed + pair))
    return [judge(job, runs[job], setting) for job in (False, True)]


async def run_once(setting: Setting, *, job: bool, seed: int) -> Run:
    """Run one way once. Raises `RunError`."""
    options = FleetOptions(
        replicas=setting.replicas, doherty=setting.doherty or " ".join(stage.DOHERTY)
    )
    found = Run()
    async with launched(
        lambda ports, folder: configuration(setting, ports, folder), options
    ) as running:
        clock = WallClock()
        client = Client(local(running.ports.proxy), clock.now_s)
        with contextlib.closing(client):
            url = f"http://127.0.0.1:{running.ports.proxy}"
            async with aiohttp.ClientSession(url) as session, asyncio.TaskGroup() as group:
                batch = await submit(session, setting, seed) if job else None
                load = group.create_task(_load(client, clock, found, setting, seed))
                if batch is not None:
                    await _follow(session, batch, found, setting)
                await load
            if batch is not None:
                async with aiohttp.ClientSession(url) as session:
                    await cancel(session, batch, setting.lines)
    return found


def configuration(setting: Setting, ports: Ports, folder: str) -> dict[str, Any]:
    """Return the configuration of a run, the same with the job and without it."""
    args = ["--profile", setting.profile, "--time-scale", f"{setting.time_scale:g}"]
    pool: dict[str, Any] = {"engine": "simulator", "replicas": setting.replicas, "args": args}
    if setting.target_inputs:
        pool["target_inputs"] = setting.target_inputs
    return {
        "proxy": {"port": ports.proxy, "admin_port": ports.admin, "access_log": "off"},
        "manager": {"port": ports.manager, "run_dir": folder},
        "models": [{"name": MODEL, "pools": [pool]}],
    }


# --- online ---------------------------------------------------------------------------------------


async def _load(client: Client, clock: WallClock, found: Run, setting: Setting, seed: int) -> None:
    draw, start_s = random.Random(seed), clock.now_s()
    due_s, end_s = 0.0, setting.before + setting.seconds
    async with asyncio.TaskGroup() as group:
        for number in itertools.count():
            due_s += draw.expovariate(setting.rate)
            if due_s > end_s:
                return
            await asyncio.sleep(max(0.0, start_s + due_s - clock.now_s()))
            request = Request(begun_s=clock.now_s())
            if due_s >= setting.before:
                found.requests.append(request)
            group.create_task(_one(client, request, online_body(setting, seed, number)))


async def _one(client: Client, request: Request, body: bytes) -> None:
    reader = TimedReader()
    try:
        async with asyncio.timeout(ANSWER_S_MAX):
            await client.post("/v1/chat/completions", body, reader=reader)
        request.fate = ": ".join(filter(None, outcome(reader, streamed=True)))
    except RequestError as error:
        request.fate = error.kind
    except TimeoutError:
        request.fate = f"no end in {ANSWER_S_MAX:g} s"
    request.first_s = reader.first_content_s
    request.gaps_s = [after - before for before, after in itertools.pairwise(reader.times_s)]


def online_body(setting: Setting, seed: int, number: int) -> bytes:
    """Return a request that shares nothing with others."""
    return orjson.dumps(
        {
            "model": MODEL,
            "messages": [
                {"role": "user", "content": f"{seed} {number} " * (setting.prompt_words // 2)}
            ],
            "max_tokens": setting.output_tokens,
            "ignore_eos": True,
            "stream": True,
        }
    )


# --- the job --------------------------------------------------------------------------------------


async def submit(session: aiohttp.ClientSession, setting: Setting, seed: int) -> str:
    """Have a job begin; return its id. Raises `RunError`."""
    content = input_file(bodies(Shape(lines=setting.lines, seed=seed), MODEL))
    form = aiohttp.FormData()
    form.add_field("purpose", "batch")
    form.add_field("file", io.BytesIO(content), filename="job.jsonl")  # read piece by piece
    file = await stage.answer_json(session.post("/v1/files", data=form))
    asked = {
        "input_file_id": file["id"],
        "endpoint": "/v1/chat/completions",
        "completion_window": "24h",
    }
    batch = await stage.answer_json(session.post("/v1/batches", json=asked))
    while batch["status"] == "validating":
        await asyncio.sleep(stage.POLL_S)
        batch = await _batch(session, batch["id"])
    if batch["status"] != "in_progress":
        raise RunError(f"the job is {batch['status']}: {batch.get('errors')}")
    return str(batch["id"])


async def _batch(session: aiohttp.ClientSession, batch_id: str) -> dict[str, Any]:
    return await stage.answer_json(session.get(f"/v1/batches/{batch_id}"))


async def _follow(
    session: aiohttp.ClientSession, batch_id: str, found: Run, setting: Setting
) -> None:
    """Count what the job gets done in the measured time."""
    await asyncio.sleep(setting.before)
    first, begun_s = await _batch(session, batch_id), time.monotonic()
    await asyncio.sleep(begun_s + setting.seconds - time.monotonic())
    last = await _batch(session, batch_id)
    found.tokens = _tokens(last) - _tokens(first)
    found.lines = last["request_counts"]["completed"] - first["request_counts"]["completed"]
    if last["request_counts"]["failed"]:
        raise RunError(f"{last['request_counts']['failed']} lines failed")


def _tokens(batch: dict[str, Any]) -> int:
    usage = batch["usage"] or {}
    return int(usage.get("total_tokens", 0))


async def cancel(session: aiohttp.ClientSession, batch_id: str, lines: int) -> None:
    """End the job, and look for each of its lines. Raises `RunError` where one is not there."""
    batch = await stage.answer_json(session.post(f"/v1/batches/{batch_id}/cancel"))
    async with asyncio.timeout(JOB_END_S):
        while batch["status"] not in stage.ENDED:
            await asyncio.sleep(stage.POLL_S)
            batch = await _batch(session, batch_id)
    seen: list[str] = []
    for file_id in filter(None, (batch.get("output_file_id"), batch.get("error_file_id"))):
        async with session.get(f"/v1/files/{file_id}/content") as answer:
            rows = (await answer.read()).splitlines()
        seen += [orjson.loads(row)["custom_id"] for row in rows]
    if len(seen) != lines or len(set(seen)) != lines:
        raise RunError(f"{len(seen)} results, {len(set(seen))} different ones, of {lines} lines")


# --- what came of it ------------------------------------------------------------------------------


def judge(job: bool, runs: list[Run], setting: Setting) -> Finding:
    """Return the figures of one way, in the simulated machine's seconds."""
    requests = [request for each in runs for request in each.requests]
    whole = [request for request in requests if request.fate == "complete"]
    waits = [request.first_s - request.begun_s for request in whole]
    gaps = [gap for request in whole for gap in request.gaps_s]
    scale = setting.time_scale

    def at(values: list[float], share: float) -> float:
        return scale * (quantile(values, share) or 0.0)

    measured_s = scale * setting.seconds * len(runs)
    return Finding(
        job=job,
        requests=len(requests),
        lost=tuple(sorted(request.fate for request in requests if request.fate != "complete")),
        ttft_p50_s=at(waits, 0.5),
        ttft_p99_s=at(waits, 0.99),
        gap_p50_s=at(gaps, 0.5),
        gap_p99_s=at(gaps, 0.99),
        job_tokens_per_s=sum(each.tokens for each in runs) / measured_s,
        job_lines=sum(each.lines for each in runs),
        replica_s=measured_s * setting.replicas,
    )


def kept(findings: list[Finding]) -> bool:
    """Say whether what is promised holds."""
    without, with_job = findings
    return (
        not without.lost
        and not with_job.lost
        and with_job.job_lines > 0
        and with_job.ttft_p99_s <= RISE_MAX * without.ttft_p99_s
        and with_job.gap_p99_s <= RISE_MAX * without.gap_p99_s
    )


def table(findings: list[Finding], setting: Setting) -> str:
    """Return the findings as text, in the simulated machine's milliseconds."""
    scale = setting.time_scale
    lines = [
        f"{setting.replicas} replicas {setting.profile}, {setting.rate / scale:g} online requests "
        f"a second, {setting.pairs} x {setting.seconds * scale:g} s; job of {setting.lines} lines",
        "           requests  lost  TTFT p50      p99  between tokens p50      p99  "
        "job tokens/s  lines  replica-s",
    ]
    for each in findings:
        lines.append(
            f"{'with job' if each.job else 'without':10s} {each.requests:8d}  {len(each.lost):4d}  "
            f"{1e3 * each.ttft_p50_s:8.1f} {1e3 * each.ttft_p99_s:8.1f}  "
            f"{1e3 * each.gap_p50_s:18.2f} {1e3 * each.gap_p99_s:8.2f}  "
            f"{each.job_tokens_per_s:12.0f}  {each.job_lines:5d}  {each.replica_s:9.0f}"
        )
        lines += [f"  lost: {fate}" for fate in sorted(set(each.lost))]
    without, with_job = findings
    pairs = (
        (with_job.ttft_p50_s, without.ttft_p50_s),
        (with_job.ttft_p99_s, without.ttft_p99_s),
        (with_job.gap_p50_s, without.gap_p50_s),
        (with_job.gap_p99_s, without.gap_p99_s),
    )
    rises = [f"{100 * (after / before - 1):+.1f} %" if before else "-" for after, before in pairs]
    lines.append(
        f"{'rise':10s} {'':8s}  {'':4s}  {rises[0]:>8s} {rises[1]:>8s}  "
        f"{rises[2]:>18s} {rises[3]:>8s}"
    )
    return "\n".join(lines)
