"""What following KV events costs: processor time an event, and memory a million blocks.

    python -m tests.bench_core.kv [BLOCKS]

An event is a prompt of 512 tokens in blocks of 16, as each engine tells of it, with the removal of
as many blocks that it displaced. Memory is counted by `tracemalloc`, so it is the tree's alone.
"""

from __future__ import annotations

import sys
import time
import tracemalloc
from collections.abc import Iterator

import msgspec

from proxy.core import limits
from proxy.core.binding import KvBinding
from proxy.core.kv_points import Points
from proxy.core.kv_tree import GPU, KvTree
from proxy.core.kv_wire import read_batch
from proxy.core.prefix import PrefixChain
from proxy.core.usage import Usage

BLOCK_TOKENS = 16
PROMPT_TOKENS = 512
PROMPT_BLOCKS = PROMPT_TOKENS // BLOCK_TOKENS
RESIDENT_PROMPTS = 2000
ROUNDS = 4000
BLOCKS = 1_000_000
_SPREAD = 0x9E3779B97F4A7C15  # consecutive numbers to numbers all over 64 bits


def names(prompt: int) -> list[int]:
    first = prompt * PROMPT_BLOCKS + 1
    return [number * _SPREAD & (1 << 64) - 1 for number in range(first, first + PROMPT_BLOCKS)]


def tokens(prompt: int) -> list[int]:
    return [(prompt * 7919 + index * 104_729) % 150_000 for index in range(PROMPT_TOKENS)]


def of_vllm(prompt: int) -> list[object]:
    stored = {
        "type": "BlockStored",
        "block_hashes": names(prompt),
        "parent_block_hash": None,
        "token_ids": tokens(prompt),
        "block_size": BLOCK_TOKENS,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
        "extra_keys": [None] * PROMPT_BLOCKS,
        "group_idx": 0,
        "kv_cache_spec_kind": "full_attention",
    }
    removed = [
        {"type": "BlockRemoved", "block_hashes": [name], "medium": "GPU", "group_idx": 0}
        for name in reversed(names(prompt - RESIDENT_PROMPTS))
    ]
    return [stored, *removed]


def of_sglang(prompt: int) -> list[object]:
    pages, ids = names(prompt), tokens(prompt)
    stored = [
        {
            "type": "BlockStored",
            "block_hashes": [page - (1 << 63)],
            "parent_block_hash": pages[at - 1] - (1 << 63) if at else None,
            "token_ids": ids[at * BLOCK_TOKENS : (at + 1) * BLOCK_TOKENS],
            "block_size": BLOCK_TOKENS,
            "lora_id": None,
            "medium": "GPU",
        }
        for at, page in enumerate(pages)
    ]
    removed = [
        {"type": "BlockRemoved", "block_hashes": [name - (1 << 63)], "medium": "GPU"}
        for name in reversed(names(prompt - RESIDENT_PROMPTS))
    ]
    return [*stored, *removed]


def of_old_sglang(prompt: int) -> list[object]:
    return [list(event.values()) for event in of_sglang(prompt) if isinstance(event, dict)]


def timed() -> Iterator[str]:
    for title, told in (
        ("vLLM, one event", of_vllm),
        ("SGLang, an event a page", of_sglang),
        ("SGLang 0.5.17, arrays", of_old_sglang),
    ):
        payloads = [msgspec.msgpack.encode([1.0, told(prompt), 0]) for prompt in range(ROUNDS)]
        binding = KvBinding(0.0)
        begun_ns = time.process_time_ns()
        for payload in payloads:
            read_batch(payload)
        read_ns = time.process_time_ns() - begun_ns
        begun_ns = time.process_time_ns()
        for number, payload in enumerate(payloads):
            binding.apply(read_batch(payload).events, number / 100)
        spent_ns = time.process_time_ns() - begun_ns
        assert len(binding.tree) == RESIDENT_PROMPTS * PROMPT_BLOCKS
        yield (
            f"{title:26}{ROUNDS * 1e9 / spent_ns:10.0f} prompts/s a core, "
            f"{spent_ns / ROUNDS / 1000:.1f} µs each, of them {read_ns / ROUNDS / 1000:.1f} to read"
        )


def bound() -> str:
    """Time what a request costs beyond its events."""
    binding = KvBinding(0.0)
    ends = [512, 1024, 1536, 2048]
    spent_ns = 0
    for prompt in range(ROUNDS):
        now_s = 1.0 + prompt / 100
        chain = PrefixChain(0, [prompt * 4 + at + 1 for at in range(4)], ends, 2048)
        events = read_batch(msgspec.msgpack.encode([1.0, of_vllm(prompt), 0])).events
        begun_ns = time.process_time_ns()
        binding.dispatched(prompt, chain, now_s)
        spent_ns += time.process_time_ns() - begun_ns
        binding.apply(events, now_s + 0.001)
        begun_ns = time.process_time_ns()
        binding.prefill_ended(prompt, now_s + 0.002)
        binding.released(prompt, Usage(PROMPT_TOKENS + prompt % 16, 9, 0), now_s + 0.003)
        binding.advance(now_s + 0.004)
        spent_ns += time.process_time_ns() - begun_ns
    return f"{'a request, bound or not':26}{spent_ns / ROUNDS / 1000:10.1f} µs"


def memory(blocks: int) -> Iterator[str]:
    above = Points(1).bind(0, 0, 0)
    for title, run_blocks in (("runs of 128", 128), ("runs of 8", 8), ("runs of 1", 1)):
        tracemalloc.start()
        tree = KvTree(0.0, blocks_max=blocks)
        before, _ = tracemalloc.get_traced_memory()
        for first in range(1, blocks - run_blocks + 2, run_blocks):
            hashes = [
                number * _SPREAD & (1 << 64) - 1 for number in range(first, first + run_blocks)
            ]
            tree.store(hashes, None, GPU, 1.0)
        after, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        mib = (after - before) / len(tree) * 1_000_000 / (1 << 20)
        yield f"{title:26}{mib:10.0f} MiB a million blocks"
    tracemalloc.start()
    points = Points(limits.KV_POINTS_MAX)
    before, _ = tracemalloc.get_traced_memory()
    for chain in range(1, blocks // 10):
        point = points.bind(chain * _SPREAD & (1 << 64) - 1, -chain, chain % 1000)
        if chain % 8:
            points.join(above, point)
        above = point
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    yield f"{'a bound chain hash':26}{(after - before) / len(points):10.0f} octets"


def main(argv: list[str]) -> int:
    blocks = int(argv[0]) if argv else BLOCKS
    for line in (*timed(), bound(), *memory(blocks)):
        print(line)  # noqa: T201  # a command
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
