"""Answers of /v1/chat/completions, /v1/completions and /v1/embeddings, as recorded.

The order of the keys and which of them are left out or null follow the recorded answers of vLLM
0.26.0 and SGLang 0.5.17. What changes from chunk to chunk is put between bytes made once.
"""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Callable

import orjson
import xxhash

from backends.simulator.api_errors import ApiError, error_value
from backends.simulator.generation import Choice, Generation, Usage, sse
from backends.simulator.kv_events import Dialect
from backends.simulator.settings import VERSIONS

EMBEDDING_DIMENSIONS = 256
DONE = b"data: [DONE]\n\n"
VLLM_FINGERPRINT = f"vllm-{VERSIONS['vllm']}-simulated"


def usage_value(usage: Usage, dialect: Dialect, *, whole: bool) -> dict[str, object]:
    """Return the usage of an answer; SGLang has no details when nothing was cached."""
    value: dict[str, object] = {
        "prompt_tokens": usage.prompt_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "completion_tokens": usage.completion_tokens,
    }
    if dialect == "sglang":
        cached = usage.cached_tokens
        value["prompt_tokens_details"] = {"cached_tokens": cached} if cached else None
        value["reasoning_tokens"] = 0
        return value
    details: dict[str, object] = {
        "cached_tokens": usage.cached_tokens,
        "created_cache_tokens": usage.created_cache_tokens,
    }
    if whole:
        details["multimodal_tokens"] = None
    value["prompt_tokens_details"] = details
    return value


def _with_text(value: object) -> tuple[bytes, bytes]:
    """Return the JSON of a value around its text, which is marked by the string `TEXT`."""
    # The last one: ids and model names come before the text, only our own keys after it.
    before, _, after = orjson.dumps(value).rpartition(b"TEXT")
    return before, after


class _OpenAiPresenter:
    """What chat and completions share."""

    id_prefix = ""
    kind = ""
    signs_usage = False  # vLLM puts its fingerprint beside the usage of a stream

    def __init__(
        self,
        generation: Generation,
        dialect: Dialect,
        chunk_choice: Callable[[Dialect, int], dict[str, object]],
    ) -> None:
        self._chunk_choice = chunk_choice
        self.dialect: Dialect = dialect
        self.generation = generation
        prefix = self.id_prefix if dialect == "vllm" else ""
        self.head = {
            "id": prefix + generation.request_id,
            "object": self.kind,
            "created": generation.created,
            "model": generation.model,
        }
        self._frames: dict[int, tuple[bytes, bytes]] = {}

    def ahead(self) -> bytes:
        """Return nothing: the first event comes with the first token."""
        return b""

    def frame(self, choice: int) -> tuple[bytes, bytes]:
        """Return what stands around the text of a chunk."""
        frame = self._frames.get(choice)
        if frame is None:
            value = {**self.head, "choices": [self._chunk_choice(self.dialect, choice)]}
            before, after = _with_text(value)
            frame = self._frames[choice] = (b"data: " + before, after + b"\n\n")
        return frame

    def piece(self, choice: int, text: str) -> bytes:
        """Return a chunk of text."""
        before, after = self.frame(choice)
        return b"%b%b%b" % (before, text.encode(), after)

    def closing(self, usage: Usage) -> bytes:
        """Return the usage, if asked for, and the end."""
        if not self.generation.include_usage:
            return DONE
        value: dict[str, object] = {**self.head, "choices": []}
        value["usage"] = usage_value(usage, self.dialect, whole=False)
        if self.signs_usage and self.dialect == "vllm":
            value["system_fingerprint"] = VLLM_FINGERPRINT
        return sse(value) + DONE

    def failure(self, error: ApiError) -> bytes:
        """Return the error and the end."""
        return sse(error_value(error, self.dialect, in_stream=True)) + DONE

    def stop_field(self, stop: str | None) -> dict[str, object]:
        """Return the stop string under the engine's own name."""
        return {"stop_reason" if self.dialect == "vllm" else "matched_stop": stop}


class ChatPresenter(_OpenAiPresenter):
    """/v1/chat/completions."""

    id_prefix = "chatcmpl-"
    kind = "chat.completion.chunk"

    def __init__(self, generation: Generation, dialect: Dialect) -> None:
        super().__init__(generation, dialect, _chat_choice)

    def opening(self) -> bytes:
        """Return the chunk of each choice that says who speaks."""
        chunks = []
        for index in range(self.generation.choices_per_prompt):
            delta: dict[str, object] = {"role": "assistant", "content": ""}
            choice: dict[str, object] = {"index": index, "delta": delta, "logprobs": None}
            choice["finish_reason"] = None
            value: dict[str, object] = {**self.head, "choices": [choice]}
            if self.dialect == "vllm":
                value |= {"prompt_token_ids": None, "prompt_text": None}
            else:
                choice["delta"] = {"reasoning_content": None, **delta}
                choice["matched_stop"] = None
            chunks.append(sse(value))
        return b"".join(chunks)

    def end(self, choice: int, text: str, reason: str, stop: str | None) -> bytes:
        """Return the end of a choice: with its last text in vLLM, by itself in SGLang."""
        last: dict[str, object] = {"index": choice, "delta": {"content": text}, "logprobs": None}
        last["finish_reason"] = reason
        last |= self.stop_field(stop)
        if self.dialect == "vllm":
            last["token_ids"] = None
            return sse({**self.head, "choices": [last]})
        last["delta"] = {"reasoning_content": None}
        end = sse({**self.head, "choices": [last]})
        return self.piece(choice, text) + end if text else end

    def whole(self, choices: list[Choice], usage: Usage) -> bytes:
        """Return the body of an answer that is not streamed."""
        value: dict[str, object] = {**self.head, "object": "chat.completion"}
        value["choices"] = [
            {
                "index": index,
                "message": self._message(choice.text),
                "logprobs": None,
                "finish_reason": choice.finish_reason,
                **self.stop_field(choice.stop),
                **({"token_ids": None, "routed_experts": None} if self.dialect == "vllm" else {}),
            }
            for index, choice in enumerate(choices)
        ]
        tokens = usage_value(usage, self.dialect, whole=True)
        if self.dialect == "sglang":
            return orjson.dumps(value | {"usage": tokens, "metadata": _SGLANG_METADATA})
        value |= {"service_tier": None, "system_fingerprint": VLLM_FINGERPRINT, "usage": tokens}
        return orjson.dumps(value | _VLLM_CHAT_TAIL)

    def _message(self, text: str) -> dict[str, object]:
        message: dict[str, object] = {"role": "assistant", "content": text}
        if self.dialect == "sglang":
            return message | {"reasoning_content": None, "tool_calls": None}
        return message | _VLLM_MESSAGE_TAIL


class CompletionPresenter(_OpenAiPresenter):
    """/v1/completions."""

    id_prefix = "cmpl-"
    kind = "text_completion"
    signs_usage = True

    def __init__(self, generation: Generation, dialect: Dialect) -> None:
        super().__init__(generation, dialect, _completion_choice)

    def opening(self) -> bytes:
        """Return nothing: completions begin with text."""
        return b""

    def end(self, choice: int, text: str, reason: str, stop: str | None) -> bytes:
        """Return the end of a choice, with its last text."""
        last = _completion_choice(self.dialect, choice, text, reason) | self.stop_field(stop)
        return sse({**self.head, "choices": [last]})

    def whole(self, choices: list[Choice], usage: Usage) -> bytes:
        """Return the body of an answer that is not streamed."""
        tail = _VLLM_COMPLETION_TAIL if self.dialect == "vllm" else {}
        answers = [
            _completion_choice(self.dialect, index, choice.text, choice.finish_reason)
            | self.stop_field(choice.stop)
            | tail
            for index, choice in enumerate(choices)
        ]
        value: dict[str, object] = {**self.head, "choices": answers}
        tokens = usage_value(usage, self.dialect, whole=True)
        if self.dialect == "sglang":
            return orjson.dumps(value | {"usage": tokens, "metadata": _SGLANG_METADATA})
        value |= {"service_tier": None, "system_fingerprint": VLLM_FINGERPRINT, "usage": tokens}
        return orjson.dumps(value | {"kv_transfer_params": None})


def _chat_choice(dialect: Dialect, choice: int) -> dict[str, object]:
    """Return one choice of a chat chunk, with `TEXT` where its text belongs."""
    delta = {"content": "TEXT"}
    value: dict[str, object] = {"index": choice, "delta": delta, "logprobs": None}
    value["finish_reason"] = None
    if dialect == "vllm":
        return value | {"token_ids": None}
    value["delta"] = {"reasoning_content": None, **delta}
    return value | {"matched_stop": None}


def _completion_choice(
    dialect: Dialect, choice: int, text: str = "TEXT", reason: str | None = None
) -> dict[str, object]:
    """Return one choice of a completion or its chunk."""
    value: dict[str, object] = {"index": choice, "text": text, "logprobs": None}
    value["finish_reason"] = reason
    if dialect == "vllm":
        return value | {"stop_reason": None, "prompt_token_ids": None, "token_ids": None}
    return value | {"matched_stop": None}


def embedding_body(model: str, vectors: list[list[float]], tokens: int, encoding: str) -> bytes:
    """Return the answer of /v1/embeddings."""
    rows = [
        {
            "index": index,
            "object": "embedding",
            "embedding": vector
            if encoding == "float"
            else base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode(),
        }
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0}
    return orjson.dumps({"object": "list", "data": rows, "model": model, "usage": usage})


def embed(prompt: bytes, dimensions: int) -> list[float]:
    """Return the unit vector of a prompt: drawn from its hash, so equal only for equal prompts."""
    state = xxhash.xxh3_64_intdigest(prompt)
    raw = b"".join(
        xxhash.xxh3_128_digest(struct.pack("<I", number), state)
        for number in range(-(-dimensions // 4))
    )
    values = [word / 2**31 - 1 for word in struct.unpack(f"<{len(raw) // 4}I", raw)][:dimensions]
    length = math.hypot(*values) or 1.0
    return [value / length for value in values]


_SGLANG_METADATA = {"weight_version": "default"}
_VLLM_MESSAGE_TAIL = {
    "refusal": None,
    "annotations": None,
    "audio": None,
    "function_call": None,
    "reasoning": None,
}
_VLLM_CHAT_TAIL = {
    "prompt_logprobs": None,
    "prompt_token_ids": None,
    "prompt_text": None,
    "kv_transfer_params": None,
    "ec_transfer_params": None,
    "metrics": None,
}
_VLLM_COMPLETION_TAIL = {"prompt_logprobs": None}
