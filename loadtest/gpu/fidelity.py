"""Whether the simulator, in real time, has the speed of the engine that its profile was fitted to.

It is measured by the program that measured the engine, over HTTP, prompt by prompt and batch by
batch, and each figure is put beside the recorded one. Promised: within 15 % for the first token of
prompts of 1k to 32k tokens, new or seen before, and for time per token at batches of 1 to 64; the
command fails otherwise, also where a figure of the recording could not be measured again. Smaller
prompts, larger batches and partly seen prompts are shown in brackets. On a machine that is short of
processors, --slow 4 lets the simulator run at a quarter of its speed, so that its own work weighs a
quarter; the figures are scaled back.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Iterable, Sequence

import msgspec
import orjson
import uvloop

from loadtest.client import Client
from loadtest.gpu.direct import EngineOptions, started
from loadtest.gpu.fit import Row, decode_text, first_token_text, is_promised, ratio_table
from loadtest.gpu.machine import command_line, this_machine, today
from loadtest.gpu.measuring import LONG_CONTEXT_TOKENS, Measured, Plan, measure
from loadtest.gpu.probing import get_text
from loadtest.gpu.records import Recording, RecordingError, head, read_recording
from loadtest.gpu.speeds import client_of, say, sizes, write
from loadtest.report import to_json

SUMMARY = "the simulator's speed beside a recorded engine's"
PROMISED_SHARE = 0.15
TIMER_S = 0.02  # about a cached prompt's time to its first token
TIMERS = 20  # before and after


def add_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("recording", help="of an engine: what `gpu speeds --json` wrote")
    add("--profile", required=True, help="of the simulator: a name, or a file that `fit` wrote")
    add("--slow", type=float, default=1.0, metavar="X", help="times slower than the engine")
    add("--repeats", type=int, default=5, help="of each prompt (default %(default)s)")
    add("--prompts", type=sizes, default=(), metavar="N,N", help="only these sizes")
    add("--batches", type=sizes, default=(), metavar="N,N", help="only these batches")
    add("--out", metavar="FILE", help="also write the report as text")
    add("--json", metavar="FILE", help="also write the rows")


def run(args: argparse.Namespace) -> int:
    """Compare. Returns 1 when a promised figure is too far off, 2 when there is no recording."""
    try:
        recording = read_recording(args.recording)
        recorded(recording, args.prompts, args.batches)
    except RecordingError as error:
        print(f"loadtest: {error}", file=sys.stderr)
        return 2
    measured, machine = uvloop.run(_measured(args, recording))
    rows = compared(recording, measured, args.slow)
    text, kept = report(args, recording, rows, machine, measured.left_out)
    print(text)
    write(args.out, f"{text}\n".encode())
    write(
        args.json,
        to_json({"rows": msgspec.to_builtins(rows), "machine": msgspec.to_builtins(machine)}),
    )
    return 0 if kept else 1


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """What the machine had to spare while the simulator ran on it."""

    behind_s: float  # that the simulator lost of its own schedule
    timers_late_s: list[float]  # sorted

    @property
    def text(self) -> str:
        """Return it for people."""
        median_ms, tenth_ms = (
            self.timers_late_s[int(len(self.timers_late_s) * share)] * 1e3 for share in (0.5, 0.9)
        )
        return (
            f"timers of {TIMER_S * 1e3:g} ms {median_ms:.1f} ms late in the median, {tenth_ms:.1f} "
            f"for one in ten; the simulator {self.behind_s:.2f} s behind its schedule"
        )


async def _measured(args: argparse.Namespace, recording: Recording) -> tuple[Measured, Machine]:
    options = EngineOptions(
        engine=fit_dialect(recording.engine),
        rehearse=True,
        args=(
            *("--profile", args.profile, "--time-scale", f"{1 / args.slow:g}"),
            *("--max-num-batched-tokens", str(recording.chunk_tokens)),
        ),
    )
    plan = plan_for(recording, args.repeats, args.prompts, args.batches, args.slow)
    async with started(options) as running, client_of(running.url) as client:
        before_s = await _timers_late_s()
        measured = await measure(client, plan, time.time_ns(), say)
        timers_late_s = sorted([*before_s, *(await _timers_late_s())])
        behind_s = await _late_s(client)
    return measured, Machine(behind_s=behind_s, timers_late_s=timers_late_s)


async def _timers_late_s() -> list[float]:
    """Return by how much timers of this machine are late just now, the least first."""
    late_s = []
    for _ in range(TIMERS):
        begun_s = time.monotonic()
        await asyncio.sleep(TIMER_S)
        late_s.append(max(0.0, time.monotonic() - begun_s - TIMER_S))
    return sorted(late_s)


async def _late_s(client: Client) -> float:
    """Return by how much the simulator lost its schedule; such figures are not the profile's."""
    try:
        state = orjson.loads(await get_text(client, "/simulator/state") or "null")
    except orjson.JSONDecodeError:
        return 0.0
    return float(state.get("late_s", 0.0)) if isinstance(state, dict) else 0.0


def recorded(recording: Recording, prompts: Sequence[int], batches: Sequence[int]) -> None:
    """Raise `RecordingError` for a size that was asked for and is not recorded."""
    for name, wanted, known in (
        ("--prompts", prompts, {row.prompt_tokens for row in recording.first_token}),
        ("--batches", batches, {row.batch for row in recording.decode}),
    ):
        if unknown := sorted(set(wanted) - known):
            there = ", ".join(map(str, sorted(known))) or "none"
            raise RecordingError(f"{name}: {unknown[0]} is not recorded; there are {there}")


def fit_dialect(engine: str) -> str:
    """Return the manners in which the simulator plays an engine."""
    return "sglang" if engine.startswith("sglang") else "vllm"


def plan_for(
    recording: Recording,
    repeats: int,
    prompts: Sequence[int],
    batches: Sequence[int],
    slow: float,
) -> Plan:
    """Return the measurements that a recording has, of those that were asked for."""
    contexts: dict[bool, list[int]] = {False: [], True: []}
    for row in recording.decode:
        contexts[_is_long(row.context_tokens)].append(row.batch)
    return Plan(
        prompts=_chosen((row.prompt_tokens for row in recording.first_token), prompts),
        repeats=repeats,
        batches=_chosen(contexts[False], batches),
        long_batches=_chosen(contexts[True], batches),
        limit_s=600.0 * max(1.0, slow),
    )


def _chosen(recorded: Iterable[int], wanted: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted({size for size in recorded if not wanted or size in wanted}))


def _is_long(context_tokens: int) -> bool:
    return context_tokens > LONG_CONTEXT_TOKENS / 2


def compared(recording: Recording, measured: Measured, slow: float) -> list[Row]:
    """Return each recorded figure that was measured again, beside its like."""
    again = {row.prompt_tokens: row.times() for row in measured.first_token}
    rows = []
    for row in recording.first_token:
        for kind, engine_ms in row.times().items():
            simulated_ms = again.get(row.prompt_tokens, {}).get(kind)
            if simulated_ms is not None:
                rows.append(
                    Row(
                        what=first_token_text(row.prompt_tokens, kind),
                        engine_ms=engine_ms,
                        simulated_ms=simulated_ms / slow,
                        promised=is_promised(row.prompt_tokens, kind),
                    )
                )
    steps = {(row.batch, _is_long(row.context_tokens)): row.token_ms for row in measured.decode}
    for decode in recording.decode:
        token_ms = steps.get((decode.batch, _is_long(decode.context_tokens)))
        if token_ms is not None:
            rows.append(
                Row(
                    what=decode_text(decode.batch, decode.context_tokens),
                    engine_ms=decode.token_ms,
                    simulated_ms=token_ms / slow,
                    promised=decode.batch <= 64,
                )
            )
    return rows


def broken(rows: Sequence[Row]) -> list[Row]:
    """Return the promised figures that are too far off."""
    return [row for row in rows if row.promised and abs(row.ratio - 1) > PROMISED_SHARE]


def verdict(rows: Sequence[Row], left_out: Sequence[str]) -> tuple[str, bool]:
    """Return the last line, and whether everything was measured and what is promised is close."""
    too_far = broken(rows)
    promised = [row for row in rows if row.promised]
    within = f"within {PROMISED_SHARE:.0%}"
    if too_far:
        figures = "; ".join(f"{row.what} {row.ratio:.3f}" for row in too_far)
        return f"FAIL: {len(too_far)} of {len(promised)} not {within}: {figures}", False
    if not promised:
        return "FAIL: nothing that is promised was compared", False
    worst = max(abs(row.ratio - 1) for row in promised)
    text = f"all {len(promised)} {within}, the farthest {worst:.1%} off"
    if left_out:
        return f"FAIL: {text}, but {len(left_out)} could not be measured", False
    return f"PASS: {text}", True


def report(
    args: argparse.Namespace,
    recording: Recording,
    rows: Sequence[Row],
    machine: Machine,
    left_out: Sequence[str],
) -> tuple[str, bool]:
    """Return the text of a comparison, and whether its promise is kept."""
    here = this_machine()
    slowed = f", {args.slow:g} times slower" if args.slow != 1 else ""
    last, kept = verdict(rows, left_out)
    parts = (
        "the engine, as recorded",
        head(recording),
        "",
        f"the simulator, in real time{slowed}: profile {args.profile}",
        f"date      {today()}",
        f"hardware  {here.hardware}",
        f"command   {command_line()}",
        f"late      {machine.text}",
        "",
        f"promised: ratios within {PROMISED_SHARE:.0%}, but for those in brackets",
        ratio_table(rows, "simulator"),
        "",
        *(f"NOT RUN: {text}" for text in left_out),
        last,
    )
    return "\n".join(parts), kept
