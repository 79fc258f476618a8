"""Token counts from the end of an answer, without reading the answer.

Engines put `usage` last, or nearly. Only the tail is searched, and a search is enough here: inside
a JSON string every quote is escaped, so the octets `"usage":` cannot be text that a model wrote.
"""

from __future__ import annotations

import re
from typing import Annotated, Final

import msgspec

_USAGE: Final = re.compile(rb'"usage"\s*:\s*(\{)')
_END: Final = re.compile(rb"[{}]")


# Counts are added up and exported: one below zero or beyond any context is no count.
_Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]


class _Details(msgspec.Struct):
    cached_tokens: _Count | None = None


class Usage(msgspec.Struct, frozen=True):
    """Counts as the engine reports them; None where it does not say."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int | None


class _Wire(msgspec.Struct):
    prompt_tokens: _Count | None = None
    completion_tokens: _Count | None = None
    prompt_tokens_details: _Details | None = None
    # Responses and Anthropic names for the same things.
    input_tokens: _Count | None = None
    output_tokens: _Count | None = None
    input_tokens_details: _Details | None = None
    cache_read_input_tokens: _Count | None = None


_decoder: Final = msgspec.json.Decoder(_Wire)


def read_usage(tail: bytes) -> Usage | None:
    """Return the last usage object in the tail of an answer, or None."""
    start = len(tail)
    match = None
    while match is None:  # `"usage"` may also be a value, all of a generated text
        start = tail.rfind(b'"usage"', 0, start)
        if start < 0:
            return None
        match = _USAGE.match(tail, start)
    end = _object_end(tail, match.start(1))
    if end < 0:
        return None
    try:
        wire = _decoder.decode(tail[match.start(1) : end])
    except (msgspec.MsgspecError, RecursionError):
        return None
    prompt = wire.prompt_tokens if wire.prompt_tokens is not None else wire.input_tokens
    output = wire.completion_tokens if wire.completion_tokens is not None else wire.output_tokens
    if prompt is None:
        return None
    details = wire.prompt_tokens_details or wire.input_tokens_details
    cached = details.cached_tokens if details is not None else wire.cache_read_input_tokens
    return Usage(prompt, output or 0, cached)


def _object_end(data: bytes, start: int) -> int:
    """Return the index after the object at `start`; usage objects hold no strings with braces."""
    depth = 0
    for match in _END.finditer(data, start):
        depth += 1 if match[0] == b"{" else -1
        if depth == 0:
            return match.end()
    return -1
