"""One engine, started by its own command line with nothing before it, and stopped without a rest.

What is measured here is the engine, so Doherty is not on the way. The rehearsal puts the simulator
in an engine's place, in its dialect, and everything else is as on a GPU.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import os
import re
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Final

import msgspec

from loadtest.client import Client, RequestError, parse_url
from loadtest.gpu.records import CHUNK_TOKENS, Phase
from loadtest.run import RunError

ENGINES: Final = ("vllm", "sglang")
MODEL: Final = "m"
POLL_INTERVAL_S = 0.25
POLL_TIMEOUT_S = 5.0
STOP_TIMEOUT_S = 40.0  # SGLang looks every 5 s whether it is idle, then its processes end
KILL_TIMEOUT_S = 10.0
LOG_TAIL_CHARACTERS = 2500
MODEL_LEN_TOKENS = 40_960
PHASES_MAX = 60

# What of an engine's log tells how its start goes; the words of vLLM 0.26 and SGLang 0.5.17.
_PHASE = re.compile(
    r"(?i)Initializing a V1|model loading took|Load weight (begin|end)|torch\.compile took"
    r"|Directly load|GPU KV cache size|KV Cache is allocated|max_total_num_tokens="
    r"|graph capturing finished|Capture .*graph (begin|end)|init engine|attention backend"
    r"|Application startup complete|fired up|listening on"
)
# SGLang prints its own and vLLM's word for it; vLLM with or without commas.
_CHUNK = re.compile(r"(?:chunked_prefill_size|max_num_batched_tokens)=([0-9]{3,6})\b")
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_PROGRESS_BAR = "%|"

# NVLink multicast stays off where several cards work together: the switch that carries it is the
# host's, which may be shared. NCCL, PyTorch and NVSHMEM read these; vLLM's own way is the fourth.
_NO_MULTICAST = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
}
# And FlashInfer's fused all-reduce sets multicast up by itself; both engines take it where it is.
_NO_FUSED_ALL_REDUCE = {
    "vllm": "--compilation-config.pass_config.fuse_allreduce_rms=false",
    "sglang": "--enforce-disable-flashinfer-allreduce-fusion",
}


SHARE_OF_CARD = 0.84  # of its memory, for all engines on it together
NEIGHBOUR_TOKENS = 8192  # context of an engine that shares its card


class EngineOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Which engine is started, and how."""

    engine: str
    model_path: str = ""
    rehearse: bool = False  # the simulator in the engine's place
    program: tuple[str, ...] = ()  # instead of the engine's own command
    args: tuple[str, ...] = ()  # after ours, so that they win
    devices: str = ""  # CUDA_VISIBLE_DEVICES; empty: as it is
    tensor_parallel: int = 1
    quantization: str = ""  # fp8, or none
    load_format: str = "dummy"
    start_timeout: float = 420.0


class Running(msgspec.Struct, frozen=True, kw_only=True):
    """An engine that answers."""

    url: str
    command: str
    log: Path
    ready_s: float
    phases: tuple[Phase, ...]
    chunk_tokens: int


def add_engine_arguments(command: argparse.ArgumentParser) -> None:
    """Add what names and starts an engine."""
    add = command.add_argument_group("engine").add_argument
    add("--model-path", default="", help="folder of the model; its weights may be missing")
    add("--load-format", default="dummy", help="of the weights (default %(default)s: random ones)")
    add("--rehearse", action="store_true", help="the simulator in the engine's place")
    each = "; with ENGINE= before it for that engine only; may be repeated"
    add("--program", action="append", default=[], metavar="COMMAND",
        help=f"instead of the engine's own, on PATH{each}")  # fmt: skip
    add("--args", action="append", default=[], metavar="WORDS",
        help=f"further arguments of the engine, quoted together{each}")  # fmt: skip
    add("--start-timeout", type=float, default=420.0, metavar="S", help="default %(default)s")


def engine_options(args: argparse.Namespace, engine: str, **more: object) -> EngineOptions:
    """Return what the command line says. Raises `RunError` when it does not suffice."""
    rehearse = bool(args.rehearse)
    if not rehearse and not args.model_path:
        raise RunError("name the model's folder with --model-path, or --rehearse without a GPU")
    fields = {
        "engine": engine,
        "model_path": args.model_path,
        "rehearse": rehearse,
        "program": tuple(words_for(engine, args.program)),
        "args": tuple(words_for(engine, args.args)),
        "load_format": args.load_format,
        "start_timeout": args.start_timeout,
    }
    return msgspec.convert({**fields, **more}, EngineOptions)


def words_for(engine: str, given: Sequence[str]) -> list[str]:
    """Return the words of what was given for every engine, and of what was for this one."""
    words = []
    for text in given:
        prefix, _, rest = text.partition("=")
        if prefix == engine:
            words += shlex.split(rest)
        elif prefix not in ENGINES:
            words += shlex.split(text)
    return words


def neighbour_words(engine: str, together: int) -> list[str]:
    """Return the arguments of an engine that starts while others fill the same card.

    Engines size their KV memory by what is free, and are misled by neighbours that grow meanwhile.
    So the size is given: enough for one answer. vLLM still wants its share to be free at the start,
    and SGLang judges what is free beside all that is on the card, which therefore gets all of it.
    """
    if together < 2:
        return []
    tokens = str(NEIGHBOUR_TOKENS)
    if engine == "vllm":
        share = f"{SHARE_OF_CARD / together:.2f}"
        words = ["--max-model-len", tokens, "--kv-cache-memory-bytes", "2G"]
        return [*words, "--gpu-memory-utilization", share]
    words = ["--context-length", tokens, "--max-total-tokens", str(2 * NEIGHBOUR_TOKENS)]
    return [*words, "--mem-fraction-static", str(SHARE_OF_CARD)]


def engine_command(options: EngineOptions, port: int) -> list[str]:
    """Return the command line. Raises `RunError` when the engine is not installed."""
    common = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", MODEL]
    if options.rehearse:
        ours = ["--dialect", options.engine, "--max-model-len", str(MODEL_LEN_TOKENS)]
        return [sys.executable, "-m", "backends.simulator", *common, *ours, *options.args]
    program = list(options.program) or _program(options.engine)
    path, parallel = options.model_path, str(options.tensor_parallel)
    quantized = ["--quantization", options.quantization] if options.quantization else []
    common += ["--load-format", options.load_format, *quantized]
    if options.tensor_parallel > 1:
        common.append(_NO_FUSED_ALL_REDUCE[options.engine])
    if options.engine == "vllm":
        ours = ["--max-model-len", str(MODEL_LEN_TOKENS), "--tensor-parallel-size", parallel]
        ours += ["--enable-prefix-caching", "--enable-prompt-tokens-details", "--seed", "0"]
        return [*program, path, *common, *ours, *options.args]
    ours = ["--context-length", str(MODEL_LEN_TOKENS), "--tp-size", parallel, "--page-size", "16"]
    ours += ["--enable-metrics", "--enable-cache-report", "--random-seed", "0"]
    return [*program, "--model-path", path, *common, *ours, *options.args]


def _program(engine: str) -> list[str]:
    """Return the command that serves: the engine's own script, else its module."""
    script = shutil.which(engine)
    if script:
        return [script, "serve"]
    if importlib.util.find_spec(engine) is None:
        raise RunError(f"no command {engine!r} on PATH; install it, or name it with --program")
    modules = {"vllm": ["vllm.entrypoints.cli.main", "serve"], "sglang": ["sglang.launch_server"]}
    return [sys.executable, "-m", *modules[engine]]


def environment(options: EngineOptions) -> dict[str, str]:
    """Return the variables beyond ours."""
    made = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "120",
        # Else each look at /health computes a token.
        "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0",
    }
    if options.tensor_parallel > 1:
        made |= _NO_MULTICAST
    if options.devices:
        made["CUDA_VISIBLE_DEVICES"] = options.devices
    return made


def read_phases(log: str, at_s: float, known: Sequence[Phase]) -> tuple[Phase, ...]:
    """Return the phases that a log tells of; those not yet `known` came `at_s`."""
    lines = [_ANSI.sub("", line).strip() for line in log.splitlines() if _PROGRESS_BAR not in line]
    told = [line[:160] for line in lines if _PHASE.search(line)][:PHASES_MAX]
    return (*known, *(Phase(round(at_s, 1), line) for line in told[len(known) :]))


def read_chunk_tokens(log: str) -> int:
    """Return the tokens of a step of prefill as the engine logs them, else the usual number."""
    found = _CHUNK.search(log)
    return int(found[1]) if found else CHUNK_TOKENS


@contextlib.asynccontextmanager
async def started(options: EngineOptions) -> AsyncIterator[Running]:
    """A fresh engine that is ready; gone at the end, with all its processes.

    Raises `RunError`, with the engine's last words, when it does not come up.
    """
    port = _free_port()
    command = engine_command(options, port)
    folder = Path(tempfile.mkdtemp(prefix=f"doherty-{options.engine}-"))
    log = folder / "engine.log"
    begun_s = time.monotonic()
    process = await _spawn(command, log, environment(options))
    failed = True
    try:
        phases = await _until_ready(process, port, log, begun_s, options)
        yield Running(
            url=f"http://127.0.0.1:{port}",
            command=shlex.join(command),
            log=log,
            ready_s=round(time.monotonic() - begun_s, 1),
            phases=phases,
            chunk_tokens=read_chunk_tokens(_read(log)),
        )
        failed = False
    finally:
        await _stop(process)
        if not failed:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)


async def _spawn(
    command: Sequence[str], log: Path, variables: dict[str, str]
) -> asyncio.subprocess.Process:
    with open(log, "wb") as output:  # noqa: ASYNC230 - once, before anything is measured
        try:
            return await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **variables},
            )
        except OSError as error:
            raise RunError(f"{command[0]}: cannot be started: {error.strerror}") from error


async def _until_ready(
    process: asyncio.subprocess.Process,
    port: int,
    log: Path,
    begun_s: float,
    options: EngineOptions,
) -> tuple[Phase, ...]:
    phases: tuple[Phase, ...] = ()
    client = Client(parse_url(f"http://127.0.0.1:{port}"), time.monotonic)
    try:
        while True:
            waited_s = time.monotonic() - begun_s
            text = _read(log)
            phases = read_phases(text, waited_s, phases)
            if await healthy(client):
                return phases
            last = text[-LOG_TAIL_CHARACTERS:].strip() or "it said nothing"
            if process.returncode is not None:
                raise RunError(f"{options.engine} ended with {process.returncode}: {last}")
            if waited_s > options.start_timeout:
                limit = f"{options.start_timeout:g} s"
                raise RunError(f"{options.engine} was not ready in {limit}; see {log}: {last}")
            await asyncio.sleep(POLL_INTERVAL_S)
    finally:
        client.close()


def _read(log: Path) -> str:
    return log.read_text("utf-8", "replace")


async def healthy(client: Client) -> bool:
    """Return whether the engine says that it serves."""
    try:
        async with asyncio.timeout(POLL_TIMEOUT_S):
            return (await client.get("/health")).status == 200
    except (RequestError, TimeoutError):
        return False


async def _stop(process: asyncio.subprocess.Process) -> None:
    """End the process and all that it started: they are one session, so one group."""
    for number, limit_s in ((signal.SIGTERM, STOP_TIMEOUT_S), (signal.SIGKILL, KILL_TIMEOUT_S)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        if await _ended(process, limit_s):
            break
    await process.wait()


async def _ended(process: asyncio.subprocess.Process, limit_s: float) -> bool:
    """Wait until the whole group has gone. Returns whether it has."""
    deadline_s = time.monotonic() + limit_s
    while process.returncode is None or _group_left(process):
        if time.monotonic() > deadline_s:
            return False
        await asyncio.sleep(0.1)
    return True


def _group_left(process: asyncio.subprocess.Process) -> bool:
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _free_port() -> int:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        return int(holder.getsockname()[1])
