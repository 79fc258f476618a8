"""/v1/messages and /v1/messages/count_tokens, as Anthropic clients speak."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
import orjson
from msgspec import Meta

from backends.simulator.api_errors import ApiError, anthropic_error
from backends.simulator.bodies import Arrival, check_roles, parse_stops
from backends.simulator.generation import Choice, Generation, Usage
from backends.simulator.tokens import render_chat

_STOP_REASONS = {"length": "max_tokens", "stop": "end_turn"}


class CountBody(msgspec.Struct, kw_only=True):
    """/v1/messages/count_tokens."""

    model: str
    messages: Annotated[list[dict[str, Any]], Meta(min_length=1)]
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None


class MessagesBody(CountBody, kw_only=True):
    """/v1/messages."""

    max_tokens: Annotated[int, Meta(ge=1)]
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Meta(ge=0)] | None = None
    cache_salt: str | None = None


def render_messages(body: CountBody) -> bytes:
    """Return the tokens of a conversation; the system prompt goes first."""
    check_roles(body.messages)
    messages = body.messages
    if body.system:
        messages = [{"role": "system", "content": body.system}, *messages]
    return render_chat(messages, body.tools)


def parse_messages(body: MessagesBody, arrival: Arrival) -> Generation:
    """Return the request in the common form."""
    return Generation(
        request_id=arrival.request_id,
        model=body.model,
        prompts=(render_messages(body),),
        created=arrival.created,
        max_tokens=body.max_tokens,
        stops=parse_stops(body.stop_sequences),
        stream=bool(body.stream),
        include_usage=True,
        priority=arrival.priority or 0,
        salt=body.cache_salt or "",
    )


class MessagesPresenter:
    """One block of text in one message. The input's tokens are known at the end only, as the
    cached ones are; the opening tells the count alone."""

    def __init__(self, generation: Generation, prompt_tokens: int) -> None:
        self._generation = generation
        self._prompt_tokens = prompt_tokens
        self._reason = "end_turn"
        self._stop: str | None = None

    def ahead(self) -> bytes:
        """Return nothing: the first event comes with the first token."""
        return b""

    def opening(self) -> bytes:
        """Return the start of the message and of its block."""
        usage = {"input_tokens": self._prompt_tokens, "output_tokens": 0}
        message = self._message([], usage) | {"stop_reason": None, "stop_sequence": None}
        return b"".join(
            (
                _event({"type": "message_start", "message": message}),
                _event(
                    {
                        "type": "content_block_start",
                        "index": 0,
                        "content_block": {"type": "text", "text": ""},
                    }
                ),
            )
        )

    def piece(self, choice: int, text: str) -> bytes:
        """Return a chunk of text."""
        assert choice == 0
        return b"%b%b%b" % (_DELTA_HEAD, text.encode(), _DELTA_TAIL)

    def end(self, choice: int, text: str, reason: str, stop: str | None) -> bytes:
        """Return the last text; the closing events follow with the usage."""
        self._end_with(reason, stop)
        return self.piece(choice, text) if text else b""

    def closing(self, usage: Usage) -> bytes:
        """Return the end of the block and of the message."""
        delta = {"stop_reason": self._reason, "stop_sequence": self._stop}
        return b"".join(
            (
                _event({"type": "content_block_stop", "index": 0}),
                _event({"type": "message_delta", "delta": delta, "usage": _usage_value(usage)}),
                _event({"type": "message_stop"}),
            )
        )

    def failure(self, error: ApiError) -> bytes:
        """Return the error event."""
        return _event({**anthropic_error(error), "type": "error"})

    def whole(self, choices: list[Choice], usage: Usage) -> bytes:
        """Return the body of an answer that is not streamed."""
        choice = choices[0]
        self._end_with(choice.finish_reason, choice.stop)
        content = [{"type": "text", "text": choice.text}]
        return orjson.dumps(self._message(content, _usage_value(usage)))

    def _end_with(self, reason: str, stop: str | None) -> None:
        self._reason = "stop_sequence" if stop else _STOP_REASONS.get(reason, reason)
        self._stop = stop

    def _message(self, content: list[dict[str, str]], usage: dict[str, int]) -> dict[str, object]:
        return {
            "id": f"msg_{self._generation.request_id}",
            "type": "message",
            "role": "assistant",
            "content": content,
            "model": self._generation.model,
            "stop_reason": self._reason,
            "stop_sequence": self._stop,
            "usage": usage,
        }


def _usage_value(usage: Usage) -> dict[str, int]:
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "cache_read_input_tokens": usage.cached_tokens,
        "cache_creation_input_tokens": 0,
    }


def _event(value: dict[str, object]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (str(value["type"]).encode(), orjson.dumps(value))


_DELTA_HEAD, _DELTA_TAIL = (
    b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,'
    b'"delta":{"type":"text_delta","text":"',
    b'"}}\n\n',
)
