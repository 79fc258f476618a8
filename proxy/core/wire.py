"""What engines say of token counts, as msgspec reads it.

A module of its own because mypyc, which translates the data path, keeps no annotations that msgspec
could read: only what is not translated can be decoded into.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from proxy.core import limits

Count = Annotated[int, msgspec.Meta(ge=0, le=limits.USAGE_TOKENS_MAX)]


class Details(msgspec.Struct):
    cached_tokens: Count | None = None


class Counts(msgspec.Struct):
    prompt_tokens: Count | None = None
    completion_tokens: Count | None = None
    prompt_tokens_details: Details | None = None
    # Responses and Anthropic names for the same things.
    input_tokens: Count | None = None
    output_tokens: Count | None = None
    input_tokens_details: Details | None = None
    cache_read_input_tokens: Count | None = None


counts: msgspec.json.Decoder[Counts] = msgspec.json.Decoder(Counts)
