"""Paths by which LoRA adapters come and go: their names only, for nothing is read.

As with the engines, vLLM has the paths only where it was told that it may have them, and answers in
words; SGLang always has them, says what it has then, and unloads an adapter only once the requests
that use it have ended.
"""

from __future__ import annotations

import msgspec
from aiohttp import web

from backends.simulator.api_errors import ApiError
from backends.simulator.bodies import decode_body
from backends.simulator.ranks import Ranks
from backends.simulator.settings import Settings

_LOOK_S = 0.01  # between looks at what still uses an adapter


class LoraBody(msgspec.Struct):
    """Both engines' bodies of both calls."""

    lora_name: str = ""
    lora_path: str = ""


class LoraControl:
    """Handlers of one server."""

    def __init__(self, settings: Settings, ranks: Ranks) -> None:
        self._settings = settings
        self._ranks = ranks

    def add_routes(self, router: web.UrlDispatcher) -> None:
        """Add the paths of the dialect."""
        if self._settings.dialect == "sglang":
            router.add_post("/load_lora_adapter", self._load_sglang)
            router.add_post("/unload_lora_adapter", self._unload_sglang)
        elif self._settings.lora_updates:
            router.add_post("/v1/load_lora_adapter", self._load_vllm)
            router.add_post("/v1/unload_lora_adapter", self._unload_vllm)

    async def _load_vllm(self, request: web.Request) -> web.StreamResponse:
        body = decode_body(LoraBody, await request.read())
        if not body.lora_name or not body.lora_path:
            raise ApiError(400, "Both 'lora_name' and 'lora_path' must be provided.")
        if body.lora_name in self._ranks.adapters:
            message = f"The lora adapter '{body.lora_name}' has already been loaded."
            raise ApiError(400, message, kind="InvalidUserInput")
        self._ranks.adapters[body.lora_name] = body.lora_path
        text = f"Success: LoRA adapter '{body.lora_name}' added successfully."
        return web.Response(text=text)

    async def _unload_vllm(self, request: web.Request) -> web.StreamResponse:
        body = decode_body(LoraBody, await request.read())
        if self._ranks.adapters.pop(body.lora_name, None) is None:
            raise ApiError(404, f"The lora adapter '{body.lora_name}' cannot be found.")
        text = f"Success: LoRA adapter '{body.lora_name}' removed successfully."
        return web.Response(text=text)

    async def _load_sglang(self, request: web.Request) -> web.StreamResponse:
        body = decode_body(LoraBody, await request.read())
        if not self._settings.lora_updates:
            return self._outcome("LoRA is not enabled. Please set `--enable-lora` to enable LoRA.")
        if body.lora_name in self._ranks.adapters:
            return self._outcome(f"LoRA with name {body.lora_name} already exists.")
        self._ranks.adapters[body.lora_name] = body.lora_path
        return self._outcome()

    async def _unload_sglang(self, request: web.Request) -> web.StreamResponse:
        body = decode_body(LoraBody, await request.read())
        if self._ranks.adapters.pop(body.lora_name, None) is None:
            return self._outcome(f"LoRA with name {body.lora_name} does not exist.")
        while any(body.lora_name in names for names in self._ranks.adapters_in_use()):
            await self._ranks.first.pass_s(_LOOK_S)
        return self._outcome()

    def _outcome(self, error: str = "") -> web.Response:
        value: dict[str, object] = {"success": not error, "error_message": error}
        value["loaded_adapters"] = self._ranks.adapters
        return web.json_response(value, status=400 if error else 200)
