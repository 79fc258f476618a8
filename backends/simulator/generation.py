"""What every generating endpoint boils down to, and the checks that all of them share."""

from __future__ import annotations

from collections.abc import Container
from typing import NamedTuple, Protocol

import msgspec
import orjson

from backends.simulator.api_errors import ApiError
from backends.simulator.clockwork import Clockwork, Sequence
from backends.simulator.kv_cache import root_hash
from backends.simulator.settings import Settings
from backends.simulator.tokens import StopFinder, WordSource, count_tokens

CHOICES_MAX = 1024


class Generation(msgspec.Struct, frozen=True, kw_only=True):
    """A request in one form, whichever endpoint it came by."""

    request_id: str
    model: str
    prompts: tuple[bytes, ...]
    created: int = 0
    choices_per_prompt: int = 1
    max_tokens: int | None = None
    max_tokens_default: int = 16
    min_tokens: int = 0
    ignore_end: bool = False
    stops: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False
    priority: int = 0
    salt: str = ""
    seed: int = 0


class Usage(NamedTuple):
    """Tokens of an exchange."""

    prompt_tokens: int
    cached_tokens: int
    created_cache_tokens: int
    completion_tokens: int


class Choice(NamedTuple):
    """One whole answer."""

    text: str
    finish_reason: str
    stop: str | None


class Presenter(Protocol):
    """How an endpoint words its answers. Texts are made of words, so they need no JSON escapes."""

    def ahead(self) -> bytes:
        """Return what vLLM sends before it computes anything."""

    def opening(self) -> bytes:
        """Return what comes before the first text, sent together with it."""

    def piece(self, choice: int, text: str) -> bytes:
        """Return a chunk of text."""

    def end(self, choice: int, text: str, reason: str, stop: str | None) -> bytes:
        """Return the last chunk of a choice."""

    def closing(self, usage: Usage) -> bytes:
        """Return what ends the stream."""

    def failure(self, error: ApiError) -> bytes:
        """Return what ends a stream that failed."""

    def whole(self, choices: list[Choice], usage: Usage) -> bytes:
        """Return the body of an answer that is not streamed."""


def sse(value: object) -> bytes:
    """Return one server-sent event."""
    return b"data: %b\n\n" % orjson.dumps(value)


def known_model(settings: Settings, adapters: Container[str], name: str) -> str:
    """Return the adapter that `name` means, "" for the model itself. Raises `ApiError` 404."""
    if name in settings.models:
        return ""
    if name in adapters:
        return name
    raise ApiError(404, f"The model `{name}` does not exist.", param="model")


def make_sequences(
    generation: Generation, settings: Settings, adapters: Container[str], clockwork: Clockwork
) -> list[Sequence]:
    """Return the sequences of a request, prompt by prompt. Raises `ApiError` 400 for those that
    could never be computed."""
    adapter = known_model(settings, adapters, generation.model)
    root = root_hash(adapter, generation.salt)
    if len(generation.prompts) * generation.choices_per_prompt > CHOICES_MAX:
        raise ApiError(400, f"at most {CHOICES_MAX} choices can be asked for at once", param="n")
    sequences = []
    for prompt in generation.prompts:
        max_tokens = _answer_tokens(generation, settings, count_tokens(prompt))
        if not clockwork.fits(count_tokens(prompt), max_tokens):
            raise ApiError(
                400,
                f"{count_tokens(prompt)} prompt tokens and {max_tokens} output tokens do not fit "
                f"into the KV cache of {settings.kv_blocks_max * settings.block_tokens} tokens; "
                "shorten the prompt or lower max_tokens",
            )
        for number in range(generation.choices_per_prompt):
            seed = settings.seed + generation.seed * CHOICES_MAX + number
            words = WordSource(prompt, seed)
            sequence = Sequence(prompt, max_tokens=max_tokens, words=words)
            if settings.mean_output_tokens and not generation.ignore_end:
                drawn = words.draw_length(settings.mean_output_tokens)
                sequence.natural_end = max(drawn, generation.min_tokens)
            if generation.stops:
                sequence.stops = StopFinder(generation.stops)
            sequence.rank = settings.rank(generation.priority)
            sequence.root = root
            sequence.adapter = adapter
            sequence.streaming = generation.stream
            sequences.append(sequence)
    return sequences


def _answer_tokens(generation: Generation, settings: Settings, prompt_tokens: int) -> int:
    limit = settings.context_tokens_max
    if not prompt_tokens:
        raise ApiError(400, "the prompt is empty; send at least one token", param="prompt")
    if prompt_tokens >= limit:
        raise ApiError(
            400,
            f"This model's maximum context length is {limit} tokens. However, your request has "
            f"{prompt_tokens} input tokens. Please reduce the length of the input messages.",
            param="input_tokens",
        )
    if generation.max_tokens is None:
        return min(generation.max_tokens_default, limit - prompt_tokens)
    if prompt_tokens + generation.max_tokens > limit:
        raise ApiError(
            400,
            f"'max_tokens' is too large: {generation.max_tokens}. This model's maximum context "
            f"length is {limit} tokens and your request has {prompt_tokens} input tokens.",
            param="max_tokens",
        )
    return generation.max_tokens


def count_usage(sequences: list[Sequence], choices_per_prompt: int, block_tokens: int) -> Usage:
    """Return the tokens of an exchange; a prompt with several choices counts once."""
    prompts = sequences[::choices_per_prompt]
    cached_tokens = created_tokens = 0
    for sequence in prompts:
        cached = max(0, sequence.cached_tokens)
        cached_tokens += cached
        created_tokens += sequence.prompt_tokens // block_tokens * block_tokens - cached
    return Usage(
        sum(sequence.prompt_tokens for sequence in prompts),
        cached_tokens,
        max(0, created_tokens),
        sum(sequence.generated_tokens for sequence in sequences),
    )
