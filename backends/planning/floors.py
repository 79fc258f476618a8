"""Times and sizes of a replica: the speed of light, and what an engine is expected to make of it.

A *floor* is physics: bytes over aggregate bandwidth, arithmetic over aggregate arithmetic, messages
over links, each at its peak. An *expected* time is the floor through `calibration.py`. Decode reads
all weights that its tokens need and every sequence's keys and values, once a step; it is bound by
reading until the batch is so large that arithmetic takes as long. Prefill is bound by arithmetic.
"""

from __future__ import annotations

import msgspec

from backends.planning.calibration import (
    BANDWIDTH_SHARE,
    CALIBRATION,
    DRAFT_STEP_S,
    LOAD_BYTES_PER_S,
    EngineName,
)
from backends.planning.formats import BF16, Format
from backends.planning.hardware import Gpu, all_reduce_s
from backends.planning.shape import (
    ModelShape,
    kv_bytes,
    kv_copies,
    step_bytes,
    weight_bytes,
)

ALL_REDUCES_PER_LAYER = 2  # after attention and after the feed-forward part
DRAFT_VOCABULARY = 32_000  # tokens that EAGLE-3 heads choose among, as most are trained
# Tokens that follow each other are sent to some of the same experts: each proposed one counts as
# this much of an independent choice. With it, gpt-oss-120b gains by its draft what was published
# for it, 25 % at batch 8 with three to four proposed tokens; independent choices would make that a
# loss.
EXPERT_NOVELTY = 0.3
# What an engine keeps beside weights and cache: the CUDA context, graphs, work space. An engine
# that was given 0.45 of an H200 with 16.4 GB of weights had 336,064 tokens of 147,456 bytes left,
# so 1.9 GB in all; what of that grows with the tokens of a step is taken as eight hidden states of
# 16 bits.
FIXED_BYTES = 1.4e9
HIDDEN_STATES = 8


class Replica(msgspec.Struct, frozen=True, kw_only=True):
    """What the times are of: a model, kept in a form, by an engine, on so many GPUs."""

    shape: ModelShape
    weights: Format
    gpu: Gpu
    gpus: int
    engine: EngineName
    kv_value_bytes: float = 2.0
    memory_share: float = 0.92
    step_tokens_max: int = 8192
    draft: Draft | None = None
    loads_wide: bool = False  # holds all weights in 16 bits before it narrows them
    attention_groups: int = 1  # that share the experts, each with sequences of its own

    @property
    def kv_copies(self) -> float:
        return kv_copies(self.shape, self.gpus // self.attention_groups)

    @property
    def repeated_bytes(self) -> float:
        """Return what further groups keep and read again: all but the routed experts."""
        if self.attention_groups == 1:
            return 0.0
        routed = self.shape.expert_total * self.weights.bytes_per_parameter
        shared = weight_bytes(self.shape, self.weights) - self.shape.other_bytes - routed
        return shared * (self.attention_groups - 1)


class Draft(msgspec.Struct, frozen=True, kw_only=True):
    """What proposes tokens, and how many of them hold."""

    name: str  # a path or hub id; "" for layers of the model itself
    tokens: int  # proposed for each step of the model
    accept_length: float  # tokens that a step yields, its own one included
    source: str


class StepTime(msgspec.Struct, frozen=True):
    """One decode step, or one token of it with speculation, in seconds."""

    memory_s: float  # bytes over peak bandwidth
    compute_s: float  # arithmetic over its peak
    link_s: float
    floor_s: float  # the greater of the two, and the links
    expected_s: float


def decode_step(replica: Replica, batch: float, context: float, tokens_each: int = 1) -> StepTime:
    """Return the time of one step of `batch` sequences, each of `tokens_each` new tokens."""
    shape, gpu, count = replica.shape, replica.gpu, replica.gpus
    tokens = batch * tokens_each
    choosing = batch * (1.0 + EXPERT_NOVELTY * (tokens_each - 1))
    read = step_bytes(shape, replica.weights, choosing)
    read += batch * kv_bytes(shape, context, replica.kv_value_bytes) * replica.kv_copies
    read += replica.repeated_bytes
    memory_s = read / (gpu.bandwidth_bytes_per_s * count)
    rate = gpu.flops[gpu.arithmetic(replica.weights)]
    compute_s = 2.0 * shape.parameters_active * tokens / (rate * count)
    link_s = _links_s(replica, tokens)
    known = CALIBRATION[replica.engine]
    bound_s = max(memory_s / BANDWIDTH_SHARE, compute_s / known.prefill_share)
    expected_s = bound_s + link_s + shape.layers * known.layer_s + batch * known.sequence_s
    return StepTime(memory_s, compute_s, link_s, max(memory_s, compute_s) + link_s, expected_s)


def token_time(replica: Replica, batch: float, context: float) -> StepTime:
    """Return the time per token of each sequence: a step, or with a draft a round by its yield.

    A round is a step that verifies the proposed tokens and one more, and as many steps of the
    draft.
    """
    draft = replica.draft
    if draft is None:
        return decode_step(replica, batch, context)
    verify = decode_step(replica, batch, context, draft.tokens + 1)
    memory_s, expected_s = _draft_step_s(replica, draft)
    floor_s = verify.floor_s + draft.tokens * memory_s
    all_s = verify.expected_s + draft.tokens * expected_s
    length = draft.accept_length
    return StepTime(
        (verify.memory_s + draft.tokens * memory_s) / length,
        verify.compute_s / length,
        verify.link_s / length,
        floor_s / length,
        all_s / length,
    )


def prefill(replica: Replica, tokens: int) -> tuple[float, float]:
    """Return floor and expected seconds to compute `tokens` tokens of one prompt, none cached."""
    shape, gpu, count = replica.shape, replica.gpu, replica.gpus
    rate = gpu.flops[gpu.arithmetic(replica.weights)] * count
    head = shape.head_parameters or shape.embedding_parameters  # only the last token needs it
    linear = 2.0 * (shape.parameters_active - head) * tokens
    linear_s = linear / rate
    attention_s = _attention_flops(shape, tokens) / (gpu.flops["bf16"] * count)
    link_s = _links_s(replica, tokens)
    known = CALIBRATION[replica.engine]
    read_s = step_bytes(shape, replica.weights, tokens) / (gpu.bandwidth_bytes_per_s * count)
    compute_s = linear_s + attention_s
    expected_s = max(compute_s / known.prefill_share, read_s / BANDWIDTH_SHARE) + link_s
    return max(compute_s, read_s) + link_s, expected_s + known.request_s


def first_token_s(replica: Replica, prompt_tokens: int) -> float:
    """Return the expected time to the first token on an idle replica with nothing cached."""
    return prefill(replica, prompt_tokens)[1]


def start_s(replica: Replica) -> float:
    """Return the expected time from start to ready: caches warm, files in the page cache."""
    loaded = weight_bytes(replica.shape, replica.shape.checkpoint)
    return CALIBRATION[replica.engine].warm_start_s + loaded / LOAD_BYTES_PER_S


def weights_per_gpu(replica: Replica) -> float:
    kept = weight_bytes(replica.shape, replica.weights) + draft_bytes(replica)
    return (kept + replica.repeated_bytes) / replica.gpus


def reserve_per_gpu(replica: Replica) -> float:
    return FIXED_BYTES + HIDDEN_STATES * 2.0 * replica.step_tokens_max * replica.shape.hidden


def kv_room_per_gpu(replica: Replica) -> float:
    """Return the bytes that are left for keys and values; negative where weights do not fit."""
    share = replica.gpu.memory_bytes * replica.memory_share
    return share - weights_per_gpu(replica) - reserve_per_gpu(replica)


def loads(replica: Replica) -> bool:
    """Return whether the weights fit while they are loaded."""
    if not replica.loads_wide:
        return kv_room_per_gpu(replica) > 0
    wide = weight_bytes(replica.shape, BF16) / replica.gpus
    return wide + FIXED_BYTES <= replica.gpu.memory_bytes * replica.memory_share


def sequence_bytes_per_gpu(replica: Replica, context: float) -> float:
    """Return what a sequence of `context` tokens keeps on each GPU, the draft's layer too."""
    shape = replica.shape
    whole = kv_bytes(shape, context, replica.kv_value_bytes)
    if replica.draft is not None:
        whole += context * shape.kv_values_per_layer * replica.kv_value_bytes
    return whole * replica.kv_copies / replica.gpus


def batch_max(replica: Replica, context: float) -> int:
    """Return how many sequences of `context` tokens fit together."""
    room = kv_room_per_gpu(replica)
    return max(0, int(room / sequence_bytes_per_gpu(replica, context))) if room > 0 else 0


def context_max(replica: Replica) -> int:
    """Return the longest context that one sequence can have, with its group's cache to itself."""
    room = kv_room_per_gpu(replica) / replica.attention_groups
    low, high = 0, replica.shape.context_tokens_max
    while low < high:
        middle = (low + high + 1) // 2
        if sequence_bytes_per_gpu(replica, middle) <= room:
            low = middle
        else:
            high = middle - 1
    return low


def crossover_batch(replica: Replica) -> int:
    """Return the batch from which arithmetic takes longer than reading the weights.

    With experts, each sees only its share of the tokens, and so many more are needed.
    """
    gpu, shape = replica.gpu, replica.shape
    rate = gpu.flops[gpu.arithmetic(replica.weights)]
    width = replica.weights.bytes_per_parameter
    spread = shape.experts / shape.experts_active if shape.moe else 1.0
    return max(1, round(rate * width / (2.0 * gpu.bandwidth_bytes_per_s) * spread))


def draft_parameters(shape: ModelShape) -> int:
    """Return the size of an EAGLE-3 head: three hidden states joined, one layer, a small head.

    Its layer attends over the joined state and the token, twice as wide as the model's.
    """
    attention = shape.hidden * 2 * (shape.query_heads + 2 * shape.kv_heads) * shape.head_dim
    attention += shape.hidden * shape.query_heads * shape.head_dim
    feed_forward = 3 * shape.hidden * max(shape.shards, default=4 * shape.hidden)
    return 3 * shape.hidden**2 + attention + feed_forward + DRAFT_VOCABULARY * shape.hidden


def draft_bytes(replica: Replica) -> float:
    """Return what the draft keeps resident: a head in 16 bits, or a layer as the model's are."""
    if replica.draft is None:
        return 0.0
    if replica.draft.name:
        return BF16.bytes_per_parameter * draft_parameters(replica.shape)
    return weight_bytes(replica.shape, replica.weights) / replica.shape.layers


def _draft_step_s(replica: Replica, draft: Draft) -> tuple[float, float]:
    """Return floor and expected time of one step of the draft."""
    shape = replica.shape
    if draft.name:
        read = draft_bytes(replica)
    else:  # a layer of the model's kind, and the model's head again
        head = shape.head_parameters or shape.embedding_parameters
        read = step_bytes(shape, replica.weights, 1) / shape.layers
        read += BF16.bytes_per_parameter * head
    memory_s = read / (replica.gpu.bandwidth_bytes_per_s * replica.gpus)
    return memory_s, memory_s / BANDWIDTH_SHARE + DRAFT_STEP_S


def _links_s(replica: Replica, tokens: float) -> float:
    size = tokens * replica.shape.hidden * 2.0
    once = all_reduce_s(replica.gpu, replica.gpus, size)
    return ALL_REDUCES_PER_LAYER * replica.shape.layers * once


def _attention_flops(shape: ModelShape, tokens: int) -> float:
    """Return the arithmetic of scores and weighted sums: half of all pairs, fewer in a window."""
    width = shape.query_heads * shape.head_dim
    pairs = sum(
        tokens * min(tokens, window) if window and window < tokens else tokens * tokens / 2
        for window in shape.windows
        if window >= 0
    )
    return 2.0 * 2.0 * pairs * width
