"""The command `python -m backends.offline.worker`: an engine worker, from its start to its end.

It runs inside the engine's own Python, loads the model once, and serves GET /health (503 until the
model is there) and /metrics, so that a manager keeps it like any replica. What follows `--` are the
engine's own arguments.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import msgspec
from aiohttp import web

from backends.clock import SystemClock
from backends.log import Log
from backends.offline.desk_client import RemoteDesk
from backends.offline.line_engine import EngineError, FlagsError, Gauges, LineEngine
from backends.offline.work import worker_at
from backends.offline.worker_loop import Worker
from backends.offline.worker_meters import Meters, render

KEY_VARIABLE = "DOHERTY_WORK_KEY"
DESK_PATIENCE_S = 30.0
CLOSE_S = 5.0
ENGINES = ("vllm", "simulator")
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Options(NamedTuple):
    """The command line."""

    engine: str
    model: str
    model_path: str
    desk: str
    worker_id: str
    host: str
    port: int
    chunk_lines: int
    arguments: tuple[str, ...]  # of the engine


def parse_options(argv: Sequence[str]) -> Options:
    """Return the options; exits with 2 and a message when they make no sense."""
    own, rest = list(argv), []
    if "--" in own:
        at = own.index("--")
        own, rest = own[:at], own[at + 1 :]
    parser = argparse.ArgumentParser(
        prog="python -m backends.offline.worker",
        description="Load a model once and do the lines of jobs with it.",
        epilog=f"The desk's key is read from {KEY_VARIABLE}. Arguments after -- are the engine's.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--engine", choices=ENGINES, required=True)
    add("--model", required=True, help="the name that lines ask for")
    add("--model-path", default="", help="where its weights are (the name)")
    add("--desk", required=True, metavar="URL", help="the offline service")
    add("--worker-id", required=True, help="told to the desk; unique among those of a manager")
    add("--host", default="127.0.0.1", help="for /health and /metrics (%(default)s)")
    add("--port", type=int, required=True, help="for the same; 0 takes a free one")
    add("--chunk-lines", type=int, default=2000, help="lines asked for at once (%(default)s)")
    found = parser.parse_args(own)
    if not found.desk.startswith(("http://", "https://")):
        parser.error(f"--desk: '{found.desk}' is not like http://HOST:PORT")
    if not 0 <= found.port <= 65535:
        parser.error(f"--port: {found.port} is not a port")
    if found.chunk_lines < 1:
        parser.error("--chunk-lines: at least 1")
    return Options(
        found.engine,
        found.model,
        found.model_path,
        found.desk,
        found.worker_id,
        found.host,
        found.port,
        found.chunk_lines,
        tuple(rest),
    )


def make_engine(
    engine: str, model: str, path: str, arguments: Sequence[str], log: Log
) -> LineEngine:
    """Return the engine, not started. Each is imported where it is wanted: their Pythons differ."""
    if engine == "simulator":
        from backends.offline.simulator_engine import SimulatorEngine  # noqa: PLC0415

        return SimulatorEngine(model, arguments, log)
    from backends.offline.vllm_engine import VllmEngine  # noqa: PLC0415

    return VllmEngine(model, path, arguments, log)


class Page:
    """GET /health and /metrics of a worker."""

    def __init__(self) -> None:
        self.worker: Worker | None = None  # none while the model is loading
        self.engine: LineEngine | None = None

    def application(self) -> web.Application:
        """Return the aiohttp application."""
        application = web.Application()
        application.router.add_get("/health", self._health)
        application.router.add_get("/metrics", self._metrics)
        return application

    async def _health(self, request: web.Request) -> web.Response:
        ready = self.worker is not None
        body = msgspec.json.encode({"status": "ok" if ready else "loading"})
        return web.Response(
            body=body, status=200 if ready else 503, content_type="application/json"
        )

    async def _metrics(self, request: web.Request) -> web.Response:
        now_s = SystemClock().now_s()
        if self.worker is None or self.engine is None:
            text = render(Meters(), Gauges(0, 0), 0, now_s)
        else:
            worker = self.worker
            text = render(worker.meters, self.engine.gauges(), len(worker.holdings), now_s)
        return web.Response(
            body=text.encode(),
            headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"},
        )


async def serve(options: Options, log: Log) -> int:
    """Load and work until a signal (0), a failure (1), or arguments that no engine takes (2)."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    page = Page()
    runner = web.AppRunner(page.application(), access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    desk = RemoteDesk(options.desk, os.environ.get(KEY_VARIABLE, ""), DESK_PATIENCE_S)
    arguments = (options.engine, options.model, options.model_path, options.arguments)
    engine = make_engine(*arguments, log)
    code = 1
    try:
        await web.TCPSite(runner, options.host, options.port).start()
        sys.stdout.write(f"listening on http://{options.host}:{runner.addresses[0][1]}\n")
        sys.stdout.flush()
        code = await _work(options, engine, desk, page, stop, log)
    except (EngineError, OSError) as error:
        log.fault("worker_failed", why=str(error))
        code = 2 if isinstance(error, FlagsError) else 1
    finally:
        await desk.close()
        await runner.cleanup()
        if not await _closed(engine):
            # A model that is still being loaded cannot be told to stop, only be left.
            log.caution("engine_left", why="it cannot be ended, so this process ends around it")
            sys.stdout.flush()
            os._exit(code)
    return code


async def _work(
    options: Options,
    engine: LineEngine,
    desk: RemoteDesk,
    page: Page,
    stop: asyncio.Event,
    log: Log,
) -> int:
    """Return the exit code. Raises `EngineError` when the model cannot be loaded."""
    if not await _started(engine, stop):
        return 0
    worker_id = worker_at(options.worker_id, f"{_boot_id()} {options.desk}")
    worker = Worker(engine, desk, worker_id, options.chunk_lines, SystemClock(), log)
    page.engine, page.worker = engine, worker
    log.tell("worker_ready", worker=options.worker_id, models=engine.models)
    return await worker.run(stop)


def _boot_id() -> str:
    """Return what names this machine until it boots again, as far as it says."""
    with suppress(OSError):
        return BOOT_ID.read_text().strip()
    return ""


async def _started(engine: LineEngine, stop: asyncio.Event) -> bool:
    """Start the engine; return False if `stop` came first."""
    starting = asyncio.ensure_future(engine.start())
    stopping = asyncio.ensure_future(stop.wait())
    await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not starting.done():
        starting.cancel()
        return False
    await starting
    return True


async def _closed(engine: LineEngine) -> bool:
    """Close the engine; return whether it has ended."""
    try:
        async with asyncio.timeout(CLOSE_S):
            await engine.close()
    except (TimeoutError, EngineError):
        return False
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """Run; return the exit code."""
    options = parse_options(sys.argv[1:] if argv is None else argv)
    return asyncio.run(serve(options, Log()))


if __name__ == "__main__":
    sys.exit(main())
