"""What a decode step is expected to take in every layout, whatever a plan chose: to be held against
measurements, and the one constant of an engine fitted anew from them.

Batch 1, no context, no speculation: the time that weights, links and layers alone account for.
"""

from __future__ import annotations

from typing import Any

from backends.planning import floors, parallel
from backends.planning.calibration import CALIBRATION
from backends.planning.floors import Replica
from backends.planning.formats import BF16, FP8, NVFP4, Format
from backends.planning.hardware import Gpu
from backends.planning.shape import ModelShape


def decode_outlook(shape: ModelShape, gpu: Gpu) -> dict[str, Any]:
    """Return the predictions for `gpu`, and the constants that they rest on."""
    return {
        "gpu": gpu.name,
        "batch": 1,
        "context_tokens": 0,
        "calibration": {
            engine: {"constant": "layer_s", "value": known.layer_s}
            for engine, known in CALIBRATION.items()
        },
        "predictions": [
            _prediction(Replica(shape=shape, weights=stored, gpu=gpu, gpus=count, engine=engine))
            for engine in CALIBRATION
            for count in parallel.COUNTS
            for stored in _formats(shape, gpu)
            if not parallel.splits(shape, stored, count)
        ],
    }


def _prediction(replica: Replica) -> dict[str, Any]:
    step = floors.decode_step(replica, 1, 0)
    layers_s = replica.shape.layers * CALIBRATION[replica.engine].layer_s
    return {
        "engine": replica.engine,
        "tp": replica.gpus,
        "weights": replica.weights.name,
        "floor_ms": step.floor_s * 1e3,
        "expected_ms": step.expected_s * 1e3,
        "overhead_ms": layers_s * 1e3,  # of that, in proportion to the constant
        "collective_ms": step.link_s * 1e3,
    }


def _formats(shape: ModelShape, gpu: Gpu) -> tuple[Format, ...]:
    """Return what the weights can be in: as shipped, or what this GPU multiplies."""
    if shape.checkpoint.bits < 16:
        return (shape.checkpoint,)
    native = ((FP8, "fp8"), (NVFP4, "fp4"))
    return (BF16, *(stored for stored, name in native if name in gpu.flops))
