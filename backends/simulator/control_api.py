"""Paths for operators and managers: health, load, sleep, pause, abort, and the simulator's own.

Which of them exist depends on the dialect, as it does with the engines. vLLM's development
endpoints are always on here (the engine wants VLLM_SERVER_DEV_MODE=1), except sleep, which wants
`--enable-sleep-mode`. SGLang's answers to wrong calls are fatal, as the engine's are.
"""

from __future__ import annotations

import asyncio
import os
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

import msgspec
import orjson
from aiohttp import web

from backends.simulator.api_errors import ApiError
from backends.simulator.bodies import Body, decode_body
from backends.simulator.clockwork import Sequence
from backends.simulator.engine import MEMORY_PARTS, Gate
from backends.simulator.exposition import usage_ratio
from backends.simulator.faults import FaultError
from backends.simulator.generation import Generation, make_sequences
from backends.simulator.tokens import encode_text

if TYPE_CHECKING:
    from backends.simulator.server import Server

_METHODS = ("reload_weights", "doherty_keep", "doherty_fill")  # the last two are our extension's
_FLUSHED = (
    "Cache flushed.\nPlease check backend logs for more details. (When there are running or "
    "waiting requests, the operation will not be performed.)\n"
)


class MemoryBody(msgspec.Struct):
    """SGLang's memory calls; without tags they mean everything."""

    tags: list[Literal["weights", "kv_cache", "cuda_graph"]] | None = None


class AbortBody(msgspec.Struct):
    """SGLang's /abort_request and vLLM's /abort_requests."""

    rid: str = ""
    abort_all: bool = False
    request_ids: list[str] | None = None


class PauseBody(msgspec.Struct):
    """SGLang's /pause_generation."""

    mode: Literal["abort", "retract", "in_place"] = "abort"


class UpdateBody(msgspec.Struct):
    """SGLang's /update_weights_from_disk."""

    model_path: str


class RpcBody(msgspec.Struct):
    """vLLM's /collective_rpc: what every worker of the engine is to do."""

    method: str


class FaultsBody(msgspec.Struct):
    """The simulator's own /simulator/faults."""

    faults: list[str]


def json_answer(value: object, status: int = 200) -> web.Response:
    """Return a JSON answer."""
    return web.Response(body=orjson.dumps(value), status=status, content_type="application/json")


def _choose(request: web.Request, name: str, allowed: tuple[str, ...]) -> str:
    """Return a query parameter, the first of `allowed` by default."""
    value = request.query.get(name, allowed[0])
    if value not in allowed:
        raise ApiError(400, f"{name} must be one of {', '.join(allowed)}", param=name)
    return value


class Control:
    """Handlers beside the serving ones."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._settings = server.settings
        self._ranks = server.ranks

    def add_routes(self, router: web.UrlDispatcher) -> None:
        """Add the paths of the dialect."""
        router.add_get("/health", self._health)
        router.add_get("/ping", self._ping)
        router.add_get("/server_info", self._server_info)
        router.add_get("/simulator/state", self._state)
        router.add_get("/simulator/faults", self._get_faults)
        router.add_post("/simulator/faults", self._set_faults)
        if self._settings.dialect == "vllm":
            self._add_vllm_routes(router)
        else:
            self._add_sglang_routes(router)

    def _add_vllm_routes(self, router: web.UrlDispatcher) -> None:
        router.add_post("/ping", self._ping)
        router.add_get("/version", self._version)
        router.add_get("/load", self._load)
        router.add_get("/kv_event_sources", self._kv_event_sources)
        router.add_post("/reset_prefix_cache", self._reset_prefix_cache)
        router.add_post("/abort_requests", self._abort_requests)
        router.add_post("/pause", self._pause)
        router.add_post("/resume", self._resume)
        router.add_get("/is_paused", self._is_paused)
        router.add_post("/collective_rpc", self._collective_rpc)
        if self._settings.sleep_mode:
            router.add_post("/sleep", self._sleep)
            router.add_post("/wake_up", self._wake_up)
            router.add_get("/is_sleeping", self._is_sleeping)

    def _add_sglang_routes(self, router: web.UrlDispatcher) -> None:
        router.add_get("/ready", self._ready)
        router.add_get("/health_generate", self._health_generate)
        router.add_get("/model_info", self._model_info)
        router.add_get("/v1/loads", self._loads)
        for method in ("GET", "POST"):
            router.add_route(method, "/flush_cache", self._flush_cache)
            router.add_route(method, "/release_memory_occupation", self._release_memory)
            router.add_route(method, "/resume_memory_occupation", self._resume_memory)
        router.add_post("/abort_request", self._abort_request)
        router.add_post("/pause_generation", self._pause_generation)
        router.add_post("/continue_generation", self._continue_generation)
        router.add_post("/update_weights_from_disk", self._update_weights)

    async def _health(self, _request: web.Request) -> web.StreamResponse:
        server = self._server
        if server.faults.sick:
            return web.Response(status=503)
        if self._settings.dialect == "sglang":
            if not server.ready or server.draining:
                return web.Response(status=503)
            if self._settings.health_generation:
                await self._generate_one()
        return web.Response()

    async def _health_generate(self, _request: web.Request) -> web.StreamResponse:
        if not self._server.ready or self._server.draining:
            return web.Response(status=503)
        await self._generate_one()
        return web.Response()

    async def _generate_one(self) -> None:
        """Run the probe: one token of a request of its own, waited for."""
        generation = Generation(
            request_id="HEALTH_CHECK",
            model=self._settings.models[0],
            prompts=(encode_text("0"),),
            max_tokens=1,
        )
        sequences: list[Sequence] = make_sequences(
            generation, self._settings, (), self._ranks.first.clockwork
        )
        outbox = self._ranks.first.submit(sequences)
        try:
            await outbox.take()
        finally:
            self._ranks.first.abort(sequences)

    async def _ready(self, _request: web.Request) -> web.StreamResponse:
        server = self._server
        ready = server.ready and not server.draining and self._ranks.gate is Gate.OPEN
        return web.Response(status=200 if ready else 503)

    async def _ping(self, _request: web.Request) -> web.StreamResponse:
        return web.Response()

    async def _version(self, _request: web.Request) -> web.StreamResponse:
        return json_answer({"version": self._settings.version})

    async def _load(self, _request: web.Request) -> web.StreamResponse:
        tracked = self._settings.load_tracking
        return json_answer({"server_load": self._server.exchanges_open if tracked else 0})

    async def _server_info(self, _request: web.Request) -> web.StreamResponse:
        settings = self._settings
        if settings.dialect == "vllm":
            return json_answer({"vllm_config": f"model='{settings.models[0]}'", "vllm_env": {}})
        return json_answer(
            {
                "model_path": settings.models[0],
                "served_model_name": settings.models[0],
                "context_length": settings.context_tokens_max,
                "page_size": settings.block_tokens,
                "max_running_requests": settings.sequences_max,
                "chunked_prefill_size": settings.batched_tokens_max,
                "enable_priority_scheduling": settings.priorities,
                "schedule_low_priority_values_first": settings.low_priority_first,
                "version": settings.version,
                "startup_time": self._server.started_s,
                "dp_size": settings.dp_size,
                "max_total_num_tokens": self._pool_tokens(),
                "internal_states": [
                    {"load": len(engine.clockwork.running)} for engine in self._ranks
                ],
                "kv_events": self._kv_events(),
            }
        )

    async def _model_info(self, _request: web.Request) -> web.StreamResponse:
        model = self._settings.models[0]
        embeds = self._settings.task == "embed"
        value: dict[str, object] = {"model_path": model, "tokenizer_path": model}
        return json_answer(value | {"is_generation": not embeds, "weight_version": "default"})

    def _pool_tokens(self) -> int:
        return self._settings.kv_blocks_max * self._settings.block_tokens

    def _kv_events(self) -> dict[str, object] | None:
        if not self._server.publishers:
            return None
        publisher = self._server.publishers[0]
        return {
            "publisher": "zmq",
            "endpoint_host": self._settings.host,
            "endpoint_port_base": publisher.port,
            "topic": publisher.topic,
            "block_size": self._settings.block_tokens,
            "dp_size": self._settings.dp_size,
            "replay_endpoint_port_base": publisher.replay_port,
        }

    async def _kv_event_sources(self, _request: web.Request) -> web.StreamResponse:
        host = self._settings.host
        sources = {}
        for rank, publisher in enumerate(self._server.publishers):
            replay_port = publisher.replay_port
            sources[str(rank)] = {
                "publisher": "zmq",
                "endpoint": f"tcp://{host}:{publisher.port}",
                "replay_endpoint": f"tcp://{host}:{replay_port}" if replay_port else None,
                "topic": publisher.topic,
            }
        return json_answer(sources)

    async def _loads(self, _request: web.Request) -> web.StreamResponse:
        return json_answer(
            {
                "timestamp": datetime.now(UTC).isoformat(),
                "version": self._settings.version,
                "accelerator": self._settings.profile.name,
                "num_accelerators": self._settings.dp_size,
                "loads": [self._rank_loads(rank) for rank in range(self._settings.dp_size)],
            }
        )

    def _rank_loads(self, rank: int) -> dict[str, object]:
        engine, settings = self._ranks.engines[rank], self._settings
        tally = engine.tally
        used_tokens = engine.cache.used_blocks * settings.block_tokens
        waiting = engine.clockwork.waiting_count
        queried = tally.queried_tokens
        return {
            "timestamp": time.time(),
            "dp_rank": rank,
            "num_running_reqs": len(engine.clockwork.running),
            "num_waiting_reqs": waiting,
            "num_waiting_uncached_tokens": engine.clockwork.waiting_uncached_tokens,
            "num_used_tokens": used_tokens,
            "num_total_tokens": used_tokens,
            "num_active_tokens": used_tokens,
            "max_total_num_tokens": self._pool_tokens(),
            "max_running_requests": settings.sequences_max,
            "token_usage": round(usage_ratio(engine), 4),
            "gen_throughput": 0.0,
            "cache_hit_rate": tally.cached_tokens / queried if queried else 0.0,
            "utilization": 0.0,
            "total_prefill_uncached_tokens": tally.computed_tokens,
            "total_prefill_busy_us": round(tally.prefill_busy_s * 1e6),
            "queues": {"waiting": waiting, "grammar": 0, "paused": 0, "retracted": 0},
        }

    async def _reset_prefix_cache(self, _request: web.Request) -> web.StreamResponse:
        return json_answer({"success": self._ranks.clear()})

    async def _flush_cache(self, request: web.Request) -> web.StreamResponse:
        try:
            timeout_s = float(request.query.get("timeout", "0"))
        except ValueError as error:
            raise ApiError(400, "timeout must be a number of seconds") from error
        try:
            async with asyncio.timeout(max(0.0, timeout_s)):
                await self._ranks.idle()
        except TimeoutError:
            return web.Response(text="the engine is busy; nothing was flushed\n", status=400)
        flushed = self._ranks.clear()
        return web.Response(text=_FLUSHED, status=200 if flushed else 400)

    async def _sleep(self, request: web.Request) -> web.StreamResponse:
        level = int(_choose(request, "level", ("1", "0", "2")))
        mode = _choose(request, "mode", ("abort", "wait", "keep"))
        await self._ranks.each(lambda engine: engine.sleep(level, mode))
        return json_answer({"status": "sleeping", "level": level})

    async def _wake_up(self, request: web.Request) -> web.StreamResponse:
        tags = request.query.getall("tags", [])
        unknown = sorted(set(tags) - {"weights", "kv_cache", "scheduler", "scheduling"})
        if unknown:
            raise ApiError(400, f"unknown tags {unknown}", param="tags")
        await self._ranks.each(lambda engine: engine.wake_up(tags))
        asleep = self._ranks.sleep_level is not None
        return json_answer({"status": "sleeping" if asleep else "awake", "tags": tags or None})

    async def _is_sleeping(self, _request: web.Request) -> web.StreamResponse:
        return json_answer({"is_sleeping": self._ranks.sleep_level is not None})

    async def _collective_rpc(self, request: web.Request) -> web.StreamResponse:
        body = await self._server.read(request, RpcBody)
        if body.method not in _METHODS:
            raise ApiError(400, f"workers have no method {body.method}", param="method")
        for engine in self._ranks if body.method != "doherty_keep" else ():
            engine.reload()
        return json_answer({"results": [None] * self._settings.dp_size})

    async def _pause(self, request: web.Request) -> web.StreamResponse:
        mode = _choose(request, "mode", ("abort", "wait", "keep"))
        await self._ranks.each(lambda engine: engine.pause(mode))
        if _choose(request, "clear_cache", ("true", "false")) == "true":
            self._ranks.clear()
        return json_answer({"status": "paused"})

    async def _resume(self, _request: web.Request) -> web.StreamResponse:
        if self._ranks.sleep_level is None:
            self._ranks.resume()
        return json_answer({"status": "resumed"})

    async def _is_paused(self, _request: web.Request) -> web.StreamResponse:
        return json_answer({"is_paused": self._ranks.frozen})

    async def _abort_requests(self, request: web.Request) -> web.StreamResponse:
        body = await self._server.read(request, AbortBody)
        self._server.abort(body.request_ids)
        return json_answer({"status": "aborted"})

    async def _abort_request(self, request: web.Request) -> web.StreamResponse:
        body = await self._server.read(request, AbortBody)
        # SGLang takes a rid as a prefix: the empty one would be everything, which needs its flag.
        if body.abort_all:
            self._server.abort(None)
        elif body.rid:
            self._server.abort([body.rid])
        return web.Response()

    async def _pause_generation(self, request: web.Request) -> web.StreamResponse:
        body = decode_body(PauseBody, await request.read() or b"{}")
        kept = "abort" if body.mode == "abort" else "keep"
        await self._ranks.each(lambda engine: engine.pause(kept))
        if body.mode == "retract":
            for engine in self._ranks:
                engine.clockwork.retract_all()
        self._ranks.gate = Gate.QUEUE  # new requests wait; SGLang refuses none
        return json_answer({"message": "Generation paused successfully.", "status": "ok"})

    async def _continue_generation(self, _request: web.Request) -> web.StreamResponse:
        self._ranks.resume()
        return json_answer({"message": "Generation continued successfully.", "status": "ok"})

    async def _memory_tags(self, request: web.Request) -> frozenset[str]:
        body: MemoryBody = await self._required(request, MemoryBody)
        return frozenset(body.tags) if body.tags else MEMORY_PARTS

    async def _required(self, request: web.Request, kind: type[Body]) -> Body:
        data = await request.read()
        if not data:
            raise ApiError(400, "the body must be a JSON object, {} at least")
        return decode_body(kind, data)

    async def _release_memory(self, request: web.Request) -> web.StreamResponse:
        tags = await self._memory_tags(request)
        for engine in self._ranks:
            engine.release(tags)
        return await self._unless_dead()

    async def _resume_memory(self, request: web.Request) -> web.StreamResponse:
        tags = await self._memory_tags(request)
        for engine in self._ranks:
            engine.take_back(tags)
        return await self._unless_dead()

    async def _update_weights(self, request: web.Request) -> web.StreamResponse:
        self._server.rename((await self._required(request, UpdateBody)).model_path)
        for engine in self._ranks:
            engine.reload()
        return json_answer({"success": True, "message": "Succeeded to update model weights."})

    async def _unless_dead(self) -> web.StreamResponse:
        """Answer `null`; a dead engine never answers."""
        if self._ranks.dead.done():
            await asyncio.Event().wait()
        return json_answer(None)

    async def _state(self, _request: web.Request) -> web.StreamResponse:
        ranks, tally, count = self._ranks, self._ranks.tally, self._ranks.count
        return json_answer(
            {
                "pid": os.getpid(),
                "running": count(lambda e: len(e.clockwork.running)),
                "waiting": count(lambda e: e.clockwork.waiting_count),
                "in_flight": self._server.exchanges_open,
                "blocks_max": count(lambda e: e.cache.blocks_max),
                "blocks_used": count(lambda e: e.cache.used_blocks),
                "blocks_cached": count(lambda e: e.cache.cached_blocks),
                "blocks_free": count(lambda e: e.cache.available_blocks - e.cache.cached_blocks),
                "blocks_evicted": count(lambda e: e.cache.evicted_blocks),
                "requests": sum(tally.requests),
                "traceparents": list(self._server.traceparents),
                "aborted": tally.finished["abort"],
                "finished": sum(tally.finished.values()) - tally.finished["abort"],
                "prompt_tokens": sum(tally.prompt_tokens),
                "cached_tokens": tally.cached_tokens,
                "generation_tokens": sum(tally.generation_tokens),
                "preemptions": tally.preemptions,
                "steps": tally.steps,
                "late_s": max(engine.late_s for engine in ranks),
                "gate": ranks.gate.value,
                "sleep_level": ranks.sleep_level,
                "blank": ranks.first.blank,
                "released": sorted(ranks.first.released),
                "ready": self._server.ready,
                "draining": self._server.draining,
                "faults": self._server.faults.texts,
            }
        )

    async def _get_faults(self, _request: web.Request) -> web.StreamResponse:
        return json_answer({"faults": self._server.faults.texts})

    async def _set_faults(self, request: web.Request) -> web.StreamResponse:
        body = await self._server.read(request, FaultsBody)
        try:
            self._server.faults.replace(tuple(body.faults))
        except FaultError as error:
            raise ApiError(400, str(error), param="faults") from error
        self._ranks.slow_down(self._server.faults.slowdown)
        return json_answer({"faults": self._server.faults.texts})
