"""How long the work of one engine step takes, and how much KV cache a card holds.

One step is one pass over the weights for everything that is scheduled: prefill chunks and one token
of each decoding sequence share it (a mixed batch, as chunked prefill makes them). Its duration is

    max(decode_base(batch), prefill_floor if any prefill, linear) + attention + context / bandwidth

where `linear` is what all its tokens cost by themselves. The maximum is right because a small batch
waits for the weights and a large one for the arithmetic; the measured growth of a decode step,
20 us a sequence, is the 21.5 us a prompt token costs. Attention comes on top: few new tokens after
a long cached prefix still wait for the weights, and then read that prefix (SGLang with 32,000
tokens cached: 23 ms with one block new, 32 with 200 tokens). The attention of a chunk from position
a to b is q * (b^2 - a^2): it telescopes, so the chunks of a prompt cost what the whole prompt
costs, however they are cut and whatever prefix was cached.

In front of the steps stands the intake (HTTP, tokenizer, hashing): a latency that requests wait
side by side, and a part per prompt token that one thread does for one request after the other.
With it the measured times of prompts that were wholly cached come out as well. Here the engines
differ most: vLLM hashes a prompt's tokens anew for each request, 1 us a token, SGLang walks a tree.

Measured profiles are data, one file of `measured/` each, as `python -m loadtest gpu fit` writes
them from a recorded run; derived ones are estimates from data sheets.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from importlib import resources
from typing import NamedTuple

import msgspec


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """One model on one kind of GPU. Durations are seconds of the simulated machine."""

    name: str
    source: str = ""  # which run it was fitted to; empty: nobody measured it
    intake_s: float  # latency from the request to the waiting queue
    intake_s_per_token: float  # serial work on the prompt before that
    prefill_s_per_token: float
    prefill_s_per_token_squared: float
    prefill_floor_s: float  # a step with any prefill takes at least this
    decode_base_s: tuple[tuple[int, float], ...]  # batch → step without reading any context
    decode_s_per_context_token: float
    kv_cache_tokens: int
    max_model_len: int = 40_960
    sleep_first_s: float = 0.0  # weights to host memory that the machine has not touched yet
    sleep_s: float = 0.0
    wake_s: float = 0.0
    discard_s: float = 0.0  # sleep that keeps nothing
    remap_s: float = 0.0  # wake after that

    def intake_work_s(self, prompt_tokens: int) -> float:
        """Return the serial part of the intake."""
        return self.intake_s_per_token * prompt_tokens

    def prefill_s(self, start_tokens: int, end_tokens: int) -> float:
        """Return the compute of the chunk [start, end): what all chunks of a prompt sum up to."""
        squares = end_tokens * end_tokens - start_tokens * start_tokens
        return (
            self.prefill_s_per_token * (end_tokens - start_tokens)
            + self.prefill_s_per_token_squared * squares
        )

    def decode_floor_s(self, batch: int) -> float:
        """Return the interpolated base of a decode step; the table's last slope goes on."""
        table = self.decode_base_s
        index = bisect_right(table, batch, key=lambda row: row[0])
        high = min(max(index, 1), len(table) - 1)
        (batch_a, base_a), (batch_b, base_b) = table[high - 1], table[high]
        return base_a + (base_b - base_a) * max(0, batch - batch_a) / (batch_b - batch_a)

    def step_s(self, decodes: int, context_tokens: int, chunks: Iterable[tuple[int, int]]) -> float:
        """Return the duration of one step: `decodes` sequences that read `context_tokens`
        between them, and the prefill `chunks` as (start, end) positions."""
        compute_s = self.prefill_s_per_token * decodes
        floor_s = self.decode_floor_s(decodes) if decodes else 0.0
        attention_s = 0.0
        for start_tokens, end_tokens in chunks:
            linear_s = self.prefill_s_per_token * (end_tokens - start_tokens)
            compute_s += linear_s
            attention_s += self.prefill_s(start_tokens, end_tokens) - linear_s
            floor_s = max(floor_s, self.prefill_floor_s)
        context_s = context_tokens * self.decode_s_per_context_token
        return max(floor_s, compute_s) + attention_s + context_s


class _Model(NamedTuple):
    parameters: float
    bytes_per_parameter: float
    kv_bytes_per_token: float


class _Card(NamedTuple):
    """Data-sheet figures of the whole tensor-parallel group."""

    memory_bytes: float
    bandwidth_bytes_per_s: float
    flops: float


def _derived(name: str, model: _Model, card: _Card) -> Profile:
    """Estimate a profile from data sheets; nobody measured it.

    The efficiencies are those that the measured profile shows against its own data sheet: 3.4 of
    5.2 ms of a step go to the weights, 0.77 of the dense FLOPS are reached in large chunks.
    Attention, intake and launch costs are taken over from it.
    """
    weight_bytes = model.parameters * model.bytes_per_parameter
    base_s = weight_bytes / card.bandwidth_bytes_per_s + 1.8e-3
    token_s = 2 * model.parameters / (card.flops * 0.77)
    pool_bytes = card.memory_bytes * 0.92 - weight_bytes - 4e9
    return Profile(
        name=name,
        intake_s=8e-3,
        intake_s_per_token=1.2e-6,
        prefill_s_per_token=token_s,
        prefill_s_per_token_squared=5.05e-10 * token_s / 21.5e-6,
        prefill_floor_s=base_s + 2.1e-3,
        decode_base_s=((1, base_s), (32, base_s * 1.05), (128, base_s * 1.3)),
        decode_s_per_context_token=model.kv_bytes_per_token / card.bandwidth_bytes_per_s,
        kv_cache_tokens=int(pool_bytes / model.kv_bytes_per_token),
        sleep_first_s=weight_bytes / 1.5e9,
        sleep_s=weight_bytes / 45e9,
        wake_s=weight_bytes / 35e9,
        discard_s=0.05,
        remap_s=0.09,
    )


def parse_profile(octets: bytes) -> Profile:
    """Return the profile of a file. Raises `ValueError` when that is none."""
    profile = msgspec.json.decode(octets, type=Profile)
    batches = [batch for batch, _ in profile.decode_base_s]
    if len(batches) < 2 or batches != sorted(set(batches)):
        raise ValueError("decode_base_s: expected two or more batches, each larger than the last")
    return profile


def _measured() -> list[Profile]:
    """Return the profiles that are shipped as data."""
    folder = resources.files("backends.simulator") / "measured"
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".json")), key=str)
    return [parse_profile(file.read_bytes()) for file in files]


_PROFILES = (
    # H100 SXM: 80 GB, 3.35 TB/s, 989 dense bf16 TFLOPS; Qwen3-8B, 147,456 bytes of KV a token.
    _derived("h100-8b", _Model(8.2e9, 2, 147_456), _Card(80e9, 3.35e12, 989e12)),
    # Two H200: 2 x (141 GB, 4.8 TB/s, 1,979 FP8 TFLOPS); Llama-3.3-70B in FP8, 327,680 bytes.
    _derived("h200-70b-fp8-tp2", _Model(70.6e9, 1, 327_680), _Card(282e9, 9.6e12, 3958e12)),
    # One B200: 180 GB usable, 8 TB/s, 9,000 FP4 TFLOPS; the same model in NVFP4.
    _derived("b200-70b-nvfp4", _Model(70.6e9, 0.5625, 327_680), _Card(180e9, 8e12, 9000e12)),
    # For tests: everything takes next to no time, in the same proportions, and the pool is small.
    Profile(
        name="fast",
        intake_s=0.0,
        intake_s_per_token=0.0,
        prefill_s_per_token=1e-7,
        prefill_s_per_token_squared=1e-13,
        prefill_floor_s=1e-3,
        decode_base_s=((1, 1e-3), (128, 1.5e-3)),
        decode_s_per_context_token=1e-10,
        kv_cache_tokens=65_536,
        max_model_len=32_768,
    ),
    *_measured(),  # last: what was measured replaces an estimate of the same name
)

PROFILES: dict[str, Profile] = {profile.name: profile for profile in _PROFILES}
