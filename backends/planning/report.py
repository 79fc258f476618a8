"""A plan for a person to read, and for a program."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from backends.plan import Plan
from backends.planning import floors, parallel
from backends.planning.compare import Comparison
from backends.planning.floors import draft_bytes
from backends.planning.launch import Pool, snippet, static_share
from backends.planning.predictions import decode_outlook
from backends.planning.shape import NO_CACHE, kv_bytes_per_token, step_bytes, weight_bytes

JSON_VERSION = 1
GB = 1e9
_DEEP = " " * 6


def text_report(comparison: Comparison, pool: Pool) -> str:
    """Return the whole report; of several GPU types the best one's plan is told in full."""
    plan = comparison.best
    lines = [*_heading(plan), ""]
    if len(comparison.plans) + len(comparison.refused) > 1:
        lines += [*_types(comparison), ""]
    lines += [*_table(plan), "", *_budget(plan), "", *_choices(plan), "", *_targets(plan), ""]
    lines += ["configuration", "", snippet(pool, note=plan.note)]
    return "\n".join(lines)


def json_report(comparison: Comparison, pool: Pool) -> dict[str, Any]:
    """Return the report as values; a change of what a key means raises `version`."""
    return {
        "version": JSON_VERSION,
        "model": comparison.best.goal.model,
        "class": comparison.best.goal.work,
        "ranked_by": comparison.rule,
        "plans": [_plan_values(plan) for plan in comparison.plans],
        "refused": dict(comparison.refused),
        "decode": decode_outlook(comparison.best.shape, comparison.best.gpu),
        "configuration": snippet(pool, note=comparison.best.note),
    }


def _heading(plan: Plan) -> Iterator[str]:
    shape, gpu, goal = plan.shape, plan.gpu, plan.goal
    yield f"{goal.model}: {goal.work} on {gpu.title}, {goal.gpus_per_node} to a node"
    experts = (
        f", {shape.experts_active} of {shape.experts} experts in {shape.expert_layers} layers"
        if shape.moe
        else ""
    )
    yield (
        f"  model    {shape.architecture}: {shape.layers} layers, "
        f"{shape.parameters / GB:.2f} B parameters, {shape.parameters_active / GB:.2f} B of them "
        f"multiply each token{experts}"
    )
    replica = plan.replica
    first = step_bytes(shape, replica.weights, 1)
    yield (
        f"  weights  {weight_bytes(shape, shape.checkpoint) / GB:.1f} GB as shipped "
        f"({shape.checkpoint.name}), {weight_bytes(shape, replica.weights) / GB:.1f} GB as planned "
        f"({replica.weights.name}); {first / GB:.2f} GB are read for a token at batch 1"
    )
    windowed = sum(window > 0 for window in shape.windows)
    without = sum(window == NO_CACHE for window in shape.windows)
    yield (
        f"  cache    {kv_bytes_per_token(shape, replica.kv_value_bytes):,.0f} bytes a token"
        + (f"; {windowed} layers keep no more than their window" if windowed else "")
        + (f"; {without} layers keep none" if without else "")
        + (
            f"; compressed (MLA), copies among {replica.gpus} GPUs: {replica.kv_copies:.0f}"
            if shape.mla
            else ""
        )
    )
    yield f"  GPU      {gpu.source}"
    for assumption in shape.assumptions:
        yield f"  assumed  {assumption}"


def _types(comparison: Comparison) -> Iterator[str]:
    yield f"GPU types, {comparison.rule}"
    yield (
        "  type   format  GPUs x replicas  ms a token  ms to first  tokens/s a replica  "
        "GPU-s per million  price per million  targets"
    )
    for plan in comparison.plans:
        cost, replica = plan.cost, plan.replica
        price = "-" if cost.price_per_million is None else f"{cost.price_per_million:.3f}"
        yield (
            f"  {plan.gpu.name:6s} {replica.weights.name:7s} "
            f"{f'{replica.gpus} x {plan.replicas}':>15s} {plan.chosen.token_s * 1e3:11.2f} "
            f"{plan.chosen.first_token_s * 1e3:12.0f} {cost.tokens_per_s:19,.0f} "
            f"{cost.gpu_s_per_million:18,.0f} {price:>18s}  "
            f"{_verdict(plan)}"
        )
    for name, why in comparison.refused:
        yield f"  {name:6s} {why}"


def _verdict(plan: Plan) -> str:
    if plan.missed:
        return "missed"
    return "met" if plan.goal.token_target_s or plan.goal.first_token_target_s else "-"


def _table(plan: Plan) -> Iterator[str]:
    goal, batch = plan.goal, plan.batch
    yield (
        f"GPUs a replica: {goal.prompt_tokens:,} tokens of prompt, {goal.answer_tokens:,} of "
        f"answer; times a token{_yield(plan)}"
    )
    yield (
        f"  GPUs  weights/GPU  floor, batch 1  expected  floor, batch {batch:<4d} "
        "expected  prefill floor  to first token  requests  longest context"
    )
    for found in plan.considered:
        if found.replica.gpus == plan.replica.gpus:
            found = plan.chosen  # noqa: PLW2901  # with what was settled after the search
        one = floors.token_time(found.replica, 1, goal.decode_context_tokens)
        many = floors.token_time(found.replica, batch, goal.decode_context_tokens)
        mark = "*" if found.replica.gpus == plan.replica.gpus else " "
        yield (
            f" {mark}{found.replica.gpus:4d} {floors.weights_per_gpu(found.replica) / GB:9.1f} GB "
            f"{one.floor_s * 1e3:12.2f} ms {one.expected_s * 1e3:6.2f} ms "
            f"{many.floor_s * 1e3:15.2f} ms {many.expected_s * 1e3:6.2f} ms "
            f"{floors.prefill(found.replica, goal.prompt_tokens)[0] * 1e3:10.0f} ms "
            f"{found.first_token_s * 1e3:13.0f} ms {found.batch_max:9,d} {found.context_max:16,d}"
            + (f"  {why}" if (why := parallel.why_not(goal, found)) else "")
        )
    yield (
        "  floor: the speed of light, bytes over peak bandwidth or arithmetic over its peak; "
        "expected: through the engine's constant"
    )


def _yield(plan: Plan) -> str:
    draft = plan.replica.draft
    return "" if draft is None else f", at {draft.accept_length:g} tokens a step"


def _budget(plan: Plan) -> Iterator[str]:
    replica, gpu = plan.replica, plan.gpu
    room = floors.kv_room_per_gpu(replica)
    sequence = floors.sequence_bytes_per_gpu(replica, plan.goal.sequence_tokens)
    yield f"memory of a GPU: {gpu.memory_bytes / GB:.1f} GB"
    yield f"  weights, draft     {floors.weights_per_gpu(replica) / GB:7.1f} GB"
    yield f"  work space, graphs {floors.reserve_per_gpu(replica) / GB:7.1f} GB"
    yield (
        f"  cache              {room / GB:7.1f} GB, {sequence / 1e6:,.1f} MB for a request of "
        f"{plan.goal.sequence_tokens:,} tokens: {plan.chosen.batch_max:,} at once"
    )
    unused = gpu.memory_bytes * (1 - replica.memory_share)
    yield f"  left alone         {unused / GB:7.1f} GB"
    if replica.engine == "vllm":
        yield f"  --gpu-memory-utilization {replica.memory_share:g}: all but what is left alone"
        return
    drafted = draft_bytes(replica) / replica.gpus
    yield (
        f"  --mem-fraction-static {static_share(replica):g}: weights and cache, "
        f"{(floors.weights_per_gpu(replica) - drafted + room) / GB:.1f} GB"
        + (f"; the draft's {drafted / GB:.1f} GB are beside it" if drafted else "")
    )


def _choices(plan: Plan) -> Iterator[str]:
    yield "choices"
    for decision in plan.decisions:
        yield f"  {decision.rule}: {decision.choice}"
        yield from textwrap.wrap(decision.why, 96, initial_indent=_DEEP, subsequent_indent=_DEEP)


def _targets(plan: Plan) -> Iterator[str]:
    goal, cost = plan.goal, plan.cost
    token_s, first_s = goal.token_target_s, goal.first_token_target_s
    targets = [
        *([f"{token_s * 1e3:g} ms a token at batch {goal.concurrency}"] if token_s else []),
        *([f"{first_s * 1e3:g} ms to the first"] if first_s else []),
    ]
    if targets and not plan.missed:
        yield f"targets met: {', '.join(targets)}"
    for missed in plan.missed:
        yield f"MISSED {missed}"
    for remedy in plan.remedies:
        yield f"  would do: {remedy}"
    price = (
        "" if cost.price_per_million is None else f", at your prices {cost.price_per_million:.3f}"
    )
    yield (
        f"kept full, a replica is expected to yield {cost.tokens_per_s:,.0f} tokens of answers a "
        f"second: a million take {cost.gpu_s_per_million:,.0f} GPU-seconds{price}"
    )
    yield from _left_out(plan)
    start_s = floors.start_s(plan.replica)
    yield (
        f"start, with warm caches and files in memory: {start_s:.0f} s; "
        + ("`vllm snapshot` applies" if plan.snapshot else "`vllm snapshot` does not apply")
        + " (one GPU, vLLM, no speculation)"
    )


def _left_out(plan: Plan) -> Iterator[str]:
    """Yield what the figures of offline work do not count, and what is cheaper by them."""
    if plan.goal.work != "offline":
        return
    text = (
        "  left out: these count prefill and decode one after the other; wholly mixed, at best, a "
        f"million would take {plan.cost.mixed_gpu_s_per_million:,.0f}. How far an engine mixes "
        "them is not measured here, nor how many tokens a draft yields in a full batch. Engines' "
        "constants are of one model on one GPU type: differences of some per cent say little"
    )
    yield from textwrap.wrap(text, 110, subsequent_indent="  ")
    for other in plan.cheaper:
        yield (
            f"  cheaper by these figures, not chosen: {other.flags}: "
            f"{other.gpu_s_per_million:,.0f} GPU-seconds "
            f"({other.mixed_gpu_s_per_million:,.0f} wholly mixed)"
        )
    if plan.cheaper:
        yield "  measure yours before you choose one"


def _plan_values(plan: Plan) -> dict[str, Any]:
    replica, goal = plan.replica, plan.goal
    return {
        "gpu": plan.gpu.name,
        "gpu_source": plan.gpu.source,
        "engine": replica.engine,
        "format": replica.weights.name,
        "format_is": plan.precision.shipping,
        "gpus_per_replica": replica.gpus,
        "attention_groups": replica.attention_groups,
        "replicas_per_node": plan.replicas,
        "kv_cache_bits": int(8 * replica.kv_value_bytes),
        "draft": None
        if replica.draft is None
        else {
            "model": replica.draft.name or None,
            "tokens": replica.draft.tokens,
            "accept_length": replica.draft.accept_length,
        },
        "model": {
            "architecture": plan.shape.architecture,
            "parameters": plan.shape.parameters,
            "parameters_active": plan.shape.parameters_active,
            "weights_bytes": round(weight_bytes(plan.shape, replica.weights)),
            "kv_bytes_per_token": round(kv_bytes_per_token(plan.shape, replica.kv_value_bytes)),
            "assumed": list(plan.shape.assumptions),
        },
        "considered": _considered(plan),
        "limits": {
            "context_tokens": plan.limits.context_tokens,
            "step_tokens": plan.limits.step_tokens,
            "target_inputs": plan.limits.aim,
            "max_inputs": plan.limits.most,
        },
        "targets": {
            "token_s": goal.token_target_s,
            "first_token_s": goal.first_token_target_s,
            "concurrency": goal.concurrency,
            "missed": list(plan.missed),
            "would_do": list(plan.remedies),
        },
        "yield": {
            "tokens_per_s": plan.cost.tokens_per_s,
            "gpu_s_per_million": plan.cost.gpu_s_per_million,
            "gpu_s_per_million_mixed": plan.cost.mixed_gpu_s_per_million,
            "price_per_million": plan.cost.price_per_million,
        },
        "cheaper": [
            {
                "flags": other.flags,
                "gpu_s_per_million": other.gpu_s_per_million,
                "gpu_s_per_million_mixed": other.mixed_gpu_s_per_million,
            }
            for other in plan.cheaper
        ],
        "start_s": floors.start_s(replica),
        "snapshot": plan.snapshot,
        "args": list(plan.args),
        "decisions": [{"rule": d.rule, "choice": d.choice, "why": d.why} for d in plan.decisions],
    }


def _considered(plan: Plan) -> Sequence[dict[str, Any]]:
    goal = plan.goal
    values = []
    for found in plan.considered:
        settled = plan.chosen if found.replica.gpus == plan.replica.gpus else found
        step = floors.decode_step(settled.replica, 1, goal.decode_context_tokens)
        prefill = floors.prefill(settled.replica, goal.prompt_tokens)
        values.append(
            {
                "gpus": settled.replica.gpus,
                "weights_bytes_per_gpu": round(floors.weights_per_gpu(settled.replica)),
                "step_floor_s": step.floor_s,
                "step_expected_s": step.expected_s,
                "token_expected_s": settled.token_s,
                "prefill_floor_s": prefill[0],
                "first_token_expected_s": settled.first_token_s,
                "batch_max": settled.batch_max,
                "context_tokens_max": settled.context_max,
                "fits": settled.fits,
                "why_not": parallel.why_not(goal, settled),
            }
        )
    return values
