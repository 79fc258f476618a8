"""The engine's HTTP side: which paths there are, who may use them, and what errors look like.

Handlers are thin: bodies are parsed in the API modules, work is done by `Engine` and `Exchange`.
A client that goes away cancels its handler (`handler_cancellation`), and that aborts its request.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextvars import ContextVar

import msgspec
from aiohttp import web

from backends.simulator.anthropic_api import (
    CountBody,
    MessagesBody,
    MessagesPresenter,
    parse_messages,
    render_messages,
)
from backends.simulator.api_errors import ApiError, error_body
from backends.simulator.bodies import (
    Arrival,
    Body,
    ChatBody,
    CompletionBody,
    EmbeddingBody,
    decode_body,
    parse_chat,
    parse_completion,
    parse_prompts,
)
from backends.simulator.clockwork import Sequence as TokenSequence
from backends.simulator.control_api import Control, json_answer
from backends.simulator.engine import Engine, Gate
from backends.simulator.exchange import Disturbance, Exchange
from backends.simulator.exposition import render_metrics
from backends.simulator.faults import FaultPlan
from backends.simulator.generation import Generation, Presenter, known_model, make_sequences
from backends.simulator.kv_events import EventPublisher
from backends.simulator.lora_api import LoraControl
from backends.simulator.openai_api import (
    EMBEDDING_DIMENSIONS,
    ChatPresenter,
    CompletionPresenter,
    embed,
    embedding_body,
)
from backends.simulator.ranks import Ranks
from backends.simulator.responses_api import ResponsesBody, ResponsesPresenter, parse_responses
from backends.simulator.settings import BODY_BYTES_MAX, Settings
from backends.simulator.tables import Tables
from backends.simulator.tokens import (
    TOKEN_ID_MAX,
    count_tokens,
    decode_tokens,
    pack_ids,
    render_chat,
    unpack_ids,
)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

# What vLLM's key guards; SGLang's guards everything but its probes.
_VLLM_GUARDED = ("/v1", "/v2", "/inference", "/cohere")
_SGLANG_OPEN = ("/health", "/ready", "/metrics")
_REQUEST_ID = re.compile(r"[!-~]{1,256}")
_INTEGER = re.compile(r"-?[0-9]{1,18}")

_begun_s: ContextVar[float] = ContextVar("begun_s")  # when the head of this request was here

_log = logging.getLogger(__name__)


class TokenizeBody(msgspec.Struct, kw_only=True):
    """/tokenize: a text or a conversation."""

    model: str | None = None
    prompt: str | list[str] | None = None
    messages: list[dict[str, object]] | None = None
    add_generation_prompt: bool = True


class DetokenizeBody(msgspec.Struct, kw_only=True):
    """/detokenize."""

    model: str | None = None
    tokens: list[int]


class Server:
    """One simulated engine behind HTTP."""

    def __init__(
        self,
        settings: Settings,
        ranks: Ranks,
        publishers: Sequence[EventPublisher],
        tables: Tables | None = None,
    ) -> None:
        self.settings = settings
        self.ranks = ranks
        self.publishers = publishers
        self._listed = settings.models  # the names that it tells
        self._tables = tables
        self.faults = FaultPlan(settings.faults, settings.seed)
        self.ready = settings.startup_s == 0 or settings.dialect == "vllm"
        self.draining = False
        self.started_s = time.time()
        self._exchanges: set[Exchange] = set()
        # What clients said of their traces, those that came last: for whoever tests a proxy.
        self.traceparents: deque[str] = deque(maxlen=16)
        ranks.slow_down(self.faults.slowdown)

    def application(self) -> web.Application:
        """Return the aiohttp application."""

        @web.middleware
        async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
            return await self._guard(request, handler)

        application = web.Application(middlewares=[guard], client_max_size=BODY_BYTES_MAX)
        if self.settings.echo_request_id:
            application.on_response_prepare.append(self._echo_request_id)
        router = application.router
        if self.settings.task == "generate":
            router.add_post("/v1/chat/completions", self._chat)
            router.add_post("/v1/completions", self._completions)
            router.add_post("/v1/responses", self._responses)
            router.add_post("/v1/messages", self._messages)
            router.add_post("/v1/messages/count_tokens", self._count_tokens)
        else:
            router.add_post("/v1/embeddings", self._embeddings)
        router.add_get("/v1/models", self._models)
        router.add_get("/metrics", self._metrics)
        router.add_post("/tokenize", self._tokenize)
        router.add_post("/detokenize", self._detokenize)
        Control(self).add_routes(router)
        LoraControl(self.settings, self.ranks).add_routes(router)
        return application

    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Check the key and put every error into the engine's shape."""
        _begun_s.set(time.monotonic())
        try:
            self._check_key(request)
            response = await handler(request)
        except ApiError as error:
            response = self._refusal(request, error)
        except web.HTTPRequestEntityTooLarge:
            message = f"the request body is larger than {BODY_BYTES_MAX} bytes"
            response = self._refusal(request, ApiError(413, message))
        except web.HTTPException as error:
            response = self._refusal(request, ApiError(error.status, error.reason))
        except (asyncio.CancelledError, ConnectionError):
            raise
        except Exception as error:  # noqa: BLE001  # the top of a request's task
            _log.exception("request failed")
            response = self._refusal(request, ApiError(500, f"{type(error).__name__}: {error}"))
        return response

    async def _echo_request_id(self, request: web.Request, response: web.StreamResponse) -> None:
        wanted = request.headers.get("X-Request-Id", "")
        known = _REQUEST_ID.fullmatch(wanted)
        response.headers["X-Request-Id"] = wanted if known else uuid.uuid4().hex

    def _check_key(self, request: web.Request) -> None:
        keys = self.settings.api_keys
        if not keys:
            return
        path = request.path
        if self.settings.dialect == "vllm":
            guarded = path.startswith(_VLLM_GUARDED)
        else:
            guarded = not path.startswith(_SGLANG_OPEN)
        scheme, _, key = request.headers.get("Authorization", "").partition(" ")
        if guarded and (scheme.lower() != "bearer" or key not in keys):
            raise ApiError(401, "Unauthorized")

    def _refusal(self, request: web.Request, error: ApiError) -> web.Response:
        body = error_body(error, self.settings.dialect, request.path)
        return web.Response(body=body, status=error.status, content_type="application/json")

    @property
    def exchanges_open(self) -> int:
        """Generating requests under way."""
        return len(self._exchanges)

    def abort(self, request_ids: list[str] | None) -> None:
        """End the named requests, all if None: their clients get what there is, and `abort`."""
        for exchange in list(self._exchanges):
            if request_ids is None or exchange.request_id in request_ids:
                exchange.abort()

    async def read(self, request: web.Request, kind: type[Body]) -> Body:
        """Return the body as `kind`."""
        return decode_body(kind, await request.read())

    def exit_process(self, reason: str) -> None:
        """End the process with an exit code other than 0."""
        self.ranks.die(reason)

    def _arrival(self, request: web.Request) -> Arrival:
        if parent := request.headers.get("traceparent"):
            self.traceparents.append(parent[:256])
        request_id = uuid.uuid4().hex
        priority = None
        if self.settings.dialect == "vllm":
            request_id = request_id[:16]
            wanted = request.headers.get("X-Request-Id", "")
            if _REQUEST_ID.fullmatch(wanted):
                request_id = wanted
            priority = _priority_of(request, "X-Vllm-Priority")
        elif self.settings.header_overrides and request.path == "/v1/chat/completions":
            priority = _priority_of(request, "X-Override-Priority")
            request_id = request.headers.get("X-Override-Rid") or request_id
            if any(exchange.request_id == request_id for exchange in self._exchanges):
                raise ApiError(400, f"Duplicate request ID detected: {request_id}")
        return Arrival(request_id=request_id, created=int(time.time()), priority=priority)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await self.read(request, ChatBody)
        generation = parse_chat(body, self._arrival(request))
        presenter = ChatPresenter(generation, self.settings.dialect)
        return await self._generate(request, generation, presenter)

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        body = await self.read(request, CompletionBody)
        generation = parse_completion(body, self._arrival(request))
        presenter = CompletionPresenter(generation, self.settings.dialect)
        return await self._generate(request, generation, presenter)

    async def _responses(self, request: web.Request) -> web.StreamResponse:
        body = await self.read(request, ResponsesBody)
        generation = parse_responses(body, self._arrival(request))
        return await self._generate(request, generation, ResponsesPresenter(body, generation))

    async def _messages(self, request: web.Request) -> web.StreamResponse:
        body = await self.read(request, MessagesBody)
        generation = parse_messages(body, self._arrival(request))
        prompt_tokens = count_tokens(generation.prompts[0])
        return await self._generate(
            request, generation, MessagesPresenter(generation, prompt_tokens)
        )

    async def _generate(
        self, request: web.Request, generation: Generation, presenter: Presenter
    ) -> web.StreamResponse:
        self.check_ready()
        engine = self._choose_rank(request)
        sequences = self._sequences(generation, engine)
        spent_s = time.monotonic() - _begun_s.get()
        disturbance = Disturbance(self.faults.strike(), self.exit_process)
        await disturbance.before_answer(request)
        self.check_gate()
        exchange = Exchange(engine, generation, sequences, spent_s)
        self._exchanges.add(exchange)
        try:
            return await exchange.answer(request, presenter, disturbance)
        except asyncio.CancelledError:
            if exchange.lingers:
                self._end_late(exchange)
            raise
        finally:
            if not exchange.lingers:
                self._exchanges.discard(exchange)

    def _end_late(self, exchange: Exchange) -> None:
        """Nobody wants it, but SGLang's HTTP layer has not seen that yet: it is computed on."""

        def notice() -> None:
            exchange.abort()
            self._exchanges.discard(exchange)

        notice_s = self.settings.real_s(self.settings.notice_s)
        asyncio.get_running_loop().call_later(notice_s, notice)

    def _sequences(self, generation: Generation, engine: Engine) -> list[TokenSequence]:
        if self._tables is not None:
            seed = generation.seed + self._tables.value(generation.prompts[0])
            generation = msgspec.structs.replace(generation, seed=seed)
        return make_sequences(generation, self.settings, self.ranks.adapters, engine.clockwork)

    def _choose_rank(self, request: web.Request) -> Engine:
        return self.ranks.choose(request.headers.get("X-Data-Parallel-Rank"))

    def check_ready(self) -> None:
        """Raise `ApiError` 503 while the model is still being loaded."""
        if not self.ready:
            raise ApiError(503, "the server is starting")

    def check_gate(self) -> None:
        """Raise `ApiError` 503 while the engine takes no requests."""
        if self.ranks.gate is Gate.REFUSE:
            message = "engine_paused: the engine is paused or asleep"
            raise ApiError(503, message, kind="engine_paused")

    async def _embeddings(self, request: web.Request) -> web.StreamResponse:
        body = await self.read(request, EmbeddingBody)
        self.check_ready()
        generation = Generation(
            request_id=uuid.uuid4().hex,
            model=body.model,
            prompts=parse_prompts(body.input),
            max_tokens=1,  # the step that computes the prompt yields the vector in a token's place
        )
        engine = self._choose_rank(request)
        sequences = self._sequences(generation, engine)
        await Disturbance(self.faults.strike(), self.exit_process).before_answer(request)
        self.check_gate()
        exchange = Exchange(engine, generation, sequences)
        await exchange.compute()
        dimensions = body.dimensions or EMBEDDING_DIMENSIONS
        vectors = [embed(prompt, dimensions) for prompt in generation.prompts]
        tokens = exchange.usage().prompt_tokens
        answer = embedding_body(body.model, vectors, tokens, body.encoding_format)
        return web.Response(body=answer, content_type="application/json")

    async def _count_tokens(self, request: web.Request) -> web.StreamResponse:
        body = await self.read(request, CountBody)
        known_model(self.settings, self.ranks.adapters, body.model)
        return json_answer({"input_tokens": count_tokens(render_messages(body))})

    def rename(self, path: str) -> None:
        """List its weights' path from now on, as SGLang does once it has read them anew."""
        self._listed = (path,)

    async def _models(self, request: web.Request) -> web.StreamResponse:
        settings = self.settings
        created = int(time.time())
        rows = []
        for name in (*self._listed, *self.ranks.adapters):
            row: dict[str, object] = {
                "id": name,
                "object": "model",
                "created": created,
                "owned_by": settings.dialect,
                "root": self._listed[0] if settings.dialect == "vllm" else name,
                "parent": self._listed[0] if name in self.ranks.adapters else None,
                "max_model_len": settings.context_tokens_max,
            }
            if settings.dialect == "vllm":
                row["permission"] = [_permission(name, created)]
            rows.append(row)
        return json_answer({"object": "list", "data": rows})

    async def _metrics(self, request: web.Request) -> web.StreamResponse:
        return web.Response(
            body=render_metrics(self.ranks).encode(),
            headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"},
        )

    async def _tokenize(self, request: web.Request) -> web.StreamResponse:
        body = await self.read(request, TokenizeBody)
        if body.messages is not None:
            tokens = render_chat(body.messages, open_answer=body.add_generation_prompt)
        elif isinstance(body.prompt, str):
            tokens = parse_prompts(body.prompt)[0]
        else:
            raise ApiError(400, "send `prompt`, a text, or `messages`", param="prompt")
        ids = unpack_ids(tokens)
        value: dict[str, object] = {"count": len(ids)}
        value |= {"max_model_len": self.settings.context_tokens_max, "tokens": ids}
        return json_answer(value | {"token_strs": None})

    async def _detokenize(self, request: web.Request) -> web.StreamResponse:
        body = await self.read(request, DetokenizeBody)
        if not all(0 <= token <= TOKEN_ID_MAX for token in body.tokens):
            raise ApiError(400, f"token ids are 0 to {TOKEN_ID_MAX}", param="tokens")
        text = decode_tokens(pack_ids(body.tokens))
        return json_answer({"prompt" if self.settings.dialect == "vllm" else "text": text})


def _priority_of(request: web.Request, name: str) -> int | None:
    header = request.headers.get(name, "")
    return int(header) if _INTEGER.fullmatch(header) else None


def _permission(name: str, created: int) -> dict[str, object]:
    return {
        "id": f"modelperm-{name}",
        "object": "model_permission",
        "created": created,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
