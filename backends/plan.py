"""A plan: from a model's shape, a GPU type and a goal to a launch, with the reason of each choice.

Pure: the rules in `planning/`, put in the order in which they depend on each other. The format
decides what memory needs, the draft what a token takes, both how many GPUs a replica has, and that
what it can hold. A target that is missed does not fail a plan: the plan says so, and what would
meet it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import msgspec

from backends.planning import floors, launch, parallel, rules, saturation
from backends.planning.drafts import CHAIN_TOKENS
from backends.planning.failure import PlanError, RequestError
from backends.planning.floors import Draft, Replica
from backends.planning.formats import NVFP4, Format, w4a16
from backends.planning.goal import Decision, Goal
from backends.planning.hardware import GPUS, Gpu
from backends.planning.parallel import Candidate
from backends.planning.rules import Precision
from backends.planning.shape import ModelShape

CONTEXT_UNIT = 1024  # contexts are cut to whole kibitokens


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """What a replica that is kept full yields."""

    tokens_per_s: float  # of answers, their prompts computed too
    gpu_s_per_million: float  # GPU-seconds for a million tokens of answers
    mixed_gpu_s_per_million: float  # at best, with prefill wholly mixed into decode steps
    price_per_million: float | None  # None without a price


class Cheaper(msgspec.Struct, frozen=True):
    """What was not chosen, though by the planner's own figures it takes fewer GPU-seconds."""

    flags: str  # that would choose it
    gpu_s_per_million: float
    mixed_gpu_s_per_million: float  # at best, with prefill wholly mixed into decode steps

    def saves_on(self, plan: Plan) -> bool:
        return self.gpu_s_per_million < plan.cost.gpu_s_per_million


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """One launch and everything that is expected of it."""

    goal: Goal
    shape: ModelShape
    gpu: Gpu
    precision: Precision
    chosen: Candidate
    considered: tuple[Candidate, ...]
    replicas: int
    limits: launch.Limits
    args: tuple[str, ...]
    cost: Cost
    snapshot: bool  # whether `vllm snapshot` can save a start
    decisions: tuple[Decision, ...]
    missed: tuple[str, ...]
    remedies: tuple[str, ...]
    cheaper: tuple[Cheaper, ...] = ()

    @property
    def replica(self) -> Replica:
        return self.chosen.replica

    @property
    def batch(self) -> int:
        """Return the batch that the plan is judged at: as asked for, offline the saturating one."""
        if self.goal.work != "offline":
            return self.goal.concurrency
        return max(1, saturation.saturating_batch(self.goal, self.replica))

    @property
    def note(self) -> str:
        """Return what the configuration's reader must know; empty if nothing."""
        if self.precision.shipping != "needs its checkpoint":
            return ""
        name = self.precision.weights.name.upper()
        return f"model_path must be a checkpoint of this model that is quantised to {name}"


def make_plan(goal: Goal, shape: ModelShape, gpu: Gpu) -> Plan:
    """Return the plan for `goal`. Raises `PlanError` where nothing fits, naming what would.

    Offline work has no target but its cost, so there the plan also names what costs less by the
    same figures, and was not chosen for what they leave out.
    """
    _check_length(goal, shape)
    plan = _make_plan(goal, shape, gpu)
    if goal.work != "offline":
        return plan
    return msgspec.structs.replace(plan, cheaper=_cheaper(plan))


def _check_length(goal: Goal, shape: ModelShape) -> None:
    """Refuse sequences that the model was not made for. Raises `RequestError`."""
    wanted = max(goal.context_tokens, goal.sequence_tokens)
    if wanted <= shape.context_tokens_max:
        return
    flag = "--context" if goal.context_tokens >= wanted else "--prompt-tokens or --answer-tokens"
    raise RequestError(
        f"the model takes {shape.context_tokens_max:,} tokens (max_position_embeddings of its "
        f"config.json; 32,768 if that has none), {wanted:,} are asked for; lower {flag}, or change "
        "the file together with the rope scaling that allows more"
    )


def _cheaper(plan: Plan) -> tuple[Cheaper, ...]:
    """Return what was left to the class and would take less, cheapest first."""
    found = [other for other in _others(plan) if other.saves_on(plan)]
    return tuple(sorted(found, key=lambda other: other.gpu_s_per_million))


def _others(plan: Plan) -> Iterator[Cheaper]:
    """Yield each engine with each draft, of those that the user left open."""
    goal = plan.goal
    engines = (None, "sglang") if goal.engine is None else (goal.engine,)
    drafts = (goal.draft,) if goal.draft else ("", "auto")
    for engine, draft in itertools.product(engines, drafts):
        asked = msgspec.structs.replace(goal, engine=engine, draft=draft)
        flags = [f"--engine {engine}"] if engine != goal.engine else []
        flags += [f"--draft {draft}"] if draft != goal.draft else []
        try:
            cost = _make_plan(asked, plan.shape, plan.gpu).cost
        except PlanError:  # what does not fit is no choice
            continue
        if flags:
            yield Cheaper(" ".join(flags), cost.gpu_s_per_million, cost.mixed_gpu_s_per_million)


def _make_plan(goal: Goal, shape: ModelShape, gpu: Gpu) -> Plan:
    """Return the plan, with nothing beside it."""
    precision, about_format = rules.choose_format(shape, gpu, as_shipped=goal.as_shipped)
    draft, about_draft = rules.choose_draft(goal, shape)
    base = _base(goal, shape, gpu, precision, draft)
    kv_value_bytes, about_kv = rules.choose_kv(goal, gpu, _fewest_gpus(goal, base) > 0)
    base = msgspec.structs.replace(base, kv_value_bytes=kv_value_bytes)
    found = parallel.candidates(goal, base)
    if not any(c.fits for c in found):
        raise _nothing_fits(goal, base, found)
    if goal.work == "offline":
        chosen, about_gpus = parallel.choose_for_throughput(goal, found)
    else:
        chosen, about_gpus = parallel.choose_for_latency(goal, gpu, found)
    engine, about_engine = rules.choose_engine(goal, chosen.replica.gpus == 1)
    replica = msgspec.structs.replace(chosen.replica, engine=engine)
    about_draft = rules.describe_draft(goal, replica, draft, about_draft)
    step_tokens, about_step = rules.choose_step_tokens(goal, replica)
    replica = msgspec.structs.replace(replica, step_tokens_max=step_tokens)
    chosen = parallel.candidate(goal, replica)
    aim, most, about_limits = rules.choose_limits(goal, replica)
    context, about_context = _choose_context(goal, chosen)
    limits = launch.Limits(context_tokens=context, step_tokens=step_tokens, aim=aim, most=most)
    replicas, about_replicas = _choose_replicas(goal, replica)
    missed = tuple(_missed(goal, chosen))
    return Plan(
        goal=goal,
        shape=shape,
        gpu=gpu,
        precision=precision,
        chosen=chosen,
        considered=found,
        replicas=replicas,
        limits=limits,
        args=launch.arguments(replica, precision, limits),
        cost=_cost(goal, replica, most),
        snapshot=engine == "vllm" and replica.gpus == 1 and replica.draft is None,
        decisions=(
            *(about_engine, about_format, about_gpus, parallel.describe_layout(replica)),
            *(about_replicas, about_draft, about_kv),
            *(rules.choose_scheduling(goal, engine), about_step, about_context, about_limits),
        ),
        missed=missed,
        remedies=tuple(_remedies(goal, chosen)) if missed else (),
    )


def _base(
    goal: Goal, shape: ModelShape, gpu: Gpu, precision: Precision, draft: Draft | None
) -> Replica:
    """Return a replica of one GPU as the rules so far have it."""
    engine, _ = rules.choose_engine(goal, single_gpu=True)
    return Replica(
        shape=shape,
        weights=precision.weights,
        gpu=gpu,
        gpus=1,
        engine=engine,
        loads_wide=rules.loads_wide(engine, precision),
        step_tokens_max=rules.OFFLINE_STEP_TOKENS if goal.work == "offline" else 8192,
        draft=draft,
    )


def _choose_context(goal: Goal, chosen: Candidate) -> tuple[int, Decision]:
    """Return the longest sequence to admit: as asked for, else what the model and memory allow."""
    longest, most = chosen.replica.shape.context_tokens_max, chosen.context_max
    if goal.context_tokens:
        why = f"asked for by --context; the model has {longest:,}"
        return goal.context_tokens, Decision("context", f"{goal.context_tokens:,} tokens", why)
    if most >= longest:
        return longest, Decision("context", f"{longest:,} tokens", "all that the model has")
    context = max(most // CONTEXT_UNIT * CONTEXT_UNIT, min(most, CONTEXT_UNIT))
    why = f"the cache holds one sequence of {most:,}; the model has {longest:,}"
    return context, Decision("context", f"{context:,} tokens", why)


def _choose_replicas(goal: Goal, replica: Replica) -> tuple[int, Decision]:
    count = goal.gpus_per_node // replica.gpus
    idle = goal.gpus_per_node - count * replica.gpus
    why = f"{goal.gpus_per_node} GPUs in a node" + (f", {idle} stay idle" if idle else "")
    if goal.gpus_per_node > parallel.GPUS_MAX:
        why += f"; a replica has at most {parallel.GPUS_MAX}, those of one board"
    return count, Decision("replicas per node", str(count), why)


def _cost(goal: Goal, replica: Replica, most: int) -> Cost:
    """Return what a full replica yields: at a saturating batch offline, else at its limit."""
    batch = saturation.saturating_batch(goal, replica) if goal.work == "offline" else most
    rate = saturation.throughput(goal, replica, max(1, batch))
    mixed = saturation.throughput(goal, replica, max(1, batch), mixed=True)
    gpu_s = 1e6 * replica.gpus / rate
    price = goal.prices_per_hour.get(replica.gpu.name)
    return Cost(
        tokens_per_s=rate,
        gpu_s_per_million=gpu_s,
        mixed_gpu_s_per_million=1e6 * replica.gpus / mixed,
        price_per_million=None if price is None else gpu_s * price / 3600,
    )


def _missed(goal: Goal, chosen: Candidate) -> Iterator[str]:
    """Yield each target that is not met, with by how much."""
    token_s, first_s = goal.token_target_s, goal.first_token_target_s
    if token_s is not None and chosen.token_s > token_s:
        batch, replica = goal.concurrency, chosen.replica
        floor_s = floors.token_time(replica, batch, goal.decode_context_tokens).floor_s
        yield (
            f"time per token: {chosen.token_s * 1e3:.1f} ms expected at batch {batch}, "
            f"{token_s * 1e3:.1f} ms wanted"
            + (f"; even the floor is {floor_s * 1e3:.1f} ms" if floor_s > token_s else "")
        )
    if first_s is not None and chosen.first_token_s > first_s:
        yield (
            f"time to first token: {chosen.first_token_s * 1e3:.0f} ms expected for "
            f"{goal.prompt_tokens:,} tokens of which none is cached, {first_s * 1e3:.0f} ms wanted"
        )


def _remedies(goal: Goal, chosen: Candidate) -> Iterator[str]:
    """Yield what would meet the targets: of each kind of change the smallest that does."""
    met: set[str] = set()
    for kind, text, other, batch in _alternatives(goal, chosen.replica):
        asked = msgspec.structs.replace(goal, concurrency=batch)
        seen = parallel.candidate(asked, other)
        if kind not in met and seen.fits and parallel.meets(asked, seen):
            met.add(kind)
            yield (
                f"{text}: {seen.token_s * 1e3:.1f} ms a token, "
                f"{seen.first_token_s * 1e3:.0f} ms to the first"
            )
    if not met:
        yield "nothing in the table of GPUs would; ask for less"


def _alternatives(goal: Goal, replica: Replica) -> Iterator[tuple[str, str, Replica, int]]:
    """Yield what could be changed, by kind: the number of GPUs, the batch, the format, the type."""
    shape, batch = replica.shape, goal.concurrency
    for count in _linked_counts(goal, replica):
        if count > replica.gpus:
            text = f"{count} GPUs a replica, though a doubling takes off little"
            yield "gpus", text, msgspec.structs.replace(replica, gpus=count), batch
    for fewer in (batch // 2, batch // 4, 1):
        if 0 < fewer < batch:
            text = f"{fewer} request{'s' * (fewer > 1)} at once instead of {batch}"
            yield "batch", text, replica, fewer
    quicker = _quicker_draft(goal, replica)
    if quicker is not None:
        text = f"a draft that yields {quicker.accept_length:g} tokens a step"
        yield "draft", text, msgspec.structs.replace(replica, draft=quicker), batch
    narrow = _narrower(shape, replica)
    if narrow is not None:
        text = f"a checkpoint in {narrow.name}, if its quality bears it"
        yield "format", text, _as_checkpoint(replica, narrow), batch
    for gpu in GPUS.values():
        if gpu.name != replica.gpu.name:
            other = _on_type(goal, replica, gpu)
            for count in _linked_counts(goal, other):
                text = f"{count} x {gpu.name} a replica"
                yield gpu.name, text, msgspec.structs.replace(other, gpus=count), batch


def _quicker_draft(goal: Goal, replica: Replica) -> Draft | None:
    """Return the least draft that would meet the target; None where the best one would not."""
    if goal.token_target_s is None:
        return None
    tokens = replica.draft.tokens if replica.draft else CHAIN_TOKENS
    draft = Draft(name="a draft", tokens=tokens, accept_length=1.0, source="wanted")
    one = msgspec.structs.replace(replica, draft=draft)
    round_s = floors.token_time(one, goal.concurrency, goal.decode_context_tokens).expected_s
    wanted = math.ceil(10 * round_s / goal.token_target_s) / 10
    return None if wanted > tokens + 1 else msgspec.structs.replace(draft, accept_length=wanted)


def _linked_counts(goal: Goal, replica: Replica) -> tuple[int, ...]:
    limit = min(goal.gpus_per_node, parallel.GPUS_MAX, replica.gpu.link_gpus)
    return tuple(
        count
        for count in parallel.COUNTS
        if count <= limit and not parallel.splits(replica.shape, replica.weights, count)
    )


def _narrower(shape: ModelShape, replica: Replica) -> Format | None:
    if shape.checkpoint.bits < 16 or replica.weights.bits <= 4:
        return None
    return NVFP4 if "fp4" in replica.gpu.flops else w4a16("w4a16", 128)


def _as_checkpoint(replica: Replica, weights: Format) -> Replica:
    return msgspec.structs.replace(replica, weights=weights, loads_wide=False)


def _on_type(goal: Goal, replica: Replica, gpu: Gpu) -> Replica:
    """Return the replica on another GPU type, in the format that is right there."""
    precision, _ = rules.choose_format(replica.shape, gpu, as_shipped=goal.as_shipped)
    wide = rules.loads_wide(replica.engine, precision)
    return msgspec.structs.replace(replica, gpu=gpu, weights=precision.weights, loads_wide=wide)


def _nothing_fits(goal: Goal, base: Replica, found: Sequence[Candidate]) -> PlanError:
    """Return the error, with the GPU types and formats on which it would fit."""
    error = parallel.no_fit(goal, base, found)
    narrow = _narrower(base.shape, base)
    checkpoints = [*([base.weights] if base.loads_wide else []), *([narrow] if narrow else [])]
    would = [
        f"a checkpoint in {weights.name}"
        for weights in checkpoints
        if _fewest_gpus(goal, _as_checkpoint(base, weights))
    ]
    for gpu in GPUS.values():
        fewest = _fewest_gpus(goal, _on_type(goal, base, gpu))
        if fewest and gpu.name != base.gpu.name:
            would.append(f"{fewest} x {gpu.name}")
    return PlanError(
        f"{error}; it would fit: {', '.join(would) if would else 'on no node of these'}"
    )


def _fewest_gpus(goal: Goal, base: Replica) -> int:
    """Return the fewest GPUs in a node that would do; 0 if none would."""
    return next((c.replica.gpus for c in parallel.candidates(goal, base) if c.fits), 0)
