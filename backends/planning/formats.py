"""In how many bytes a parameter is kept, and which arithmetic multiplies it.

A format's size counts its scales, because they are read with every token: a block of 16 (NVFP4), 32
(MXFP4) or a group of 128 parameters (AWQ, GPTQ) shares one. Which parameters a format covers
matters as much: none of them touches embeddings, the output head, norms or routers, and gpt-oss
keeps its attention in 16 bits, too. So the sizes are per group of parameters, not per model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

Arithmetic = Literal["bf16", "fp8", "int8", "fp4"]
Covers = Literal["nothing", "linear", "experts"]


class Format(msgspec.Struct, frozen=True):
    """How weights are stored; `covers` says which of them, the others stay in 16 bits."""

    name: str
    bits: int
    bytes_per_parameter: float
    arithmetic: Arithmetic  # the narrowest that its kernels use, where the GPU has it
    covers: Covers = "linear"
    group: int = 0  # parameters along a row that share a scale; shards must be multiples of it


BF16 = Format("bf16", 16, 2.0, "bf16", "nothing")
FP8 = Format("fp8", 8, 1.0, "fp8")  # one scale per tensor or channel: nothing to count
FP8_BLOCK = Format("fp8", 8, 1.0 + 4 / 128**2, "fp8", group=128)  # a float for 128 x 128
INT8 = Format("int8", 8, 1.0, "int8")
NVFP4 = Format("nvfp4", 4, 0.5 + 1 / 16, "fp4", group=16)  # an FP8 scale for 16
NVFP4_EXPERTS = Format("nvfp4", 4, 0.5 + 1 / 16, "fp4", "experts", group=16)
MXFP4 = Format("mxfp4", 4, 0.5 + 1 / 32, "fp4", "experts")  # an 8-bit exponent for 32


def w4a16(name: str, group: int) -> Format:
    """Four bits that are widened before they are multiplied: a 16-bit scale and a zero a group."""
    return Format(name, 4, 0.5 + 2.5 / group if group > 0 else 0.5, "bf16", group=max(group, 0))


def w8a16(name: str) -> Format:
    return Format(name, 8, 1.0 + 2 / 128, "bf16")


def checkpoint_format(quantization: Mapping[str, Any]) -> tuple[Format | None, str]:
    """Return the format that a `quantization_config` names; None and the reason if none we know."""
    method = str(quantization.get("quant_method", "")).lower()
    readers = {
        "fp8": _fp8,
        "fbgemm_fp8": _fp8,
        "mxfp4": lambda _: MXFP4,
        "modelopt": _modelopt,
        "modelopt_fp4": _modelopt,
        "nvfp4": lambda _: NVFP4,
        "awq": _grouped,
        "gptq": _grouped,
        "bitsandbytes": _bitsandbytes,
        "compressed-tensors": _compressed_tensors,
    }
    reader = readers.get(method)
    if reader is None:
        return None, f"quant_method '{method}' is not known"
    found = reader(quantization)
    return found, "" if found else f"the widths in its {method} configuration are not known"


def _fp8(quantization: Mapping[str, Any]) -> Format:
    return FP8_BLOCK if quantization.get("weight_block_size") else FP8


def _modelopt(quantization: Mapping[str, Any]) -> Format | None:
    inner = quantization.get("quantization")
    source = inner if isinstance(inner, Mapping) else quantization
    named = str(source.get("quant_algo", "")).upper()
    if "NVFP4" in named:
        return NVFP4
    return FP8 if "FP8" in named else None


def _grouped(quantization: Mapping[str, Any]) -> Format | None:
    name, bits = str(quantization["quant_method"]), quantization.get("bits", 4)
    if bits == 8:
        return w8a16(name)
    return w4a16(name, _group(quantization)) if bits == 4 else None


def _group(quantization: Mapping[str, Any]) -> int:
    """Return how many parameters share a scale; the usual 128 where it is not told."""
    size = quantization.get("group_size")
    return size if isinstance(size, int) and size else 128


def _bitsandbytes(quantization: Mapping[str, Any]) -> Format:
    if quantization.get("load_in_8bit"):
        return w8a16("bitsandbytes")
    return w4a16("bitsandbytes", 64)  # the block of NF4


def _compressed_tensors(quantization: Mapping[str, Any]) -> Format | None:
    groups = quantization.get("config_groups")
    every = groups.values() if isinstance(groups, Mapping) else ()
    first = _mapping(next(iter(every), None))
    weights = _mapping(first.get("weights"))
    bits, kind = weights.get("num_bits"), str(weights.get("type", ""))
    if bits == 4 and kind == "float":
        return NVFP4
    if bits == 8 and kind == "float":
        return FP8
    if bits == 8:
        return INT8 if first.get("input_activations") else w8a16("compressed-tensors")
    if bits == 4:
        return w4a16("compressed-tensors", _group(weights))
    return None


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
