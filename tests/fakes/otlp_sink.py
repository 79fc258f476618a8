"""A collector: takes OTLP over HTTP and keeps the spans, as they were on the wire."""

from __future__ import annotations

import asyncio
import gzip
from typing import Any, Self

from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


class Told:
    """One span as the collector got it."""

    def __init__(self, span: Any, resource: dict[str, Any]) -> None:
        self.name: str = span.name
        self.kind: int = span.kind
        self.trace_id: str = span.trace_id.hex()
        self.span_id: str = span.span_id.hex()
        self.parent_id: str = span.parent_span_id.hex()
        self.state: str = span.trace_state
        self.start_ns: int = span.start_time_unix_nano
        self.end_ns: int = span.end_time_unix_nano
        self.attributes = _values(span.attributes)
        self.events = [(e.name, e.time_unix_nano) for e in span.events]
        self.links = [(link.trace_id.hex(), link.span_id.hex()) for link in span.links]
        self.failed: bool = span.status.code == 2
        self.error: str = span.status.message
        self.resource = resource


def _values(pairs: Any) -> dict[str, Any]:
    return {p.key: getattr(p.value, p.value.WhichOneof("value")) for p in pairs}


class OtlpSink:
    """Use as `async with OtlpSink() as sink`; `sink.url` is what --otlp-traces-endpoint takes."""

    def __init__(self, status: int = 200, pause_s: float = 0.0) -> None:
        self.status = status
        self.pause_s = pause_s
        self.spans: list[Told] = []
        self.octets = b""  # all that came
        self.posts = 0
        self._heard = asyncio.Condition()
        app = web.Application(client_max_size=64 * 1024 * 1024)
        app.router.add_post("/v1/traces", self._take)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        self.url = ""

    async def __aenter__(self) -> Self:
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    async def _take(self, request: web.Request) -> web.Response:
        self.posts += 1
        body = await request.read()
        if body[:2] == b"\x1f\x8b":
            body = gzip.decompress(body)
        if self.pause_s:
            await asyncio.sleep(self.pause_s)
        if self.status != 200:
            return web.Response(status=self.status, body=b"\xff\x00 no")
        assert request.content_type == "application/x-protobuf"
        async with self._heard:
            self.octets += body
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                named = _values(resource.resource.attributes)
                for scope in resource.scope_spans:
                    self.spans += [Told(span, named) for span in scope.spans]
            self._heard.notify_all()
        return web.Response(content_type="application/x-protobuf")

    async def until(self, count: int) -> list[Told]:
        """Wait until so many spans have come; return all."""
        async with asyncio.timeout(30), self._heard:
            await self._heard.wait_for(lambda: len(self.spans) >= count)
        return self.spans

    def named(self, name: str) -> list[Told]:
        return [span for span in self.spans if span.name == name]
