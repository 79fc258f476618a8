"""The simulator's arithmetic of one request alone, and the least squares that fit it to a run.

A prompt waits for the intake (a latency, and a part per token), then for steps of prefill: each
takes `max(floor, linear)` and its attention. Once it is said which chunks wait for the floor, all
is linear in the five constants; so that is assumed, solved, and said again, until it stays. Errors
are relative: 1 ms of 20 counts as 60 of 1,200. A decode step is a base per batch and so much per
token of context, which is linear anyhow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import msgspec

from loadtest.gpu.records import TAIL_TOKENS, Decode, FirstToken

BLOCK_TOKENS = 16
ROUNDS_MAX = 50
SMALL_CHUNK_TOKENS = 340  # a first guess at what waits for the floor: 7.3 ms of 21.5 us a token
NEAR_SHARE = 0.075  # half of what is promised of a simulator
PIVOT_MIN = 1e-14
CONSTANTS = ("intake", "intake_per_token", "floor", "linear", "attention")


class FitError(ValueError):
    """The run does not say enough; the text says what is missing."""


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """A profile of the simulator, field by field as its files have them. Durations are seconds."""

    name: str
    source: str = ""
    intake_s: float
    intake_s_per_token: float
    prefill_s_per_token: float
    prefill_s_per_token_squared: float
    prefill_floor_s: float
    decode_base_s: tuple[tuple[int, float], ...]
    decode_s_per_context_token: float
    kv_cache_tokens: int
    max_model_len: int = 40_960
    sleep_first_s: float = 0.0
    sleep_s: float = 0.0
    wake_s: float = 0.0
    discard_s: float = 0.0
    remap_s: float = 0.0


class Prompt(msgspec.Struct, frozen=True, kw_only=True):
    """A measured prompt: its length, what was cached of it, and the time to its first token."""

    tokens: int
    cached_tokens: int
    first_s: float
    kind: str


def prompts_of(rows: Sequence[FirstToken]) -> list[Prompt]:
    """Return the single measurements of a recording."""
    found = []
    for row in rows:
        tail_start = (row.prompt_tokens - TAIL_TOKENS) // BLOCK_TOKENS * BLOCK_TOKENS
        seen = row.cached_tokens or (row.prompt_tokens - 1) // BLOCK_TOKENS * BLOCK_TOKENS
        starts = {"cold": 0, "cached": seen, "tail": tail_start}
        for kind, value_ms in row.times().items():
            found.append(
                Prompt(
                    tokens=row.prompt_tokens,
                    cached_tokens=starts[kind],
                    first_s=value_ms / 1e3,
                    kind=kind,
                )
            )
    return found


def chunks_of(prompt: Prompt, chunk_tokens: int) -> list[tuple[int, int]]:
    """Return the steps that a prompt alone is computed in."""
    cuts = [*range(prompt.cached_tokens, prompt.tokens, chunk_tokens), prompt.tokens]
    return list(pairwise(cuts))


def predicted_first_s(profile: Profile, prompt: Prompt, chunk_tokens: int) -> float:
    """Return the time to the first token of a prompt alone."""
    constants = {
        "intake": profile.intake_s,
        "intake_per_token": profile.intake_s_per_token,
        "floor": profile.prefill_floor_s,
        "linear": profile.prefill_s_per_token,
        "attention": profile.prefill_s_per_token_squared,
    }
    return first_s(constants, prompt, chunk_tokens)


def first_s(constants: Mapping[str, float], prompt: Prompt, chunk_tokens: int) -> float:
    """Return that time by the constants."""
    total_s = constants["intake"] + constants["intake_per_token"] * prompt.tokens
    for start, end in chunks_of(prompt, chunk_tokens):
        total_s += max(constants["floor"], constants["linear"] * (end - start))
        total_s += constants["attention"] * (end * end - start * start)
    return total_s


def predicted_token_s(profile: Profile, batch: int, context_tokens: int) -> float:
    """Return a decode step at a batch that the profile has."""
    base_s = dict(profile.decode_base_s)[batch]
    return base_s + batch * context_tokens * profile.decode_s_per_context_token


def fit_first_token(
    prompts: Sequence[Prompt], chunk_tokens: int, weights: Sequence[float] = ()
) -> dict[str, float]:
    """Return the five constants, each prompt's error counting by its weight.

    Raises `FitError` when the prompts do not tell the constants apart.
    """
    weights = weights or [1.0] * len(prompts)
    kinds = {prompt.kind for prompt in prompts}
    if len({p.tokens for p in prompts if p.kind == "cold"}) < 3 or "cached" not in kinds:
        raise FitError("needs cold prompts of three lengths or more, and cached ones")
    at_floor = {
        (start, end)
        for prompt in prompts
        for start, end in chunks_of(prompt, chunk_tokens)
        if end - start < SMALL_CHUNK_TOKENS
    }
    best: tuple[float, dict[str, float]] | None = None
    for _ in range(ROUNDS_MAX):
        rows = [_coefficients(prompt, chunk_tokens, at_floor) for prompt in prompts]
        values = non_negative(rows, [prompt.first_s for prompt in prompts], weights)
        constants = dict(zip(CONSTANTS, values, strict=True))
        error = _squares(rows, values, [prompt.first_s for prompt in prompts], weights)
        said = {
            (start, end)
            for prompt in prompts
            for start, end in chunks_of(prompt, chunk_tokens)
            if constants["linear"] * (end - start) < constants["floor"]
        }
        if said == at_floor:
            return constants
        if best is None or error < best[0]:
            best = error, constants
        at_floor = said
    assert best is not None
    return best[1]


def closest_first_token(
    prompts: Sequence[Prompt], chunk_tokens: int, promised: Sequence[bool]
) -> dict[str, float]:
    """Return constants that keep every promised prompt near, as far as any do.

    Least squares to begin with; while a promised prompt is farther off than `NEAR_SHARE`, weight is
    moved to what is far off (Lawson's algorithm). Not further: a few figures can be met exactly at
    the price of all others. Those keep their weight, so they still say what nobody else does.
    """
    weights = [1.0] * len(prompts)
    best: tuple[float, dict[str, float]] | None = None
    for _ in range(ROUNDS_MAX):
        constants = fit_first_token(prompts, chunk_tokens, weights)
        errors = [
            abs(first_s(constants, prompt, chunk_tokens) / prompt.first_s - 1) if counts else 0.0
            for prompt, counts in zip(prompts, promised, strict=True)
        ]
        worst = max(errors, default=0.0)
        if best is None or worst < best[0]:
            best = worst, constants
        if worst <= NEAR_SHARE:
            break
        weights = [
            weight * (0.5 + error / worst) if counts else weight
            for weight, error, counts in zip(weights, errors, promised, strict=True)
        ]
    assert best is not None
    return best[1]


def _coefficients(
    prompt: Prompt, chunk_tokens: int, at_floor: set[tuple[int, int]]
) -> tuple[float, ...]:
    floors = linear = attention = 0.0
    for start, end in chunks_of(prompt, chunk_tokens):
        if (start, end) in at_floor:
            floors += 1
        else:
            linear += end - start
        attention += end * end - start * start
    return 1.0, float(prompt.tokens), floors, linear, attention


def fit_decode(rows: Sequence[Decode]) -> tuple[tuple[tuple[int, float], ...], float]:
    """Return the base of each batch, and what a token of context costs.

    Raises `FitError` when no batch was measured with two contexts. A larger batch is never quicker:
    what differs that way is noise.
    """
    batches = sorted({row.batch for row in rows})
    contexts = {batch: {row.context_tokens for row in rows if row.batch == batch}
                for batch in batches}  # fmt: skip
    if len(batches) < 2 or all(len(found) < 2 for found in contexts.values()):
        raise FitError("needs decode at two batches or more, one of them with two contexts")
    coefficients = [
        (
            float(row.batch * row.context_tokens),
            *(1.0 if row.batch == batch else 0.0 for batch in batches),
        )
        for row in rows
    ]
    context_s, *bases = non_negative(coefficients, [row.token_ms / 1e3 for row in rows])
    table, least_s = [], 0.0
    for batch, base_s in zip(batches, bases, strict=True):
        least_s = max(least_s, base_s)
        table.append((batch, least_s))
    return tuple(table), context_s


def non_negative(
    rows: Sequence[Sequence[float]], measured: Sequence[float], weights: Sequence[float] = ()
) -> list[float]:
    """Return the values, none below 0, with the least (weighted) squared relative errors."""
    weights = weights or [1.0] * len(rows)
    width = len(rows[0])
    scales = [max(abs(row[column]) for row in rows) or 1.0 for column in range(width)]
    scaled = [
        [row[column] / scales[column] / goal for column in range(width)]
        for row, goal in zip(rows, measured, strict=True)
    ]
    free = list(range(width))
    while free:
        values = _solve(
            [
                [
                    sum(w * row[a] * row[b] for w, row in zip(weights, scaled, strict=True))
                    for b in free
                ]
                for a in free
            ],
            [sum(w * row[a] for w, row in zip(weights, scaled, strict=True)) for a in free],
        )
        worst = min(range(len(free)), key=lambda index: values[index])
        if values[worst] >= 0:
            found = [0.0] * width
            for column, value in zip(free, values, strict=True):
                found[column] = value / scales[column]
            return found
        del free[worst]
    return [0.0] * width


def _solve(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Return the solution by elimination; a direction that nothing tells apart gets 0."""
    size = len(right)
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    for column in range(size):
        pivot = max(range(column, size), key=lambda index: abs(rows[index][column]))
        rows[column], rows[pivot] = rows[pivot], rows[column]
        if abs(rows[column][column]) < PIVOT_MIN:
            rows[column] = [1.0 if index == column else 0.0 for index in range(size + 1)]
        for other in range(size):
            if other != column and rows[other][column]:
                factor = rows[other][column] / rows[column][column]
                rows[other] = [
                    a - factor * b for a, b in zip(rows[other], rows[column], strict=True)
                ]
    return [rows[index][size] / rows[index][index] for index in range(size)]


def _squares(
    rows: Sequence[Sequence[float]],
    values: Sequence[float],
    measured: Sequence[float],
    weights: Sequence[float],
) -> float:
    total = 0.0
    for row, goal, weight in zip(rows, measured, weights, strict=True):
        predicted = sum(a * b for a, b in zip(row, values, strict=True))
        total += weight * (predicted / goal - 1) ** 2
    return total
