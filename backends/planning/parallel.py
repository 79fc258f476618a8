"""How many GPUs a replica has.

Tensor parallelism adds bandwidth, and so takes time off every token; each layer then waits twice
for the slowest link, and what a step spends beside reading does not shrink. So online it grows from
what memory needs until the targets are met or a doubling takes off too little, within one NVLink
domain; and offline it stays at the fewest GPUs that hold a saturating batch, because two small
replicas serve more than a large one.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from backends.planning.failure import PlanError
from backends.planning.floors import (
    Replica,
    batch_max,
    context_max,
    crossover_batch,
    first_token_s,
    kv_room_per_gpu,
    loads,
    token_time,
)
from backends.planning.formats import Format
from backends.planning.goal import Decision, Goal
from backends.planning.hardware import Gpu
from backends.planning.rules import without_idle_draft
from backends.planning.saturation import BATCH_MAX, saturating_batch, throughput
from backends.planning.shape import ModelShape

GPUS_MAX = 8  # the NVLink domain of a board; larger ones are racks, which one launch does not span
COUNTS = (1, 2, 4, 8)
# A doubling that takes off less is not made. Twice the bandwidth could halve a token's time; one
# published doubling, of H100s, took off some 30 %; half of that is where the GPUs serve more apart.
GAIN_MIN = 0.15


class Candidate(msgspec.Struct, frozen=True):
    """A number of GPUs, and what it would do at the batch that is asked for."""

    replica: Replica
    batch_max: int
    context_max: int
    fits: bool
    token_s: float
    first_token_s: float
    tokens_per_s: float  # answer tokens of a replica that is kept full


def splits(shape: ModelShape, weights: Format, gpus: int) -> str:
    """Return why a model cannot be cut into so many parts; empty if it can."""
    if gpus == 1:
        return ""
    if shape.query_heads % gpus:
        return f"{shape.query_heads} attention heads are no multiple of {gpus}"
    if not shape.mla and shape.kv_heads % gpus and gpus % shape.kv_heads:
        return f"{shape.kv_heads} key-value heads neither divide {gpus} nor are divided by it"
    unit = max(1, weights.group)
    for width in shape.shards:
        if width % (gpus * unit):
            grain = f" in groups of {unit}" if unit > 1 else ""
            return f"a width of {width:,} cannot be cut into {gpus}{grain}"
    return ""


def candidates(goal: Goal, base: Replica) -> tuple[Candidate, ...]:
    """Return every number of GPUs that the model can be cut for, within a node."""
    return tuple(
        _better_layout(goal, without_idle_draft(goal, msgspec.structs.replace(base, gpus=count)))
        for count in COUNTS
        if count <= min(goal.gpus_per_node, GPUS_MAX)
        and not splits(base.shape, base.weights, count)
    )


def _better_layout(goal: Goal, replica: Replica) -> Candidate:
    """Cut the attention, too, or keep it whole on each GPU where that serves more.

    A compressed cache (MLA) cannot be cut by heads, so that cutting the attention keeps it once
    for each GPU. With whole attention each GPU has sequences of its own, and only the experts are
    shared: more fit, but a single token takes longer, so it is for offline work.
    """
    cut = candidate(goal, replica)
    shape = replica.shape
    if goal.work != "offline" or replica.gpus == 1 or not (shape.mla and shape.moe):
        return cut
    whole = candidate(goal, msgspec.structs.replace(replica, attention_groups=replica.gpus))
    better = whole.fits and (not cut.fits or whole.tokens_per_s > cut.tokens_per_s)
    return whole if better else cut


def describe_layout(replica: Replica) -> Decision:
    """Say how the GPUs of a replica share the model."""
    rule, count = "layout", replica.gpus
    if replica.attention_groups > 1:
        why = f"cut by heads, the compressed cache would be kept {count} times; so each GPU has "
        why += "sequences of its own, and all share the experts"
        return Decision(rule, f"attention on each of {count} GPUs, experts shared", why)
    if count == 1:
        return Decision(rule, "one GPU", "nothing is cut, nothing waits for a link")
    why = "each token reads from all GPUs at once"
    if replica.shape.mla:
        why += f"; the price is that the compressed cache is kept {count} times"
    return Decision(rule, f"tensor parallelism over {count} GPUs", why)


def candidate(goal: Goal, replica: Replica) -> Candidate:
    holds = batch_max(replica, goal.sequence_tokens)
    longest = context_max(replica)
    wanted = goal.context_tokens or goal.sequence_tokens
    room = loads(replica) and kv_room_per_gpu(replica) > 0
    return Candidate(
        replica=replica,
        batch_max=holds,
        context_max=longest,
        fits=room and holds >= goal.concurrency and longest >= wanted,
        token_s=token_time(replica, goal.concurrency, goal.decode_context_tokens).expected_s,
        first_token_s=first_token_s(replica, goal.prompt_tokens),
        tokens_per_s=throughput(goal, replica, saturating_batch(goal, replica)),
    )


def meets(goal: Goal, found: Candidate) -> bool:
    token_s, first_s = goal.token_target_s, goal.first_token_target_s
    return (token_s is None or found.token_s <= token_s) and (
        first_s is None or found.first_token_s <= first_s
    )


def choose_for_latency(
    goal: Goal, gpu: Gpu, found: Sequence[Candidate]
) -> tuple[Candidate, Decision]:
    """Grow from what memory needs until the targets hold or a doubling gains too little."""
    fitting = [c for c in found if c.fits]
    chosen = fitting[0]
    need = _count(chosen.replica.gpus)
    why = f"memory needs {need}"
    if any(not loads(c.replica) and kv_room_per_gpu(c.replica) > 0 for c in found):
        why += ", because SGLang loads all 16 bits before it narrows them (a checkpoint in "
        why += f"{chosen.replica.weights.name} would not)"
    for wider in fitting[1:]:
        if meets(goal, chosen):
            break
        count = wider.replica.gpus
        if count > gpu.link_gpus:
            why += f"; {count} would talk over PCIe, beyond any NVLink domain"
            break
        gain = _gain(goal, chosen, wider)
        if gain < GAIN_MIN:
            why += f"; {count} would take off only {gain:.0%} more (less than {GAIN_MIN:.0%})"
            break
        why += f"; {count} take off {gain:.0%}"
        chosen = wider
    why += ", and the targets are met" if meets(goal, chosen) else ", and the targets are missed"
    return chosen, Decision("GPUs per replica", _count(chosen.replica.gpus), why)


def choose_for_throughput(goal: Goal, found: Sequence[Candidate]) -> tuple[Candidate, Decision]:
    """Take the fewest GPUs that hold a saturating batch, or fewer where they yield more for each.

    Fewer may: chunks of prefill keep the arithmetic busy, too, and every further GPU costs links.
    """
    fitting = [c for c in found if c.fits]
    first = next((c for c in fitting if c.batch_max >= _saturating(goal, c)), fitting[-1])
    up_to = fitting[: fitting.index(first) + 1]
    best = max(up_to, key=lambda c: (_yield(c), -c.replica.gpus))
    wanted = _saturating(goal, best)
    if best.batch_max >= wanted:
        why = f"the fewest that hold a saturating batch: {wanted:,} requests keep the arithmetic "
        why += f"busy, {best.batch_max:,} fit; other GPUs are other replicas"
    elif first.batch_max >= _saturating(goal, first):
        why = f"{best.batch_max:,} of the {wanted:,} requests fit that saturate it; "
        why += (
            f"{first.replica.gpus} GPUs would hold them, but yield {_yield(first):,.0f} tokens a "
        )
        why += f"second each instead of {_yield(best):,.0f}"
    else:
        why = f"no number in a node holds a saturating batch ({wanted:,} requests); this one "
        why += "yields most for each GPU"
    return best, Decision("GPUs per replica", _count(best.replica.gpus), why)


def _saturating(goal: Goal, found: Candidate) -> int:
    return min(crossover_batch(found.replica), BATCH_MAX[goal.work])


def _yield(found: Candidate) -> float:
    """Return answer tokens a second for each GPU of a replica that is kept full."""
    return found.tokens_per_s / found.replica.gpus


def why_not(goal: Goal, found: Candidate) -> str:
    """Return why a candidate does not fit; empty if it does."""
    wanted = goal.context_tokens or goal.sequence_tokens
    if found.fits:
        return ""
    if kv_room_per_gpu(found.replica) <= 0:
        return "the weights do not fit"
    if not loads(found.replica):
        return "does not fit while it loads in 16 bits"
    if found.batch_max < goal.concurrency:
        return f"holds {found.batch_max:,} of {goal.concurrency:,} requests"
    return f"holds no sequence of {wanted:,} tokens"


def no_fit(goal: Goal, base: Replica, found: Sequence[Candidate]) -> PlanError:
    """Return the error that says what is too large."""
    most = ""
    if goal.gpus_per_node > GPUS_MAX:
        most = f" (a replica has at most {GPUS_MAX}, those of one board)"
    node = f"{min(goal.gpus_per_node, GPUS_MAX)} x {base.gpu.name}{most}"
    best = found[-1]
    where = f"{_count(best.replica.gpus)} of type {base.gpu.name}{most}"
    if kv_room_per_gpu(best.replica) <= 0:
        return PlanError(f"the weights in {base.weights.name} do not fit {where}")
    if not loads(best.replica):
        return PlanError(
            f"the weights in 16 bits, which SGLang loads before it narrows them, do not fit {where}"
        )
    return PlanError(
        f"{goal.concurrency} requests of {goal.sequence_tokens:,} tokens, or one of "
        f"{goal.context_tokens or goal.sequence_tokens:,}, do not fit {node}: there is room for "
        f"{best.batch_max:,} and for one of {best.context_max:,}; lower --concurrency or --context"
    )


def _gain(goal: Goal, now: Candidate, wider: Candidate) -> float:
    """Return the greatest share that `wider` takes off a time that misses its target."""
    gains = [0.0]
    if goal.token_target_s is not None and now.token_s > goal.token_target_s:
        gains.append(1.0 - wider.token_s / now.token_s)
    if goal.first_token_target_s is not None and now.first_token_s > goal.first_token_target_s:
        gains.append(1.0 - wider.first_token_s / now.first_token_s)
    return max(gains)


def _count(gpus: int) -> str:
    return f"{gpus} GPU" if gpus == 1 else f"{gpus} GPUs"
