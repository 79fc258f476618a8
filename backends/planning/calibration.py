"""What engines reach of a GPU's peaks: the step from the speed of light to an expected time.

Decode has one constant for each engine, `layer_s`: the seconds that a step spends in a layer beside
reading it (launches, small kernels, tails). It does not shrink with tensor parallelism or with
narrower weights, which is why halving the bytes does not halve the time. The share of the bandwidth
that reading itself reaches is the GPU's, not the engine's.

The figures are fitted to NVIDIA H200s with the shape of Qwen3-8B (vLLM 0.26.0 and SGLang 0.5.17,
random weights, CUDA graphs on). `layer_s` comes from one, two and four cards in bf16 and FP8, of
which it misses none by more than 18.3 % (`loadtest/results/floors-h200-tp124.txt`): on one card it
expects up to 14 % too much, on four up to 18 % too little, because what the cards have to say to
each other at every layer is not in it. The rest comes from one card in bf16: prefill of 8,192
tokens in 232 ms and 218 ms, of 32,000 in 1,250 ms and 1,216 ms.
`tests/backends/test_plan_floors.py` holds the fit against them.
"""

from __future__ import annotations

from typing import Literal

import msgspec

EngineName = Literal["vllm", "sglang"]

# A plain copy on an H200 moved 4.3 of its 4.8 TB/s; taken for every type, as no other was measured.
BANDWIDTH_SHARE = 0.9


class Calibration(msgspec.Struct, frozen=True):
    """One engine."""

    layer_s: float  # decode: a layer's time beside reading it
    sequence_s: float  # decode: what each sequence of a batch adds (sampling, tokens, events)
    prefill_share: float  # of the peak arithmetic, in large chunks
    request_s: float  # of a first token: HTTP, tokens, scheduling, a step's start
    warm_start_s: float  # from exec to ready with warm compile caches, weights apart


CALIBRATION: dict[EngineName, Calibration] = {
    "vllm": Calibration(
        layer_s=49.6e-6, sequence_s=11e-6, prefill_share=0.60, request_s=8e-3, warm_start_s=46.0
    ),
    "sglang": Calibration(
        layer_s=60.9e-6, sequence_s=21e-6, prefill_share=0.62, request_s=4e-3, warm_start_s=80.0
    ),
}

# A step of the draft beside reading it: sampling, and the host between small kernels. SGLang with
# an EAGLE-3 head of three steps took 6.85 ms where it took 5.01 without, same model and GPU;
# reading the head three times and its three layers leave this much of the difference to each step.
DRAFT_STEP_S = 0.4e-3

# Page-cached files are read again at 7.6 GB/s (measured on the same host); what comes from a disk
# or over a network takes longer.
LOAD_BYTES_PER_S = 7.6e9
