"""Whether the paths that save time start and serve: EAGLE-3 and FP8, on either engine.

Each is started with random weights, answers a chat and a completion, is asked what it counts of
speculation, and is stopped. A random draft head is never right, so an acceptance length of 1 is
what must be seen, and no speed-up can be judged; a wrong flag, a missing kernel or a crash in the
first batch can. Several may share a card: --together 2 gives each its share of the memory.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import orjson
import uvloop

from loadtest.client import Client, RequestError
from loadtest.gpu.abreast import abreast, visible_devices
from loadtest.gpu.direct import (
    ENGINES,
    EngineOptions,
    Running,
    add_engine_arguments,
    engine_options,
    neighbour_words,
)
from loadtest.gpu.machine import command_line, this_machine, today
from loadtest.gpu.probing import Probe, engine_version, get_text, model_name
from loadtest.gpu.records import milliseconds, table
from loadtest.gpu.speculation import Speculation, read_speculation, weights_gb
from loadtest.gpu.speeds import client_of, say, write
from loadtest.report import to_json
from loadtest.run import RunError
from loadtest.wire import error_text

SUMMARY = "EAGLE-3 and FP8 start and serve on both engines"
PATHS = ("bf16", "fp8", "eagle3", "eagle3-fp8")
PROMPT_TOKENS = 64
CHAT_TOKENS = 32
COMPLETION_TOKENS = 128  # SGLang's gauges follow every 40 steps
CHAT_TIMEOUT_S = 120.0  # a first batch may compile kernels
DRAFT_STEPS = 3


class Trial(msgspec.Struct, frozen=True):
    """One engine and the path that is tried on it."""

    engine: str
    path: str

    @property
    def speculates(self) -> bool:
        return self.path.startswith("eagle3")


class Finding(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What came of a trial."""

    trial: Trial
    version: str = ""
    ready_s: float = 0.0
    weights_gb: float = 0.0
    chat_tokens: int = 0
    completion_tokens: int = 0
    token_ms: float = 0.0
    speculation: Speculation | None = None
    rehearsed: bool = False  # by the simulator, which drafts nothing
    failure: str = ""
    not_run: str = ""


def add_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--engines", type=names_of(ENGINES), default=ENGINES, metavar="E,E", help="default: both")
    add("--paths", type=names_of(PATHS), default=("fp8", "eagle3"), metavar="P,P",
        help=f"of {', '.join(PATHS)} (default: fp8,eagle3)")  # fmt: skip
    add("--draft-path", default="", help="folder of the EAGLE-3 head")
    add("--fp8-model-path", default="", help="a folder in FP8 already (default: on loading)")
    add("--gpus", type=int, default=0, metavar="N", help="cards to use (default: all)")
    add("--together", type=int, default=1, metavar="N", help="engines on a card (default 1)")
    add_engine_arguments(command)
    add("--limit-s", type=float, default=560.0, help="no start after that (default %(default)s)")
    add("--out", metavar="FILE", help="also write the report as text")
    add("--json", metavar="FILE", help="also write the findings")


def names_of(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """Return an argparse type: names with commas between; nothing is none."""

    def parse(text: str) -> tuple[str, ...]:
        names = tuple(name for name in text.split(",") if name)
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"'{name}' is none of {', '.join(known)}")
        return names

    return parse


def run(args: argparse.Namespace) -> int:
    """Try each path. Returns 1 when one does not start, serve, or speculate as it should."""
    trials = [Trial(engine, path) for engine in args.engines for path in args.paths]
    if any(trial.speculates for trial in trials) and not (args.draft_path or args.rehearse):
        print(
            "loadtest: EAGLE-3 needs a draft head: name its folder with --draft-path",
            file=sys.stderr,
        )
        return 2
    machine = this_machine()
    findings = uvloop.run(_tried(args, trials, max(1, args.gpus or len(machine.gpus))))
    facts = {
        "date": today(),
        "hardware": machine.hardware,
        "driver": machine.driver,
        "software": ", ".join(f"{name} {text}" for name, text in machine.software.items()),
        "model": Path(args.model_path).name,
        "draft": Path(args.draft_path).name,
        "engines": "rehearsed: the simulator in their place" if args.rehearse else "",
        "command": command_line(),
    }
    text = report(facts, findings)
    print(text)
    write(args.out, f"{text}\n".encode())
    write(args.json, to_json({"findings": msgspec.to_builtins(findings), "facts": facts}))
    return 0 if all(passed(each) for each in findings if not each.not_run) else 1


async def _tried(args: argparse.Namespace, trials: Sequence[Trial], cards: int) -> list[Finding]:
    deadline_s = time.monotonic() + args.limit_s
    findings: list[Finding] = []
    devices = visible_devices()[:cards] * args.together
    for wave in waves(trials, len(devices)):
        if time.monotonic() > deadline_s:
            findings += [Finding(trial=trial, not_run="the time was up") for trial in wave]
            continue
        say(f"starting {', '.join(f'{trial.engine} {trial.path}' for trial in wave)}")
        options = [
            options_for(args, trial, device) for trial, device in zip(wave, devices, strict=False)
        ]

        async def use(place: int, running: Running, wave: Sequence[Trial] = wave) -> Finding:
            return await _one(wave[place], running, rehearsed=args.rehearse)

        for trial, found in zip(wave, await abreast(options, use), strict=True):
            if isinstance(found, RunError):
                found = Finding(trial=trial, failure=str(found))  # noqa: PLW2901 - the same thing
            findings.append(found)
            said = found.failure or f"{found.completion_tokens} tokens of a completion"
            say(f"{trial.engine} {trial.path}: {said}")
    return findings


def waves(trials: Sequence[Trial], slots: int) -> list[list[Trial]]:
    """Return which trials are started together: as many of one engine as there are places."""
    found: list[list[Trial]] = []
    for trial in trials:
        if not found or len(found[-1]) == slots or found[-1][0].engine != trial.engine:
            found.append([])
        found[-1].append(trial)
    return found


def options_for(args: argparse.Namespace, trial: Trial, device: str) -> EngineOptions:
    """Return how a trial's engine is started."""
    more: dict[str, object] = {"devices": device}
    if trial.path.endswith("fp8") and args.fp8_model_path:
        more["model_path"] = args.fp8_model_path
    elif trial.path.endswith("fp8"):
        more["quantization"] = "fp8"
    options = engine_options(args, trial.engine, **more)
    if trial_args := [] if args.rehearse else _trial_args(args, trial):
        options = msgspec.structs.replace(options, args=(*options.args, *trial_args))
    return options


def _trial_args(args: argparse.Namespace, trial: Trial) -> list[str]:
    words = neighbour_words(trial.engine, args.together)
    if not trial.speculates:
        return words
    if trial.engine == "vllm":
        config = {
            "method": "eagle3",
            "model": args.draft_path,
            "num_speculative_tokens": DRAFT_STEPS,
        }
        return [*words, "--speculative-config", orjson.dumps(config).decode()]
    words += ["--speculative-algorithm", "EAGLE3"]
    words += ["--speculative-draft-model-path", args.draft_path]
    words += ["--speculative-num-steps", str(DRAFT_STEPS), "--speculative-eagle-topk", "1"]
    return [*words, "--speculative-num-draft-tokens", str(DRAFT_STEPS + 1)]


async def _one(trial: Trial, running: Running, *, rehearsed: bool) -> Finding:
    async with client_of(running.url) as client:
        model = await model_name(client)
        chat_tokens = await _chat(client, model)
        probe = Probe(client, model, time.time_ns())
        prompt = probe.prompt(PROMPT_TOKENS)
        answer = await probe.ask(prompt, COMPLETION_TOKENS)
        timed = await probe.decode([prompt], COMPLETION_TOKENS, 2)
        metrics = await get_text(client, "/metrics")
        version = await engine_version(client)
    log = await asyncio.to_thread(running.log.read_text, "utf-8", "replace")
    return Finding(
        trial=trial,
        version=version,
        ready_s=running.ready_s,
        weights_gb=weights_gb(log),
        chat_tokens=chat_tokens,
        completion_tokens=answer.tokens,
        token_ms=timed.token_ms,
        speculation=None if rehearsed or not trial.speculates else read_speculation(metrics, log),
        rehearsed=rehearsed,
    )


async def _chat(client: Client, model: str) -> int:
    """Return the tokens of a chat's answer. Raises `RunError` when there is none."""
    messages = [{"role": "user", "content": "Say hello to the class"}]
    body = orjson.dumps(
        {"model": model, "messages": messages, "max_tokens": CHAT_TOKENS, "temperature": 0}
    )
    try:
        async with asyncio.timeout(CHAT_TIMEOUT_S):
            answer = await client.post("/v1/chat/completions", body)
    except RequestError as error:
        raise RunError(f"a chat: {error}") from error
    except TimeoutError as error:
        raise RunError(f"a chat: no answer in {CHAT_TIMEOUT_S:g} s") from error
    try:
        value = orjson.loads(answer.body)
        if answer.status == 200:
            return int(value["usage"]["completion_tokens"])
    except (orjson.JSONDecodeError, TypeError, KeyError) as error:
        raise RunError(f"a chat: {answer.status} and no usage") from error
    raise RunError(f"a chat: {answer.status} {error_text(value)}")


def passed(found: Finding) -> bool:
    """Return whether it started and served, and speculated if it should."""
    if found.failure or found.not_run:
        return False
    served = found.chat_tokens > 0 and found.completion_tokens == COMPLETION_TOKENS
    return served and (_drafted(found) or found.rehearsed or not found.trial.speculates)


def _drafted(found: Finding) -> bool:
    return found.speculation is not None and found.speculation.drafted


def report(facts: dict[str, str], findings: Sequence[Finding]) -> str:
    """Return the text of a run."""
    heads = ("", "version", "ready s", "weights GB", "chat tokens", "completion tokens",
             "ms a token", "speculation", "")  # fmt: skip
    rows = [
        (f"{each.trial.engine} {each.trial.path}", each.version, f"{each.ready_s:.0f}",
         f"{each.weights_gb:.1f}" if each.weights_gb else "-", f"{each.chat_tokens}",
         f"{each.completion_tokens}", milliseconds(each.token_ms),
         each.speculation.text if each.speculation else "-", "PASS" if passed(each) else "FAIL")
        for each in findings
        if not each.failure and not each.not_run
    ]  # fmt: skip
    parts = [
        "\n".join(f"{name:<9} {value}" for name, value in facts.items() if value),
        table(heads, rows),
    ]
    for each in findings:
        name = f"{each.trial.engine} {each.trial.path}"
        if each.not_run:
            parts.append(f"NOT RUN: {name}: {each.not_run}")
        if each.failure:
            parts.append(f"FAIL: {name}: {each.failure}")
    parts.append(
        "The weights are random, so a draft is never accepted (length 1) and nothing can be said "
        "of speed-ups."
    )
    return "\n\n".join(parts)
