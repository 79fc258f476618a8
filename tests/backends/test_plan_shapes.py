"""From `config.json` to parameters, bytes and cache: counted sizes against published ones."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.planning.failure import PlanError, RequestError
from backends.planning.formats import BF16, FP8, INT8, NVFP4, checkpoint_format, w4a16, w8a16
from backends.planning.reading import read_shape
from backends.planning.shape import (
    NO_CACHE,
    experts_hit,
    kv_bytes,
    kv_bytes_per_token,
    kv_copies,
    step_bytes,
    weight_bytes,
)
from tests.fakes.model_shapes import CONFIGS, PARAMETERS


def config(name: str, **changes: Any) -> dict[str, Any]:
    return {**copy.deepcopy(CONFIGS[name]), **changes}


@pytest.mark.parametrize("name", PARAMETERS)
def test_counted_parameters_are_the_published_ones(name: str) -> None:
    shape = read_shape(config(name))
    total, active = PARAMETERS[name]
    assert shape.parameters / 1e9 == pytest.approx(total, rel=0.005)
    if shape.moe:
        # Some count the embedding as active, some do not; the published lie between.
        read = shape.parameters_active / 1e9
        assert read * 0.99 <= active <= (read + shape.embedding_parameters / 1e9) * 1.01


@pytest.mark.parametrize(
    ("name", "expected_bytes"),
    [
        ("llama-3.1-8b", 131_072),
        ("llama-3.3-70b", 327_680),
        ("qwen3-8b", 147_456),
        ("qwen3-235b-a22b", 192_512),
        ("gpt-oss-20b", 49_152),
        ("gpt-oss-120b", 73_728),
        ("deepseek-v3", 70_272),
    ],
)
def test_cache_of_a_token(name: str, expected_bytes: int) -> None:
    assert kv_bytes_per_token(read_shape(config(name)), 2.0) == expected_bytes


def test_windowed_layers_stop_growing() -> None:
    shape = read_shape(config("gpt-oss-20b"))
    assert shape.windows[:3] == (128, 0, 128)
    token_of_a_layer = 49_152 / 24
    assert kv_bytes(shape, 1128, 2.0) == 12 * (128 + 1128) * token_of_a_layer
    chunked = read_shape(config("llama-4-maverick"))
    assert chunked.windows[:4] == (8192, 8192, 8192, 0)
    gemma = read_shape(config("gemma-3-27b"))
    assert [index for index, window in enumerate(gemma.windows[:12]) if not window] == [5, 11]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"sliding_window": 4096, "use_sliding_window": False}, (0, 0, 0, 0)),
        (
            {"sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 3},
            (0, 0, 0, 4096),
        ),
        (
            {"sliding_window": 4096, "model_type": "mistral", "use_sliding_window": None},
            (4096,) * 4,
        ),
        ({"full_attention_interval": 2}, (NO_CACHE, 0, NO_CACHE, 0)),
        (
            {
                "sliding_window": 64,
                "layer_types": ["full_attention", "sliding_attention", "linear_attention", "x"],
            },
            (0, 64, NO_CACHE, 0),
        ),
    ],
)
def test_what_each_layer_sees(changes: dict[str, Any], expected: tuple[int, ...]) -> None:
    assert read_shape(config("qwen3-8b", num_hidden_layers=4, **changes)).windows == expected


def test_a_tied_embedding_is_read_as_the_head() -> None:
    tied = read_shape(config("qwen3-0.6b"))
    untied = read_shape(config("qwen3-0.6b", tie_word_embeddings=False))
    assert untied.parameters - tied.parameters == tied.embedding_parameters
    assert untied.parameters_active == tied.parameters_active
    assert step_bytes(untied, BF16, 1) == step_bytes(tied, BF16, 1)


def test_every_family_names_its_experts_differently() -> None:
    found = {
        name: (shape.experts, shape.experts_active, shape.expert_layers)
        for name in CONFIGS
        if (shape := read_shape(config(name))).moe
    }
    assert found == {
        "qwen3-235b-a22b": (128, 8, 94),
        "gpt-oss-20b": (32, 4, 24),
        "gpt-oss-120b": (128, 4, 36),
        "mixtral-8x7b": (8, 2, 32),
        "deepseek-v3": (256, 8, 58),  # the first three layers are dense
        "kimi-k2": (384, 8, 60),
        "qwen3-30b-a3b": (128, 8, 48),
        "llama-4-maverick": (128, 1, 24),  # every other layer is dense
    }
    sparse = read_shape(config("qwen3-235b-a22b", decoder_sparse_step=2, mlp_only_layers=[1]))
    assert sparse.expert_layers == 46
    assert read_shape(config("qwen3-235b-a22b", moe_layers=[3, 5])).expert_layers == 2


@given(tokens=st.integers(1, 5000), more=st.integers(0, 5000))
def test_experts_are_hit_as_often_as_independent_choices_hit_them(tokens: int, more: int) -> None:
    shape = read_shape(config("deepseek-v3"))
    assert experts_hit(shape, 1) == pytest.approx(8)
    assert experts_hit(shape, tokens) <= experts_hit(shape, tokens + more) <= 256
    assert experts_hit(shape, tokens) <= 8 * tokens + 1e-6


@pytest.mark.parametrize(
    ("quantization", "name", "bytes_each"),
    [
        ({"quant_method": "fp8"}, "fp8", 1.0),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8", 1.000244140625),
        ({"quant_method": "mxfp4"}, "mxfp4", 0.53125),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "fp8", 1.0),
        ({"quant_method": "modelopt", "quantization": {"quant_algo": "NVFP4"}}, "nvfp4", 0.5625),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, "awq", 0.51953125),
        ({"quant_method": "gptq", "bits": 4, "group_size": -1}, "gptq", 0.5),
        ({"quant_method": "gptq", "bits": 8, "group_size": 128}, "gptq", 1.015625),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes", 0.5390625),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes", 1.015625),
    ],
)
def test_formats_of_checkpoints(quantization: dict[str, Any], name: str, bytes_each: float) -> None:
    stored, doubt = checkpoint_format(quantization)
    assert stored is not None
    assert (stored.name, stored.bytes_per_parameter, doubt) == (name, bytes_each, "")


@pytest.mark.parametrize(
    ("weights", "activations", "expected"),
    [
        ({"num_bits": 8, "type": "float"}, None, FP8),
        ({"num_bits": 4, "type": "float"}, None, NVFP4),
        ({"num_bits": 8, "type": "int"}, {"num_bits": 8}, INT8),
        ({"num_bits": 8, "type": "int"}, None, w8a16("compressed-tensors")),
        ({"num_bits": 4, "group_size": 32}, None, w4a16("compressed-tensors", 32)),
    ],
)
def test_formats_of_compressed_tensors(
    weights: dict[str, Any], activations: dict[str, Any] | None, expected: object
) -> None:
    group = {"weights": weights, "input_activations": activations}
    stored = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    assert checkpoint_format(stored) == (expected, "")


def test_a_format_that_is_not_known_is_told_and_counted_as_16_bits() -> None:
    for quantization in (
        {"quant_method": "quip", "bits": 2},
        {"quant_method": "compressed-tensors"},
        {"quant_method": "awq", "bits": 3},
        {"quant_method": "modelopt", "quant_algo": "W2"},
    ):
        shape = read_shape(config("llama-3.1-8b", quantization_config=quantization))
        assert shape.checkpoint is BF16
        assert "16 bits" in shape.assumptions[0]


def test_formats_cover_what_they_cover() -> None:
    dense = read_shape(config("llama-3.1-8b"))
    kept = 2 * (dense.embedding_parameters + dense.head_parameters)
    assert weight_bytes(dense, BF16) == 2 * dense.parameters
    assert weight_bytes(dense, FP8) == kept + dense.parameters - kept / 2
    oss = read_shape(config("gpt-oss-120b"))
    assert weight_bytes(oss, oss.checkpoint) == pytest.approx(
        2 * (oss.parameters - oss.expert_total) + 0.53125 * oss.expert_total
    )


def test_the_checkpoint_corrects_what_the_file_cannot_tell() -> None:
    counted = weight_bytes(read_shape(config("gemma-3-27b")), BF16)
    with_tower = read_shape(config("gemma-3-27b"), int(counted + 0.9e9))
    assert with_tower.other_bytes == pytest.approx(0.9e9)
    assert weight_bytes(with_tower, BF16) == pytest.approx(counted + 0.9e9)
    assert not with_tower.assumptions
    smaller = read_shape(config("llama-3.1-8b"), 8_000_000_000)
    assert "the larger is planned with" in smaller.assumptions[0]
    drafting = read_shape(config("deepseek-v3"), 690_000_000_000)
    assert drafting.other_bytes == 0  # its own drafting layer is no vision tower


def test_what_was_assumed_is_told() -> None:
    strange = config("llama-3.1-8b", model_type="newmodel", torch_dtype="float32")
    strange.pop("max_position_embeddings")
    told = read_shape(strange).assumptions
    assert [text.split()[0] for text in told] == ["the", "model_type", "the"]
    assert "'newmodel'" in told[1]
    assert read_shape(strange).context_tokens_max == 32_768
    mixed = config("qwen3-8b", num_hidden_layers=2)
    mixed["layer_types"] = ["linear_attention", "full_attention"]
    assert "linear-attention" in read_shape(mixed).assumptions[0]
    assert "two matrices" in read_shape(config("llama-3.1-8b", model_type="phi")).assumptions[0]


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "num_attention_heads"])
def test_a_missing_size_is_named(key: str) -> None:
    lacking = config("llama-3.1-8b")
    lacking.pop(key)
    with pytest.raises(RequestError, match=key):
        read_shape(lacking)


def test_what_cannot_be_sized_is_refused() -> None:
    with pytest.raises(PlanError, match="recurrent"):
        read_shape({"model_type": "mamba2"})
    with pytest.raises(RequestError, match="negative"):
        read_shape(config("llama-3.1-8b", hidden_size=-1))
    with pytest.raises(RequestError, match="64 heads do not fit a hidden_size of 32"):
        read_shape(config("llama-3.3-70b", hidden_size=32))
    lacking = config("mixtral-8x7b")
    lacking.pop("num_experts_per_tok")
    with pytest.raises(RequestError, match="num_experts_per_tok"):
        read_shape(lacking)
    with pytest.raises(RequestError, match="100000000 layers are more"):
        read_shape(config("llama-3.1-8b", num_hidden_layers=10**8))
    with pytest.raises(RequestError, match="vocab_size is larger than any"):
        read_shape(config("llama-3.1-8b", vocab_size=10**400))
    states = config("qwen3-8b", num_hidden_layers=2, layer_types=["linear_attention"] * 2)
    with pytest.raises(RequestError, match="no layer keeps keys and values"):
        read_shape(states)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama-3.1-8b", {"architectures": 5}),
        ("llama-3.1-8b", {"architectures": [5]}),
        ("qwen3-30b-a3b", {"mlp_only_layers": 5}),
        ("llama-3.1-8b", {"quantization_config": {"quant_method": "gptq", "group_size": "x"}}),
        ("llama-3.1-8b", {"quantization_config": {"quant_method": "awq", "group_size": None}}),
        (
            "llama-3.1-8b",
            {
                "quantization_config": {
                    "quant_method": "compressed-tensors",
                    "config_groups": {"g": 1},
                }
            },
        ),
    ],
)
def test_a_value_of_another_kind_is_as_one_that_is_not_told(
    name: str, changes: dict[str, Any]
) -> None:
    assert read_shape(config(name, **changes)).parameters == read_shape(config(name)).parameters


def test_heads_are_split_until_there_are_none_left() -> None:
    dense, latent = read_shape(config("llama-3.3-70b")), read_shape(config("deepseek-v3"))
    assert [kv_copies(dense, n) for n in (1, 8, 16)] == [1, 1, 2]
    assert [kv_copies(latent, n) for n in (1, 8)] == [1, 8]


_SIZE = st.integers(1, 200_000)


@given(
    st.dictionaries(
        st.sampled_from(
            (
                *("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"),
                *("num_key_value_heads", "intermediate_size", "head_dim", "num_local_experts"),
                *("num_experts_per_tok", "sliding_window", "kv_lora_rank", "model_type"),
                *("layer_types", "quantization_config", "text_config", "tie_word_embeddings"),
                *("architectures", "mlp_only_layers", "moe_layers"),
            )
        ),
        st.one_of(
            st.none(), st.booleans(), _SIZE, st.text(max_size=5), st.lists(st.text(max_size=5))
        ),
    )
)
def test_any_file_is_read_or_refused_by_name(values: dict[str, Any]) -> None:
    if isinstance(values.get("num_hidden_layers"), int):
        values["num_hidden_layers"] %= 200
    try:
        shape = read_shape(values)
    except PlanError:
        return
    assert shape.parameters > 0
    assert len(shape.windows) == shape.layers
