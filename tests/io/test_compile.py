"""Which `proxy` the workers import, and what stops a translation. Making one takes half a minute:
that is a step of the test command, which then runs the core's tests over it."""

from __future__ import annotations

import ast
import asyncio
import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import msgspec.inspect
import pytest

from proxy import compile as compiling
from proxy.io import control, telemetry
from proxy.io.server import ServerProtocol
from proxy.io.upstream import Upstream


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(compiling.FOLDER, str(tmp_path))
    return tmp_path


@pytest.fixture
def package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that may be changed."""
    package = folder / "sources" / "proxy"
    (package / "core").mkdir(parents=True)
    (package / "core" / "a.py").write_text("A = 1\n")
    (package / "core" / "_scan.c").write_text("int a;\n")
    monkeypatch.setattr(compiling, "PACKAGE", package)
    return package


def test_workers_run_the_translation_only_where_it_fits(package: Path) -> None:
    assert compiling.import_root() == package.parent
    compiling.folder().mkdir()
    assert compiling.import_root() == compiling.folder()
    path = compiling.worker_environment()["PYTHONPATH"]
    assert path.split(os.pathsep)[0] == str(compiling.folder())
    for name in ("a.py", "_scan.c"):
        source = package / "core" / name
        before = source.read_text()
        source.write_text(before + " ")
        assert compiling.import_root() == package.parent
        source.write_text(before)
        assert compiling.import_root() == compiling.folder()


SHOWN = """
import os, sys
{before}
paths, environment = list(sys.path), dict(os.environ)
from proxy.compile import take_core
take_core()
import proxy, proxy.errors, proxy.core.binding, proxy.io.kv_stream
assert (paths, environment) == (sys.path, dict(os.environ))
for module in (proxy, proxy.errors, proxy.core, proxy.core.binding, proxy.io.kv_stream):
    print(module.__name__, module.__file__)
"""


@pytest.mark.parametrize("before", ["", "import proxy.core.limits"])
def test_the_supervisor_takes_the_core_whole_or_not_at_all(folder: Path, before: str) -> None:
    """And leaves nothing that its successor would find instead of a translation of its own."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(compiling.PACKAGE, compiling.folder() / "proxy", ignore=ignored)
    shown = subprocess.run(
        [sys.executable, "-c", SHOWN.format(before=before)],
        cwd=compiling.PACKAGE.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    found = dict(line.split(" ", 1) for line in shown.stdout.splitlines())
    translated = {name for name, file in found.items() if str(compiling.folder()) in file}
    core = {"proxy.errors", "proxy.core", "proxy.core.binding"}
    assert translated == (set() if before else core)


CORE = {"proxy.errors", *(f"proxy.{m}".replace("/", ".") for m in compiling.MODULES)}
CORE = {name for name in CORE if not name.startswith("proxy.io.")}


def test_the_supervisors_shell_has_no_class_of_a_translated_parent() -> None:
    """Which has no sources for a child: it would fail where the core is translated alone."""
    importlib.import_module("proxy.supervisor")
    translated = {f"proxy.{module}".replace("/", ".") for module in compiling.MODULES}
    children = [
        f"{name}.{kind.__name__}"
        for name, module in list(sys.modules.items())
        if name.startswith("proxy.") and name not in translated
        for kind in vars(module).values()
        if isinstance(kind, type) and kind.__module__ == name
        if CORE & {parent.__module__ for parent in kind.__mro__[1:]}
    ]
    assert children == []


def test_nothing_that_the_supervisor_reads_from_workers_becomes_a_translated_class() -> None:
    """mypyc leaves no annotations: what should be a tuple would stay the list that it came as."""
    kinds = {one.cls for one in _types(msgspec.inspect.type_info(control.Message))}
    assert telemetry.Sample in kinds
    assert [kind for kind in kinds if kind.__module__ in CORE] == []


def _types(kind: msgspec.inspect.Type, seen: set[int] | None = None) -> Iterator[Any]:
    """Yield the classes that a type is made of."""
    seen = set() if seen is None else seen
    if id(kind) in seen:
        return
    seen.add(id(kind))
    if isinstance(kind, msgspec.inspect.StructType | msgspec.inspect.NamedTupleType):
        yield kind
    for name in kind.__struct_fields__:
        parts = getattr(kind, name)
        for part in parts if isinstance(parts, tuple) else (parts,):
            inner = part.type if isinstance(part, msgspec.inspect.Field) else part
            if isinstance(inner, msgspec.inspect.Type):
                yield from _types(inner, seen)


def test_it_can_be_switched_off(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiling.folder().mkdir()
    monkeypatch.setenv(compiling.FOLDER, "off")
    assert compiling.import_root() == package.parent
    with pytest.raises(compiling.CompileError, match="unset it"):
        compiling.compile_all()


def test_what_is_there_is_not_made_again(package: Path) -> None:
    compiling.folder().mkdir()
    assert compiling.compile_all() == compiling.folder()


def test_one_that_root_has_made_is_for_whoever_runs_it(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image is built by root and run by somebody else, as is what a package has installed."""
    done = subprocess.CompletedProcess[str]((), 0, "", "")
    monkeypatch.setattr(compiling, "_check_tools", lambda: None)
    monkeypatch.setattr(compiling.subprocess, "run", lambda *_, **__: done)
    made = compiling.compile_all()
    assert made.stat().st_mode & 0o777 == 0o755
    assert compiling.import_root() == made
    monkeypatch.setattr(compiling.os, "access", lambda *_: False)  # where it is not, after all
    assert compiling.import_root() == package.parent


@pytest.mark.parametrize(
    ("variables", "words"),
    [({"CC": "/nowhere/cc"}, "no C compiler"), ({"DOHERTY_COMPILED": "off"}, "unset it")],
)
def test_the_command_says_what_is_missing(
    tmp_path: Path, variables: dict[str, str], words: str
) -> None:
    made = subprocess.run(
        [sys.executable, "-m", "proxy.compile"],
        env=os.environ | {compiling.FOLDER: str(tmp_path)} | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 1
    assert words in made.stderr
    assert made.stdout == ""


def test_an_unknown_option_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert compiling.main(["--fast"]) == 2
    assert "usage: doherty compile [--force]" in capsys.readouterr().out


def test_every_module_of_the_list_exists() -> None:
    for module in compiling.MODULES:
        assert (compiling.PACKAGE / f"{module}.py").is_file(), module


@pytest.mark.parametrize("kind", [ServerProtocol, Upstream])
def test_connections_have_what_a_transport_calls(kind: type) -> None:
    """They cannot inherit it: translated classes have no sources for a parent."""
    called = [name for name in dir(asyncio.Protocol) if not name.startswith("_")]
    assert "pause_writing" in called
    assert [name for name in called if not callable(getattr(kind, name, None))] == []


def test_no_struct_that_is_translated_depends_on_keywords_of_its_class() -> None:
    """mypyc passes them on to nobody; without these two a struct still works."""
    harmless = {"frozen", "gc"}
    depends = [
        f"{module}: {node.name}({keyword.arg}=...)"
        for module in compiling.MODULES
        for node in ast.walk(ast.parse((compiling.PACKAGE / f"{module}.py").read_text()))
        if isinstance(node, ast.ClassDef)
        for keyword in node.keywords
        if keyword.arg not in harmless
    ]
    assert depends == []
