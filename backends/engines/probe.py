"""Which program serves an engine here, and of which release it is. The only part that looks around.

The interpreter that would run the engine is asked for the version of its package; that takes tens
of milliseconds where the engine's own `--version` takes the half minute of its imports. An engine
without a console script on the path (a host without network, to which its packages were carried)
is run as a module: by the interpreter that `DOHERTY_ENGINE_PYTHON` names, or by this one.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from backends.engines.base import (
    Engine,
    EngineMissingError,
    Entry,
    Launch,
    Ports,
    merged,
    resolve_program,
)
from backends.engines.release import UNKNOWN_RELEASE, Release, parse_release
from backends.spec import ReplicaSpec

PYTHON_VARIABLE = "DOHERTY_ENGINE_PYTHON"
PROBE_TIMEOUT_S = 30.0  # a cold network file system takes its time to find a package

_SHEBANG_BYTES = 512
_WRAPPED = re.compile(r"'''exec' \"?([^\" ]+)\"? ")  # pip's form where the path is long
_MEMORY_SAVER = "--enable-memory-saver"
_LIBRARIES = "LD_LIBRARY_PATH"

# Asked of another interpreter: nothing of the engine is imported, and a package that lost its
# metadata still has its version in a file.
_QUESTION = r"""
import glob, importlib.metadata, importlib.util, json, os, re, shutil, sys
name = sys.argv[1]
sys.path = [place for place in sys.path if place]  # not the folder that the manager runs in
found = importlib.util.find_spec(name)
origin = found.origin or "" if found else ""
try:
    version = importlib.metadata.version(name)
except importlib.metadata.PackageNotFoundError:
    version = ""
    for file in ("_version.py", "version.py"):
        path = os.path.join(os.path.dirname(origin), file)
        if origin and not version and os.path.exists(path):
            told = re.search(r"version\w*\s*=\s*['\"]([^'\"]+)", open(path).read())
            version = told.group(1) if told else ""
nvcc = shutil.which("nvcc")
homes = [os.path.dirname(os.path.dirname(os.path.realpath(nvcc)))] if nvcc else []
places = [os.path.join(p, "nvidia", "*", "lib") for p in sys.path]
places += [os.path.join(home, "lib64") for home in [*homes, "/usr/local/cuda"]]
cudart = [f for place in places for f in sorted(glob.glob(os.path.join(place, "libcudart.so.*")))]
cudart = os.path.dirname(cudart[0]) if cudart else ""
try:
    traces = importlib.util.find_spec("opentelemetry.exporter.otlp.proto.http") is not None
except ImportError:
    traces = False
told = {"version": version, "origin": origin, "cudart": cudart, "traces": traces}
print(json.dumps(told))
"""


class Told(msgspec.Struct, frozen=True):
    """What an interpreter says of a package: version, main file, folder of the CUDA runtime.

    And whether it could send traces by HTTP: an engine that is told to and cannot does not start.
    """

    version: str = ""
    origin: str = ""
    cudart: str = ""
    traces: bool = False


class Program(msgspec.Struct, frozen=True):
    """What to run in the place of the first words of an engine's command."""

    head: tuple[str, ...]
    words: int = 1
    package: str = ""  # empty: nobody can be asked for a release
    python: str = ""
    python_path: str = ""
    version: str = ""  # known without asking
    inherits: tuple[tuple[str, str], ...] | None = None  # environment; None: that of this process

    def argv(self, command: Sequence[str]) -> tuple[str, ...]:
        return (*self.head, *command[self.words :])


def program_of(engine: Engine, spec: ReplicaSpec, environ: Mapping[str, str]) -> Program:
    """Return the program that serves `engine`. Raises `EngineMissingError`."""
    draft = engine.command(spec, Ports(0), UNKNOWN_RELEASE)
    env = merged(environ, draft, spec)
    entry = engine.entry
    if entry is None or draft.argv[: len(entry.script)] != entry.script:
        return Program(resolve_program(draft.argv[:1], ""))
    python = spec.env.get(PYTHON_VARIABLE) or environ.get(PYTHON_VARIABLE) or ""
    return find_program(entry, env, python)


def find_program(entry: Entry, env: Mapping[str, str], python: str = "") -> Program:
    """Return how to run `entry` with `env`. Raises `EngineMissingError`."""
    path = env.get("PYTHONPATH", "")
    if python:
        found = shutil.which(python, path=env.get("PATH"))
        if found is None:
            raise EngineMissingError(f"{PYTHON_VARIABLE}: no interpreter at '{python}'")
        return _as_module(entry, found, path)
    try:
        head = resolve_program(entry.script, entry.package)
    except EngineMissingError:
        if _importable(entry.package, path):
            return _as_module(entry, sys.executable, path)
        raise
    if entry.runs_module:
        return _as_module(entry, interpreter_of(head[0], env) or sys.executable, path)
    words = len(entry.script)
    return Program(head, words, entry.package, interpreter_of(head[0], env), path)


def probe_release(program: Program) -> Release:
    """Return the release of `program`, asking when need be; unknown when nobody says."""
    return parse_release(_ask(program).version)


def known_release(program: Program) -> Release | None:
    """Return the release when it can be had without asking; None: `probe_release` may take long."""
    if not program.package or not program.python:
        return parse_release(program.version)
    known = _known(program)
    return parse_release(known.version) if known else None


def can_trace(program: Program) -> bool:
    """Say whether an engine could send traces, as it has told with its release; else no."""
    told, _ = _asked.get(program, (Told(), 0))
    return told.traces


def completed(
    program: Program, launch: Launch, spec: ReplicaSpec, environ: Mapping[str, str]
) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return the arguments and the environment of the process that `launch` stands for."""
    env = merged(environ, launch, spec)
    if _MEMORY_SAVER in launch.argv:
        # Its library is preloaded, before Python could say where the CUDA runtime lies.
        env = with_library(env, _ask(program).cudart)
    return program.argv(launch.argv), env


def interpreter_of(script: str, env: Mapping[str, str]) -> str:
    """Return the interpreter that a script's first lines name; empty: it is no Python script."""
    try:
        with open(script, "rb") as file:
            text = file.read(_SHEBANG_BYTES).decode("utf-8", "replace")
    except OSError:
        return ""
    if not text.startswith("#!"):
        return ""
    words = text[2:].partition("\n")[0].split()
    if words and Path(words[0]).name == "env":
        words = [shutil.which(words[-1], path=env.get("PATH")) or ""]
    wrapped = _WRAPPED.search(text)
    name = wrapped.group(1) if wrapped else words[0] if words else ""
    return name if "python" in Path(name).name else ""


def with_library(env: Mapping[str, str], folder: str) -> dict[str, str]:
    """Return `env` with a folder of libraries, after those that it names."""
    folders = [one for one in env.get(_LIBRARIES, "").split(os.pathsep) if one]
    if folder and folder not in folders:
        folders.append(folder)
    return {**env, _LIBRARIES: os.pathsep.join(folders)} if folders else dict(env)


def _as_module(entry: Entry, python: str, path: str) -> Program:
    return Program((python, *entry.module), len(entry.script), entry.package, python, path)


def _importable(package: str, path: str) -> bool:
    places = [*path.split(os.pathsep), *sys.path]
    return any((Path(place) / package / "__init__.py").is_file() for place in places if place)


_asked: dict[Program, tuple[Told, int]] = {}


def _ask(program: Program) -> Told:
    """Ask once, and again when the package's main file is another one."""
    known = _known(program)
    if known is not None:
        return known
    told = _question(program) if program.package and program.python else Told()
    _asked[program] = told, _changed_ns(told.origin)
    return told


def _known(program: Program) -> Told | None:
    told, changed_ns = _asked.get(program, (Told(), 0))
    return told if told.origin and _changed_ns(told.origin) == changed_ns else None


def _changed_ns(path: str) -> int:
    try:
        return os.stat(path).st_mtime_ns if path else 0
    except OSError:
        return 0


def _question(program: Program) -> Told:
    env = dict(os.environ)
    env.pop("PYTHONPATH", None)
    if program.python_path:
        env["PYTHONPATH"] = program.python_path
    try:
        run = subprocess.run(  # noqa: S603  # the operator's own interpreter
            [program.python, "-c", _QUESTION, program.package],
            env=env,
            capture_output=True,
            timeout=PROBE_TIMEOUT_S,
            check=False,
        )
        answer = run.stdout.strip().rpartition(b"\n")[2]  # hooks of a site may print before it
        return msgspec.json.decode(answer, type=Told)
    except (OSError, subprocess.TimeoutExpired, msgspec.MsgspecError):
        return Told()
