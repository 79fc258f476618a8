"""Real checkpoints of random weights: safetensors that any engine loads, the same from one seed.

Weights that an engine draws itself (`--load-format dummy`) are gone when it lets go of them; these
lie on the disk, so what was let go of can be read again, and greedy answers can be compared. A
weight is a bf16 number of random sign and mantissa: of embeddings with a magnitude between 2^-7 and
2^-5, about the 0.02 that such models begin their training with, of layers between 2^-13 and 2^-11.
Layers as large as the embeddings would leave nothing of the token in the residual stream, all of
the 150,000 logits nearly equal, and the greedy choice to the order in which a kernel sums; so small
they still move the logits, by about a hundredth. Norms are 1. Standard library only: one random
octet makes a weight, in as many processes as there are files.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import random
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

SHARD_BYTES = 1 << 30
CHUNK_WEIGHTS = 1 << 24
INDEX = "model.safetensors.index.json"
_ITEM = 2  # octets of a bf16
_ONE = b"\x80\x3f"
# The upper octet of a bf16: sign, and all of the exponent but its last bit.
_EMBEDDING = bytes(0xBC if octet & 0x80 else 0x3C for octet in range(256))
_LAYER = bytes(0xB9 if octet & 0x80 else 0x39 for octet in range(256))

Shapes = dict[str, tuple[int, ...]]


def tensors_of(config: Mapping[str, Any]) -> Shapes:
    """Return the names and shapes of a dense decoder's weights, as published checkpoints have them.

    Raises `ValueError` for another architecture.
    """
    kind = config["architectures"][0]
    if kind not in ("Qwen3ForCausalLM", "LlamaForCausalLM"):
        raise ValueError(f"no weights are known of {kind}")
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    layer: Shapes = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    if kind == "Qwen3ForCausalLM":
        layer |= {"self_attn.q_norm": (head,), "self_attn.k_norm": (head,)}
    shapes: Shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for number in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{number}.{name}.weight": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def write_weights(folder: Path, config: Mapping[str, Any], seed: int) -> int:
    """Write a checkpoint into `folder`; return its octets. Raises `ValueError`, `OSError`."""
    shards = _shards(tensors_of(config))
    names = [f"model-{n + 1:05}-of-{len(shards):05}.safetensors" for n in range(len(shards))]
    index = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
    for stale in folder.glob("*.safetensors"):
        if stale.name not in names:
            stale.unlink()
    with concurrent.futures.ProcessPoolExecutor(min(os.cpu_count() or 1, len(shards))) as pool:
        paths = [folder / name for name in names]
        total = sum(pool.map(_write, paths, shards, [seed] * len(shards)))
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=1)
    new = folder / f".{INDEX}.new"
    new.write_text(text)
    new.replace(folder / INDEX)
    return total


def _shards(shapes: Shapes) -> list[Shapes]:
    """Share the tensors out to files, in their order; a large one has a file of its own."""
    shards: list[Shapes] = []
    room = 0
    for name, shape in shapes.items():
        size = _count(shape) * _ITEM
        if not shards or size > room:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][name] = shape
        room -= size
    return shards


def _write(path: Path, shapes: Shapes, seed: int) -> int:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + _count(shape) * _ITEM
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned, as the format wants
    new = path.with_name(f".{path.name}.new")
    with new.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            for piece in _values(name, shape, seed):
                file.write(piece)
    new.replace(path)
    return end


def _values(name: str, shape: Sequence[int], seed: int) -> Iterator[bytes | bytearray]:
    count = _count(shape)
    if len(shape) == 1:
        yield _ONE * count
        return
    upper = _LAYER if ".layers." in name else _EMBEDDING
    draw = random.Random(f"{seed}/{name}")  # noqa: S311  # weights, no secrets
    for start in range(0, count, CHUNK_WEIGHTS):
        lower = draw.randbytes(min(CHUNK_WEIGHTS, count - start))
        piece = bytearray(_ITEM * len(lower))
        piece[::2] = lower
        piece[1::2] = (lower[1:] + lower[:1]).translate(upper)
        yield piece


def _count(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
