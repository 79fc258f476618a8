"""From block ids to the bytes of a request.

Equal ids must become equal text, or the replay has no prefix to reuse: a block's text is a
function of its id, the seed and nothing else. Words of three letters with the space before them
are four bytes, and one token in the vocabularies of today's models, so that a prompt has about the
length that the trace says on a real engine as well as on one that counts bytes. All of it is plain
ASCII without quotes or backslashes: it needs no escaping in JSON.

Chat requests are cut into messages at block boundaries, system first and user last, so that where
the next turn's ids extend this turn's, its messages do too.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from itertools import islice
from typing import Literal

import msgspec
import orjson

from loadtest.traces import Arrival, block_ids
from loadtest.words import WORDS

Api = Literal["chat", "completions"]

WORD_BYTES = [f" {word}".encode() for word in WORDS]
WORD_LENGTH_BYTES = 4

CACHE_BYTES_MAX = 64 * 1024 * 1024  # text of recent blocks; a replay comes back to few of them
ENTRY_OVERHEAD_BYTES = 250  # of a key and a place in the cache

_ROLE_HEADS = {
    "system": b'{"role":"system","content":"',
    "user": b'{"role":"user","content":"',
    "assistant": b'{"role":"assistant","content":"',
}


class Style(msgspec.Struct, frozen=True, kw_only=True):
    """What a request looks like on the wire, apart from its prompt."""

    model: str
    api: Api = "chat"
    bytes_per_token: int = 4
    seed: int = 0  # another seed is another text for every block: nothing cached is found again
    ignore_eos: bool = True  # engines' extension: answer as long as the trace says


class PromptWriter:
    """Writes request bodies; remembers the text of recent blocks, within a bound."""

    def __init__(
        self, style: Style, block_tokens: int = 512, cache_bytes_max: int = CACHE_BYTES_MAX
    ) -> None:
        self.style = style
        entry_bytes = block_tokens * style.bytes_per_token + ENTRY_OVERHEAD_BYTES
        entries_max = max(1, cache_bytes_max // entry_bytes)
        self._block = functools.lru_cache(maxsize=entries_max)(self._make_block)
        ignore_eos = b',"ignore_eos":true' if style.ignore_eos else b""
        self._tail = (
            b',"model":%b%b,"stream":true,"stream_options":{"include_usage":true},"max_tokens":'
            % (orjson.dumps(style.model), ignore_eos)
        )

    def body(self, arrival: Arrival) -> bytes:
        """Return the JSON body of the request."""
        if self.style.api == "completions":
            prompt: list[bytes] = [
                b'{"prompt":"',
                *(text for _, text in self._messages(arrival)),
                b'"',
            ]
        else:
            prompt = [b'{"messages":[']
            for role, text in self._messages(arrival):
                prompt += [_ROLE_HEADS[role], text, b'"},']
            prompt[-1] = b'"}]'
        return b"".join((*prompt, self._tail, str(arrival.output_tokens).encode(), b"}"))

    def _messages(self, arrival: Arrival) -> Iterator[tuple[str, bytes]]:
        """Yield role and escaped text of each message; never none."""
        if arrival.texts:
            for place, message in enumerate(arrival.texts):
                escaped = orjson.dumps(message.encode("utf-8", "replace").decode())
                yield "assistant" if place % 2 else "user", escaped[1:-1]
            return
        sizes = message_sizes(arrival)
        pieces = self._pieces(arrival)
        for place, size in enumerate(sizes):
            text = b"".join(islice(pieces, size))
            if place == 0 and _has_system(arrival):
                yield "system", text
            elif place == len(sizes) - 1:
                yield "user", text
            else:
                yield "assistant" if (place - _has_system(arrival)) % 2 else "user", text

    def _pieces(self, arrival: Arrival) -> Iterator[bytes]:
        """Yield the blocks' text, the last one cut to the prompt's length."""
        bytes_per_token = self.style.bytes_per_token
        block_bytes = arrival.block_tokens * bytes_per_token
        last = arrival.block_count - 1
        cut_tokens = min(
            max(1, arrival.input_tokens - last * arrival.block_tokens), arrival.block_tokens
        )
        for place, block_id in enumerate(block_ids(arrival)):
            text = self._block(block_id, block_bytes)
            yield text if place < last else text[: cut_tokens * bytes_per_token]

    def _make_block(self, block_id: int, block_bytes: int) -> bytes:
        name = b"%d:%d" % (self.style.seed, block_id)
        choices = hashlib.shake_128(name).digest(-(-block_bytes // WORD_LENGTH_BYTES))
        return b"".join([WORD_BYTES[choice] for choice in choices])[:block_bytes]


def _has_system(arrival: Arrival) -> bool:
    return min(arrival.system_blocks, arrival.block_count - 1) > 0


def message_sizes(arrival: Arrival) -> list[int]:
    """Return the number of blocks of each message, the system message first where there is one.

    The last message is the user's, so at least one block is left for it.
    """
    total = arrival.block_count
    system = min(arrival.system_blocks, total - 1)
    rest = list(arrival.message_blocks)
    if sum(rest) != total - system:  # not given, or the prompt is shorter than its own head
        rest = [1] * (total - system)
    return [system, *rest] if system else rest
