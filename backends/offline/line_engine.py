"""What does lines: the port between a worker and the model that it has loaded.

An engine takes a line and returns its result, as many at once as it is given; how many of them it
computes together is its own business, as in one call of an offline interface with all of them. A
cancelled line is given up. What is wrong with one line is a result; what is wrong with the engine
sets `dead`, and nothing is asked of it any more.
"""

from __future__ import annotations

import asyncio
import re
from typing import NamedTuple, Protocol

import msgspec

from backends.offline.work import Line, Result

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
EMBEDDINGS, RESPONSES = "/v1/embeddings", "/v1/responses"
GENERATING = (CHAT, COMPLETIONS, RESPONSES)
# How vLLM and the simulator word a prompt that does not fit the model.
_TOO_LONG = re.compile(r"maximum (context|model) length|max_model_len|longer than the maximum")
_NO_MODEL = re.compile(r"The model .*does not exist", re.DOTALL)


class Gauges(NamedTuple):
    """What an engine has in hand; None: it does not say."""

    waiting: int
    running: int
    kv_usage: float | None = None


class LineEngine(Protocol):
    """A loaded model. `start` comes first; the other attributes hold from then on."""

    models: tuple[str, ...]  # names that a line may ask for
    urls: tuple[str, ...]  # whose requests it understands
    gpus: int
    sequences_max: int  # that it computes together at most
    dead: asyncio.Future[str]

    async def start(self) -> None:
        """Load the model. Raises `EngineError` when that cannot be."""

    async def do(self, line: Line) -> Result:
        """Return what came of a line. Raises `EngineError` once the engine is dead."""

    def gauges(self) -> Gauges:
        """Return what it has in hand now."""

    async def close(self) -> None:
        """Let go of the model, whatever is computed. Raises `EngineError` where that cannot be."""


class EngineError(Exception):
    """The engine cannot start, or has died."""


class FlagsError(EngineError):
    """The engine does not take its arguments, and has said why."""


class Usage(msgspec.Struct, frozen=True):
    """Of a response; embeddings have no answer, and /v1/responses other names."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: Details | None = None
    input_tokens: int = 0
    output_tokens: int = 0
    input_tokens_details: Details | None = None


class Details(msgspec.Struct, frozen=True):
    """Of the tokens of a prompt."""

    cached_tokens: int | None = None


class _Response(msgspec.Struct, frozen=True):
    id: str = ""
    usage: Usage | None = None


def response_result(line: Line, body: bytes) -> Result:
    """Return the result of a line that was answered with `body`."""
    response = msgspec.json.decode(body, type=_Response)
    usage = response.usage or Usage()
    details = usage.prompt_tokens_details or usage.input_tokens_details or Details()
    return Result(
        job_id=line.job_id,
        number=line.number,
        status=200,
        request_id=response.id,
        body=msgspec.Raw(body),
        prompt_tokens=usage.prompt_tokens or usage.input_tokens,
        cached_tokens=details.cached_tokens or 0,
        completion_tokens=usage.completion_tokens or usage.output_tokens,
    )


def error_result(line: Line, status: int, message: str, param: str | None = None) -> Result:
    """Return the result of a line that cannot be answered, with OpenAI's body."""
    code = None
    if status == 404 and _NO_MODEL.search(message):  # else an earlier response, of /v1/responses
        code = "model_not_found"
    elif _TOO_LONG.search(message):
        code = "context_length_exceeded"
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": message, "type": kind, "param": param, "code": code}
    body = msgspec.json.encode({"error": error})
    return Result(job_id=line.job_id, number=line.number, status=status, body=msgspec.Raw(body))
