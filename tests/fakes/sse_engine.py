"""A tiny engine that streams chat completions, and misbehaves when told to.

It remembers the prompt blocks it has seen, without end, so that its hit rate is the bound that a
trace allows. `mode` is one of MODES and may be changed between requests.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from typing import Any, Self

from aiohttp import web

MODES = ("ok", "cut", "no_done", "error_event", "http_500", "stall", "not_a_stream", "garbage")
BYTES_PER_TOKEN = 4


class SseEngine:
    """Use as `async with SseEngine() as engine`; then `engine.url`."""

    def __init__(self, block_tokens: int = 512, model: str = "demo", port: int = 0) -> None:
        self.mode = "ok"
        self.headers = {"x-doherty-replica": "demo-0"}
        self.block_bytes = block_tokens * BYTES_PER_TOKEN
        self.max_model_len: int | None = None  # only said, not kept to
        self.prompt_bytes_max: int | None = None  # longer prompts are answered 400
        self.listing: web.Response | None = None  # answers /v1/models instead
        self.bodies: list[dict[str, Any]] = []
        self.request_headers: list[dict[str, str]] = []
        self.arrived = asyncio.Condition()
        self.release = asyncio.Event()
        self.url = ""
        self.loop: asyncio.AbstractEventLoop | None = None  # that it runs in
        self._model = model
        self._port = port
        self._seen: set[bytes] = set()
        self._runner: web.AppRunner | None = None
        self.app = web.Application(client_max_size=64 * 1024 * 1024)
        self.app.router.add_get("/v1/models", self._models)
        self.app.router.add_post("/v1/chat/completions", self._chat)
        self.app.router.add_post("/v1/completions", self._chat)

    async def __aenter__(self) -> Self:
        self.loop = asyncio.get_running_loop()
        self._runner = web.AppRunner(self.app, shutdown_timeout=1.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port)
        await site.start()
        port = self._runner.addresses[0][1]
        self.url = f"http://127.0.0.1:{port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self.release.set()
        assert self._runner is not None
        await self._runner.cleanup()

    async def until_arrived(self, count: int) -> None:
        async with self.arrived:
            await self.arrived.wait_for(lambda: len(self.bodies) >= count)

    async def _models(self, _: web.Request) -> web.Response:
        if self.listing is not None:
            given = self.listing  # a response can be sent only once
            return web.Response(status=given.status, body=given.body, headers=given.headers)
        model = {"id": self._model, "max_model_len": self.max_model_len}
        return web.json_response({"object": "list", "data": [model]})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        async with self.arrived:
            self.bodies.append(body)
            self.request_headers.append({k.lower(): v for k, v in request.headers.items()})
            self.arrived.notify_all()
        if self.mode == "stall":
            await self.release.wait()
        if self.prompt_bytes_max is not None and len(prompt_text(body)) > self.prompt_bytes_max:
            return web.json_response({"object": "error", "message": "too long"}, status=400)
        if self.mode == "http_500":
            error = {"message": "out of luck", "type": "server_error", "code": 500}
            return web.json_response({"error": error}, status=500)
        if self.mode == "not_a_stream" or not body.get("stream", True):
            return web.json_response({"choices": []}, headers=self.headers)
        response = web.StreamResponse(headers={"content-type": "text/event-stream", **self.headers})
        await response.prepare(request)
        await self._stream(request, response, body)
        return response

    async def _stream(
        self, request: web.Request, response: web.StreamResponse, body: dict[str, Any]
    ) -> None:
        chat = "messages" in body
        if chat:
            await send(response, chunk({"role": "assistant", "content": ""}))
        count = body["max_tokens"]
        for place in range(count):
            if place == 1 and self.mode == "error_event":
                await send(response, {"error": {"message": "engine lost", "code": 500}})
                break
            if place == 1 and self.mode == "garbage":
                await response.write(b"data: {not json}\n\n")
                break
            if place == 1 and self.mode == "cut":
                assert request.transport is not None
                request.transport.abort()
                return
            finish = "length" if place == count - 1 else None
            await send(response, chunk({"content": " abc"} if chat else " abc", finish))
        if body.get("stream_options", {}).get("include_usage"):
            await send(response, {"choices": [], "usage": self._usage(body, count)})
        if self.mode != "no_done":
            await response.write(b"data: [DONE]\n\n")
        await response.write_eof()

    def _usage(self, body: dict[str, Any], output_tokens: int) -> dict[str, Any]:
        prompt = prompt_text(body).encode()
        chain, cached, open_prefix = b"", 0, True
        for start in range(0, len(prompt), self.block_bytes):
            block = prompt[start : start + self.block_bytes]
            chain = hashlib.sha256(chain + block).digest()
            open_prefix = open_prefix and chain in self._seen
            cached += len(block) if open_prefix else 0
            self._seen.add(chain)
        return {
            "prompt_tokens": -(-len(prompt) // BYTES_PER_TOKEN),
            "completion_tokens": output_tokens,
            "prompt_tokens_details": {"cached_tokens": cached // BYTES_PER_TOKEN},
        }


def prompt_text(body: dict[str, Any]) -> str:
    """Return the prompt's text, without any template around it."""
    if "prompt" in body:
        return str(body["prompt"])
    return "".join(message["content"] for message in body["messages"])


def chunk(content: dict[str, str] | str, finish: str | None = None) -> dict[str, Any]:
    key = "text" if isinstance(content, str) else "delta"
    return {"id": "x", "choices": [{"index": 0, key: content, "finish_reason": finish}]}


async def send(response: web.StreamResponse, value: dict[str, Any]) -> None:
    await response.write(b"data: " + json.dumps(value).encode() + b"\n\n")
