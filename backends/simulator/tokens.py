"""What stands in for a tokenizer and for a model's words.

A token is four bytes of the rendered UTF-8 text, the last one padded with NUL; its id is those
bytes as a little-endian unsigned integer. So a token array is `bytes`, its length is a shift, and
hashing a block is hashing a slice: a prompt of 100,000 tokens costs milliseconds.

The chat template pads every part to whole tokens and ends an open prompt with exactly what begins
the assistant's message in the next turn. Generated words are four ASCII bytes each. Together: the
prompt of turn n plus its answer is a prefix, token by token, of the prompt of turn n + 1.
"""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import orjson
import xxhash

TOKEN_BYTES = 4
TOKEN_ID_MAX = 2**32 - 1
_MASK64 = 2**64 - 1
_MESSAGE_END = b"<|/|"

_CONSONANTS = "bcdfghjklmnprstvwz"
WORDS: tuple[str, ...] = tuple(
    f" {a}{vowel}{b}" for a in _CONSONANTS for vowel in "aeiou" for b in _CONSONANTS
)[:1024]
WORD_BYTES: tuple[bytes, ...] = tuple(word.encode() for word in WORDS)


def pad(data: bytes) -> bytes:
    """Return `data` filled up to whole tokens."""
    return data + b"\0" * (-len(data) % TOKEN_BYTES)


def encode_text(text: str) -> bytes:
    """Return the tokens of a plain text."""
    return pad(text.encode())


def decode_tokens(tokens: bytes) -> str:
    """Return the text of `tokens`; ids that no text has come out as replacement characters."""
    return tokens.replace(b"\0", b"").decode("utf-8", "replace")


def count_tokens(tokens: bytes | bytearray) -> int:
    """Return how many tokens an array holds."""
    return len(tokens) // TOKEN_BYTES


def pack_ids(ids: Iterable[int]) -> bytes:
    """Return the array of given ids. Raises `OverflowError` for one beyond 32 bits unsigned."""
    packed = array("I", ids)
    assert packed.itemsize == TOKEN_BYTES
    return packed.tobytes()


def unpack_ids(tokens: bytes | bytearray) -> list[int]:
    """Return the ids of an array."""
    unpacked = array("I")
    unpacked.frombytes(tokens)
    return unpacked.tolist()


def _content_text(content: object) -> str:
    """Flatten the content of a message: text parts as they are, others as their JSON."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return orjson.dumps(content).decode()
    parts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) else part
        parts.append(text if isinstance(text, str) else orjson.dumps(part).decode())
    return "".join(parts)


def render_chat(
    messages: Sequence[dict[str, Any]], tools: object = None, *, open_answer: bool = True
) -> bytes:
    """Return the tokens of a conversation; `open_answer` appends the head of the answer."""
    parts: list[bytes] = []
    if tools:
        parts += (encode_text("<|tools|>"), pad(orjson.dumps(tools)), _MESSAGE_END)
    for message in messages:
        text = _content_text(message.get("content"))
        calls = message.get("tool_calls")
        if calls:
            text += orjson.dumps(calls).decode()
        parts += (encode_text(f"<|{message.get('role')}|>"), encode_text(text), _MESSAGE_END)
    if open_answer:
        parts.append(encode_text("<|assistant|>"))
    return b"".join(parts)


class WordSource:
    """The deterministic answer to a prompt: which word comes next and when it ends by itself."""

    __slots__ = ("_state",)

    def __init__(self, prompt: bytes, seed: int) -> None:
        self._state = xxhash.xxh3_64_intdigest(prompt, seed & _MASK64)

    def next_word(self) -> int:
        """Return the index in `WORDS` of the next token."""
        # Knuth's MMIX generator; its high bits are the good ones.
        self._state = (self._state * 6364136223846793005 + 1442695040888963407) & _MASK64
        return self._state >> 54

    def draw_length(self, mean_tokens: float) -> int:
        """Return how long this answer is by itself: exponential about the mean, at least one."""
        unit = (xxhash.xxh3_64_intdigest(b"length", self._state) + 1) / 2**64
        return max(1, round(-mean_tokens * math.log(unit)))


class StopFinder:
    """Finds stop strings in text that comes in pieces and holds back what may become one."""

    __slots__ = ("_held", "_hold_chars", "_pattern")

    def __init__(self, stops: Sequence[str]) -> None:
        self._pattern = re.compile("|".join(re.escape(stop) for stop in stops))
        self._hold_chars = max(len(stop) for stop in stops) - 1
        self._held = ""

    def feed(self, piece: str) -> tuple[str, str | None]:
        """Return the text that may go out now, and the stop string that ends it, if one does."""
        text = self._held + piece
        found = self._pattern.search(text)
        if found:
            self._held = ""
            return text[: found.start()], found[0]
        cut = max(0, len(text) - self._hold_chars)
        self._held = text[cut:]
        return text[:cut], None

    def flush(self) -> str:
        """Return what was held back, at the end for another reason."""
        text, self._held = self._held, ""
        return text
