"""As much of vLLM as an engine of lines touches, in its places, with an engine that counts steps.

The engine runs as many requests together as `--max-num-seqs` says, one token each at a step. What
it was asked to do is kept, so that a test sees when it ran empty.
"""

from __future__ import annotations

import argparse
import sys
import time
import types
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pydantic
import pytest

STEP_S = 0.001


class ChatCompletionRequest(pydantic.BaseModel):
    """What a line of a chat asks for."""

    model: str
    messages: list[dict[str, Any]] = pydantic.Field(min_length=1)
    max_tokens: int = 4
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    request_id: str = "given"
    tools: list[int] | list[list[int]] | None = None  # a union: its errors name the types as well

    @pydantic.model_validator(mode="before")
    @classmethod
    def check_messages(cls, data: Any) -> Any:
        """Take for granted that there are messages, as vLLM's own check does."""
        for _ in data["messages"]:
            pass
        return data


class _Response(pydantic.BaseModel):
    id: str
    usage: dict[str, Any]
    schema_: str = pydantic.Field(default="asked for", alias="schema")  # as in /v1/responses


class _Error(pydantic.BaseModel):
    message: str
    code: int
    param: str | None = None


class _ErrorResponse(pydantic.BaseModel):
    error: _Error


class EngineDeadError(Exception):
    """vLLM's word for an engine process that has ended."""


class Engine:
    """`LLM.llm_engine`."""

    def __init__(self, sequences_max: int) -> None:
        self.vllm_config = SimpleNamespace(
            parallel_config=SimpleNamespace(world_size=2, data_parallel_size=1),
            scheduler_config=SimpleNamespace(
                max_num_seqs=sequences_max,
                async_scheduling=True,
                enable_chunked_prefill=True,
                max_num_batched_tokens=8192,
            ),
            cache_config=SimpleNamespace(enable_prefix_caching=True),
        )
        self.model_config = self.renderer = self.input_processor = SimpleNamespace()
        self.engine_core = SimpleNamespace(shutdown=lambda: self.calls.append("shutdown"))
        self.calls: list[str] = []
        self.loads: list[int] = []  # requests computed, step by step
        self.adapters: list[str] = []
        self._left: dict[str, int] = {}

    def get_supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    def add_request(
        self, request_id: str, prompt: str, params: int, *, lora_request: Any, priority: int
    ) -> None:
        if prompt == "too long":
            raise ValueError("the prompt is longer than the maximum model length of 8")
        if prompt == "gone":
            raise EngineDeadError("EngineCore is gone")
        self._left[request_id] = 10**9 if prompt == "die" else params
        if prompt == "odd":
            raise RuntimeError("it could not be sent")

    def abort_request(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            self.calls.append(f"abort {self._left.pop(request_id, None)}")

    def add_lora(self, lora_request: str) -> bool:
        self.adapters.append(lora_request)
        return True

    def has_unfinished_requests(self) -> bool:
        return bool(self._left)

    def step(self) -> list[SimpleNamespace]:
        time.sleep(STEP_S)
        batch = list(self._left)[: self.vllm_config.scheduler_config.max_num_seqs]
        self.loads.append(len(batch))
        if any(self._left[request_id] > 10**8 for request_id in batch):
            raise RuntimeError("EngineCore died")
        outputs = []
        for request_id in batch:
            self._left[request_id] -= 1
            finished = not self._left[request_id]
            outputs.append(SimpleNamespace(request_id=request_id, finished=finished))
            if finished:
                del self._left[request_id]
        return outputs


class _Chat:
    """vLLM's serving class for chats."""

    def __init__(self, client: Any) -> None:
        self._client = client

    async def create_chat_completion(self, request: Any) -> Any:
        if request.model == "unknown":
            error = _Error(message="The model `unknown` does not exist.", code=404, param="model")
            return _ErrorResponse(error=error)
        content = request.messages[-1]["content"]
        if content == "go on":
            error = _Error(message="Response with id 'resp_0' not found.", code=404)
            return _ErrorResponse(error=error)
        generator = self._client.generate(
            content, request.max_tokens, request.request_id, trace_headers=None, priority=0
        )
        async for _ in generator:
            pass
        details = {"cached_tokens": 1}
        usage = {"prompt_tokens": 3, "completion_tokens": request.max_tokens}
        usage |= {"prompt_tokens_details": details}
        return _Response(id=f"chatcmpl-{request.request_id}", usage=usage)


async def _init_app_state(client: Any, state: Any, args: Any, tasks: Any) -> None:
    await client.add_lora("adapter-file")
    state.openai_serving_models = SimpleNamespace(lora_requests={"adapter": 1})
    state.openai_serving_chat = _Chat(client)


def _make_arg_parser(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    for flag in ("--model", "--served-model-name"):
        parser.add_argument(flag)
    parser.add_argument("--max-num-seqs", type=int, default=4)
    for flag in ("--enable-prompt-tokens-details", "--disable-log-stats"):
        parser.add_argument(flag, action="store_true")
    return parser


def _create_error_response(error: Exception) -> _ErrorResponse:
    code = 400 if isinstance(error, ValueError) else 500
    return _ErrorResponse(error=_Error(message=str(error), code=code))


def install(monkeypatch: pytest.MonkeyPatch, build: Callable[[int], Engine] = Engine) -> None:
    """Put the modules where vLLM 0.26.0 has them; `build` makes the engine."""

    def from_engine_args(args: argparse.Namespace) -> SimpleNamespace:
        return SimpleNamespace(llm_engine=build(args.max_num_seqs))

    names = {
        "vllm.utils.argparse_utils": {"FlexibleArgumentParser": argparse.ArgumentParser},
        "vllm.entrypoints.openai.cli_args": {"make_arg_parser": _make_arg_parser},
        "vllm.entrypoints.openai.api_server": {"init_app_state": _init_app_state},
        "vllm.entrypoints.serve.utils.error_response": {
            "create_error_response": _create_error_response
        },
        "vllm.entrypoints.openai.chat_completion.protocol": {
            "ChatCompletionRequest": ChatCompletionRequest
        },
        "vllm.engine.arg_utils": {"EngineArgs": SimpleNamespace(from_cli_args=lambda args: args)},
        "vllm.entrypoints.llm": {"LLM": SimpleNamespace(from_engine_args=from_engine_args)},
        "starlette.datastructures": {"State": SimpleNamespace},
    }
    for name, values in names.items():
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            place = ".".join(parts[:depth])
            module = types.ModuleType(place)
            module.__path__ = []
            if place not in sys.modules:
                monkeypatch.setitem(sys.modules, place, module)
        for key, value in values.items():
            setattr(sys.modules[name], key, value)
