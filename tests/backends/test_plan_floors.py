"""Times and sizes: worked floors, measured times, and laws that hold for every model and GPU."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.planning import floors
from backends.planning.failure import RequestError
from backends.planning.floors import Draft, Replica
from backends.planning.formats import BF16, FP8, MXFP4, NVFP4, Format, w4a16
from backends.planning.hardware import GPUS, all_reduce_s, gpu_named
from backends.planning.reading import read_shape
from backends.planning.shape import kv_bytes_per_token, weight_bytes
from tests.fakes.model_shapes import CONFIGS

SHAPES = {name: read_shape(config) for name, config in CONFIGS.items()}


def replica(model: str = "qwen3-8b", gpu: str = "h200", **values: Any) -> Replica:
    given: dict[str, Any] = {"weights": BF16, "gpus": 1, "engine": "vllm"} | values
    return Replica(shape=SHAPES[model], gpu=GPUS[gpu], **given)


@pytest.mark.parametrize(
    ("model", "gpu", "gpus", "weights", "floor_ms"),
    [
        ("llama-3.1-8b", "h100", 1, FP8, 2.4),
        ("llama-3.3-70b", "h200", 1, FP8, 14.7),
        ("llama-3.3-70b", "h200", 2, FP8, 7.4),
        ("llama-3.3-70b", "h100", 4, FP8, 5.3),
        ("llama-3.3-70b", "b200", 1, NVFP4, 5.3),
        ("qwen3-8b", "h200", 1, BF16, 3.15),
    ],
)
def test_decode_floor_is_bytes_over_aggregate_bandwidth(
    model: str, gpu: str, gpus: int, weights: Format, floor_ms: float
) -> None:
    found = floors.decode_step(replica(model, gpu, gpus=gpus, weights=weights), 1, 0)
    assert found.memory_s * 1e3 == pytest.approx(floor_ms, rel=0.02)
    assert found.floor_s == found.memory_s + found.link_s


# One NVIDIA H200, shape of Qwen3-8B, bf16, random weights, vLLM 0.26.0 and SGLang 0.5.17:
# milliseconds a token by batch, at a mean context of 256.
MEASURED_DECODE_MS = {
    "vllm": {1: 5.20, 8: 5.52, 32: 5.72, 64: 6.26, 128: 7.76},
    "sglang": {1: 5.01, 8: 5.39, 32: 5.70, 64: 6.75, 128: 8.83},
}
MEASURED_FIRST_TOKEN_MS = {
    "vllm": {512: 19.5, 2048: 56.5, 8192: 232.0, 32_000: 1250.0},
    "sglang": {512: 20.1, 2048: 52.6, 8192: 218.0, 32_000: 1216.0},
}


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_expected_decode_is_what_was_measured(engine: str) -> None:
    for batch, measured_ms in MEASURED_DECODE_MS[engine].items():
        found = floors.decode_step(replica(engine=engine), batch, 256)
        assert found.expected_s * 1e3 == pytest.approx(measured_ms, rel=0.17)


# Time per token on H200s at batch 1, as loadtest/results/floors-h200-tp124.txt has it.
MEASURED_LAYOUTS_MS = {
    "vllm": {(1, BF16): 5.19, (1, FP8): 3.48, (2, BF16): 3.56, (2, FP8): 2.83, (4, BF16): 3.22,
             (4, FP8): 3.21},
    "sglang": {(1, BF16): 5.05, (1, FP8): 3.59, (2, BF16): 4.04, (2, FP8): 4.10, (4, BF16): 3.83,
               (4, FP8): 3.66},
}  # fmt: skip


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_one_constant_serves_every_layout(engine: str) -> None:
    for (gpus, weights), measured_ms in MEASURED_LAYOUTS_MS[engine].items():
        found = floors.decode_step(replica(engine=engine, gpus=gpus, weights=weights), 1, 256)
        assert found.expected_s * 1e3 == pytest.approx(measured_ms, rel=0.2)


@pytest.mark.parametrize(("batch", "measured_ms"), [(1, 5.48), (8, 7.39), (32, 13.4)])
def test_expected_decode_at_a_long_context_is_what_was_measured(
    batch: int, measured_ms: float
) -> None:
    found = floors.decode_step(replica(), batch, 8000)
    assert found.expected_s * 1e3 == pytest.approx(measured_ms, rel=0.08)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_expected_prefill_is_what_was_measured(engine: str) -> None:
    for tokens, measured_ms in MEASURED_FIRST_TOKEN_MS[engine].items():
        found = floors.first_token_s(replica(engine=engine), tokens)
        assert found * 1e3 == pytest.approx(measured_ms, rel=0.25 if tokens == 512 else 0.05)


def test_the_cache_that_an_engine_reported_is_expected() -> None:
    # vLLM given 0.45 of an H200 reported 336,064 tokens.
    found = floors.kv_room_per_gpu(replica(memory_share=0.45))
    assert found / kv_bytes_per_token(SHAPES["qwen3-8b"], 2.0) == pytest.approx(336_064, rel=0.01)


@pytest.mark.parametrize(("batch", "measured_s"), [(1, 1 / 146), (8, 8 / 1245), (32, 32 / 4351)])
def test_a_draft_that_never_holds_costs_what_was_measured(batch: int, measured_s: float) -> None:
    # SGLang with an EAGLE-3 head of random weights, three steps, nothing ever accepted.
    draft = Draft(name="d", tokens=3, accept_length=1.0, source="")
    found = floors.token_time(replica(engine="sglang", draft=draft), batch, 256)
    assert found.expected_s == pytest.approx(measured_s, rel=0.2)


def test_what_a_draft_yields_divides_the_round() -> None:
    draft = Draft(name="d", tokens=3, accept_length=1.0, source="")
    one = floors.token_time(replica(draft=draft), 4, 1000)
    two = floors.token_time(
        replica(draft=msgspec.structs.replace(draft, accept_length=2.5)), 4, 1000
    )
    assert two.expected_s == pytest.approx(one.expected_s / 2.5)
    assert two.floor_s == pytest.approx(one.floor_s / 2.5)


def test_a_draft_of_a_sparse_model_gains_what_was_published() -> None:
    # gpt-oss-120b: 2.1 tokens a step, 25 % more tokens a second at batch 8.
    draft = Draft(name="d", tokens=3, accept_length=2.1, source="")
    plain = replica("gpt-oss-120b", weights=MXFP4)
    gained = floors.token_time(plain, 8, 2000).expected_s / (
        floors.token_time(msgspec.structs.replace(plain, draft=draft), 8, 2000).expected_s
    )
    assert gained == pytest.approx(1.25, abs=0.05)


def test_a_models_own_drafting_layer_is_of_its_kind() -> None:
    own = Draft(name="", tokens=1, accept_length=1.85, source="")
    deepseek = SHAPES["deepseek-v3"]
    with_it = replica("deepseek-v3", gpus=8, weights=deepseek.checkpoint, draft=own)
    extra = floors.weights_per_gpu(with_it) * 8 - weight_bytes(deepseek, deepseek.checkpoint)
    assert extra == pytest.approx(weight_bytes(deepseek, deepseek.checkpoint) / 61)
    without = msgspec.structs.replace(with_it, draft=None)
    assert floors.token_time(with_it, 1, 1000).expected_s < (
        floors.token_time(without, 1, 1000).expected_s
    )


def test_arithmetic_binds_beyond_the_crossover() -> None:
    dense = replica("llama-3.1-8b", "h100", weights=FP8)
    assert floors.crossover_batch(dense) == pytest.approx(295, abs=1)
    below = floors.decode_step(dense, 100, 0)
    above = floors.decode_step(dense, 600, 0)
    assert below.memory_s > below.compute_s
    assert above.compute_s > above.memory_s
    # Each of 128 experts sees a thirty-second of the tokens.
    sparse = replica("gpt-oss-120b", "h200", weights=MXFP4)
    assert floors.crossover_batch(sparse) == pytest.approx(32 * 989e12 * 0.53125 / 9.6e12, rel=0.01)


def test_narrow_weights_are_multiplied_as_the_gpu_can() -> None:
    assert GPUS["h200"].arithmetic(FP8) == "fp8"
    assert GPUS["a100"].arithmetic(FP8) == "bf16"
    assert GPUS["h200"].arithmetic(NVFP4) == "bf16"
    assert GPUS["b200"].arithmetic(NVFP4) == "fp4"
    assert GPUS["b200"].arithmetic(MXFP4) == "fp8"
    assert GPUS["b200"].arithmetic(w4a16("awq", 128)) == "bf16"


def test_groups_of_whole_attention_hold_more_sequences_but_shorter_ones() -> None:
    deepseek = SHAPES["deepseek-v3"]
    cut = replica("deepseek-v3", gpus=8, weights=deepseek.checkpoint)
    whole = msgspec.structs.replace(cut, attention_groups=8)
    assert floors.batch_max(whole, 4096) > 3 * floors.batch_max(cut, 4096)
    assert floors.weights_per_gpu(whole) > floors.weights_per_gpu(cut)
    assert floors.decode_step(whole, 1, 4096).memory_s > floors.decode_step(cut, 1, 4096).memory_s
    one_gpu_holds = floors.kv_room_per_gpu(whole) / kv_bytes_per_token(deepseek, 2.0)
    assert floors.context_max(whole) == min(deepseek.context_tokens_max, int(one_gpu_holds))


def test_links_cost_nothing_alone_and_more_the_further() -> None:
    h200, l40s = GPUS["h200"], GPUS["l40s"]
    assert all_reduce_s(h200, 1, 1e6) == 0.0
    times = [all_reduce_s(h200, count, 8192) for count in (2, 4, 8)]
    assert times == sorted(times)
    assert all_reduce_s(l40s, 2, 8192) > all_reduce_s(h200, 2, 8192)
    assert all_reduce_s(h200, 8, 1e9) > 1e9 / h200.link_bytes_per_s


def test_every_gpu_says_where_its_figures_are_from() -> None:
    assert list(GPUS) == ["a100", "l40s", "h100", "h200", "b200", "gb200", "b300"]
    for name, gpu in GPUS.items():
        assert gpu.name == name
        assert len(gpu.source) > 20
        assert gpu.flops["bf16"] < gpu.flops.get("fp8", gpu.flops.get("int8", 0))
    assert gpu_named("H200") is GPUS["h200"]
    with pytest.raises(RequestError, match="did you mean h200"):
        gpu_named("h2000")
    with pytest.raises(RequestError, match="known are a100"):
        gpu_named("tpu")


MODELS = st.sampled_from(sorted(SHAPES))
TYPES = st.sampled_from(sorted(GPUS))
FORMATS = st.sampled_from((BF16, FP8, NVFP4, MXFP4))
ANY = {"model": MODELS, "gpu": TYPES, "weights": FORMATS, "gpus": st.sampled_from((1, 2, 4, 8))}


@given(**ANY, batch=st.integers(1, 2000), context=st.integers(0, 100_000))
def test_no_expectation_beats_the_floor(
    model: str, gpu: str, weights: Format, gpus: int, batch: int, context: int
) -> None:
    one = replica(model, gpu, weights=weights, gpus=gpus)
    step = floors.decode_step(one, batch, context)
    assert step.expected_s > step.floor_s >= step.memory_s
    longer = floors.decode_step(one, batch + 1, context + 1)
    assert longer.floor_s >= step.floor_s
    floor_s, expected_s = floors.prefill(one, context + 1)
    assert expected_s > floor_s > 0


@given(**ANY)
def test_more_gpus_never_hold_more_bytes_each(
    model: str, gpu: str, weights: Format, gpus: int
) -> None:
    one = replica(model, gpu, weights=weights, gpus=gpus)
    wider = msgspec.structs.replace(one, gpus=2 * gpus)
    assert floors.weights_per_gpu(wider) < floors.weights_per_gpu(one)
    assert floors.sequence_bytes_per_gpu(wider, 1000) <= floors.sequence_bytes_per_gpu(one, 1000)
    assert floors.batch_max(wider, 1000) >= floors.batch_max(one, 1000)
    assert floors.context_max(wider) >= floors.context_max(one)


@given(**ANY, context=st.integers(1, 100_000), kv_value_bytes=st.sampled_from((1.0, 2.0)))
def test_what_is_said_to_fit_fits(
    model: str, gpu: str, weights: Format, gpus: int, context: int, kv_value_bytes: float
) -> None:
    one = replica(model, gpu, weights=weights, gpus=gpus, kv_value_bytes=kv_value_bytes)
    memory = one.gpu.memory_bytes * one.memory_share
    fixed = floors.weights_per_gpu(one) + floors.reserve_per_gpu(one)
    batch = floors.batch_max(one, context)
    each = floors.sequence_bytes_per_gpu(one, context)
    if batch:
        assert fixed + batch * each <= memory
    assert fixed + (batch + 1) * each > memory
    longest = floors.context_max(one)
    if longest:
        assert fixed + floors.sequence_bytes_per_gpu(one, longest) <= memory
    if 0 < longest < one.shape.context_tokens_max:
        assert fixed + floors.sequence_bytes_per_gpu(one, longest + 1) > memory
