"""A plan as an engine's arguments and as a pool of Doherty's configuration.

Flags are those of vLLM 0.33 and SGLang 0.5.23, and only what the adapters do not set themselves.
"""

from __future__ import annotations

import json
import re

import msgspec

from backends.planning.floors import Replica, draft_bytes, reserve_per_gpu
from backends.planning.formats import Format
from backends.planning.rules import Precision


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What a launch bounds."""

    context_tokens: int
    step_tokens: int
    aim: int  # requests in flight; 0: none to aim at
    most: int


_NO_STRINGS = frozenset(
    ("yes", "no", "on", "off", "true", "false", "null", "y", "n")
)  # of YAML 1.1
# vLLM 0.33 refuses plain fp8 for a checkpoint of 16 bits; both NVFP4 makers take experts only.
_VLLM_AT_LOAD = {"fp8": "fp8_per_tensor", "nvfp4": "nvfp4_per_token"}
_SGLANG_AT_LOAD = {"fp8": "fp8", "nvfp4": "nvfp4_online"}


def arguments(replica: Replica, precision: Precision, limits: Limits) -> tuple[str, ...]:
    """Return the engine's own arguments for `replica`."""
    if replica.engine == "vllm":
        return _vllm(replica, precision, limits)
    return _sglang(replica, precision, limits)


def _vllm(replica: Replica, precision: Precision, limits: Limits) -> tuple[str, ...]:
    draft = replica.draft
    speculation: tuple[str, ...] = ()
    if draft is not None:
        config: dict[str, object] = {"method": "eagle3", "model": draft.name}
        if not draft.name:
            config = {"method": "mtp"}
        config["num_speculative_tokens"] = draft.tokens
        speculation = ("--speculative-config", json.dumps(config, separators=(",", ":")))
    groups = replica.attention_groups
    apart = ("--data-parallel-size", str(groups), "--enable-expert-parallel")
    return (
        *("--tensor-parallel-size", str(replica.gpus // groups)),
        *(apart if groups > 1 else ()),
        *_at_load(_VLLM_AT_LOAD, precision),
        *(("--kv-cache-dtype", "fp8_e4m3") if replica.kv_value_bytes == 1 else ()),
        *("--gpu-memory-utilization", f"{replica.memory_share:g}"),
        *("--max-model-len", str(limits.context_tokens)),
        *("--max-num-seqs", str(-(-limits.most // groups))),  # of each group
        *("--max-num-batched-tokens", str(limits.step_tokens)),
        *("--enable-chunked-prefill", "--async-scheduling"),
        *speculation,
    )


def _sglang(replica: Replica, precision: Precision, limits: Limits) -> tuple[str, ...]:
    draft, groups = replica.draft, replica.attention_groups
    speculation: tuple[str, ...] = ()
    if draft is not None:
        named: tuple[str, ...] = ()
        if draft.name:
            named = ("--speculative-draft-model-path", draft.name)
            # It would take the model's --quantization otherwise, and accept less.
            named += ("--speculative-draft-model-quantization", "unquant")
        speculation = (
            *("--speculative-algorithm", "EAGLE3" if draft.name else "NEXTN"),
            *named,
            *("--speculative-num-steps", str(draft.tokens), "--speculative-eagle-topk", "1"),
            *("--speculative-num-draft-tokens", str(draft.tokens + 1)),
        )
    return (
        *("--tensor-parallel-size", str(replica.gpus)),
        *(("--attn-dp-size", str(groups)) if groups > 1 else ()),
        *_at_load(_SGLANG_AT_LOAD, precision),
        *(("--kv-cache-dtype", "fp8_e4m3") if replica.kv_value_bytes == 1 else ()),
        *("--mem-fraction-static", f"{static_share(replica):g}"),
        *("--context-length", str(limits.context_tokens)),
        *("--max-running-requests", str(limits.most)),
        *("--cuda-graph-max-bs-decode", str(-(-limits.most // groups))),  # of each group
        *("--chunked-prefill-size", str(limits.step_tokens)),
        *speculation,
    )


def static_share(replica: Replica) -> float:
    """Return the share of the memory that SGLang gives to weights and cache alone.

    Work space, graphs and the draft come out of the rest, where vLLM counts them in its share.
    """
    memory = replica.gpu.memory_bytes
    rest = reserve_per_gpu(replica) + draft_bytes(replica) / replica.gpus
    return int(1000 * (replica.memory_share - rest / memory)) / 1000


def _at_load(names: dict[str, str], precision: Precision) -> tuple[str, ...]:
    """A checkpoint that is quantised says so itself; only what is made at load needs the flag."""
    if precision.shipping != "at load":
        return ()
    weights: Format = precision.weights
    return ("--quantization", names[weights.name])


class Pool(msgspec.Struct, frozen=True, kw_only=True):
    """What goes into the configuration."""

    name: str  # that clients ask for
    engine: str
    model_path: str
    replicas: int
    args: tuple[str, ...]
    gpus: int
    limits: Limits
    serves_jobs: bool = False  # engine workers, as many as jobs need, in place of servers
    gpu_price_per_hour: float | None = None


def snippet(pool: Pool, *, note: str = "") -> str:
    """Return the YAML of one model with one pool; `note` becomes a comment above it."""
    lines = [f"# {note}"] if note else []
    lines += ["models:", f"  - name: {_text(pool.name)}", "    pools:"]
    price, limits = pool.gpu_price_per_hour, pool.limits
    keys = [
        ("engine", pool.engine),
        *([("serves", "jobs")] if pool.serves_jobs else []),
        ("model_path", _text(pool.model_path)),
        *([] if pool.serves_jobs else [("replicas", str(pool.replicas))]),
        ("gpus", str(pool.gpus)),
        *([] if price is None else [("gpu_price_per_hour", f"{price:g}")]),
    ]
    if pool.serves_jobs:
        keys.append(("autoscale", f"{{max: {pool.replicas}}}"))
    else:
        keys += [("target_inputs", str(limits.aim))] if limits.aim else []
        keys.append(("max_inputs", str(limits.most)))
    first, *rest = [f"{key}: {value}" for key, value in keys]
    lines += [f"      - {first}", *(f"        {line}" for line in rest)]
    lines += ["        args: [", *(f"          {line}," for line in _by_flag(pool.args))]
    return "\n".join([*lines, "        ]"]) + "\n"


def _by_flag(args: tuple[str, ...]) -> list[str]:
    """Return the arguments for a flow sequence, each flag on a line with its value."""
    lines: list[str] = []
    for arg in args:
        if arg.startswith("--"):
            lines.append(arg)
        else:
            lines[-1] += f", {json.dumps(arg)}"
    return lines


def _text(value: str) -> str:
    """Return `value` as YAML reads it back: a JSON string is one."""
    plain = re.fullmatch(r"[A-Za-z/][A-Za-z0-9._/-]*", value)
    return value if plain and value.lower() not in _NO_STRINGS else json.dumps(value)
