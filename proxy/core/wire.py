"""What engines say of token counts, as msgspec reads it.

A module of its own because mypyc, which translates the data path, keeps no annotations that msgspec
could read: only what is not translated can be decoded into.
"""

from __future__ import annotations

import msgspec


class Details(msgspec.Struct):
    cached_tokens: int | None = None


class Counts(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: Details | None = None
    # Responses and Anthropic names for the same things.
    input_tokens: int | None = None
    output_tokens: int | None = None
    input_tokens_details: Details | None = None
    cache_read_input_tokens: int | None = None


counts: msgspec.json.Decoder[Counts] = msgspec.json.Decoder(Counts)
