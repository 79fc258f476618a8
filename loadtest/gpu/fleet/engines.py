"""The replicas of a fleet: engines on loopback addresses of their own, which may outlive a call.

Each engine listens at an address of its own (127.0.0.1, 127.0.0.2, ...), as engines on hosts of
their own would, so that all of them tell of their KV caches at the same port, and a router that
wants to hear it can be told that one number. A start takes a minute, and a machine stays warm for
half a minute between two calls: engines are in sessions of their own, a file says where they are,
and the next call takes them over. Who started none ends none.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec
import orjson

from loadtest.client import Client, RequestError, parse_url
from loadtest.fleet import get
from loadtest.gpu import direct
from loadtest.gpu.direct import MODEL, EngineOptions
from loadtest.gpu.fleet.record import Tokens
from loadtest.gpu.gauges import series, total
from loadtest.run import RunError

KV_BYTES_PER_TOKEN: Final = 147_456  # of the 8 B shape in bf16: 36 layers, 8 heads of 128, K and V
EVENTS_PORT, REPLAY_PORT = 5557, 5558
POLL_S = 0.25
STOP_S = 15.0
FLUSH_TRIES, FLUSH_PAUSE_S = 40, 0.25
# vLLM's ports for its own processes; engines that start together must not share them.
VLLM_FIRST_PORT, VLLM_PORTS_APART = 20_000, 100

# Of each engine's exposition; SGLang counts no preemptions of its own, but retractions.
_COUNTERS: Final = {
    "vllm": (
        "vllm:prompt_tokens_total", "vllm:prefix_cache_hits_total",
        "vllm:generation_tokens_total", "vllm:num_preemptions_total",
    ),
    "sglang": (
        "sglang:prompt_tokens_total", "sglang:cached_tokens_total",
        "sglang:generation_tokens_total", "sglang:num_retracted_requests_total",
    ),
}  # fmt: skip


class Shape(msgspec.Struct, frozen=True):
    """How the cards are shared out."""

    replicas: int = 4
    cards: int = 1

    @property
    def text(self) -> str:
        return f"{self.replicas}x{self.cards}"


class FleetOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Which engines are started."""

    engine: str = "simulator"  # or vllm, sglang
    dialect: str = "vllm"  # whose manners the simulator has
    model_path: str = ""
    shape: Shape = Shape()
    kv_cache_tokens: int = 400_000
    time_scale: float = 1.0  # of the simulator
    args: tuple[str, ...] = ()
    start_timeout_s: float = 300.0

    @property
    def manners(self) -> str:
        return self.dialect if self.engine == "simulator" else self.engine


class Engine(msgspec.Struct):
    """One that runs."""

    url: str
    pid: int
    log: str
    ready_s: float = 0.0


class _Kept(msgspec.Struct):
    key: str
    engines: list[Engine]


def arguments(options: FleetOptions, place: int) -> list[str]:
    """Return what is added to the engine's command line for one replica."""
    host = f"127.0.0.{place + 1}"
    tokens = str(options.kv_cache_tokens)
    # Both engines bind where they see "*" or "::" and connect elsewhere; this is IPv4 all the same
    # (an IPv4-mapped address, RFC 4291 section 2.5.5.2).
    endpoint = f"tcp://[::ffff:{host}]:{EVENTS_PORT}"
    told: dict[str, object] = {"publisher": "zmq", "endpoint": endpoint, "topic": ""}
    if options.manners == "vllm":
        told |= {
            "enable_kv_cache_events": True,
            "replay_endpoint": f"tcp://{host}:{REPLAY_PORT}",
        }
    words = ["--host", host, "--kv-events-config", orjson.dumps(told).decode()]
    if options.engine == "simulator":
        words += ["--kv-cache-tokens", tokens, "--time-scale", f"{options.time_scale:g}"]
        words += ["--profile", f"h200-8b-{options.dialect}"]
    elif options.engine == "vllm":
        words += ["--kv-cache-memory-bytes", str(options.kv_cache_tokens * KV_BYTES_PER_TOKEN)]
    else:
        words += ["--max-total-tokens", tokens, "--attention-backend", "fa3"]
        words += ["--sampling-backend", "pytorch", "--grammar-backend", "none"]
        words += ["--mm-feature-transport", "cpu"]
    return [*words, *options.args]


def command_of(options: FleetOptions, place: int, port: int) -> tuple[list[str], dict[str, str]]:
    """Return command line and further environment of one replica. Raises `RunError`."""
    cards = options.shape.cards
    first = place * cards
    engine_options = EngineOptions(
        engine=options.manners,
        model_path=options.model_path,
        rehearse=options.engine == "simulator",
        args=tuple(arguments(options, place)),
        devices=",".join(str(card) for card in range(first, first + cards)),
        tensor_parallel=cards,
    )
    variables = direct.environment(engine_options) | {
        "VLLM_SERVER_DEV_MODE": "1",  # /reset_prefix_cache
        "VLLM_PORT": str(VLLM_FIRST_PORT + VLLM_PORTS_APART * place),
    }
    return direct.engine_command(engine_options, port), variables


class Fleet:
    """The replicas, all ready."""

    def __init__(self, options: FleetOptions, engines: list[Engine]) -> None:
        self.options = options
        self.engines = engines
        self._clients = [Client(parse_url(e.url), time.perf_counter) for e in engines]

    @property
    def urls(self) -> list[str]:
        return [engine.url for engine in self.engines]

    def close(self) -> None:
        for one in self._clients:
            one.close()

    async def flush(self) -> None:
        """Empty every prefix cache, and let each engine say so. Raises `RunError`."""
        path = "/reset_prefix_cache" if self.options.manners == "vllm" else "/flush_cache"
        for client, engine in zip(self._clients, self.engines, strict=True):
            for _ in range(FLUSH_TRIES):
                if await _flushed(client, path):
                    break
                await asyncio.sleep(FLUSH_PAUSE_S)
            else:
                raise RunError(f"{engine.url}{path}: refused; is something under way?")
            # vLLM tells of an emptied cache with the next step that it runs.
            await ask(client, "hello", 1)

    async def tokens(self) -> list[Tokens]:
        """Return what each engine has counted; an engine that is gone has counted nothing."""
        return [await self._tokens(client) for client in self._clients]

    async def version(self) -> str:
        """Return what the first engine says that it is; empty: nothing."""
        path = "/version" if self.options.manners == "vllm" else "/server_info"
        status, page = await get(self._clients[0], path)
        if status != 200:
            return ""
        with contextlib.suppress(orjson.JSONDecodeError, KeyError, TypeError):
            return str(orjson.loads(page)["version"])
        return ""

    async def _tokens(self, client: Client) -> Tokens:
        status, page = await get(client, "/metrics")
        if status != 200:
            return Tokens(0.0, 0.0, 0.0)
        found = series(page.decode())
        return Tokens(*(total(found, name) for name in _COUNTERS[self.options.manners]))


async def _flushed(client: Client, path: str) -> bool:
    try:
        answer = await client.post(path, b"")
    except RequestError:
        return False
    return answer.status == 200 and b"false" not in answer.body.lower()


async def ask(client: Client, prompt: str, output_tokens: int) -> int:
    """Ask for a completion; return the status, 0 without an answer."""
    body = {"model": MODEL, "prompt": prompt, "max_tokens": output_tokens}
    try:
        return (await client.post("/v1/completions", orjson.dumps(body))).status
    except RequestError:
        return 0


def spent(before: Sequence[Tokens], after: Sequence[Tokens]) -> list[Tokens]:
    """Return what was counted between two readings; of an engine that ended, nothing."""
    return [
        Tokens(
            *(
                round(max(0.0, getattr(late, name) - getattr(early, name)), 1)
                for name in Tokens.__struct_fields__
            )
        )
        for early, late in zip(before, after, strict=True)
    ]


# --- starting, keeping, ending ----------------------------------------------------------------


def key_of(options: FleetOptions) -> str:
    """Return what must be the same for a fleet to be taken over."""
    return msgspec.json.encode(options).decode()


async def begin(
    options: FleetOptions, folder: Path, kept: Path | None, say: Callable[[str], None]
) -> Fleet:
    """Return the fleet that `kept` names if it lives and is the same; else start one. Both ready.

    Raises `RunError` with an engine's last words.
    """
    engines = await spawned(options, folder, kept)
    fleet, begun_s = Fleet(options, engines), time.monotonic()
    try:
        for engine in engines:
            await _until_healthy(engine, begun_s, options.start_timeout_s)
    except BaseException:
        fleet.close()
        await end(engines)
        raise
    say(f"ready: {len(engines)} replicas after {time.monotonic() - begun_s:.1f} s")
    return fleet


async def spawned(options: FleetOptions, folder: Path, kept: Path | None) -> list[Engine]:
    """Return engines that live, ready or not: those that `kept` names, or new ones.

    Raises `RunError`.
    """
    old = _known(kept) if kept is not None else None
    if old is not None and kept is not None:
        if old.key == key_of(options) and all(group_lives(one.pid) for one in old.engines):
            return old.engines
        await end(old.engines)
        _forget(kept)
    engines = [_start_one(options, folder, place) for place in range(options.shape.replicas)]
    if kept is not None:
        _remember(kept, options, engines)
    return engines


def _start_one(options: FleetOptions, folder: Path, place: int) -> Engine:
    host = f"127.0.0.{place + 1}"
    port = _free_port(host)
    command, variables = command_of(options, place, port)
    log = folder.resolve() / f"engine-{place}.log"
    return Engine(f"http://{host}:{port}", _spawn(command, log, variables), str(log))


def _known(kept: Path) -> _Kept | None:
    with contextlib.suppress(OSError, msgspec.MsgspecError):
        return msgspec.json.decode(kept.read_bytes(), type=_Kept)
    return None


def _remember(kept: Path, options: FleetOptions, engines: list[Engine]) -> None:
    kept.write_bytes(msgspec.json.encode(_Kept(key_of(options), engines)))


def _forget(kept: Path) -> None:
    kept.unlink(missing_ok=True)


def _spawn(command: Sequence[str], log: Path, variables: dict[str, str]) -> int:
    """Start a program in a session of its own; no object of ours ends it when we end.

    Raises `RunError`.
    """
    program = shutil.which(command[0])
    if program is None:
        raise RunError(f"{command[0]}: there is no such program")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    return os.posix_spawn(
        program,
        list(command),
        {**os.environ, **variables},
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(log), flags, 0o644),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
    )


async def _until_healthy(engine: Engine, begun_s: float, limit_s: float) -> None:
    client = Client(parse_url(engine.url), time.monotonic)
    with contextlib.closing(client):
        while not await direct.healthy(client):
            waited_s = time.monotonic() - begun_s
            if not group_lives(engine.pid):
                raise RunError(f"the engine ended: {_tail(engine.log)}")
            if waited_s > limit_s:
                raise RunError(f"engine not ready in {limit_s:g} s: {_tail(engine.log)}")
            await asyncio.sleep(POLL_S)
    engine.ready_s = round(time.monotonic() - begun_s, 1)


def _tail(log: str) -> str:
    return Path(log).read_text("utf-8", "replace")[-2500:].strip() or "it said nothing"


async def end(engines: Sequence[Engine]) -> None:
    """End the engines with all that they started: each is a group of its own."""
    for number, limit_s in ((signal.SIGTERM, STOP_S), (signal.SIGKILL, STOP_S)):
        for engine in engines:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(engine.pid, number)
        deadline_s = time.monotonic() + limit_s
        while any(group_lives(engine.pid) for engine in engines):
            if time.monotonic() > deadline_s:
                break
            await asyncio.sleep(0.1)


def group_lives(pid: int) -> bool:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)  # ours: nobody else takes its status
    try:
        os.killpg(pid, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _free_port(host: str) -> int:
    with socket.socket() as holder:
        holder.bind((host, 0))
        return int(holder.getsockname()[1])


async def end_kept(kept: Path) -> int:
    """End the fleet that a file names. Raises `RunError` where it names none."""
    known = _known(kept)
    if known is None:
        raise RunError(f"{kept}: names no engines to end; expected what `gpu fleet --kept` wrote")
    await end(known.engines)
    _forget(kept)
    return 0
