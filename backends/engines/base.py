"""What the manager must know about an engine, as one small protocol.

An engine here is a table of facts: the command that starts it, the paths that say it is ready, the
paths that say how busy it is, and how to read them. It starts nothing and asks nothing itself, so
every fact can be tested without an engine.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import msgspec

from backends.engines.facts import Facts
from backends.engines.release import UNKNOWN_RELEASE, Release
from backends.spec import ReplicaSpec
from proxy.contract import LoadSample
from proxy.contract.extras import install_command

HOST = "127.0.0.1"  # engines listen where only this machine can reach them
EVERYWHERE = "0.0.0.0"  # noqa: S104  # all addresses of a network of its own, or of another machine
UNPLACED = "unplaced.invalid"  # the host of what has no machine yet: nobody is asked (RFC 6761)
KV_TOPIC = "kv"
_TRACES_FLAG = "--otlp-traces-endpoint"
# It reads the adapter's weights, from a hub in the worst case. To unload one SGLang waits for the
# requests that use it (managers/tokenizer_control_mixin.py).
LORA_TIMEOUT_S = 120.0

# Engines bind their event socket only when its endpoint looks like a wildcard: has `*` or `::` in
# it (vLLM `distributed/kv_events.py`, SGLang `disaggregation/kv_events.py`). `tcp://*` would tell
# the whole network which tokens pass. This is 127.0.0.1 in a form that they take for a wildcard.
_BOUND_LOOPBACK = "tcp://[::ffff:127.0.0.1]"
_BOUND_EVERYWHERE = "tcp://*"

# By class, online first. Both engines run the lower number first, as they are started here. What
# clients ask for in the priorities of their bodies are small numbers, so offline work is behind all
# of them; and within 32 bits.
PRIORITIES = (0, 1_000, 1_000_000)


class Launch(msgspec.Struct, frozen=True):
    """A command line and what it adds to the environment."""

    argv: tuple[str, ...]
    env: dict[str, str] = {}
    python_path: str = ""  # put before what PYTHONPATH says
    rid_header: bool = False  # it takes a chat request's id from a field of the head
    # By class, online first: the field of the head that puts a request in its place. Empty: none
    priority_fields: tuple[str, ...] = ()


def priority_fields(name: str) -> tuple[str, ...]:
    """Return the fields of an engine that reads a request's priority from this one."""
    return tuple(f"{name}: {priority}" for priority in PRIORITIES)


class Ports(msgspec.Struct, frozen=True):
    """Leased ports of one replica; 0: none. Those of data-parallel ranks follow one another."""

    http: int
    kv_events: int = 0
    kv_replay: int = 0
    internal: int = 0  # where the engine looks for ports for its own processes
    host: str = HOST  # where it listens; `EVERYWHERE` in a cell and on another machine


class PortsNeeded(NamedTuple):
    """How many consecutive ports to lease from the first of each kind on; 0: lease none."""

    kv_events: int = 0
    kv_replay: int = 0
    internal: int = 0


class KvEvents(NamedTuple):
    """Where a replica's KV events are, as a proxy on this machine connects; of rank 0."""

    endpoint: str
    replay: str
    topic: str


class Call(msgspec.Struct, frozen=True):
    """One request of a sequence. An answer outside `statuses` ends the sequence.

    `expect` must then be in the answer's body, whitespace apart; empty: any body will do.
    """

    method: Literal["GET", "POST"]
    path: str
    body: bytes = b""
    statuses: tuple[int, ...] = (200,)
    timeout_s: float = 10.0
    why: str = ""
    expect: bytes = b""


class Entry(NamedTuple):
    """How an engine is run: the words that begin its command, and the module for the same."""

    package: str
    script: tuple[str, ...]
    module: tuple[str, ...]
    runs_module: bool = False  # the module is ours, and the script only says whose Python it is


class EngineMissingError(Exception):
    """The engine's program is not installed; the text says how to get it."""


class FlagError(Exception):
    """The engine would not take its arguments, or would break by them; the text says which one."""


class Engine(Protocol):
    """One kind of engine server."""

    @property
    def name(self) -> str: ...

    @property
    def entry(self) -> Entry | None:
        """Return how it is run; None: its command names the program itself."""

    @property
    def uses_gpu(self) -> bool:
        """Say whether its processes hold memory of GPUs, which the driver can move."""

    def command(self, spec: ReplicaSpec, ports: Ports, release: Release) -> Launch:
        """Return the command; the user's own arguments come last, so that they win."""

    def check(self, spec: ReplicaSpec, release: Release) -> tuple[str, ...]:
        """Return what to warn of. Raises `FlagError` for arguments that cannot work."""

    def ports_needed(self, spec: ReplicaSpec, release: Release) -> PortsNeeded:
        """Return how many ports `command` wants beside the one of HTTP."""

    def gpus_needed(self, spec: ReplicaSpec) -> int:
        """Return how many GPUs the arguments ask for: ranks of every kind of parallelism."""

    def kv_source(self, spec: ReplicaSpec, ports: Ports, release: Release) -> KvEvents | None:
        """Return where `command` has the KV events sent; None: nowhere, or it must be asked."""

    def sleep_calls(self, spec: ReplicaSpec, level: int) -> tuple[Call, ...]:
        """Return what lets go of the GPU's memory, in order. Raises `FlagError`."""

    def wake_calls(self, spec: ReplicaSpec, level: int) -> tuple[Call, ...]:
        """Return what takes it back after a sleep of this level."""

    def balk_calls(self, spec: ReplicaSpec, level: int, done: int) -> tuple[Call, ...] | None:
        """Return what takes a sleep back of whose calls `done` were answered and the next failed.

        None: what it has let go of is not known, and a wrong guess may be fatal.
        """

    def sleep_level(self, spec: ReplicaSpec) -> int:
        """Return how deep it sleeps where nobody says: as quick to come back from as it can be."""

    def dump_level(self, spec: ReplicaSpec) -> int:
        """Return how deep it sleeps while its processes are dumped: an image holds what it kept."""

    def adapter_calls(
        self, spec: ReplicaSpec, loaded: Mapping[str, str], wanted: Mapping[str, str]
    ) -> tuple[Call, ...]:
        """Return what makes the LoRA adapters `loaded` (name to path) those that are `wanted`."""

    def facts(self, spec: ReplicaSpec) -> Facts:
        """Return how it behaves where that differs between engines."""

    def ready_paths(self, spec: ReplicaSpec) -> tuple[str, ...]:
        """Return the paths to ask for readiness; the first that is not 404 decides."""

    def load_paths(self, spec: ReplicaSpec) -> tuple[str, ...]:
        """Return the paths whose answers tell the load; the first is needed, the rest refine it."""

    def read_load(self, answers: Sequence[bytes], at_s: float) -> LoadSample | None:
        """Return what `answers` (in the order of `load_paths`, empty where missing) tell."""


def kv_endpoints(ports: Ports) -> dict[str, str]:
    """Return the part of an engine's `--kv-events-config` that says where the events go."""
    alone = ports.host == HOST
    bound = _BOUND_LOOPBACK if alone else _BOUND_EVERYWHERE
    endpoints = {"endpoint": f"{bound}:{ports.kv_events}", "topic": KV_TOPIC}
    if ports.kv_replay:
        replay = f"tcp://{HOST}" if alone else _BOUND_EVERYWHERE
        endpoints["replay_endpoint"] = f"{replay}:{ports.kv_replay}"  # always bound
    return endpoints


def kv_events_of(ports: Ports) -> KvEvents | None:
    """Return the same as a subscriber sees it, where nothing lies between."""
    if not ports.kv_events:
        return None
    replay = f"tcp://{HOST}:{ports.kv_replay}" if ports.kv_replay else ""
    return KvEvents(f"tcp://{HOST}:{ports.kv_events}", replay, KV_TOPIC)


def url_of(port: int, host: str = HOST) -> str:
    """Return the address of a replica as the fleet publishes it."""
    return f"http://{host}:{port}"


def launch_hash(engine: Engine, spec: ReplicaSpec) -> str:
    """Name the process that `spec` stands for, its ports and its own name apart: equal names need
    no restart, and all replicas of a pool have one.

    Nor does it name the adapters, which come and go while it runs (`backends.adapters`).
    """
    bare = msgspec.structs.replace(spec, adapters={}, replica_id="")
    launch = engine.command(bare, Ports(0), UNKNOWN_RELEASE)
    cards = [] if spec.gpus is None else [spec.gpus]
    env = sorted((launch.env | spec.env).items())
    image = [spec.image] if spec.image else []
    node = sorted(spec.resources.items())
    beside = [*cards, *image, *([node] if node else [])]
    text = msgspec.json.encode([engine.name, launch.argv, env, *beside])
    return hashlib.sha256(text).hexdigest()[:32]


def trace_flags(spec: ReplicaSpec, *before: str) -> tuple[str, ...]:
    """Return the flags by which an engine sends traces, unless the pool has said where to."""
    if not spec.traces_url or given(spec.args, _TRACES_FLAG):
        return ()
    return (*before, _TRACES_FLAG, spec.traces_url)


def trace_environment(spec: ReplicaSpec) -> dict[str, str]:
    """Return what has both engines send them by HTTP: without it they speak gRPC.

    With it the URL is taken as it is, path and all (vLLM `tracing/otel.py`, SGLang
    `observability/trace.py`).
    """
    return {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"} if trace_flags(spec) else {}


def resolve_program(argv: Sequence[str], extra: str) -> tuple[str, ...]:
    """Return `argv` with its program as a path. Raises `EngineMissingError` naming the remedy.

    The folder of this interpreter is looked at first: an engine that was installed beside Doherty
    is found without an activated environment.
    """
    program = argv[0]
    if "/" in program:
        found: str | None = program if Path(program).is_file() else None
    else:
        found = shutil.which(program, path=str(Path(sys.executable).parent))
        found = found or shutil.which(program)
    if found is None:
        remedy = f"; install it with: {install_command(extra)}" if extra else ""
        remedy += ", or name a Python that has it in DOHERTY_ENGINE_PYTHON" if extra else ""
        raise EngineMissingError(f"program '{program}' was not found{remedy}")
    return (found, *argv[1:])


def option(args: Sequence[str], *flags: str) -> str | None:
    """Return the last value that `args` give to one of `flags`, after a space or an equals sign."""
    value: str | None = None
    for index, arg in enumerate(args):
        name, equals, joined = arg.partition("=")
        if _dashed(name) not in flags:
            continue
        if equals:
            value = joined
        elif index + 1 < len(args):
            value = args[index + 1]
    return value


def count_option(args: Sequence[str], *flags: str, default: int = 1) -> int:
    """Return the whole number that `args` give to one of `flags`."""
    text = option(args, *flags)
    return int(text) if text and text.isascii() and text.isdigit() else default


def given(args: Sequence[str], *flags: str) -> bool:
    """Say whether `args` hold one of `flags`, whole, or a key of its JSON value (vLLM: --x.y)."""
    return any(_dashed(arg.partition("=")[0]).partition(".")[0] in flags for arg in args)


def _dashed(name: str) -> str:
    """vLLM takes --max_num_seqs too."""
    return name.replace("_", "-") if name.startswith("--") else name


def lora_calls(
    loaded: Mapping[str, str], wanted: Mapping[str, str], load_path: str, unload_path: str
) -> tuple[Call, ...]:
    """Return the calls that make `loaded` `wanted`; both engines have the same bodies for them.

    What is no longer wanted goes first: engines keep room for so many adapters and no more.
    """
    gone = [name for name, path in loaded.items() if wanted.get(name) != path]
    fresh = [name for name, path in wanted.items() if loaded.get(name) != path]
    unloads = tuple(
        Call(
            "POST",
            unload_path,
            msgspec.json.encode({"lora_name": name}),
            timeout_s=LORA_TIMEOUT_S,
            why=f"unload '{name}'",
        )
        for name in gone
    )
    loads = tuple(
        Call(
            "POST",
            load_path,
            msgspec.json.encode({"lora_name": name, "lora_path": wanted[name]}),
            timeout_s=LORA_TIMEOUT_S,
            why=f"load '{name}'",
        )
        for name in fresh
    )
    return unloads + loads


def merged(environ: Mapping[str, str], launch: Launch, spec: ReplicaSpec) -> dict[str, str]:
    """Return the environment of an engine: ours without our secrets, the engine's, the user's."""
    own = {k: v for k, v in environ.items() if not k.startswith("DOHERTY_")}
    env = own | launch.env | spec.env
    if launch.python_path:
        further = [env["PYTHONPATH"]] if env.get("PYTHONPATH") else []
        env["PYTHONPATH"] = os.pathsep.join([launch.python_path, *further])
    return env
