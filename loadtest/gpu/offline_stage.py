"""An engine on this machine as it does jobs, and as its own server: processes, for any stranger."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec

from loadtest.gpu import machine
from loadtest.gpu.steps import Findings
from loadtest.offline import stage
from loadtest.run import RunError

MODEL = "m"
HOST = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked of which engine."""

    engine: str
    model_path: str
    args: tuple[str, ...]
    lines: int = 4000
    shared_lines: int = 900
    prefixes: int = 150  # of some 3,500 tokens: 525,000 together, where 60 GiB of KV hold 437,000
    prefix_words: int = 3500
    in_flight: int = 256
    chunk_lines: int = 2000
    form_lines: int = 6  # of each kind
    load_s: float = 240.0
    seed: int = 1


@contextlib.asynccontextmanager
async def desk(
    setting: Setting, folder: Path, store: Path, found: Findings, *extra: str
) -> AsyncIterator[str]:
    """A service and one engine worker that is ready; the service's URL. Raises `RunError`."""
    port, log = stage.free_port(), folder / "worker.log"
    simulated = setting.engine != "vllm"
    python = [sys.executable] if simulated else vllm_python()
    command = [*python, "-m", "backends.offline.worker", "--model", MODEL, "--engine"]
    command += ["simulator"] if simulated else ["vllm", "--model-path", setting.model_path]
    command += ["--worker-id", "worker-1", "--port", str(port)]
    command += ["--chunk-lines", str(setting.chunk_lines)]
    roots = f"{Path.cwd()}:{os.environ.get('PYTHONPATH', '')}".rstrip(":")
    rest = {"chunk_lines": setting.chunk_lines, "store": str(store)}
    async with stage.service(folder, rest) as url:
        command += ["--desk", url, "--", *setting.args, *extra]
        async with stage.program(command, log, {**HOST, "PYTHONPATH": roots}) as process:
            healthy = stage.until_healthy(f"http://127.0.0.1:{port}", process, log, setting.load_s)
            found.figures["worker ready, s"] = round(await healthy, 1)
            async with stage.alive(process, log):
                yield url


@contextlib.asynccontextmanager
async def server(setting: Setting, folder: Path, *extra: str) -> AsyncIterator[str]:
    """The engine's own server, ready; its URL. Raises `RunError`."""
    port, log = stage.free_port(), folder / "serve.log"
    command = ["vllm", "serve", setting.model_path]
    if setting.engine != "vllm":
        command = [sys.executable, "-m", "backends.simulator"]
    command += ["--served-model-name", MODEL, "--port", str(port), *setting.args, *extra]
    url = f"http://127.0.0.1:{port}"
    async with stage.program(command, log, HOST) as process:
        await stage.until_healthy(url, process, log, setting.load_s)
        async with stage.alive(process, log):
            yield url


def vllm_python() -> list[str]:
    """Return the Python that vLLM is in. Raises `RunError`."""
    if (program := shutil.which("vllm-python")) is not None:  # of deploy/airgap/unpack.py
        return [program]
    if found := machine.interpreters("vllm"):
        return found[:1]
    raise RunError("no command 'vllm' on PATH whose Python could be found; install it")
