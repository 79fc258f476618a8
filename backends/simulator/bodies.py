"""The bodies of the OpenAI endpoints as types, and how they become a `Generation`.

Types are checked strictly, in one pass with the decoding: a wrong type names its place. Unknown
fields are accepted and ignored, as the engines do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from backends.simulator.api_errors import ApiError
from backends.simulator.generation import Generation
from backends.simulator.settings import CHAT_TOKENS_DEFAULT, COMPLETION_TOKENS_DEFAULT
from backends.simulator.tokens import TOKEN_ID_MAX, encode_text, pack_ids, render_chat

TokenId = Annotated[int, Meta(ge=0, le=TOKEN_ID_MAX)]
Positive = Annotated[int, Meta(ge=1)]
Prompt = str | list[str | TokenId | list[TokenId]]
Body = TypeVar("Body", bound=msgspec.Struct)

STOPS_MAX = 16


class StreamOptions(msgspec.Struct):
    """What else a stream carries."""

    include_usage: bool = False


class Sampling(msgspec.Struct, kw_only=True):
    """Fields that chat and completions share; those without effect are still checked."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Positive | None = None
    max_tokens: Positive | None = None
    min_tokens: Annotated[int, Meta(ge=0)] | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    temperature: Annotated[float, Meta(ge=0)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    ignore_eos: bool = False
    priority: int | None = None
    cache_salt: str | None = None
    extra_key: str | None = None
    request_id: str | None = None  # vLLM's name for a chosen id
    rid: str | None = None  # SGLang's


class ChatBody(Sampling, kw_only=True):
    """/v1/chat/completions."""

    messages: Annotated[list[dict[str, Any]], Meta(min_length=1)]
    max_completion_tokens: Positive | None = None
    tools: list[dict[str, Any]] | None = None
    add_generation_prompt: bool = True


class CompletionBody(Sampling, kw_only=True):
    """/v1/completions."""

    prompt: Prompt


class EmbeddingBody(msgspec.Struct, kw_only=True):
    """/v1/embeddings."""

    model: str
    input: Prompt
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Meta(ge=1, le=4096)] | None = None


class Arrival(msgspec.Struct, frozen=True, kw_only=True):
    """What the server knows of a request beside its body."""

    request_id: str
    created: int = 0
    priority: int | None = None  # of a header, over the body's


def decode_body(kind: type[Body], body: bytes) -> Body:
    """Return `body` as `kind`. Raises `ApiError` 400 that says what is wrong where."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise ApiError(400, str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from error


def parse_chat(body: ChatBody, arrival: Arrival) -> Generation:
    """Return the request in the common form."""
    check_roles(body.messages)
    prompt = render_chat(body.messages, body.tools, open_answer=body.add_generation_prompt)
    max_tokens = body.max_completion_tokens or body.max_tokens
    return _common(body, arrival, (prompt,), max_tokens or -CHAT_TOKENS_DEFAULT)


def parse_completion(body: CompletionBody, arrival: Arrival) -> Generation:
    """Return the request in the common form."""
    prompts = parse_prompts(body.prompt)
    return _common(body, arrival, prompts, body.max_tokens or -COMPLETION_TOKENS_DEFAULT)


def check_roles(messages: Sequence[dict[str, Any]]) -> None:
    """Raise `ApiError` 400 unless every message says who speaks."""
    if not all(isinstance(message.get("role"), str) for message in messages):
        raise ApiError(400, "every message needs a role", param="messages")


def parse_prompts(prompt: Prompt) -> tuple[bytes, ...]:
    """Return the token arrays of one or several texts or lists of ids."""
    if isinstance(prompt, str):
        return (encode_text(prompt),)
    kinds = {type(item) for item in prompt}
    if len(kinds) != 1:
        raise ApiError(400, "a prompt is a text, token ids, or a list of one of them")
    if kinds == {int}:
        return (pack_ids(item for item in prompt if isinstance(item, int)),)
    return tuple(
        encode_text(item) if isinstance(item, str) else pack_ids(item)
        for item in prompt
        if not isinstance(item, int)
    )


def parse_stops(stop: str | list[str] | None) -> tuple[str, ...]:
    """Return the stop strings."""
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(stops) > STOPS_MAX or not all(stops):
        raise ApiError(400, f"stop takes up to {STOPS_MAX} texts, none empty", param="stop")
    return stops


def _common(
    body: Sampling, arrival: Arrival, prompts: tuple[bytes, ...], max_tokens: int
) -> Generation:
    """Return the common form; a negative `max_tokens` is what holds where none is asked for."""
    if body.stream_options is not None and not body.stream:
        raise ApiError(
            400, "Stream options can only be defined when `stream=True`.", param="stream_options"
        )
    priority = arrival.priority if arrival.priority is not None else body.priority
    return Generation(
        request_id=body.rid or body.request_id or arrival.request_id,
        model=body.model,
        prompts=prompts,
        created=arrival.created,
        choices_per_prompt=body.n or 1,
        max_tokens=max_tokens if max_tokens > 0 else None,
        max_tokens_default=abs(max_tokens),
        min_tokens=body.min_tokens or 0,
        ignore_end=body.ignore_eos,
        stops=parse_stops(body.stop),
        stream=bool(body.stream),
        include_usage=body.stream_options is not None and body.stream_options.include_usage,
        priority=priority or 0,
        salt=(body.cache_salt or "") + (body.extra_key or ""),  # as SGLang joins them
        seed=body.seed or 0,
    )
