"""/v1/responses: one message of text, whole or as named events.

State is not kept: `previous_response_id` is refused, as vLLM does without its response store.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
import orjson
from msgspec import Meta

from backends.simulator.api_errors import ApiError
from backends.simulator.bodies import Arrival, check_roles
from backends.simulator.generation import Choice, Generation, Usage
from backends.simulator.settings import CHAT_TOKENS_DEFAULT
from backends.simulator.tokens import render_chat


class ResponsesBody(msgspec.Struct, kw_only=True):
    """/v1/responses. The service tiers are the closed set of both engines."""

    model: str
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Meta(ge=1)] | None = None
    stream: bool | None = None
    tools: list[dict[str, Any]] | None = None
    temperature: Annotated[float, Meta(ge=0)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    previous_response_id: str | None = None
    background: bool | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority"] | None = None
    metadata: dict[str, str] | None = None
    priority: int | None = None
    cache_salt: str | None = None


def parse_responses(body: ResponsesBody, arrival: Arrival) -> Generation:
    """Return the request in the common form."""
    if body.previous_response_id is not None:
        raise ApiError(
            404,
            f"Response with id '{body.previous_response_id}' not found.",
            param="previous_response_id",
        )
    if body.background:
        raise ApiError(400, "background responses need a response store", param="background")
    messages: list[dict[str, Any]] = []
    if body.instructions:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        messages.append({"role": "user", "content": body.input})
    else:
        for item in body.input:
            # Items other than messages (calls and their results) have a type in place of a role.
            role = item.get("role") or item.get("type")
            messages.append({"role": role, "content": item.get("content", item.get("output"))})
    check_roles(messages)
    if not messages:
        raise ApiError(400, "the input is empty; send at least one item", param="input")
    priority = arrival.priority if arrival.priority is not None else body.priority
    return Generation(
        request_id=arrival.request_id,
        model=body.model,
        prompts=(render_chat(messages, body.tools),),
        created=arrival.created,
        max_tokens=body.max_output_tokens,
        max_tokens_default=CHAT_TOKENS_DEFAULT,
        stream=bool(body.stream),
        include_usage=True,
        priority=priority or 0,
        salt=body.cache_salt or "",
    )


class ResponsesPresenter:
    """Numbers its events; the text is repeated whole at the end, as clients expect."""

    def __init__(self, body: ResponsesBody, generation: Generation) -> None:
        self._body = body
        self._generation = generation
        self._response_id = f"resp_{generation.request_id}"
        self._item_id = f"msg_{generation.request_id}"
        self._number = 0
        self._texts: list[str] = []
        self._reason = "stop"
        delta = {
            "type": "response.output_text.delta",
            "content_index": 0,
            "item_id": self._item_id,
            "output_index": 0,
            "logprobs": [],
        }
        self._delta_head = b"event: response.output_text.delta\ndata: " + orjson.dumps(delta)[:-1]

    def ahead(self) -> bytes:
        """Return the events that say that it is under way."""
        return b"".join(
            (
                self._event("response.created", response=self._response("in_progress")),
                self._event("response.in_progress", response=self._response("in_progress")),
            )
        )

    def opening(self) -> bytes:
        """Return the events up to the first text, but for those that are out already."""
        ahead = b"" if self._number else self.ahead()
        place: dict[str, object] = {"item_id": self._item_id, "output_index": 0, "content_index": 0}
        return b"".join(
            (
                ahead,
                self._event(
                    "response.output_item.added",
                    output_index=0,
                    item=self._message("in_progress", []),
                ),
                self._event("response.content_part.added", **place, part=_text_part("")),
            )
        )

    def piece(self, choice: int, text: str) -> bytes:
        """Return a chunk of text."""
        assert choice == 0
        self._texts.append(text)
        number = self._number
        self._number += 1
        tail = b'","sequence_number":%d}\n\n' % number
        return b'%b,"delta":"%b%b' % (self._delta_head, text.encode(), tail)

    def end(self, choice: int, text: str, reason: str, stop: str | None) -> bytes:
        """Return the last text; the closing events follow with the usage."""
        assert stop is None or reason == "stop"
        self._reason = reason
        return self.piece(choice, text) if text else b""

    def closing(self, usage: Usage) -> bytes:
        """Return the events that close part, item and response."""
        text = "".join(self._texts)
        place: dict[str, object] = {"item_id": self._item_id, "output_index": 0, "content_index": 0}
        status = self._status()
        item = self._message(status, [_text_part(text)])
        final = "response.completed" if status == "completed" else "response.incomplete"
        return b"".join(
            (
                self._event("response.output_text.done", **place, text=text, logprobs=[]),
                self._event("response.content_part.done", **place, part=_text_part(text)),
                self._event("response.output_item.done", output_index=0, item=item),
                self._event(final, response=self._response(status, [item], usage)),
            )
        )

    def failure(self, error: ApiError) -> bytes:
        """Return the error event."""
        return self._event("error", code=str(error.status), message=error.message, param=None)

    def whole(self, choices: list[Choice], usage: Usage) -> bytes:
        """Return the body of an answer that is not streamed."""
        self._reason = choices[0].finish_reason
        status = self._status()
        item = self._message(status, [_text_part(choices[0].text)])
        return orjson.dumps(self._response(status, [item], usage))

    def _status(self) -> str:
        return "completed" if self._reason == "stop" else "incomplete"

    def _event(self, kind: str, **fields: object) -> bytes:
        value = {"type": kind, **fields, "sequence_number": self._number}
        self._number += 1
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), orjson.dumps(value))

    def _message(self, status: str, content: list[dict[str, object]]) -> dict[str, object]:
        return {
            "id": self._item_id,
            "content": content,
            "role": "assistant",
            "status": status,
            "type": "message",
        }

    def _response(
        self,
        status: str,
        output: list[dict[str, object]] | None = None,
        usage: Usage | None = None,
    ) -> dict[str, object]:
        body = self._body
        incomplete = None
        if status == "incomplete":
            incomplete = {"reason": "max_output_tokens" if self._reason == "length" else "abort"}
        return {
            "id": self._response_id,
            "created_at": self._generation.created,
            "error": None,
            "incomplete_details": incomplete,
            "instructions": body.instructions,
            "metadata": body.metadata,
            "model": body.model,
            "object": "response",
            "output": output or [],
            "parallel_tool_calls": True,
            "temperature": body.temperature if body.temperature is not None else 1.0,
            "tool_choice": "auto",
            "tools": body.tools or [],
            "top_p": body.top_p if body.top_p is not None else 1.0,
            "background": False,
            "max_output_tokens": body.max_output_tokens or self._generation.max_tokens_default,
            "previous_response_id": None,
            "service_tier": body.service_tier or "auto",
            "status": status,
            "text": {"format": {"type": "text"}},
            "truncation": "disabled",
            "usage": _usage_value(usage) if usage else None,
            "user": None,
        }


def _text_part(text: str) -> dict[str, object]:
    return {"annotations": [], "text": text, "type": "output_text", "logprobs": []}


def _usage_value(usage: Usage) -> dict[str, object]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
