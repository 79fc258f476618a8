"""`config.json` to a shape: the names that model families give to the same sizes.

What is not told is assumed as most families have it, and what was assumed is told with the plan.
What cannot be assumed (layers, widths, heads) is an error that names the missing key.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backends.planning.failure import RequestError
from backends.planning.formats import BF16, Format, checkpoint_format
from backends.planning.shape import NO_CACHE, ModelShape, weight_bytes

# Families whose counts were held against their published sizes, or that name everything they have.
KNOWN = frozenset(
    (
        *("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gpt_oss"),
        *("deepseek_v2", "deepseek_v3", "kimi_k2", "gemma2", "gemma3_text", "glm4_moe"),
        *("llama4_text", "phi3", "minimax_m2", "granite"),
    )
)
# Two matrices in the feed-forward part instead of three.
_UNGATED = frozenset(("gpt_neox", "starcoder2", "phi", "nemotron", "opt", "falcon"))
_RECURRENT = frozenset(("mamba", "mamba2", "rwkv", "jamba", "nemotron_h", "falcon_h1", "zamba2"))
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
LAYERS_MAX = 1024  # each is sized by itself; the deepest known models have some 130
SIZE_MAX = 1 << 40  # beyond it a number is no size, and its products are no floats
_EXPERTS_ACTIVE = ("num_experts_per_tok", "experts_per_token", "num_experts_per_token", "moe_k")


class _Sizes:
    """The file, asked by any of several names."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.kind = str(config.get("model_type", ""))

    def maybe(self, *names: str) -> int:
        """Return the first of `names` that holds a number, else 0."""
        for name in names:
            value = self.config.get(name)
            if isinstance(value, int) and not isinstance(value, bool):
                if value < 0:
                    raise RequestError(f"config.json: {name} is {value}; a size cannot be negative")
                if value > SIZE_MAX:
                    raise RequestError(f"config.json: {name} is larger than any model's")
                return value
        return 0

    def listed(self, name: str) -> list[Any]:
        """Return the list of that name; empty where there is none."""
        value = self.config.get(name)
        return value if isinstance(value, list) else []

    def need(self, *names: str) -> int:
        value = self.maybe(*names)
        if not value:
            raise RequestError(
                f"config.json has no {' or '.join(names)}; is it the configuration of a language "
                "model in the Hugging Face form?"
            )
        return value


def read_shape(config: Mapping[str, Any], stored_bytes: int = 0) -> ModelShape:
    """Return the shape that `config` tells; `stored_bytes` is the checkpoint's size, 0 if unknown.

    Raises `RequestError`.
    """
    inner = config.get("text_config") or config.get("llm_config")
    nested = isinstance(inner, Mapping)
    sizes = _Sizes(dict(inner) if isinstance(inner, Mapping) else dict(config))
    if sizes.kind in _RECURRENT:
        raise RequestError(
            f"model_type {sizes.kind}: models with recurrent layers keep a state that this planner "
            "does not size; start one replica and read the engine's own report"
        )
    checkpoint, notes = _checkpoint(config, inner if nested else {})
    notes += _notes(sizes, nested=nested, stored_bytes=stored_bytes)
    shape = _shape(config, sizes, checkpoint, notes)
    return _corrected(shape, stored_bytes)


def _shape(
    config: Mapping[str, Any], sizes: _Sizes, checkpoint: Format, notes: tuple[str, ...]
) -> ModelShape:
    layers = sizes.need("num_hidden_layers", "n_layer")
    if layers > LAYERS_MAX:
        raise RequestError(f"config.json: {layers} layers are more than any model's ({LAYERS_MAX})")
    hidden = sizes.need("hidden_size", "n_embd")
    vocabulary = sizes.need("vocab_size")
    heads = sizes.need("num_attention_heads", "n_head")
    head_dim = _head_dim(sizes) or hidden // heads
    if not head_dim:
        raise RequestError(f"config.json: {heads} heads do not fit a hidden_size of {hidden}")
    kv_heads = sizes.maybe("num_key_value_heads") or heads
    tied = sizes.config.get("tie_word_embeddings", config.get("tie_word_embeddings"))
    if tied is None:
        tied = sizes.kind.startswith("gemma")
    windows = _windows(sizes, layers)
    if all(window == NO_CACHE for window in windows):
        raise RequestError(
            "config.json: no layer keeps keys and values, and states are not sized by this "
            "planner; start one replica and read the engine's own report"
        )
    routed_layers = _routed_layers(sizes, layers)
    experts = sizes.maybe(*_EXPERTS) if routed_layers else 0
    matrices = 2 if sizes.kind in _UNGATED else 3
    width = sizes.maybe("moe_intermediate_size") or sizes.maybe("intermediate_size")
    dense_width = sizes.maybe("intermediate_size_mlp", "intermediate_size", "n_inner") or 4 * hidden
    shared = _shared_width(sizes, width)
    mlp = matrices * hidden * ((layers - routed_layers) * dense_width + routed_layers * shared)
    return ModelShape(
        architecture=_architecture(config, sizes),
        layers=layers,
        hidden=hidden,
        vocabulary=vocabulary,
        query_heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        latent_dim=_latent(sizes),
        windows=windows,
        embedding_parameters=vocabulary * hidden,
        head_parameters=0 if tied else vocabulary * hidden,
        attention_parameters=layers * _attention(sizes, hidden, heads, kv_heads, head_dim),
        mlp_parameters=mlp,
        router_parameters=routed_layers * hidden * experts,
        expert_parameters=matrices * hidden * width if experts else 0,
        expert_layers=routed_layers if experts else 0,
        experts=experts,
        experts_active=min(sizes.need(*_EXPERTS_ACTIVE), experts) if experts else 0,
        shards=_shards(routed_layers, layers, dense_width, width),
        context_tokens_max=sizes.maybe("max_position_embeddings", "n_positions") or 32_768,
        drafting_layers=sizes.maybe("num_nextn_predict_layers"),
        checkpoint=checkpoint,
        assumptions=notes,
    )


def _architecture(config: Mapping[str, Any], sizes: _Sizes) -> str:
    names = config.get("architectures")
    first = names[0] if isinstance(names, list) and names else None
    return first if isinstance(first, str) else sizes.kind or "unknown"


def _shards(routed_layers: int, layers: int, dense_width: int, width: int) -> tuple[int, ...]:
    dense = (dense_width,) if routed_layers < layers else ()
    return dense + ((width,) if routed_layers else ())


def _latent(sizes: _Sizes) -> int:
    rank = sizes.maybe("kv_lora_rank")
    return rank + sizes.need("qk_rope_head_dim") if rank else 0


def _head_dim(sizes: _Sizes) -> int:
    """Return a head's width; under MLA, where keys are wider than values, the mean of both."""
    if not sizes.maybe("kv_lora_rank"):
        return sizes.maybe("head_dim")
    key = sizes.need("qk_nope_head_dim") + sizes.need("qk_rope_head_dim")
    return (key + sizes.need("v_head_dim")) // 2


def _attention(sizes: _Sizes, hidden: int, heads: int, kv_heads: int, head_dim: int) -> int:
    """Return the parameters of one layer's attention."""
    latent = sizes.maybe("kv_lora_rank")
    if not latent:
        inner, kv = heads * head_dim, 2 * kv_heads * head_dim
        biased = sizes.config.get("attention_bias") or sizes.kind in ("qwen2", "qwen2_moe")
        return hidden * (2 * inner + kv) + (inner + kv if biased else 0)
    rope, plain = sizes.need("qk_rope_head_dim"), sizes.need("qk_nope_head_dim")
    value, rank = sizes.need("v_head_dim"), sizes.maybe("q_lora_rank")
    query_width = heads * (plain + rope)
    query = rank * (hidden + query_width) if rank else hidden * query_width
    expanded = latent * heads * (plain + value)
    return query + hidden * (latent + rope) + expanded + heads * value * hidden


def _routed_layers(sizes: _Sizes, layers: int) -> int:
    """Return how many layers have routed experts."""
    if sizes.maybe(*_EXPERTS) < 2:
        return 0
    dense_first = sizes.maybe("first_k_dense_replace")
    step = sizes.maybe("decoder_sparse_step", "moe_layer_freq", "interleave_moe_layer_step") or 1
    listed = sizes.listed("moe_layers")
    if listed:
        return min(len(listed), layers)
    only_dense = sizes.listed("mlp_only_layers")
    return sum(
        index >= dense_first and (index + 1) % step == 0 and index not in only_dense
        for index in range(layers)
    )


def _shared_width(sizes: _Sizes, width: int) -> int:
    """Return the width of the experts that every token visits."""
    if sizes.kind == "llama4_text":
        return width
    return sizes.maybe("shared_expert_intermediate_size") or width * sizes.maybe("n_shared_experts")


def _windows(sizes: _Sizes, layers: int) -> tuple[int, ...]:
    """Return what each layer sees: `layer_types` where it is told, else the family's habit."""
    window = sizes.maybe("sliding_window", "attention_chunk_size")
    kinds = sizes.listed("layer_types")
    if len(kinds) == layers:
        return tuple(_window_of(str(kind), window) for kind in kinds)
    interval = sizes.maybe("full_attention_interval")
    if interval:
        return tuple(0 if (index + 1) % interval == 0 else NO_CACHE for index in range(layers))
    if not window or sizes.config.get("use_sliding_window") is False:
        return (0,) * layers
    period = {"gpt_oss": 2, "gemma2": 2, "llama4_text": 4}.get(sizes.kind, 0)
    period = sizes.maybe("sliding_window_pattern") or period
    if sizes.kind in ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe"):
        first = sizes.maybe("max_window_layers")
        return tuple(window if index >= first else 0 for index in range(layers))
    if period > 1:
        return tuple(0 if (index + 1) % period == 0 else window for index in range(layers))
    return (window,) * layers


def _window_of(kind: str, window: int) -> int:
    if "linear" in kind or "mamba" in kind or "conv" in kind:
        return NO_CACHE
    return window if "sliding" in kind or "chunked" in kind else 0


def _checkpoint(
    config: Mapping[str, Any], inner: Mapping[str, Any] | None
) -> tuple[Format, tuple[str, ...]]:
    """Return the format of the weights as they are shipped, and what is doubtful about it."""
    quantization = config.get("quantization_config") or (inner or {}).get("quantization_config")
    if isinstance(quantization, Mapping) and quantization:
        found, doubt = checkpoint_format(quantization)
        return (found, ()) if found else (BF16, (f"{doubt}: sizes are those of 16 bits",))
    dtype = str(config.get("torch_dtype") or config.get("dtype") or "")
    if dtype == "float32":
        return BF16, ("the checkpoint is float32; engines load it as 16 bits",)
    return BF16, ()


def _notes(sizes: _Sizes, *, nested: bool, stored_bytes: int) -> tuple[str, ...]:
    notes: list[str] = []
    if sizes.kind not in KNOWN:
        notes.append(
            f"model_type '{sizes.kind or 'none'}' is not one whose count was checked: read as a "
            f"decoder with {'two' if sizes.kind in _UNGATED else 'three'} matrices in each "
            "feed-forward part"
        )
    if nested and not stored_bytes:
        notes.append("only the language model is counted, not what else the checkpoint holds")
    if NO_CACHE in _windows(sizes, sizes.maybe("num_hidden_layers")):
        notes.append("linear-attention layers are counted as attention, their states not at all")
    if not sizes.maybe("max_position_embeddings", "n_positions"):
        notes.append("the longest context is not told: 32,768 tokens are assumed")
    return tuple(notes)


def _corrected(shape: ModelShape, stored_bytes: int) -> ModelShape:
    """Count as resident what the checkpoint weighs beyond the decoder; tell if it weighs less."""
    counted = weight_bytes(shape, shape.checkpoint)
    if not stored_bytes:
        return shape
    values = {name: getattr(shape, name) for name in shape.__struct_fields__}
    if stored_bytes < 0.97 * counted:
        note = (
            f"the checkpoint holds {stored_bytes / 1e9:.1f} GB where {counted / 1e9:.1f} were "
            "counted: the larger is planned with"
        )
        values["assumptions"] = (*shape.assumptions, note)
        return ModelShape(**values)
    if shape.drafting_layers and stored_bytes > counted:
        return shape  # its drafting layers, which are loaded only where they draft
    values["other_bytes"] = max(0, int(stored_bytes - counted))
    return ModelShape(**values)
