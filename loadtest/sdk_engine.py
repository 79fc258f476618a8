"""An engine that computes nothing and answers every call of OpenAI's text API by its schema.

It is what the official client's own tests are run against, with and without a proxy between, so its
answers have every member that the schema requires, streams included. Stored completions are there
whatever their id. A stream that is asked of the model `ENDLESS` ends only when its reader leaves.
"""

from __future__ import annotations

import array
import asyncio
import base64
import contextlib
from collections.abc import AsyncIterator, Iterable
from typing import Any

import orjson
from aiohttp import web

MODEL = "gpt-loadtest"  # what our own calls ask for
ENDLESS = "endless"
CREATED = 1_700_000_000
WORDS = ("Hello", ", ", "world", ".")
EMBEDDING = (0.25, -0.5, 1.0)
PIECE_INTERVAL_S = 0.005
USAGE = {
    "prompt_tokens": 3,
    "completion_tokens": len(WORDS),
    "total_tokens": 3 + len(WORDS),
    "prompt_tokens_details": {"audio_tokens": 0, "cached_tokens": 0},
    "completion_tokens_details": {"audio_tokens": 0, "reasoning_tokens": 0},
}


class SdkEngine:
    """What it serves, and what it saw. Use `serving()`."""

    def __init__(self, models: Iterable[str]) -> None:
        self.models = sorted({MODEL, ENDLESS, *models})
        self.streams_cut = 0  # endless ones whose reader left
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Listen on a free port of 127.0.0.1 as long as the block."""
        app = web.Application()
        stored = "/v1/chat/completions/{id}"
        app.add_routes(
            [
                web.get("/health", self._health),
                web.get("/v1/models", self._models),
                web.get("/v1/models/{id:.+}", self._model),
                web.delete("/v1/models/{id:.+}", self._delete_model),
                web.post("/v1/chat/completions", self._chat),
                web.get("/v1/chat/completions", self._stored_list),
                web.get(stored, self._stored),
                web.post(stored, self._stored),
                web.delete(stored, self._delete_stored),
                web.get(stored + "/messages", self._stored_messages),
                web.post("/v1/completions", self._completion),
                web.post("/v1/embeddings", self._embeddings),
            ]
        )
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            self.port = runner.addresses[0][1]
            yield
        finally:
            await runner.cleanup()

    # --- models ------------------------------------------------------------------------------

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _models(self, _: web.Request) -> web.Response:
        return _json({"object": "list", "data": [_model(name) for name in self.models]})

    async def _model(self, request: web.Request) -> web.Response:
        return _json(_model(request.match_info["id"]))

    async def _delete_model(self, request: web.Request) -> web.Response:
        return _json({"id": request.match_info["id"], "object": "model", "deleted": True})

    # --- what is computed --------------------------------------------------------------------

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        model = asked["model"]
        if not asked.get("stream"):
            return _json(_chat_completion(model))
        pieces: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
        pieces += [{"content": word} for word in WORDS]
        chunks = [_chat_chunk(model, delta, None) for delta in pieces]
        chunks.append(_chat_chunk(model, {}, "stop"))
        if (asked.get("stream_options") or {}).get("include_usage"):
            chunks.append({**_chat_chunk(model, {}, None), "choices": [], "usage": USAGE})
        return await self._stream(request, model, chunks)

    async def _completion(self, request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        model = asked["model"]
        if not asked.get("stream"):
            return _json({**_text_completion(model, "".join(WORDS), "stop"), "usage": USAGE})
        chunks = [_text_completion(model, word, "stop") for word in WORDS]
        return await self._stream(request, model, chunks)

    async def _stream(
        self, request: web.Request, model: str, chunks: list[dict[str, Any]]
    ) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await answer.prepare(request)
        try:
            for chunk in chunks:
                await answer.write(b"data: " + orjson.dumps(chunk) + b"\n\n")
            while model == ENDLESS:
                await answer.write(b"data: " + orjson.dumps(chunks[1]) + b"\n\n")
                await asyncio.sleep(PIECE_INTERVAL_S)
            await answer.write(b"data: [DONE]\n\n")
        except ConnectionError:  # the reader has left, as some tests do at once
            self.streams_cut += model == ENDLESS
        return answer

    async def _embeddings(self, request: web.Request) -> web.Response:
        asked = await request.json()
        embedding: object = EMBEDDING
        # The schema has numbers only, and the client's tests hold answers to it although the client
        # asks for base64; engines send that.
        if asked.get("encoding_format") == "base64" and asked["model"] == MODEL:
            embedding = base64.b64encode(array.array("f", EMBEDDING).tobytes()).decode()
        datum = {"object": "embedding", "index": 0, "embedding": embedding}
        usage = {"prompt_tokens": 3, "total_tokens": 3}
        return _json({"object": "list", "data": [datum], "model": asked["model"], "usage": usage})

    # --- what is stored ----------------------------------------------------------------------

    async def _stored_list(self, _: web.Request) -> web.Response:
        kept = _chat_completion("stored")
        page = {"first_id": kept["id"], "last_id": kept["id"], "has_more": False}
        return _json({"object": "list", "data": [kept], **page})

    async def _stored(self, request: web.Request) -> web.Response:
        kept = {**_chat_completion("stored"), "id": request.match_info["id"]}
        if request.method == "POST":
            kept["metadata"] = (await request.json())["metadata"]
        return _json(kept)

    async def _delete_stored(self, request: web.Request) -> web.Response:
        deleted = {"object": "chat.completion.deleted", "deleted": True}
        return _json({"id": request.match_info["id"], **deleted})

    async def _stored_messages(self, request: web.Request) -> web.Response:
        message = {"id": request.match_info["id"] + "-0", **_message()}
        page = {"first_id": message["id"], "last_id": message["id"], "has_more": False}
        return _json({"object": "list", "data": [message], **page})


def _json(value: object) -> web.Response:
    return web.Response(body=orjson.dumps(value), content_type="application/json")


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": CREATED, "owned_by": "loadtest"}


def _message() -> dict[str, Any]:
    return {"role": "assistant", "content": "".join(WORDS), "refusal": None}


def _chat_completion(model: str) -> dict[str, Any]:
    choice = {"index": 0, "message": _message(), "logprobs": None, "finish_reason": "stop"}
    return {
        "id": "chatcmpl-sdk",
        "object": "chat.completion",
        "created": CREATED,
        "model": model,
        "choices": [choice],
        "usage": USAGE,
    }


def _chat_chunk(model: str, delta: dict[str, Any], finish: str | None) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    return {
        "id": "chatcmpl-sdk",
        "object": "chat.completion.chunk",
        "created": CREATED,
        "model": model,
        "choices": [choice],
    }


def _text_completion(model: str, text: str, finish: str) -> dict[str, Any]:
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}
    return {
        "id": "cmpl-sdk",
        "object": "text_completion",
        "created": CREATED,
        "model": model,
        "choices": [choice],
    }
