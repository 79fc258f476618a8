"""Stands in for `doherty up CONFIG`: a fake engine on the proxy's port and a manager's fleet page.

`doherty_command.py [--exit CODE] [--notes FILE] up CONFIG`: with --exit it fails with a word on
standard error; with --notes it writes its pid and then a line when the first request has come. The
fleet says "starting" once before it says "ready".
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


async def serve(config: dict[str, Any], notes: Path | None) -> None:
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
    async with engine:
        if notes is not None:
            # A pipe: opening it waits for the reader, so nothing is served before.
            with notes.open("w", buffering=1) as lines:
                lines.write(f"{os.getpid()}\n")
                await engine.until_arrived(1)
                lines.write("request\n")
                await stopped.wait()
        await stopped.wait()
    await runner.cleanup()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--exit", type=int)
    parser.add_argument("--notes", type=Path)
    parser.add_argument("command", choices=["up"])
    parser.add_argument("config", type=Path)
    args = parser.parse_args()
    exit_code: int | None = args.exit
    if exit_code is not None:
        sys.stderr.write("port 8000 is in use\n")
        return exit_code
    asyncio.run(serve(json.loads(args.config.read_text()), args.notes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
