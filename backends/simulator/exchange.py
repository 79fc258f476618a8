"""The story of one generating request: submit, wait for text, write it, and let go.

Whatever ends it early (the client goes, a fault strikes, the server stops), its sequences are
aborted once, here. Faults that concern the answer are played here as well, chunk by chunk.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

from aiohttp import web

from backends.simulator.api_errors import ApiError
from backends.simulator.clockwork import Sequence
from backends.simulator.engine import Engine, Outbox
from backends.simulator.faults import Fault
from backends.simulator.generation import Choice, Generation, Presenter, Usage, count_usage

_GARBAGE = b"\x00\xff\x13\x37 this is not HTTP\r\n" * 4


class Disturbance:
    """One fault on its way through one answer; without a fault it does nothing."""

    def __init__(self, fault: Fault | None, exit_process: Callable[[str], None]) -> None:
        self._fault = fault
        self._exit_process = exit_process
        chunked = fault is not None and fault.kind in ("stall", "cut", "garbage", "error", "exit")
        self._chunks_left = int(fault.amount) if fault is not None and chunked else -1

    async def before_answer(self, request: web.Request) -> None:
        """Play what happens instead of an answer, or before it."""
        fault = self._fault
        if fault is None:
            return
        if fault.kind == "status":
            raise ApiError(int(fault.amount), "a fault that was asked for")
        if fault.kind == "delay":
            await asyncio.sleep(fault.amount)
        elif fault.kind == "refuse":
            await self._break(request, b"")
        elif self._chunks_left == 0 and fault.kind != "error":
            await self.strike(request)

    def allowed(self, chunks: int) -> int:
        """Return how many of the next `chunks` may still go out."""
        if self._chunks_left < 0:
            return chunks
        allowed = min(chunks, self._chunks_left)
        self._chunks_left -= allowed
        return allowed

    @property
    def pending(self) -> bool:
        """Whether a fault will strike in the course of the answer."""
        return self._chunks_left >= 0

    @property
    def due(self) -> bool:
        """Whether the fault strikes now."""
        return self._chunks_left == 0

    @property
    def error(self) -> bool:
        """Whether the fault is one that the engine still puts into words."""
        return self._fault is not None and self._fault.kind == "error"

    async def strike(self, request: web.Request) -> None:
        """Play the fault that is due; returns only for `error`, whose words are the caller's."""
        assert self._fault is not None
        self._chunks_left = -1
        match self._fault.kind:
            case "stall":
                await asyncio.Event().wait()
            case "cut":
                await self._break(request, b"")
            case "garbage":
                await self._break(request, _GARBAGE)
            case "exit":
                self._exit_process("a fault that was asked for")
                await asyncio.Event().wait()
            case _:
                return

    async def _break(self, request: web.Request, last_bytes: bytes) -> None:
        """Close the connection, after `last_bytes`; never returns: the closing cancels us."""
        transport = request.transport
        if transport is not None:
            if last_bytes:
                # uvloop's transport is a WriteTransport in all but name.
                cast("asyncio.WriteTransport", transport).write(last_bytes)
                transport.close()
            else:
                transport.abort()
        await asyncio.Event().wait()


class Exchange:
    """One request with its sequences."""

    def __init__(
        self,
        engine: Engine,
        generation: Generation,
        sequences: list[Sequence],
        spent_s: float = 0.0,
    ) -> None:
        self.request_id = generation.request_id
        self._spent_s = spent_s  # real, on reading the request
        self._engine = engine
        self._generation = generation
        self.sequences = sequences
        self._begun = False  # the answer
        self.lingers = False  # its client has left, unseen

    async def answer(
        self, request: web.Request, presenter: Presenter, disturbance: Disturbance
    ) -> web.StreamResponse:
        """Compute and answer."""
        outbox = self._engine.submit(self.sequences, self._spent_s)
        try:
            if self._generation.stream:
                return await self._stream(request, presenter, outbox, disturbance)
            body = presenter.whole(await self._collect(outbox), self.usage())
            if disturbance.pending:
                await self._send_half(request, body, disturbance)
            return web.Response(body=body, content_type="application/json")
        except asyncio.CancelledError:
            self.lingers = not self._begun and self._engine.settings.notice_s > 0.0
            raise
        finally:
            if not self.lingers:
                self._engine.abort(self.sequences)

    def abort(self) -> None:
        """Give it up; its client gets what there is."""
        self._engine.abort(self.sequences)

    async def compute(self) -> list[Choice]:
        """Compute and return the answers."""
        outbox = self._engine.submit(self.sequences, self._spent_s)
        try:
            return await self._collect(outbox)
        finally:
            self._engine.abort(self.sequences)

    def usage(self) -> Usage:
        """Return what the exchange has used by now."""
        return count_usage(
            self.sequences,
            self._generation.choices_per_prompt,
            self._engine.settings.block_tokens,
        )

    async def _collect(self, outbox: Outbox) -> list[Choice]:
        texts: list[list[str]] = [[] for _ in self.sequences]
        choices: dict[int, Choice] = {}
        while len(choices) < len(self.sequences):
            for index, emission in await outbox.take():
                texts[index].append(emission.text)
                if emission.finish_reason is not None:
                    text = "".join(texts[index])
                    choices[index] = Choice(text, emission.finish_reason, emission.stop)
        return [choices[index] for index in range(len(choices))]

    async def _send_half(self, request: web.Request, body: bytes, disturbance: Disturbance) -> None:
        if disturbance.error:
            raise ApiError(500, "the engine failed")
        response = web.StreamResponse(
            headers={"Content-Type": "application/json", "Content-Length": str(len(body))}
        )
        await response.prepare(request)
        await response.write(body[: len(body) // 2])
        await disturbance.strike(request)

    async def _stream(
        self,
        request: web.Request,
        presenter: Presenter,
        outbox: Outbox,
        disturbance: Disturbance,
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        # vLLM answers the head at once, SGLang when the first text is there.
        if self._engine.settings.dialect == "vllm":
            self._begun = True
            await response.prepare(request)
            await response.write(presenter.ahead())
        unfinished = len(self.sequences)
        opened = False
        while unfinished:
            pieces = await outbox.take()
            chunks = [] if opened else [presenter.opening()]
            if not opened:
                opened = self._begun = True
                if not response.prepared:
                    await response.prepare(request)
            allowed = disturbance.allowed(len(pieces))
            for index, emission in pieces[:allowed]:
                if emission.finish_reason is not None:
                    unfinished -= 1
                    chunks.append(
                        presenter.end(index, emission.text, emission.finish_reason, emission.stop)
                    )
                elif emission.text:
                    chunks.append(presenter.piece(index, emission.text))
            if chunks:
                await response.write(b"".join(chunks))
            if disturbance.due and (unfinished or allowed < len(pieces)):
                await disturbance.strike(request)
                await response.write(presenter.failure(ApiError(500, "the engine failed")))
                return response
        await response.write(presenter.closing(self.usage()))
        return response
