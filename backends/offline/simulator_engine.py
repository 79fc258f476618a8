"""The simulator as an engine of lines: the same clockwork and the same bodies as behind its HTTP.

It takes the simulator's flags. Faults that concern an answer on the wire have no meaning here; of
the others `status`, `delay`, `exit` and `slow` are played.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence

import msgspec

from backends.log import Log
from backends.offline.line_engine import (
    CHAT,
    COMPLETIONS,
    EMBEDDINGS,
    GENERATING,
    EngineError,
    Gauges,
    error_result,
    response_result,
)
from backends.offline.work import Line, Result
from backends.simulator.api_errors import ApiError
from backends.simulator.bodies import (
    Arrival,
    ChatBody,
    CompletionBody,
    EmbeddingBody,
    decode_body,
    parse_chat,
    parse_completion,
    parse_prompts,
)
from backends.simulator.exchange import Exchange
from backends.simulator.exposition import usage_ratio
from backends.simulator.faults import FaultPlan
from backends.simulator.flags import parse_flags
from backends.simulator.generation import Generation, Presenter, make_sequences
from backends.simulator.openai_api import (
    EMBEDDING_DIMENSIONS,
    ChatPresenter,
    CompletionPresenter,
    embed,
    embedding_body,
)
from backends.simulator.ranks import Ranks
from backends.simulator.responses_api import ResponsesBody, ResponsesPresenter, parse_responses
from backends.tasks import cancel_all, spawn


class SimulatorEngine:
    """Simulated ranks in this process."""

    def __init__(self, model: str, flags: Sequence[str], log: Log) -> None:
        self._settings = parse_flags(["--served-model-name", model, *flags])
        self._log = log
        self._ranks = Ranks(self._settings, ())
        self._faults = FaultPlan(self._settings.faults, self._settings.seed)
        self._ranks.slow_down(self._faults.slowdown)
        self._tasks: list[asyncio.Task[None]] = []
        embeds = self._settings.task == "embed"
        self.models = (*self._settings.models, *self._settings.adapters)
        self.urls: tuple[str, ...] = (EMBEDDINGS,) if embeds else GENERATING
        self.gpus = self._settings.dp_size
        self.sequences_max = self._settings.sequences_max * self._settings.dp_size
        self.dead = self._ranks.dead

    async def start(self) -> None:
        await self._ranks.first.pass_s(self._settings.startup_s)
        self._tasks = [spawn(engine.run(), "engine", self._log) for engine in self._ranks]

    async def do(self, line: Line) -> Result:
        if self.dead.done():
            raise EngineError(self.dead.result())
        try:
            await self._misbehave()
            if line.url not in self.urls:
                return error_result(line, 400, f"this model does not serve {line.url}", "url")
            body = bytes(line.body)
            if line.url == EMBEDDINGS:
                return response_result(line, await self._embed(body))
            return response_result(line, await self._generate(line.url, body))
        except ApiError as error:
            return error_result(line, error.status, error.message, error.param)

    def gauges(self) -> Gauges:
        waiting = self._ranks.count(lambda engine: engine.clockwork.waiting_count)
        running = self._ranks.count(lambda engine: len(engine.clockwork.running))
        usage = sum(usage_ratio(engine) for engine in self._ranks) / self._settings.dp_size
        return Gauges(waiting, running, usage)

    async def close(self) -> None:
        await cancel_all(self._tasks)

    async def _misbehave(self) -> None:
        fault = self._faults.strike()
        if fault is None:
            return
        if fault.kind == "status":
            raise ApiError(int(fault.amount), "a fault that was asked for")
        if fault.kind == "delay":
            await asyncio.sleep(fault.amount)
        elif fault.kind == "exit":
            self._ranks.die("a fault that was asked for")
            raise EngineError(self.dead.result())

    async def _generate(self, url: str, body: bytes) -> bytes:
        generation, presenter = self._read(url, body)
        exchange = self._exchange(generation)
        return presenter.whole(await exchange.compute(), exchange.usage())

    def _read(self, url: str, body: bytes) -> tuple[Generation, Presenter]:
        arrival = Arrival(request_id=uuid.uuid4().hex[:16], created=int(time.time()))
        if url == CHAT:
            generation = _whole(parse_chat(decode_body(ChatBody, body), arrival))
            return generation, ChatPresenter(generation, self._settings.dialect)
        if url == COMPLETIONS:
            generation = _whole(parse_completion(decode_body(CompletionBody, body), arrival))
            return generation, CompletionPresenter(generation, self._settings.dialect)
        request = decode_body(ResponsesBody, body)
        generation = _whole(parse_responses(request, arrival))
        return generation, ResponsesPresenter(request, generation)

    async def _embed(self, body: bytes) -> bytes:
        request = decode_body(EmbeddingBody, body)
        generation = Generation(
            request_id=uuid.uuid4().hex,
            model=request.model,
            prompts=parse_prompts(request.input),
            max_tokens=1,  # the step that computes the prompt yields the vector in a token's place
        )
        exchange = self._exchange(generation)
        await exchange.compute()
        dimensions = request.dimensions or EMBEDDING_DIMENSIONS
        vectors = [embed(prompt, dimensions) for prompt in generation.prompts]
        tokens = exchange.usage().prompt_tokens
        return embedding_body(request.model, vectors, tokens, request.encoding_format)

    def _exchange(self, generation: Generation) -> Exchange:
        engine = self._ranks.choose(None)
        sequences = make_sequences(
            generation, self._settings, self._ranks.adapters, engine.clockwork
        )
        return Exchange(engine, generation, sequences)


def _whole(generation: Generation) -> Generation:
    """Return the request as one that is not streamed: nobody would read the stream."""
    if not generation.stream:
        return generation
    return msgspec.structs.replace(generation, stream=False)
