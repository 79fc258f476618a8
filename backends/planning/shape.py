"""What a model is to a planner: how many parameters of which kind, and what a token leaves behind.

Parameters are counted from the sizes in `config.json`, since that works before a byte of weights is
there; where a checkpoint is there, its own total corrects what cannot be seen in the file, such as
a vision tower. They are kept by kind, because each kind costs something else: an embedding is
looked up, not read; the head and the attention are read once a step; of routed experts only those
that the batch's tokens are sent to; and formats cover some kinds and not others.
"""

from __future__ import annotations

import msgspec

from backends.planning.formats import BF16, Format

NO_CACHE = -1  # a layer that keeps a state of fixed size instead of keys and values


class ModelShape(msgspec.Struct, frozen=True, kw_only=True):
    """A decoder. Counts are of the whole model unless they say otherwise."""

    architecture: str
    layers: int
    hidden: int
    vocabulary: int
    query_heads: int
    kv_heads: int
    head_dim: int
    latent_dim: int = 0  # of MLA: compressed keys and values with their rotary part; 0: none
    windows: tuple[int, ...]  # for each layer: 0 sees all, else this many tokens, or NO_CACHE
    embedding_parameters: int
    head_parameters: int  # 0 when tied: the embedding is then read as the head
    attention_parameters: int
    mlp_parameters: int  # dense layers, shared experts
    router_parameters: int = 0
    expert_parameters: int = 0  # of one routed expert in one layer
    expert_layers: int = 0
    experts: int = 0  # in each such layer
    experts_active: int = 0  # that a token is sent to
    shards: tuple[int, ...] = ()  # widths that tensor parallelism cuts
    context_tokens_max: int
    drafting_layers: int = 0  # layers in the checkpoint that predict further tokens (MTP)
    checkpoint: Format = BF16
    other_bytes: int = 0  # in the checkpoint, beside the decoder
    assumptions: tuple[str, ...] = ()

    @property
    def expert_total(self) -> int:
        return self.expert_parameters * self.experts * self.expert_layers

    @property
    def parameters(self) -> int:
        """Return how many there are, as models are named after it."""
        return (
            self.resident_16bit
            + self.attention_parameters
            + self.mlp_parameters
            + self.expert_total
        )

    @property
    def resident_16bit(self) -> int:
        """Return those that no format covers."""
        return self.embedding_parameters + self.head_parameters + self.router_parameters

    @property
    def parameters_active(self) -> int:
        """Return how many multiply one token: not the embedding, and of the experts its own."""
        head = self.head_parameters or self.embedding_parameters
        routed = self.expert_parameters * self.experts_active * self.expert_layers
        return (
            head + self.router_parameters + self.attention_parameters + self.mlp_parameters + routed
        )

    @property
    def mla(self) -> bool:
        return self.latent_dim > 0

    @property
    def moe(self) -> bool:
        return self.experts > 0

    @property
    def kv_values_per_layer(self) -> int:
        """Return the numbers that one token leaves in one layer's cache."""
        return self.latent_dim if self.mla else 2 * self.kv_heads * self.head_dim

    @property
    def cached_layers(self) -> int:
        return sum(window != NO_CACHE for window in self.windows)


def weight_bytes(shape: ModelShape, stored: Format) -> float:
    """Return the bytes of all weights in `stored`, and of what the checkpoint holds beside."""
    return _size(shape, stored, shape.mlp_parameters, shape.expert_total) + shape.other_bytes


def step_bytes(shape: ModelShape, stored: Format, tokens: float) -> float:
    """Return the bytes of weights that one step over `tokens` tokens reads.

    Routed experts are read once for all tokens that were sent to them: of E experts, with k for
    each of n tokens, E (1 - (1 - k/E)^n) are hit when the choices are independent.
    """
    routed = shape.expert_parameters * shape.expert_layers * experts_hit(shape, tokens)
    looked_up = 2.0 * shape.embedding_parameters if shape.head_parameters else 0.0
    return _size(shape, stored, shape.mlp_parameters, routed) - looked_up


def experts_hit(shape: ModelShape, tokens: float) -> float:
    if not shape.moe:
        return 0.0
    missed = 1.0 - shape.experts_active / shape.experts
    return shape.experts * (1.0 - float(missed**tokens))


def _size(shape: ModelShape, stored: Format, mlp: float, routed: float) -> float:
    narrow = stored.bytes_per_parameter
    linear = narrow if stored.covers == "linear" else BF16.bytes_per_parameter
    expert = BF16.bytes_per_parameter if stored.covers == "nothing" else narrow
    return (
        shape.resident_16bit * BF16.bytes_per_parameter
        + (shape.attention_parameters + mlp) * linear
        + routed * expert
    )


def kv_bytes_per_token(shape: ModelShape, kv_value_bytes: float) -> float:
    """Return what a token adds while no layer's window is full."""
    return shape.cached_layers * shape.kv_values_per_layer * kv_value_bytes


def kv_bytes(shape: ModelShape, context_tokens: float, kv_value_bytes: float) -> float:
    """Return what a sequence of `context_tokens` keeps: a windowed layer stops at its window."""
    kept = sum(
        min(context_tokens, window) if window else context_tokens
        for window in shape.windows
        if window != NO_CACHE
    )
    return kept * shape.kv_values_per_layer * kv_value_bytes


def kv_copies(shape: ModelShape, gpus: int) -> float:
    """Return how often the cache is kept, summed over the GPUs of a replica.

    Heads are split among GPUs as far as there are heads; a latent cache has one, so that each
    GPU keeps all of it.
    """
    return float(gpus) if shape.mla else max(1.0, gpus / shape.kv_heads)
