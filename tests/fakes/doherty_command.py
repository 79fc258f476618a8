"""Stands in for `doherty up CONFIG`: a fake engine on the proxy's port and a manager's fleet page.

`doherty_command.py [--exit CODE] [--notes FILE] [--workers] [--leases N] up CONFIG`: with --exit it
fails with a word on standard error; with --notes it writes its pid and then a line when the first
request has come; with --workers it has as many processes as the configuration has workers, which
serve nothing, starts a dead one again, and counts them on the admin port's /metrics. That page says
that all is at rest, but for so many leases. The fleet says "starting" once before it says "ready".
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from aiohttp import web

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.fakes.sse_engine import SseEngine

HELD = ("leases_of_others", "queue_depth", "requests_in_flight", "replica_queued_tokens")


class Workers:
    """Processes that wait to be killed; each is started again when it was."""

    def __init__(self) -> None:
        self.alive = 0
        self.restarts = 0

    async def keep(self) -> None:
        """Keep one place filled until cancelled."""
        code = "import sys; sys.stdin.read()"  # it ends with us, too
        while True:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", code, "proxy.worker"), stdin=asyncio.subprocess.PIPE
            )
            self.alive += 1
            try:
                await process.wait()
            except asyncio.CancelledError:
                process.kill()
                await process.wait()
                raise
            self.alive -= 1
            self.restarts += 1

    def lines(self) -> str:
        return f"doherty_workers {self.alive}\ndoherty_worker_restarts_total {self.restarts}\n"


async def serve_admin(port: int, workers: Workers, leases: int) -> web.AppRunner:
    held = {"leases": leases, **dict.fromkeys(HELD, 0)}

    async def metrics(_: web.Request) -> web.Response:
        gauges = "".join(f"doherty_{name} {value}\n" for name, value in held.items())
        return web.Response(text=gauges + workers.lines())

    admin = web.Application()
    admin.router.add_get("/metrics", metrics)
    runner = web.AppRunner(admin)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    return runner


async def serve_workers(count: int, workers: Workers, stopped: asyncio.Event) -> None:
    async with asyncio.TaskGroup() as group:
        places = [group.create_task(workers.keep()) for _ in range(count)]
        await stopped.wait()
        for place in places:
            place.cancel()


async def serve(config: dict[str, Any], notes: Path | None, leases: int, *, workers: bool) -> None:
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    pool = config["models"][0]["pools"][0]
    engine = SseEngine(port=config["proxy"]["port"])
    engine.headers = {"x-doherty-replica": f"{config['proxy']['policy']}-0"}

    async def readyz(_: web.Request) -> web.Response:
        return web.Response(text="ok")

    states = ["starting"]

    async def fleet(_: web.Request) -> web.Response:
        states.append("ready")
        replicas = [{"replica_id": str(i), "state": states[-2]} for i in range(pool["replicas"])]
        return web.json_response({"epoch": "e", "version": len(states), "replicas": replicas})

    engine.app.router.add_get("/readyz", readyz)
    manager = web.Application()
    manager.router.add_get("/v1/fleet", fleet)
    runner = web.AppRunner(manager)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", config["manager"]["port"]).start()
    kept = Workers()
    admin = await serve_admin(config["proxy"]["admin_port"], kept, leases)
    async with engine:
        if notes is not None:
            # A pipe: opening it waits for the reader, so nothing is served before.
            with notes.open("w", buffering=1) as lines:
                lines.write(f"{os.getpid()}\n")
                await engine.until_arrived(1)
                lines.write("request\n")
                await stopped.wait()
        if workers:
            await serve_workers(config["proxy"]["workers"], kept, stopped)
        await stopped.wait()
    await admin.cleanup()
    await runner.cleanup()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--exit", type=int)
    parser.add_argument("--notes", type=Path)
    parser.add_argument("--workers", action="store_true")
    parser.add_argument("--leases", type=int, default=0)
    parser.add_argument("command", choices=["up"])
    parser.add_argument("config", type=Path)
    args = parser.parse_args()
    exit_code: int | None = args.exit
    if exit_code is not None:
        sys.stderr.write("port 8000 is in use\n")
        return exit_code
    config = json.loads(args.config.read_text())
    asyncio.run(serve(config, args.notes, args.leases, workers=args.workers))
    return 0


if __name__ == "__main__":
    sys.exit(main())
