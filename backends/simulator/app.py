"""The command `doherty simulator`: sockets up, signals, and the way down.

Going down is where the engines differ most. vLLM ends what is in flight at once, or waits for it as
long as `--shutdown-timeout` says while it ends everything new. SGLang turns unready, goes on taking
requests, and leaves once it finds itself idle at one of its looks, however long that takes.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys

import uvloop
from aiohttp import web

from backends.log import Log
from backends.simulator.engine import Engine, Gate
from backends.simulator.flags import parse_flags
from backends.simulator.kv_events import EventPublisher
from backends.simulator.ranks import Ranks
from backends.simulator.server import Server
from backends.simulator.settings import Settings
from backends.simulator.tables import Tables, build_tables
from backends.tasks import cancel_all, spawn

ABORT_TIMEOUT_S = 5.0  # real; for the ends of aborted requests to reach their clients


def main(argv: list[str] | None = None) -> int:
    """Run one engine until it is told to stop; return the exit code."""
    settings = parse_flags(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    return uvloop.run(serve(settings))


async def serve(settings: Settings) -> int:
    """Serve until a signal (0) or the engine's death (1)."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    # vLLM does not listen before it can serve; SGLang does, and answers 503.
    if settings.dialect == "vllm" and settings.startup_s and await _stopped_within(settings, stop):
        return 0
    tables = None
    if settings.tables_mib:
        arguments = (settings.tables_mib, settings.seed, stop.is_set)
        tables = await asyncio.to_thread(build_tables, *arguments)
        if tables is None:
            return 0
    process = Process(settings, tables)
    try:
        port = await process.start()
        sys.stdout.write(f"listening on http://{settings.host}:{port}\n")
        sys.stdout.flush()
        return await process.run_until(stop)
    finally:
        await process.close()


async def _stopped_within(settings: Settings, stop: asyncio.Event) -> bool:
    try:
        async with asyncio.timeout(settings.real_s(settings.startup_s)):
            await stop.wait()
    except TimeoutError:
        return False
    return True


class Process:
    """Engine, HTTP server and event sockets of one simulated engine, in the running loop."""

    def __init__(self, settings: Settings, tables: Tables | None = None) -> None:
        endpoint = settings.kv_events
        self._settings = settings
        self._publishers: list[EventPublisher] = []
        if endpoint is not None:
            self._publishers = [
                EventPublisher(endpoint, settings.dialect, settings.block_tokens, rank)
                for rank in range(settings.dp_size)
            ]
        self.ranks = Ranks(settings, self._publishers)
        self.server = Server(settings, self.ranks, self._publishers, tables)
        self._runner = web.AppRunner(
            self.server.application(),
            access_log=None,
            handler_cancellation=True,
            keepalive_timeout=settings.keep_alive_timeout_s,
            shutdown_timeout=ABORT_TIMEOUT_S,
        )
        self._log = Log()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> int:
        """Listen; return the port."""
        await self._runner.setup()
        await web.TCPSite(self._runner, self._settings.host, self._settings.port).start()
        for engine in self.ranks:
            self._tasks.append(spawn(self._run(engine), "engine", self._log))
        if not self.server.ready:
            self._tasks.append(spawn(self._become_ready(), "startup", self._log))
        port: int = self._runner.addresses[0][1]
        return port

    async def run_until(self, stop: asyncio.Event) -> int:
        """Wait for `stop` and go down as the dialect does, or for the engine's death."""
        going = spawn(self._go_down_after(stop), "signals", self._log)
        self._tasks.append(going)
        await asyncio.wait((going, self.ranks.dead), return_when=asyncio.FIRST_COMPLETED)
        if not self.ranks.dead.done():
            return 0
        sys.stderr.write(f"fatal: {self.ranks.dead.result()}\n")
        self._drop_connections()
        return 1

    async def close(self) -> None:
        """Let go of everything."""
        try:
            await self._runner.cleanup()
        finally:
            await cancel_all(self._tasks)
            for publisher in self._publishers:
                publisher.close()

    async def _run(self, engine: Engine) -> None:
        try:
            await engine.run()
        except Exception as error:
            engine.die(f"{type(error).__name__}: {error}")
            raise

    async def _become_ready(self) -> None:
        await self.ranks.first.pass_s(self._settings.startup_s)
        self.server.ready = True

    async def _go_down_after(self, stop: asyncio.Event) -> None:
        await stop.wait()
        self.server.draining = True
        if self._settings.dialect == "sglang":
            await self._drain_sglang()
        else:
            await self._drain_vllm()

    async def _drain_sglang(self) -> None:
        busy = True
        while busy:
            await self.ranks.first.pass_s(self._settings.drain_poll_s)
            busy = self.ranks.busy or self.server.exchanges_open > 0

    async def _drain_vllm(self) -> None:
        self.ranks.gate = Gate.ABORT
        await self._idle_within(self._settings.shutdown_timeout_s)
        self.ranks.abort_all()
        await self._idle_within(ABORT_TIMEOUT_S)

    async def _idle_within(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await self.ranks.idle()
        except TimeoutError:
            return

    def _drop_connections(self) -> None:
        """Cut all clients off, as the end of a killed process does."""
        server = self._runner.server
        for connection in server.connections if server is not None else ():
            if connection.transport is not None:
                connection.transport.abort()
