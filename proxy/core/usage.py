"""Token counts from the end of an answer, without reading the answer.

Engines put `usage` last, or nearly. Only the tail is searched, and a search is enough here: inside
a JSON string every quote is escaped, so the octets `"usage":` cannot be text that a model wrote.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final, NamedTuple

import msgspec

from proxy.core import wire

_Reader = Callable[[bytes], tuple[int, int, int] | None]

_read: _Reader | None
try:
    from proxy.core._scan import usage as _read
except ImportError:
    _read = None

_OBJECT: Final = re.compile(rb"\s*:\s*\{")


class Usage(NamedTuple):
    """Counts as the engine reports them; None where it does not say."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int | None


def read_usage(tail: bytes) -> Usage | None:
    """Return the last usage object in the tail of an answer, or None."""
    if _read is not None:  # `_scan.c` reads the usual form, and leaves all else
        counts = _read(tail)
        if counts is not None:
            prompt_tokens, completion_tokens, cached_tokens = counts
            cached = cached_tokens if cached_tokens >= 0 else None
            # Its own constructor is interpreted, of which every request would pay.
            return tuple.__new__(Usage, (prompt_tokens, completion_tokens, cached))
    return read_any_usage(tail)


def read_any_usage(tail: bytes) -> Usage | None:
    """The same, whatever its form."""
    start, found = -1, len(tail)
    while start < 0:  # `"usage"` may also be a value, all of a generated text
        found = tail.rfind(b'"usage"', 0, found)
        if found < 0:
            return None
        start = _object_start(tail, found + 7)
    end = _object_end(tail, start)
    if end < 0:
        return None
    try:
        said = wire.counts.decode(tail[start:end])
    except (msgspec.MsgspecError, RecursionError):
        return None
    prompt = said.prompt_tokens if said.prompt_tokens is not None else said.input_tokens
    output = said.completion_tokens if said.completion_tokens is not None else said.output_tokens
    if prompt is None:
        return None
    details = said.prompt_tokens_details or said.input_tokens_details
    cached = details.cached_tokens if details is not None else said.cache_read_input_tokens
    return Usage(prompt, output or 0, cached)


def _object_start(data: bytes, at: int) -> int:
    """Return the index of the object that is the value of the key before `at`, or -1."""
    if data[at : at + 2] == b":{":
        return at + 1
    match = _OBJECT.match(data, at)
    return match.end() - 1 if match else -1


def _object_end(data: bytes, start: int) -> int:
    """Return the index after the object at `start`; usage objects hold no strings with braces."""
    depth = 1
    at = start + 1
    while (close := data.find(b"}", at)) >= 0:
        depth += data.count(b"{", at, close) - 1
        at = close + 1
        if depth == 0:
            return at
    return -1
