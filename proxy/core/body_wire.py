"""The fields of a request body that are ours, as msgspec reads them.

A module of its own for the same reason as `wire.py`: what msgspec decodes into is not translated.
"""

from __future__ import annotations

from typing import Final

import msgspec
from msgspec import Raw

NOTHING: Final = Raw()


class Typed(msgspec.Struct, gc=False):
    """The fields as msgspec reads them: the names that are ours, in the order of `scan.Fields`."""

    model: str = ""
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    session_id: str | None = None
    cache_salt: str | None = None
    lora_path: str | None = None
    previous_response_id: str | None = None
    stream: bool | None = None
    max_tokens: Raw = NOTHING
    max_completion_tokens: Raw = NOTHING
    max_output_tokens: Raw = NOTHING
    n: Raw = NOTHING
    messages: Raw = NOTHING
    prompt: Raw = NOTHING
    tools: Raw = NOTHING
    system: Raw = NOTHING
    instructions: Raw = NOTHING
    query: Raw = NOTHING
    input: Raw = NOTHING
    documents: Raw = NOTHING
    text_1: Raw = NOTHING
    input_ids: Raw = NOTHING
    session_params: Raw = NOTHING


class Untyped(msgspec.Struct, gc=False):
    """The same fields where one of them is not of its type, to say which, or to leave it out."""

    model: Raw = NOTHING
    service_tier: Raw = NOTHING
    prompt_cache_key: Raw = NOTHING
    session_id: Raw = NOTHING
    cache_salt: Raw = NOTHING
    lora_path: Raw = NOTHING
    previous_response_id: Raw = NOTHING
    stream: Raw = NOTHING
    max_tokens: Raw = NOTHING
    max_completion_tokens: Raw = NOTHING
    max_output_tokens: Raw = NOTHING
    n: Raw = NOTHING
    messages: Raw = NOTHING
    prompt: Raw = NOTHING
    tools: Raw = NOTHING
    system: Raw = NOTHING
    instructions: Raw = NOTHING
    query: Raw = NOTHING
    input: Raw = NOTHING
    documents: Raw = NOTHING
    text_1: Raw = NOTHING
    input_ids: Raw = NOTHING
    session_params: Raw = NOTHING


class SessionParams(msgspec.Struct, gc=False):
    """What we read of SGLang's `session_params`."""

    id: str | None = None


decoder: Final = msgspec.json.Decoder(Typed)
untyped: Final = msgspec.json.Decoder(Untyped)
elements: Final[msgspec.json.Decoder[list[Raw]]] = msgspec.json.Decoder(list[Raw])
session_params: Final = msgspec.json.Decoder(SessionParams)
string: Final[msgspec.json.Decoder[str | None]] = msgspec.json.Decoder(str | None)
number: Final[msgspec.json.Decoder[int | float]] = msgspec.json.Decoder(int | float)
flag: Final[msgspec.json.Decoder[bool | None]] = msgspec.json.Decoder(bool | None)
