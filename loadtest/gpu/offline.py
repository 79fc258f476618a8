"""Jobs on a GPU: tokens a second through Doherty against vLLM by itself, on the same card.

One after another, each with the card for itself and after a warm-up:

- bare: `LLM.generate` of vLLM with all lines of a file in one call (`bare_llm.py`, which knows
  nothing of us);
- doherty: the same file as a job, through the offline service and one engine worker. Promised: 0.95
  of bare or more, from when the job was validated to when its last line was answered;
- served: the same lines one by one over HTTP at `vllm serve`, with so many in flight.

Bare and Doherty also get a job whose lines share beginnings, more than the KV cache holds, in no
order: Doherty does them in the order of their prefixes.

Beside speed, the forms: jobs whose lines ask for everything that a request can ask for, checked one
by one and held against the engine's own server (`forms.py`).

    RUN=offline bash loadtest/gpu/host.sh vllm BUNDLES OUT 590
    python -m loadtest gpu offline --engine simulator --lines 500 --shared-lines 100
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import aiohttp
import msgspec
import orjson

from loadtest.gpu import machine
from loadtest.gpu.command import add_stack_arguments, finish
from loadtest.gpu.forms_steps import Forms
from loadtest.gpu.offline_stage import HOST, MODEL, Setting, desk, server, vllm_python
from loadtest.gpu.steps import Finding, Findings, Step, run_steps, status_of
from loadtest.offline import stage
from loadtest.offline.lines import COMPLETIONS, Shape, bodies, input_file
from loadtest.run import RunError

SUMMARY = "jobs through an engine worker, against LLM.generate and against HTTP"
RATIO_MIN = 0.95
WARM_LINES = 64
MARK = "FIGURES "
DIFFERENT, SHARED = "different", "shared"
STEPS = ("bare", "doherty", "served", "forms", "forms served", "forms embedded")


class Figures(msgspec.Struct, frozen=True):
    """What a yardstick prints of a file."""

    lines: int
    failed: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    seconds: float
    tokens_per_s: float


class Run:
    """The files, and the rates that were found, by way and job."""

    def __init__(self, setting: Setting, logs: Path, work: Path) -> None:
        self.setting = setting
        self.folder = logs
        self.store = work / "offline.db"
        self.rates: dict[tuple[str, str], float] = {}
        self.bodies = {
            DIFFERENT: bodies(Shape(lines=setting.lines, seed=setting.seed), MODEL, COMPLETIONS),
            SHARED: bodies(
                Shape(
                    lines=setting.shared_lines,
                    prompt_words=(20, 60),
                    answer_tokens=(16, 64),
                    prefixes=setting.prefixes,
                    prefix_words=setting.prefix_words,
                    seed=setting.seed,
                ),
                MODEL,
                COMPLETIONS,
            ),
            "warm": bodies(Shape(lines=WARM_LINES, seed=setting.seed + 1), MODEL, COMPLETIONS),
        }
        self.paths = {name: work / f"{name}.jsonl" for name in self.bodies}
        for name, path in self.paths.items():
            path.write_bytes(input_file(self.bodies[name], COMPLETIONS))

    # --- the ways ------------------------------------------------------------------------------

    async def bare(self, found: Findings) -> None:
        """Give each file to the engine in one call."""
        for job, figures in await self._bare():
            self._note(found, "bare", job, figures.tokens_per_s)
            found.figures[f"{job}: cached"] = _share(figures.cached_tokens, figures.prompt_tokens)
            found.claim(not figures.failed, f"{job}: no line fails, {figures.failed} did")

    async def _bare(self) -> list[tuple[str, Figures]]:
        jobs = (DIFFERENT, SHARED)
        if self.setting.engine != "vllm":
            command = [sys.executable, "-m", "backends.offline.bare", "--engine", "simulator"]
            command += ["--model", MODEL, "--input"]
            return [
                (job, await self._yardstick([*command, str(self.paths[job]), *self._rest()]))
                for job in jobs
            ]
        command = [*vllm_python(), str(Path(__file__).with_name("bare_llm.py"))]
        for job in jobs:
            command += ["--input", str(self.paths[job])]
        command += ["--warm", str(self.paths["warm"]), "--", "--model", self.setting.model_path]
        text = await self._output([*command, *self.setting.args])
        rows = [row.removeprefix(MARK) for row in text.splitlines() if row.startswith(MARK)]
        return list(
            zip(jobs, [msgspec.json.decode(row, type=Figures) for row in rows], strict=True)
        )

    async def _yardstick(self, command: Sequence[str]) -> Figures:
        text = await self._output(command)
        return msgspec.json.decode(text.splitlines()[-1], type=Figures)

    async def _output(self, command: Sequence[str]) -> str:
        log = self.folder / "bare.log"
        async with stage.program(command, log, HOST) as process:
            if await process.wait():
                raise RunError(f"the bare engine failed: {stage.said(log)}")
            return log.read_text("utf-8", "replace")

    async def doherty(self, found: Findings) -> None:
        """Have both files done as jobs."""
        setting = self.setting
        async with desk(setting, self.folder, self.store, found) as url:
            for job in ("warm", DIFFERENT, SHARED):
                content = self.paths[job].read_bytes()
                course = await stage.do_job(url, content, setting.load_s, COMPLETIONS)
                found.claim(not course.failed, f"{job}: no line fails, {course.failed} did")
                if job != "warm":
                    self._course(found, job, course)

    def _course(self, found: Findings, job: str, course: stage.Course) -> None:
        self._note(found, "doherty", job, course.tokens_per_s)
        found.figures[f"{job}: cached"] = _share(course.cached_tokens, course.prompt_tokens)
        found.figures[f"{job}: whole, s"] = course.ended_s
        bare = self.rates.get(("bare", job))
        if bare is None:
            return
        ratio = course.tokens_per_s / bare
        found.figures[f"{job}: over bare"] = round(ratio, 3)
        if job == DIFFERENT:
            found.claim(ratio >= RATIO_MIN, f"{ratio:.3f} of bare, promised {RATIO_MIN}")

    async def served(self, found: Findings) -> None:
        """Ask for the lines of the first file one by one."""
        setting = self.setting
        async with server(setting, self.folder) as url:
            await one_by_one(url, self.bodies["warm"], setting.in_flight)
            begun_s = time.perf_counter()
            tokens = await one_by_one(url, self.bodies[DIFFERENT], setting.in_flight)
            rate = tokens / (time.perf_counter() - begun_s)
        self._note(found, "served", DIFFERENT, rate)
        doherty = self.rates.get(("doherty", DIFFERENT))
        if doherty is not None:
            found.figures["doherty over served"] = round(doherty / rate, 3)

    def _note(self, found: Findings, way: str, job: str, rate: float) -> None:
        self.rates[way, job] = rate
        found.figures[f"{job}: tokens/s"] = round(rate)

    def _rest(self) -> list[str]:
        return ["--", *self.setting.args]


def _share(part: int, whole: int) -> str:
    return f"{part / max(1, whole):.1%}"


async def one_by_one(url: str, requests: list[dict[str, object]], in_flight: int) -> int:
    """Ask for all, so many at a time; return the tokens. Raises `RunError`."""
    waiting = iter(requests)
    connector = aiohttp.TCPConnector(limit=in_flight)
    timeout = aiohttp.ClientTimeout()
    async with aiohttp.ClientSession(url, connector=connector, timeout=timeout) as session:

        async def ask_on() -> int:
            tokens = 0
            for body in waiting:
                async with session.post(COMPLETIONS, json=body) as answer:
                    if answer.status != 200:
                        raise RunError(f"the server answered {answer.status}")
                    tokens += orjson.loads(await answer.read())["usage"]["total_tokens"]
            return tokens

        try:
            return sum(await asyncio.gather(*(ask_on() for _ in range(in_flight))))
        except aiohttp.ClientError as error:
            raise RunError(f"the server does not answer: {error}") from error


def add_arguments(command: argparse.ArgumentParser) -> None:
    base, add = Setting(engine="", model_path="", args=()), command.add_argument
    add("--lines", type=int, default=base.lines, help="of the first job (%(default)s)")
    add("--shared-lines", type=int, default=base.shared_lines, help="of the second (%(default)s)")
    add("--prefixes", type=int, default=base.prefixes, help="of the second (%(default)s)")
    add("--prefix-words", type=int, default=base.prefix_words, help="of each (%(default)s)")
    add("--in-flight", type=int, default=base.in_flight, help="over HTTP (%(default)s)")
    add("--chunk-lines", type=int, default=base.chunk_lines, help="(%(default)s)")
    add("--form-lines", type=int, default=base.form_lines, help="of each kind (%(default)s)")
    add("--skip", action="append", default=[], choices=STEPS)
    add_stack_arguments(command)


def run(args: argparse.Namespace) -> int:
    if args.engine == "sglang" or (args.engine == "vllm" and not args.model_path):
        print("loadtest: expected --engine vllm with --model-path, or simulator", file=sys.stderr)
        return 2
    setting = Setting(
        engine=args.engine,
        model_path=args.model_path,
        args=tuple(args.engine_args),
        lines=args.lines,
        shared_lines=args.shared_lines,
        prefixes=args.prefixes,
        prefix_words=args.prefix_words,
        in_flight=args.in_flight,
        chunk_lines=args.chunk_lines,
        form_lines=args.form_lines,
        seed=args.seed,
    )
    with tempfile.TemporaryDirectory(prefix="doherty-gpu-offline-") as made:
        logs = Path(args.logs or made).resolve()
        logs.mkdir(parents=True, exist_ok=True)
        run_of_all = Run(setting, logs, Path(made))
        found = asyncio.run(prove(run_of_all, args.skip, args.limit_s))
        finish(args, "jobs through an engine worker", machine.header(machine.gpus()), found)
    return status_of(found)


async def prove(made: Run, skip: Sequence[str], limit_s: float) -> list[Finding]:
    """Do each way within the limit."""
    forms = Forms(made.setting, made.folder, made.store)
    steps = [
        Step(name="bare", run=made.bare, usual_s=180.0, limit_s=330.0),
        Step(name="doherty", run=made.doherty, usual_s=110.0, limit_s=280.0),
        Step(name="served", run=made.served, usual_s=95.0, limit_s=240.0),
        Step(name="forms", run=forms.generated, usual_s=110.0, limit_s=280.0),
        Step(name="forms served", run=forms.served, usual_s=90.0, limit_s=240.0),
        Step(name="forms embedded", run=forms.embedded, usual_s=70.0, limit_s=200.0),
    ]
    chosen = [step for step in steps if step.name not in skip]
    return await run_steps(chosen, limit_s, lambda text: print(text, flush=True))
