"""vLLM's offline `LLM` as an engine of lines.

What a line means is left to vLLM's own serving classes, as `vllm run-batch` uses them: they check a
request, apply the chat template, tools, adapters, structured outputs and sampling parameters, and
word the answer, so that a line is answered exactly as the server would. They ask an engine client
for tokens; `_Client` is one that passes on to the `LLM` (see `vllm_stepper`). Templates and
tokenizers run in the event loop and its threads while the GPU computes lines that came before.

Names that moved between vLLM 0.26.0 and 0.33.0 are looked for in both places.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import re
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any, NamedTuple

from backends.log import Log
from backends.offline.line_engine import (
    CHAT,
    COMPLETIONS,
    EMBEDDINGS,
    RESPONSES,
    EngineError,
    Gauges,
    error_result,
    response_result,
)
from backends.offline.vllm_stepper import Stepper
from backends.offline.work import Line, Result

_PLACES = {
    "FlexibleArgumentParser": ("vllm.utils.argparse_utils",),
    "make_arg_parser": ("vllm.entrypoints.openai.cli_args", "vllm.entrypoints.common.cli_args"),
    "init_app_state": (
        "vllm.entrypoints.launchers.api_server.entry",
        "vllm.entrypoints.openai.api_server",
    ),
    "create_error_response": (
        "vllm.entrypoints.serve",
        "vllm.entrypoints.serve.utils.error_response",
    ),
    "ChatCompletionRequest": ("vllm.entrypoints.openai.chat_completion.protocol",),
    "CompletionRequest": ("vllm.entrypoints.openai.completion.protocol",),
    "ResponsesRequest": ("vllm.entrypoints.openai.responses.protocol",),
    "EmbeddingRequest": ("vllm.entrypoints.pooling.embed.protocol",),
    "EngineArgs": ("vllm.engine.arg_utils",),
    "LLM": ("vllm.entrypoints.llm",),
    "State": ("starlette.datastructures",),
    "TypeAdapter": ("pydantic",),
    "ValidationError": ("pydantic",),
}
PROBLEMS_SHOWN_MAX = 3
_NAME = re.compile(r"\w+")  # pydantic's places also name its own functions and types


def find(name: str) -> Any:
    """Return what vLLM calls `name`, wherever this release has it. Raises `EngineError`."""
    problems = []
    for place in _PLACES[name]:
        try:
            return getattr(importlib.import_module(place), name)
        except (ImportError, AttributeError) as error:
            problems.append(str(error))
    raise EngineError(f"this vLLM has no {name} that we know: {'; '.join(problems)}")


class _Endpoint(NamedTuple):
    reader: Any  # of pydantic: octets → request
    answer: Callable[[Any], Awaitable[Any]]


class VllmEngine:
    """One `LLM`, with vLLM's serving classes in front."""

    def __init__(self, model: str, path: str, arguments: Sequence[str], log: Log) -> None:
        self._flags = ["--model", path or model, "--served-model-name", model]
        # Bare `LLM` keeps no statistics either; usage with cached tokens is told all the same.
        self._flags += ["--enable-prompt-tokens-details", "--disable-log-stats", *arguments]
        self._log = log
        self._endpoints: dict[str, _Endpoint] = {}
        self._stepper = Stepper(self._build)
        self._args: Any = None  # of vLLM's server, whose flags include those of serving
        self.models: tuple[str, ...] = (model,)
        self.urls: tuple[str, ...] = ()
        self.gpus = 1
        self.sequences_max = 1
        self.dead: asyncio.Future[str] = self._stepper.dead

    async def start(self) -> None:
        # A process with threads must not be forked, and CUDA must not be in it.
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        llm = await self._stepper.start()
        config = llm.llm_engine.vllm_config
        self.gpus = config.parallel_config.world_size * config.parallel_config.data_parallel_size
        self.sequences_max = config.scheduler_config.max_num_seqs
        tasks = llm.llm_engine.get_supported_tasks()
        state = find("State")()
        await find("init_app_state")(_Client(llm, self._stepper, tasks), state, self._args, tasks)
        self._endpoints = _endpoints(state)
        self.urls = tuple(self._endpoints)
        self.models += tuple(state.openai_serving_models.lora_requests)
        self._log.tell(
            "vllm_ready",
            async_scheduling=config.scheduler_config.async_scheduling,
            chunked_prefill=config.scheduler_config.enable_chunked_prefill,
            prefix_caching=config.cache_config.enable_prefix_caching,
            sequences_max=self.sequences_max,
            batched_tokens_max=config.scheduler_config.max_num_batched_tokens,
        )

    async def do(self, line: Line) -> Result:
        if self.dead.done():
            raise EngineError(self.dead.result())
        endpoint = self._endpoints.get(line.url)
        if endpoint is None:
            return error_result(line, 400, f"this model does not serve {line.url}", "url")
        try:
            request = endpoint.reader.validate_json(bytes(line.body))
        except find("ValidationError") as error:
            return error_result(line, 400, *_what_is_wrong(error))
        except Exception as error:  # noqa: BLE001  # of a check that took a field for granted
            return error_result(line, 400, str(error))
        _make_whole(request)
        try:
            response = await endpoint.answer(request)
        except EngineError:
            raise
        except Exception as error:  # vLLM's server has words for each of them
            if self.dead.done():
                raise EngineError(self.dead.result()) from error
            response = find("create_error_response")(error)
        return _result(line, response)

    def gauges(self) -> Gauges:
        # Statistics are off: what is computed together is bounded by this, and by the KV cache.
        running = min(len(self._stepper), self.sequences_max)
        return Gauges(len(self._stepper) - running, running)

    async def close(self) -> None:
        await self._stepper.stop()

    def _build(self) -> Any:
        """Read the flags and load the model; in the stepper's thread, for either takes long."""
        parser = find("make_arg_parser")(find("FlexibleArgumentParser")(prog="vllm"))
        self._args = parser.parse_args(self._flags)
        return find("LLM").from_engine_args(find("EngineArgs").from_cli_args(self._args))


class _Client:
    """What vLLM's serving classes need of an engine, from an `LLM`."""

    errored = False  # a dead engine is seen before they are asked

    def __init__(self, llm: Any, stepper: Stepper, tasks: Any) -> None:
        engine = llm.llm_engine
        self.vllm_config = engine.vllm_config
        self.model_config = engine.model_config
        self.renderer = engine.renderer
        self.input_processor = engine.input_processor
        self._stepper = stepper
        self._tasks = tasks

    async def generate(
        self,
        prompt: Any,
        sampling_params: Any,
        request_id: str,
        *,
        lora_request: Any = None,
        priority: int = 0,
        **_: Any,  # of tracing, other ranks and sessions, which there are not here
    ) -> AsyncGenerator[Any, None]:
        """Yield the one, finished output."""

        def add(engine: Any) -> None:
            engine.add_request(
                request_id, prompt, sampling_params, lora_request=lora_request, priority=priority
            )

        yield await self._stepper.request(request_id, add)

    async def encode(
        self, prompt: Any, pooling_params: Any, request_id: str, **rest: Any
    ) -> AsyncGenerator[Any, None]:
        """Yield the one, finished output."""
        async for output in self.generate(prompt, pooling_params, request_id, **rest):
            yield output

    async def add_lora(self, lora_request: Any) -> bool:
        """Load an adapter."""
        return bool(await self._stepper.call(lambda engine: engine.add_lora(lora_request)))

    async def get_supported_tasks(self) -> Any:
        """Return what the model can do."""
        return self._tasks

    async def is_tracing_enabled(self) -> bool:
        """Say that there is no tracing."""
        return False

    async def abort(self, request_id: Any) -> None:
        """Give requests up; those that `generate` waits for are aborted when it is cancelled."""
        ids = [request_id] if isinstance(request_id, str) else list(request_id)
        await self._stepper.call(lambda engine: engine.abort_request(ids))

    def check_admission(self, *_: Any, **__: Any) -> None:
        """Refuse nothing: the desk gives out what there is room for."""


def _endpoints(state: Any) -> dict[str, _Endpoint]:
    """Return what the model serves, of what a batch may ask for."""
    chat = getattr(state, "openai_serving_chat", None)
    completion = getattr(state, "openai_serving_completion", None)
    responses = getattr(state, "openai_serving_responses", None)
    embedding = getattr(state, "serving_embedding", None)
    adapter = find("TypeAdapter")
    served: dict[str, _Endpoint] = {}
    if chat is not None:
        reader = adapter(find("ChatCompletionRequest"))
        served[CHAT] = _Endpoint(reader, chat.create_chat_completion)
    if completion is not None:
        reader = adapter(find("CompletionRequest"))
        served[COMPLETIONS] = _Endpoint(reader, completion.create_completion)
    if responses is not None:
        reader = adapter(find("ResponsesRequest"))
        served[RESPONSES] = _Endpoint(reader, responses.create_responses)
    if embedding is not None:
        served[EMBEDDINGS] = _Endpoint(adapter(find("EmbeddingRequest")), embedding)
    return served


def _make_whole(request: Any) -> None:
    """Make of a request one that is answered in one piece, under an id that no other line has."""
    fields = type(request).model_fields
    settings = {"stream": False, "stream_options": None, "background": False, "store": False}
    for name, value in settings.items():
        if name in fields:
            setattr(request, name, value)
    if "request_id" in fields and "stream" in fields:
        prefix = "resp_" if "background" in fields else ""
        request.request_id = prefix + uuid.uuid4().hex


def _what_is_wrong(error: Any) -> tuple[str, str | None]:
    """Return what pydantic found, in a few words, and the field."""
    found = [
        ([part for part in problem["loc"] if _NAME.fullmatch(str(part))], problem["msg"])
        for problem in error.errors()
    ]
    said = [f"{'.'.join(map(str, place)) or 'body'}: {what}" for place, what in found]
    place = found[0][0] if found else []
    return "; ".join(said[:PROBLEMS_SHOWN_MAX]), str(place[0]) if place else None


def _result(line: Line, response: Any) -> Result:
    """Return the result of what a serving class returned."""
    error = getattr(response, "error", None)
    if error is not None and hasattr(error, "code") and hasattr(error, "message"):
        status = int(error.code) if str(error.code).isdigit() else 500
        return error_result(line, status, error.message, getattr(error, "param", None))
    if hasattr(response, "model_dump_json"):
        # By alias, as the server: a schema in a response is called "schema", not "schema_".
        return response_result(line, response.model_dump_json(by_alias=True).encode())
    body = getattr(response, "body", b"")  # of starlette's responses: those of embeddings
    if getattr(response, "status_code", 500) != 200 or not bytes(body).startswith(b"{"):
        return error_result(line, 400, "vLLM answered in a form that a batch cannot hold")
    return response_result(line, bytes(body))
