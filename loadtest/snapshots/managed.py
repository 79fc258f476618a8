"""What a manager makes of images: its replica is killed, and comes back from one, or without."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import orjson

from loadtest.client import Client, RequestError
from loadtest.fleet import get, local
from loadtest.run import RunError
from loadtest.snapshots.stage import (
    COMMAND_S_MAX,
    DOHERTY,
    MODEL,
    POLL_S,
    PROMPTS,
    Stage,
    answer,
    flip_a_bit,
    running,
)


class _Replica(msgspec.Struct):
    state: str = "ready"
    url: str = ""
    pid: int = 0
    reason: str = ""


class _Fleet(msgspec.Struct):
    replicas: list[_Replica] = []


async def managed(stage: Stage, folder: Path, kills: int) -> tuple[tuple[float, ...], float]:
    """Return the seconds from each kill to an answer: from the image, and with a damaged one.

    Raises `RunError`, also when a replica came back otherwise than it should.
    """
    async with _manager(stage, folder) as client:
        replica = await _after(client, 0)
        images = list((folder / "run" / "snapshots" / "images").iterdir())
        if len(images) != 1:
            raise RunError(f"the manager made {len(images)} images of its first replica, not 1")
        seconds: list[float] = []
        for _ in range(kills):
            taken_s, replica = await _killed(stage, client, replica)
            if "restored" not in replica.reason:
                raise RunError(f"it was not restored: {replica.reason or 'a cold start'}")
            seconds.append(taken_s)
        flip_a_bit(images[0])
        fallback_s, replica = await _killed(stage, client, replica)
        if "restored" in replica.reason:
            raise RunError("a damaged image was restored")
        return tuple(seconds), fallback_s


async def _killed(stage: Stage, client: Client, before: _Replica) -> tuple[float, _Replica]:
    """Kill a replica; return the seconds until the one in its place has answered, and that one."""
    begun_s = time.monotonic()
    os.kill(before.pid, signal.SIGKILL)
    replica = await _after(client, before.pid)
    stage.judge(PROMPTS[0], await answer(replica.url, PROMPTS[0]))
    seconds = time.monotonic() - begun_s
    for prompt in PROMPTS:
        stage.judge(prompt, await answer(replica.url, prompt))
    return seconds, replica


async def _after(client: Client, pid: int) -> _Replica:
    """Wait for a replica that serves and is not `pid`. Raises `RunError`."""
    end_s = time.monotonic() + COMMAND_S_MAX
    while time.monotonic() < end_s:
        status, body = await get(client, "/v1/fleet")
        replicas = msgspec.json.decode(body, type=_Fleet).replicas if status == 200 else []
        for replica in replicas:
            if replica.state == "ready" and replica.pid not in (0, pid):
                return replica
        await asyncio.sleep(POLL_S)
    raise RunError(f"no replica serves within {COMMAND_S_MAX:g} s")


@contextlib.asynccontextmanager
async def _manager(stage: Stage, folder: Path) -> AsyncIterator[Client]:
    """Run a manager with one replica; its client is closed, and it has ended, after the block."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    pool = {
        "name": "slow",
        "engine": "simulator",
        "replicas": 1,
        "snapshot": True,
        "start_timeout_secs": COMMAND_S_MAX,
        "args": ["--profile", "fast", "--start-tables-mib", str(stage.tables_mib)],
    }
    config = {
        "models": [{"name": MODEL, "pools": [pool]}],
        "manager": {"port": port, "run_dir": str(folder / "run"), "gpus": "none"},
    }
    path = _written(folder, orjson.dumps(config))
    client = Client(local(port), time.monotonic)
    try:
        argv = (*DOHERTY, "manager", "--config", str(path))
        async with running(argv, folder / "manager.log"):
            yield client
    except RequestError as error:
        raise RunError(f"a replica that serves gave no answer: {error}") from error
    finally:
        client.close()


def _written(folder: Path, config: bytes) -> Path:
    folder.mkdir()
    path = folder / "config.json"
    path.write_bytes(config)
    return path
