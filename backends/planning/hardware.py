"""GPU types: memory, bandwidth, arithmetic and links, each with its source.

Arithmetic is dense (vendors print twice as much, with sparsity). Memory is what the driver reports,
since that is what an engine's share is a share of. Bandwidth and arithmetic are peaks; what kernels
reach of them is in `calibration.py`.
"""

from __future__ import annotations

import difflib
from typing import Literal

import msgspec

from backends.planning.failure import RequestError
from backends.planning.formats import Arithmetic, Format

MIB = 1024 * 1024
Generation = Literal["Ampere", "Ada", "Hopper", "Blackwell"]


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """One GPU type, as eight of it stand in a node."""

    name: str
    title: str
    generation: Generation
    memory_bytes: int
    bandwidth_bytes_per_s: float
    flops: dict[Arithmetic, float]
    link_bytes_per_s: float  # one direction, to all peers together
    link_gpus: int  # GPUs that reach each other at that rate; 1: no NVLink
    scarce: bool  # hard to get on demand
    source: str

    def arithmetic(self, weights: Format) -> Arithmetic:
        """Return what multiplies `weights` here: the format's own, where this GPU has it.

        MXFP4 is multiplied with activations of eight bits, so it earns the rate of FP8; a GPU
        without the narrow arithmetic widens weights to 16 bits as it reads them.
        """
        if weights.arithmetic not in self.flops:
            return "bf16"
        return "fp8" if weights.name == "mxfp4" else weights.arithmetic


_A100 = Gpu(
    name="a100",
    title="A100 80 GB SXM",
    generation="Ampere",
    memory_bytes=81_920 * MIB,
    bandwidth_bytes_per_s=2.039e12,
    flops={"bf16": 312e12, "int8": 624e12},
    link_bytes_per_s=300e9,
    link_gpus=8,
    scarce=False,
    source="NVIDIA A100 80GB data sheet (2021): 2,039 GB/s, 312 TFLOPS BF16, NVLink 600 GB/s",
)
_L40S = Gpu(
    name="l40s",
    title="L40S",
    generation="Ada",
    memory_bytes=46_068 * MIB,
    bandwidth_bytes_per_s=0.864e12,
    flops={"bf16": 362e12, "fp8": 733e12, "int8": 733e12},
    link_bytes_per_s=32e9,
    link_gpus=1,
    scarce=False,
    source="NVIDIA L40S data sheet (2023): 864 GB/s, 362 TFLOPS BF16, 733 FP8, PCIe 4 (64 GB/s)",
)
_H100 = Gpu(
    name="h100",
    title="H100 80 GB SXM",
    generation="Hopper",
    memory_bytes=81_559 * MIB,
    bandwidth_bytes_per_s=3.35e12,
    flops={"bf16": 989e12, "fp8": 1979e12, "int8": 1979e12},
    link_bytes_per_s=450e9,
    link_gpus=8,
    scarce=False,
    source="NVIDIA H100 data sheet: 3.35 TB/s, 1,979 TFLOPS BF16 and 3,958 FP8 with sparsity, "
    "NVLink 900 GB/s",
)
_H200 = Gpu(
    name="h200",
    title="H200 141 GB SXM",
    generation="Hopper",
    memory_bytes=143_771 * MIB,
    bandwidth_bytes_per_s=4.8e12,
    flops={"bf16": 989e12, "fp8": 1979e12, "int8": 1979e12},
    link_bytes_per_s=450e9,
    link_gpus=8,
    scarce=False,
    source="NVIDIA H200 data sheet: 4.8 TB/s, arithmetic as H100, NVLink 900 GB/s; memory as its "
    "driver reports it",
)
_B200 = Gpu(
    name="b200",
    title="B200 SXM",
    generation="Blackwell",
    memory_bytes=180 * 10**9,
    bandwidth_bytes_per_s=7.7e12,
    flops={"bf16": 2250e12, "fp8": 4500e12, "int8": 4500e12, "fp4": 9000e12},
    link_bytes_per_s=900e9,
    link_gpus=8,
    scarce=True,
    source="NVIDIA HGX B200: 180 GB usable of 192, 7.7 TB/s a GPU in the eight-GPU board, 9 PFLOPS "
    "dense FP4, NVLink 1.8 TB/s",
)
_GB200 = Gpu(
    name="gb200",
    title="GB200 (a GPU of an NVL72)",
    generation="Blackwell",
    memory_bytes=186 * 10**9,
    bandwidth_bytes_per_s=8.0e12,
    flops={"bf16": 2500e12, "fp8": 5000e12, "int8": 5000e12, "fp4": 10000e12},
    link_bytes_per_s=900e9,
    link_gpus=72,
    scarce=True,
    source="NVIDIA GB200 NVL72 data sheet, per GPU: 186 GB, 8 TB/s, 10 PFLOPS dense FP4, "
    "NVLink 1.8 TB/s among 72",
)
_B300 = Gpu(
    name="b300",
    title="B300 SXM",
    generation="Blackwell",
    memory_bytes=268 * 10**9,
    bandwidth_bytes_per_s=8.0e12,
    flops={"bf16": 2250e12, "fp8": 4500e12, "fp4": 13500e12},
    link_bytes_per_s=900e9,
    link_gpus=8,
    scarce=True,
    source="Blackwell Ultra as published: 288 GB of which 268 to 279 usable (the lower is taken), "
    "8 TB/s, 13 to 14 PFLOPS dense FP4, INT8 all but gone, NVLink 1.8 TB/s",
)
GPUS: dict[str, Gpu] = {gpu.name: gpu for gpu in (_A100, _L40S, _H100, _H200, _B200, _GB200, _B300)}


def gpu_named(name: str, flag: str = "--gpu") -> Gpu:
    """Return the GPU type of that name. Raises `RequestError` with `flag` and the nearest."""
    key = name.lower().removeprefix("nvidia-").removeprefix("nvidia ")
    if key in GPUS:
        return GPUS[key]
    near = difflib.get_close_matches(key, GPUS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(GPUS)}"
    raise RequestError(f"{flag} {name}: no such GPU type; {hint}")


# Seconds of one all-reduce of some kilobytes among 2, 4 and 8 GPUs; two stand in every layer.
# NVLink: the one-shot kernel of SGLang on H100, 32 KiB (sgl-project/sglang pull request 2904).
_LINKED_ALL_REDUCE_S = {1: 0.0, 2: 4.5e-6, 4: 4.8e-6, 8: 7.8e-6}
# Without NVLink engines fall back on NCCL's ring, which pays for each of its 2 (n - 1) hops: as
# timed over NVLink on A100 (NVIDIA/nccl-tests issue 123); over PCIe it is at least that.
_RING_ALL_REDUCE_S = {1: 0.0, 2: 10e-6, 4: 16.9e-6, 8: 33.7e-6}


def all_reduce_s(gpu: Gpu, gpus: int, size_bytes: float) -> float:
    """Return the time of one all-reduce: a latency, and each GPU's share over its link.

    A ring moves 2 (n - 1) / n of the size through each link; no algorithm without the switch's
    arithmetic moves less.
    """
    if gpus == 1:
        return 0.0
    table = _LINKED_ALL_REDUCE_S if gpu.link_gpus >= gpus else _RING_ALL_REDUCE_S
    known = min((count for count in table if count >= gpus), default=max(table))
    return table[known] + 2 * (gpus - 1) / gpus * size_bytes / gpu.link_bytes_per_s
