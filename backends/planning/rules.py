"""The choices that need no search: engine, format, cache, speculation, scheduling, limits.

Each rule is a function that returns what it chose and a `Decision` that says why, so that a reader
of the report can disagree with one without distrusting the rest. The searches, for the number of
GPUs, are in `parallel.py`.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from backends.planning.calibration import CALIBRATION, EngineName
from backends.planning.drafts import find_draft
from backends.planning.floors import Draft, Replica, batch_max, prefill, token_time
from backends.planning.formats import FP8, INT8, NVFP4, NVFP4_EXPERTS, Format, w4a16
from backends.planning.goal import Decision, Goal
from backends.planning.hardware import Gpu
from backends.planning.saturation import BATCH_MAX, drafting_yield, saturating_batch
from backends.planning.shape import ModelShape

# "Some 70 B": models named 70B or 72B (70.6 and 72.7 billion parameters) still count as of that
# size.
FOUR_BIT_PARAMETERS_MIN = 75e9
# What a draft must take off the time per token to be worth its memory and its risk.
SPECULATION_GAIN_MIN = 0.05
OFFLINE_STEP_TOKENS = 16_384
Shipping = Literal["as shipped", "at load", "needs its checkpoint"]


class Precision(msgspec.Struct, frozen=True):
    """The weights' format, and how they come to be in it."""

    weights: Format
    shipping: Shipping


def choose_engine(goal: Goal, single_gpu: bool) -> tuple[EngineName, Decision]:
    """Online SGLang, offline vLLM; in between what starts sooner or can be snapshotted."""
    if goal.engine is not None:
        return goal.engine, Decision("engine", goal.engine, "asked for by --engine")
    match goal.work:
        case "online":
            why = "its host work per step is the least, and it runs EAGLE-3 best"
            return "sglang", Decision("engine", "sglang", why)
        case "offline":
            why = "it mixes chunks of prefill into decode steps best, which the figures below, "
            why += "prefill and decode one after the other, do not count"
            return "vllm", Decision("engine", "vllm", why)
        case "semi-online":
            ours, theirs = CALIBRATION["vllm"].warm_start_s, CALIBRATION["sglang"].warm_start_s
            why = f"either would serve; with warm caches vLLM starts in {ours:.0f} s, SGLang "
            why += f"in {theirs:.0f} s (8 B, one H200), and a burst waits for starts"
            if single_gpu:
                why += "; on one GPU `vllm snapshot` can skip most of a start"
            return "vllm", Decision("engine", "vllm", why)


def choose_format(
    shape: ModelShape, gpu: Gpu, *, as_shipped: bool = False
) -> tuple[Precision, Decision]:
    """As shipped if narrow already; else by what the GPU multiplies and what the size bears."""
    stored = shape.checkpoint
    if as_shipped:
        why = "asked for by --format shipped"
        return Precision(stored, "as shipped"), Decision(
            "format", f"{stored.name}, as shipped", why
        )
    if stored.bits < 16:
        return Precision(stored, "as shipped"), _shipped(shape, gpu, stored)
    parameters = shape.parameters_active
    large = parameters > FOUR_BIT_PARAMETERS_MIN
    size = f"{parameters / 1e9:.1f} B {'active ' if shape.moe else ''}parameters"
    if large and "fp4" in gpu.flops:
        why = f"{size} are above some 70 B: four bits cost little there, and {gpu.generation} "
        why += "multiplies FP4"
        if shape.moe:
            return Precision(NVFP4_EXPERTS, "at load"), Decision("format", "nvfp4, at load", why)
        why += "; of dense layers engines make none at load"
        needed = Precision(NVFP4, "needs its checkpoint")
        return needed, Decision("format", "nvfp4, needs its checkpoint", why)
    if "fp8" in gpu.flops:
        why = f"{gpu.generation} multiplies FP8; "
        why += (
            f"{size} would bear four bits, but they would be widened here: only worth it "
            "where memory or latency demands"
            if large
            else f"up to some 70 B four bits would cost quality, and it has {size}"
        )
        return Precision(FP8, "at load"), Decision("format", "fp8, at load", why)
    if large:
        why = f"{gpu.generation} has no FP8, and {size} are above some 70 B: four bits, "
        why += "widened as they are read (AWQ or GPTQ)"
        needed = Precision(w4a16("w4a16", 128), "needs its checkpoint")
        return needed, Decision("format", "w4a16, needs its checkpoint", why)
    why = f"{gpu.generation} has no FP8 but multiplies INT8; up to some 70 B four bits would "
    why += f"cost quality, and it has {size}"
    needed = Precision(INT8, "needs its checkpoint")
    return needed, Decision("format", "int8, needs its checkpoint", why)


def _shipped(shape: ModelShape, gpu: Gpu, stored: Format) -> Decision:
    why = "the checkpoint is quantised already, and was trained or calibrated so"
    if stored.name == "mxfp4" and shape.parameters < FOUR_BIT_PARAMETERS_MIN:
        why = "the exception below 70 B: gpt-oss was trained for MXFP4 and loses nothing by it"
    if stored.arithmetic not in gpu.flops:
        why += f"; {gpu.generation} widens it to 16 bits as it is read: fewer bytes, but the "
        why += "arithmetic of bf16"
    return Decision("format", f"{stored.name}, as shipped", why)


def loads_wide(engine: EngineName, precision: Precision) -> bool:
    """Say whether an engine holds all 16 bits before it narrows them.

    SGLang 0.5.23 narrows a model once it is loaded; vLLM 0.33 goes layer by layer.
    """
    return engine == "sglang" and precision.shipping == "at load"


def choose_kv(goal: Goal, gpu: Gpu, fits_16bit: bool) -> tuple[float, Decision]:
    """16 bits, since fewer change the answers; eight where asked for or where nothing fits else."""
    if goal.kv_fp8 and "fp8" in gpu.flops:
        return 1.0, Decision("kv cache", "fp8_e4m3", "asked for by --kv-dtype fp8")
    if not fits_16bit and "fp8" in gpu.flops:
        why = f"in 16 bits {goal.concurrency} requests of {goal.sequence_tokens:,} tokens do not "
        why += "fit a node; measure what it does to the answers"
        return 1.0, Decision("kv cache", "fp8_e4m3", why)
    why = "the engines' default; fewer bits change answers, so that is yours to choose "
    why += "(--kv-dtype fp8)"
    if goal.kv_fp8:
        why = f"{gpu.generation} does not read FP8, whatever --kv-dtype says"
    return 2.0, Decision("kv cache", "16 bits", why)


def choose_draft(goal: Goal, shape: ModelShape) -> tuple[Draft | None, Decision]:
    """A draft where people wait for tokens and one is known; elsewhere one that is asked for."""
    rule = "speculation"
    if goal.work == "offline" and not goal.draft:
        why = "mixed-in chunks of prefill use arithmetic that decode leaves idle, and what a draft "
        why += "yields in a full batch is not published; what one would save by these figures "
        why += "stands below (--draft auto takes it)"
        return None, Decision(rule, "off", why)
    if goal.work == "semi-online" and not goal.draft:
        why = "bursts make large batches, and a replica that speculates cannot be snapshotted"
        return None, Decision(rule, "off", why)
    draft = find_draft(shape, goal.model, goal.draft, goal.accept_length)
    if draft is None:
        why = "asked for by --draft none" if goal.draft == "none" else "no draft is known for it; "
        why += "" if goal.draft == "none" else "give one with --draft"
        return None, Decision(rule, "off", why)
    named = f"EAGLE-3 with {draft.name}" if draft.name else "the model's own drafting layers (MTP)"
    count = "1 proposed token is" if draft.tokens == 1 else f"{draft.tokens} proposed tokens are"
    why = f"reading bounds decode, so {count} checked with the next at little cost; "
    why += f"{draft.accept_length:g} tokens a step are expected ({draft.source})"
    return draft, Decision(rule, named, why)


def drafting_gain(goal: Goal, replica: Replica) -> float:
    """Return the share that the replica's draft takes off a token's time; negative: it adds.

    Offline nobody waits for a token, so that there it is the share of the GPUs' time.
    """
    if goal.work == "offline":
        return drafting_yield(goal, replica)
    plain = msgspec.structs.replace(replica, draft=None)
    batch, context = goal.concurrency, goal.decode_context_tokens
    with_it = token_time(replica, batch, context).expected_s
    return 1.0 - with_it / token_time(plain, batch, context).expected_s


def without_idle_draft(goal: Goal, replica: Replica) -> Replica:
    """Drop a draft that does not pay at the batch that is asked for."""
    if replica.draft is None or drafting_gain(goal, replica) >= SPECULATION_GAIN_MIN:
        return replica
    return msgspec.structs.replace(replica, draft=None)


def describe_draft(goal: Goal, replica: Replica, draft: Draft | None, said: Decision) -> Decision:
    """Say what became of `draft` on the chosen replica."""
    if draft is None:
        return said
    drafting = msgspec.structs.replace(replica, draft=draft)
    gain = drafting_gain(goal, drafting)
    of_what = f"a token's time at batch {goal.concurrency}"
    if goal.work == "offline":
        batch = saturating_batch(goal, drafting)
        of_what = f"the GPU-seconds of a token at batch {batch}, prefill and decode one after the "
        of_what += f"other ({_change(drafting_yield(goal, drafting, mixed=True))} were prefill "
        of_what += "wholly mixed into decode steps)"
    if replica.draft is None:
        change = f"takes only {gain:.0%} off" if gain >= 0 else f"adds {-gain:.0%} to"
        return Decision(said.rule, "off", f"{said.choice} {change} {of_what}; {said.why}")
    return Decision(said.rule, said.choice, f"{said.why}; {gain:.0%} off {of_what}")


def _change(gain: float) -> str:
    return f"{gain:.0%} off" if gain >= 0 else f"{-gain:.0%} more"


def choose_scheduling(goal: Goal, engine: EngineName) -> Decision:
    """Both engines prepare the next step while the GPU works; nothing here turns that off."""
    if engine == "sglang":
        why = "the host prepares the next step while the GPU is at this one; on by default, and "
        why += "--disable-overlap-schedule must stay away"
        return Decision("scheduling", "overlap scheduling", why)
    why = "the host prepares the next step while the GPU is at this one, and chunks of prefill "
    why += "carry decode along"
    return Decision("scheduling", "async scheduling, chunked prefill", why)


def choose_step_tokens(goal: Goal, replica: Replica) -> tuple[int, Decision]:
    """Return the most tokens of a step: many for throughput, few where streams would wait."""
    rule = "step budget"
    if goal.work == "offline":
        why = "nobody waits for a step, and large ones keep the arithmetic busy"
        return OFFLINE_STEP_TOKENS, Decision(rule, f"{OFFLINE_STEP_TOKENS:,} tokens", why)
    limit_s = (goal.first_token_target_s or 0.4) / 2
    tokens = 8192
    while tokens > 1024 and prefill(replica, tokens)[1] > limit_s:
        tokens //= 2
    took_s = prefill(replica, tokens)[1]
    why = f"a chunk of somebody else's prompt holds every stream up: {took_s * 1e3:.0f} ms"
    return tokens, Decision(rule, f"{tokens:,} tokens", why)


def choose_limits(goal: Goal, replica: Replica) -> tuple[int, int, Decision]:
    """Return the requests in flight to aim at and never to exceed, for one replica.

    The batch that was asked for is aimed at, met or not: the plan is judged at it. Beyond it, as
    many as meet the target are; but twice the aim is room for a burst while other replicas start,
    so no more than half of the cache.
    """
    rule = "requests in flight"
    fit = batch_max(replica, goal.sequence_tokens)
    most = max(1, min(fit, max(BATCH_MAX[goal.work], goal.concurrency)))
    if goal.token_target_s is None:
        why = f"{fit:,} requests of {goal.sequence_tokens:,} tokens fit the cache"
        return 0, most, Decision(rule, f"at most {most}", why)
    meeting = _largest_batch(goal, replica, goal.token_target_s, most)
    aim = max(1, min(goal.concurrency, most), min(meeting, (most + 1) // 2))
    most = min(most, 2 * aim)
    why = f"at {aim} a token is expected to take "
    why += f"{token_time(replica, aim, goal.decode_context_tokens).expected_s * 1e3:.1f} ms; "
    why += f"up to {most} are taken while others start ({fit:,} fit the cache)"
    if aim == goal.concurrency and most < 2 * aim:
        why += f"; aimed at as asked for (--concurrency), which leaves room for {most - aim} more "
        why += "in a burst instead of as many again"
    if aim > goal.concurrency:
        why += f"; {goal.concurrency} were asked for, and so many more meet the target"
    return aim, most, Decision(rule, f"{aim}, at most {most}", why)


def _largest_batch(goal: Goal, replica: Replica, target_s: float, most: int) -> int:
    """Return the largest batch that meets the target; 0 if none does. Times grow with batches."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if token_time(replica, middle, goal.decode_context_tokens).expected_s <= target_s:
            low = middle
        else:
            high = middle - 1
    return low
