"""The data path as machine code: the same sources, translated by mypyc.

What every request passes through is plain typed Python, and mypyc translates it as it stands; for
the body scan there is C besides (`core/_scan.c`), built with it. So is what the supervisor makes of
each batch of KV events. Where that has been done, both workers and supervisor run the translation;
everywhere else they run the sources, to the same effect at about twice the price. Nothing is built
unasked: `doherty compile` needs a C compiler and this Python's headers.

A translation lies in a folder named by a digest of the sources, of Python and of this machine, so
that one which no longer fits is never loaded: an edited file is enough to fall back to the sources.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import proxy
from proxy.contract.extras import install_command

PACKAGE: Final = Path(__file__).resolve().parent
FOLDER: Final = "DOHERTY_COMPILED"  # where translations lie; "off" has the sources run
# What a request passes through. The rest runs when somebody asks, or once.
_CORE: Final = """additions admission asked binding charging chunked claim_limits claims classes
cost credentials crowd engine_errors explanation fairness fleet head head_memory headcount
hearsay held holding http1 idle index kv_points kv_tree kv_underway kv_wire lease lengths limits
lines loads multipart note_ring note_wire notes opening outlook pacing picture pieces policy
preamble preempting prefilling prefix principal principals prospects quota regions replica
request_spans response_id responses retry ring room routes scan session share_cells sketch spare
speeds sse termination tier_echo trace_context usage wishes"""
_IO: Final = (
    "abroad access_log authentication choice class_telemetry clock connection crossing echoing "
    "endings engine_answer exchange facts lateness metered metering noting outbox passage plane "
    "preemption queues reading refusal relay server telemetry tracing upstream upstreams waiting"
)
MODULES: Final = (
    "errors",
    *(f"core/{name}" for name in _CORE.split()),
    *(f"io/{name}" for name in _IO.split()),
)


# Nothing outside calls the translation's functions by name, so the compiler may inline them.
_C_FLAGS: Final = "-w -fvisibility=hidden -fno-semantic-interposition"


class CompileError(Exception):
    """The data path cannot be translated here; the text says why and what would help."""


def digest() -> str:
    """Name what a translation depends on."""
    seen = hashlib.sha256(f"{sys.version} {platform.machine()}".encode())
    for path in sorted(path for kind in ("py", "c", "h") for path in PACKAGE.rglob(f"*.{kind}")):
        seen.update(str(path.relative_to(PACKAGE)).encode() + b"\0" + path.read_bytes() + b"\0")
    return seen.hexdigest()[:16]


def folder() -> Path:
    """Return where the translation of these sources lies, or would."""
    given = os.environ.get(FOLDER)
    base = Path(given) if given else Path(sys.prefix) / "share" / "doherty" / "compiled"
    return base / digest()


def import_root() -> Path:
    """Return the folder from which workers import `proxy`: the translation's, or the sources'."""
    if os.environ.get(FOLDER) == "off":
        return PACKAGE.parent
    compiled = folder()
    return compiled if os.access(compiled, os.R_OK | os.X_OK) else PACKAGE.parent


def worker_environment() -> dict[str, str]:
    """Return the environment in which a worker finds its `proxy`."""
    # glibc gives memory back to the kernel after every large body, and takes it again with a page
    # fault for each 4 KiB. Kept up to these sizes (the second is the largest that it knows), a
    # request of 128 KB costs a fifth less, and one of 16 MB holds others up for 9 ms and not 20.
    memory = {"MALLOC_TRIM_THRESHOLD_": str(64 << 20), "MALLOC_MMAP_THRESHOLD_": str(32 << 20)}
    path = os.pathsep.join(filter(None, (str(import_root()), os.environ.get("PYTHONPATH"))))
    return memory | os.environ | {"PYTHONPATH": path}


def take_core() -> None:
    """Have this process run the translation of the core, where there is one. For the supervisor.

    Its shell, which is little of what it costs, stays the sources: there msgspec decodes into
    classes that workers only encode. What is translated goes together, so a process that has
    imported some of the sources goes on with them. Nothing of this is in our environment or on our
    path afterwards: a successor looks for a translation of its own.
    """
    root = import_root()
    if root == PACKAGE.parent or any(
        name in sys.modules for name in ("proxy.core", "proxy.errors")
    ):
        return
    sys.path.insert(0, str(root))  # for what the compiler puts beside the package
    proxy.__path__.insert(0, str(root / "proxy"))
    try:
        importlib.import_module("proxy.core")  # its modules are looked for where it was found
        importlib.import_module("proxy.errors")
    finally:
        del proxy.__path__[0], sys.path[0]


def compile_all(*, force: bool = False) -> Path:
    """Translate the data path; return the folder. Raises `CompileError`."""
    if os.environ.get(FOLDER) == "off":
        raise CompileError(f"{FOLDER}=off: unset it, or name a folder")
    target = folder()
    if target.is_dir() and not force:
        return target
    _check_tools()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="build-") as name:
        build = Path(name)
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(PACKAGE, build / "proxy", ignore=ignored)
        sources = [f"proxy/{module}.py" for module in MODULES]
        made = subprocess.run(  # noqa: S603 - our own command
            [sys.executable, "-P", "-c", _SETUP, "build_ext", "--inplace", "--", *sources],
            cwd=build,
            env=os.environ | {"CFLAGS": f"{os.environ.get('CFLAGS', '')} {_C_FLAGS}"},
            capture_output=True,
            text=True,
            check=False,
        )
        if made.returncode:
            raise CompileError(f"mypyc or the C compiler failed:\n{_tail(made)}")
        shutil.rmtree(build / "build", ignore_errors=True)
        if target.is_dir():
            shutil.rmtree(target)
        build.chmod(0o755)  # a temporary folder is its maker's alone, and workers may be others
        build.rename(target)
        build.mkdir()  # for the one who cleans up
    return target


_SETUP: Final = """
import sys
from mypyc.build import mypycify
from setuptools import Extension, setup
at = sys.argv.index("--")
sources, sys.argv[at:] = sys.argv[at + 1 :], []
options = ["--ignore-missing-imports", *sources]
ours = Extension("proxy.core._scan", ["proxy/core/_scan.c"], extra_compile_args=["-O3"])
made = mypycify(options, opt_level="3", debug_level="0")
setup(name="doherty-compiled", packages=[], ext_modules=[*made, ours])
"""


def _check_tools() -> None:
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    if shutil.which(os.environ.get("CC", compiler)) is None:
        raise CompileError("there is no C compiler (Debian, Ubuntu: apt-get install gcc)")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        raise CompileError(
            "this Python has no headers (Debian, Ubuntu: apt-get install python3-dev)"
        )
    for module, package in (("mypyc", "mypy"), ("setuptools", "setuptools")):
        if subprocess.run(  # noqa: S603 - our own command
            [sys.executable, "-c", f"import {module}"], capture_output=True, check=False
        ).returncode:
            raise CompileError(f"{package} is missing: {install_command('compile')}")


def _tail(made: subprocess.CompletedProcess[str]) -> str:
    return "\n".join((made.stdout + made.stderr).strip().splitlines()[-30:])


def main(argv: Sequence[str]) -> int:
    """The command `doherty compile [--force]`."""
    if set(argv) - {"--force"}:
        print(f"{__doc__}\nusage: doherty compile [--force]")  # noqa: T201
        return 0 if set(argv) <= {"--force", "-h", "--help"} else 2
    try:
        print(compile_all(force="--force" in argv))  # noqa: T201
    except CompileError as error:
        print(f"doherty compile: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
