"""What the manager must know about an engine, as one small protocol.

An engine here is a table of facts: the command that starts it, the paths that say it is ready, the
paths that say how busy it is, and how to read them. It starts nothing and asks nothing itself, so
every fact can be tested without an engine.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from backends.spec import ReplicaSpec
from proxy.contract import LoadSample

HOST = "127.0.0.1"  # engines listen where only this machine can reach them


class Launch(msgspec.Struct, frozen=True):
    """A command line and what it adds to the environment."""

    argv: tuple[str, ...]
    env: dict[str, str] = {}


class EngineMissingError(Exception):
    """The engine's program is not installed; the text says how to get it."""


class Engine(Protocol):
    """One kind of engine server."""

    @property
    def name(self) -> str: ...

    def command(self, spec: ReplicaSpec, port: int) -> Launch:
        """Return the command; the user's own arguments come last, so that they win."""

    def ready_paths(self, spec: ReplicaSpec) -> tuple[str, ...]:
        """Return the paths to ask for readiness; the first that is not 404 decides."""

    def load_paths(self, spec: ReplicaSpec) -> tuple[str, ...]:
        """Return the paths whose answers tell the load; the first is needed, the rest refine it."""

    def read_load(self, answers: Sequence[bytes], at_s: float) -> LoadSample | None:
        """Return what `answers` (in the order of `load_paths`, empty where missing) tell."""

    def abort_path(self, spec: ReplicaSpec) -> str | None:
        """Return the path to post to that ends all requests, where SIGTERM waits for them."""


def url_of(port: int) -> str:
    """Return the address of a replica as the fleet publishes it."""
    return f"http://{HOST}:{port}"


def launch_hash(engine: Engine, spec: ReplicaSpec) -> str:
    """Name the process that `spec` stands for, its port apart: equal names need no restart."""
    launch = engine.command(spec, 0)
    text = msgspec.json.encode([engine.name, launch.argv, sorted((launch.env | spec.env).items())])
    return hashlib.sha256(text).hexdigest()[:32]


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
        remedy = f"; install it with: .venv/bin/pip install -e '.[{extra}]'" if extra else ""
        raise EngineMissingError(f"program '{program}' was not found{remedy}")
    return (found, *argv[1:])


def option(args: Sequence[str], flag: str) -> str | None:
    """Return the last value that `args` give to `flag`, after a space or an equals sign."""
    value: str | None = None
    for index, arg in enumerate(args):
        if arg == flag and index + 1 < len(args):
            value = args[index + 1]
        elif arg.startswith(flag + "="):
            value = arg[len(flag) + 1 :]
    return value


def merged(environ: Mapping[str, str], launch: Launch, spec: ReplicaSpec) -> dict[str, str]:
    """Return the environment of an engine: ours without our secrets, the engine's, the user's."""
    own = {k: v for k, v in environ.items() if not k.startswith("DOHERTY_")}
    return own | launch.env | spec.env
