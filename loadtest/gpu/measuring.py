"""Which measurements a whole run of an engine has, and in which order they are given up.

The times to first token come first, then decode with short contexts, then with long ones, each from
small to large: when the time is up, what is missing is named, and what is there can be used.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from loadtest.client import Client
from loadtest.gpu.probing import Probe, fits, kv_pool_tokens, model_name
from loadtest.gpu.records import Decode, FirstToken
from loadtest.run import RunError

SHORT_CONTEXT_TOKENS = 128
LONG_CONTEXT_TOKENS = 8_000
WARMUP_PROMPTS_TOKENS = (256, 2_048, 16_384)


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What is measured."""

    prompts: tuple[int, ...] = (128, 512, 1024, 2048, 4096, 8192, 16_384, 32_000)
    repeats: int = 5
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    long_batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    decode_repeats: int = 3
    answer_tokens: int = 192
    limit_s: float = 100.0


QUICK = Plan(
    prompts=(512, 2048),
    repeats=2,
    batches=(1, 2),
    long_batches=(),
    decode_repeats=1,
    answer_tokens=24,
    limit_s=20.0,
)


class Measured(msgspec.Struct, kw_only=True):
    """What has come of a plan."""

    kv_cache_tokens: int = 0
    first_token: list[FirstToken] = []
    decode: list[Decode] = []
    left_out: list[str] = []


async def measure(
    client: Client, plan: Plan, seed: int, told: Callable[[str], None], model: str = ""
) -> Measured:
    """Carry out a plan on an engine that nobody else uses."""
    deadline_s = time.monotonic() + plan.limit_s
    probe = Probe(client, model or await model_name(client), seed)
    measured = Measured(kv_cache_tokens=await kv_pool_tokens(client))
    for tokens in WARMUP_PROMPTS_TOKENS:
        if tokens <= max(plan.prompts, default=0):
            await probe.ask(probe.prompt(tokens), 4)
    for tokens in plan.prompts:
        if _over(deadline_s, measured, f"time to first token of {tokens:,} tokens"):
            continue
        try:
            row = await probe.first_token(tokens, plan.repeats)
        except RunError as error:
            measured.left_out.append(f"time to first token: {error}")
            continue
        measured.first_token.append(row)
        shown = ", ".join(f"{kind} {value:.1f}" for kind, value in row.times().items())
        told(f"{tokens:,} tokens: first token after {shown} ms")
    await _decodes(probe, plan, measured, deadline_s, told)
    return measured


async def _decodes(
    probe: Probe,
    plan: Plan,
    measured: Measured,
    deadline_s: float,
    told: Callable[[str], None],
) -> None:
    for context, batches in (
        (SHORT_CONTEXT_TOKENS, plan.batches),
        (LONG_CONTEXT_TOKENS, plan.long_batches),
    ):
        prompts: list[list[int]] = []
        for batch in batches:
            what = f"decode at batch {batch}, context {context:,}"
            answer_tokens = answer_length(plan.answer_tokens, batch, context)
            if not fits(batch, context + answer_tokens, measured.kv_cache_tokens):
                measured.left_out.append(f"{what}: more than the KV cache holds")
                continue
            if _over(deadline_s, measured, what):
                continue
            prompts += [probe.prompt(context) for _ in range(batch - len(prompts))]
            try:
                row = await probe.decode(prompts, answer_tokens, plan.decode_repeats)
            except RunError as error:
                measured.left_out.append(f"{what}: {error}")
                continue
            measured.decode.append(row)
            told(f"batch {batch}, context {row.context_tokens:,}: {row.token_ms:.2f} ms a token")


def answer_length(tokens: int, batch: int, context_tokens: int) -> int:
    """Return how long answers must be for a batch to be under way together for about `tokens`.

    One thread takes in prompts one after another, about 1.2 us a token and some 0.5 ms each in
    vLLM 0.26, while those already in get a token every 5 to 20 ms.
    """
    intake_s = batch * (0.5e-3 + context_tokens * 1.2e-6)
    return tokens + round(intake_s / 5e-3)


def _over(deadline_s: float, measured: Measured, what: str) -> bool:
    if time.monotonic() < deadline_s:
        return False
    measured.left_out.append(f"{what}: the time was up")
    return True
