"""Which program serves an engine, of which release it is, and what it is started with."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest

from backends.engines import ENGINES
from backends.engines.base import EngineMissingError, FlagError, Ports
from backends.engines.probe import (
    PYTHON_VARIABLE,
    can_trace,
    completed,
    find_program,
    interpreter_of,
    known_release,
    probe_release,
    program_of,
    with_library,
)
from backends.engines.release import UNKNOWN_RELEASE, Release
from backends.spec import ReplicaSpec

SPEC = ReplicaSpec(replica_id="m-0", model="m", pool="m", engine="vllm")
ENTRY = ENGINES["vllm"].entry
assert ENTRY is not None


class Ready(NamedTuple):
    """What a start comes to."""

    release: Release
    argv: tuple[str, ...]
    env: dict[str, str]


def prepare(spec: ReplicaSpec, environ: Mapping[str, str]) -> Ready:
    """Go the way from a specification to a process, as a manager does."""
    engine = ENGINES[spec.engine]
    program = program_of(engine, spec, environ)
    release = probe_release(program)
    engine.check(spec, release)
    launch = engine.command(spec, Ports(1), release)
    return Ready(release, *completed(program, launch, spec, environ))


def package(site: Path, name: str, version: str, *, metadata: bool = True) -> None:
    """Lay out an installed package whose import would fail, as an engine's does without a GPU."""
    (site / name).mkdir(parents=True)
    (site / name / "__init__.py").write_text("raise ImportError('no torch')")
    if metadata:
        info = site / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    else:
        (site / name / "_version.py").write_text(f"__version__ = version = '{version}'\n")


def script(folder: Path, name: str, first: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"{first}\nimport this\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is installed but what the test lays into the folder of scripts returned here."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}")
    monkeypatch.setattr("backends.engines.probe.sys.path", [])
    return folder


def test_a_script_is_asked_by_its_interpreter(away: Path, tmp_path: Path) -> None:
    found = script(away, "vllm", f"#!{sys.executable}")
    package(tmp_path / "site", "vllm", "0.27.1.post1")
    env = {"PATH": str(away), "PYTHONPATH": str(tmp_path / "site")}
    program = find_program(ENTRY, env)
    assert program.argv(("vllm", "serve", "m")) == (str(found), "serve", "m")
    assert probe_release(program) == Release(0, 27, 1)


def test_an_upgrade_is_seen(away: Path, tmp_path: Path) -> None:
    script(away, "vllm", f"#!{sys.executable}")
    site = tmp_path / "site"
    package(site, "vllm", "0.26.0")
    env = {"PATH": str(away), "PYTHONPATH": str(site)}
    program = find_program(ENTRY, env)
    assert known_release(program) is None
    assert probe_release(program) == Release(0, 26)
    assert known_release(program) == Release(0, 26)
    (site / "vllm-0.26.0.dist-info" / "METADATA").write_text("Name: vllm\nVersion: 0.33.0\n")
    assert probe_release(program) == Release(0, 26), "asked once"
    os.utime(site / "vllm" / "__init__.py", ns=(1, 1))
    assert known_release(program) is None
    assert probe_release(program) == Release(0, 33)


def test_a_package_without_a_script_is_run_as_a_module(away: Path, tmp_path: Path) -> None:
    for name, version in (("vllm", "0.26.0"), ("sglang", "0.5.17")):
        package(tmp_path / "site", name, version, metadata=False)
    environ = {"PATH": str(away), "PYTHONPATH": str(tmp_path / "site")}
    ready = prepare(SPEC, environ)
    assert ready.argv[:5] == (sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", "m")
    assert ready.release == Release(0, 26)
    spec = msgspec.structs.replace(SPEC, engine="sglang", model_path="/w")
    ready = prepare(spec, environ)
    assert ready.argv[:5] == (sys.executable, "-m", "sglang.launch_server", "--model-path", "/w")
    assert ready.release == Release(0, 5, 17)


def test_a_pool_names_its_own_packages(away: Path, tmp_path: Path) -> None:
    package(tmp_path / "site", "vllm", "0.30.0")
    spec = msgspec.structs.replace(SPEC, env={"PYTHONPATH": str(tmp_path / "site")})
    ready = prepare(spec, {"PATH": str(away)})
    assert ready.release == Release(0, 30)
    assert ready.env["PYTHONPATH"].split(os.pathsep)[1:] == [str(tmp_path / "site")]


def test_an_interpreter_may_be_named(away: Path, tmp_path: Path) -> None:
    script(away, "vllm", "#!/bin/sh")
    package(tmp_path / "site", "vllm", "0.32.0")
    environ = {
        "PATH": str(away),
        "PYTHONPATH": str(tmp_path / "site"),
        "DOHERTY_ENGINE_PYTHON": sys.executable,
    }
    ready = prepare(SPEC, environ)
    assert ready.argv[:3] == (sys.executable, "-m", "vllm.entrypoints.cli.main")
    assert ready.release == Release(0, 32)
    assert "DOHERTY_ENGINE_PYTHON" not in ready.env
    pool = msgspec.structs.replace(SPEC, env={"DOHERTY_ENGINE_PYTHON": "/no/such/python"})
    with pytest.raises(EngineMissingError, match="no interpreter at '/no/such/python'"):
        program_of(ENGINES["vllm"], pool, environ)


def test_what_is_not_there_is_said_with_the_remedy(away: Path) -> None:
    with pytest.raises(EngineMissingError, match=r"\[vllm\]'.*DOHERTY_ENGINE_PYTHON"):
        prepare(SPEC, {"PATH": str(away)})


def test_arguments_are_held_to_the_release_found(away: Path, tmp_path: Path) -> None:
    package(tmp_path / "site", "vllm", "0.26.0")
    environ = {"PATH": str(away), "PYTHONPATH": str(tmp_path / "site")}
    spec = msgspec.structs.replace(SPEC, args=("--max-num-queued-reqs", "9"))
    with pytest.raises(FlagError, match=r"vllm 0\.26\.0 has no flag --max-num-queued-reqs"):
        prepare(spec, environ)


@pytest.mark.parametrize("first", ["#!/bin/sh", "\x7fELF", "#!", ""])
def test_a_program_that_is_no_python_has_no_release(away: Path, first: str) -> None:
    script(away, "vllm", first)
    program = find_program(ENTRY, {"PATH": str(away)})
    assert program.python == ""
    assert probe_release(program) == UNKNOWN_RELEASE


def test_a_silent_interpreter_has_no_release(away: Path) -> None:
    liar = script(away, "python-liar", "#!/bin/sh\necho nonsense; exit 0;")
    script(away, "vllm", f"#!{liar}")
    assert probe_release(find_program(ENTRY, {"PATH": str(away)})) == UNKNOWN_RELEASE


def test_a_site_that_prints_is_understood(away: Path, tmp_path: Path) -> None:
    script(away, "vllm", f"#!{sys.executable}")
    site = tmp_path / "site"
    package(site, "vllm", "0.32.0")
    (site / "sitecustomize.py").write_text("print('{\"version\": \"9.9.9\"}')\nprint('hello')\n")
    env = {"PATH": str(away), "PYTHONPATH": str(site)}
    assert probe_release(find_program(ENTRY, env)) == Release(0, 32)


def test_the_folder_of_the_manager_does_not_count(
    away: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(away, "vllm", f"#!{sys.executable}")
    package(tmp_path / "here", "vllm", "0.1.0")
    monkeypatch.chdir(tmp_path / "here")
    assert probe_release(find_program(ENTRY, {"PATH": str(away)})) == UNKNOWN_RELEASE


INTERPRETERS = [
    ("#!/opt/e/bin/python3.12", "/opt/e/bin/python3.12"),
    ("#!/opt/e/bin/python -sE", "/opt/e/bin/python"),
    ("#!/bin/sh\n'''exec' \"/very/long/python3\" \"$0\" \"$@\"\n' '''", "/very/long/python3"),
    ("#!/bin/sh\n'''exec' /very/long/python3 \"$0\" \"$@\"\n' '''", "/very/long/python3"),
    ("#!/bin/bash", ""),
    ("#!/usr/bin/env no-such-python-here", ""),
]  # fmt: skip


@pytest.mark.parametrize(("first", "python"), INTERPRETERS)
def test_interpreters_are_read(tmp_path: Path, first: str, python: str) -> None:
    path = script(tmp_path / "bin", "x", first)
    assert interpreter_of(str(path), {"PATH": "/usr/bin"}) == python


def test_env_names_an_interpreter_on_the_path(tmp_path: Path) -> None:
    python = script(tmp_path / "bin", "python9", "#!/bin/sh")
    path = script(tmp_path / "bin", "x", "#!/usr/bin/env -S python9")
    assert interpreter_of(str(path), {"PATH": str(tmp_path / "bin")}) == str(python)
    assert interpreter_of(str(tmp_path / "gone"), {}) == ""


def test_the_memory_saver_finds_the_cuda_runtime(away: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    package(site, "sglang", "0.5.17")
    cuda = site / "nvidia" / "cu13" / "lib"
    cuda.mkdir(parents=True)
    (cuda / "libcudart.so.13").write_text("")
    environ = {"PATH": str(away), "PYTHONPATH": str(site), "LD_LIBRARY_PATH": "/mine"}
    awake = msgspec.structs.replace(SPEC, engine="sglang")
    assert prepare(awake, environ).env["LD_LIBRARY_PATH"] == "/mine"
    sleepy = msgspec.structs.replace(awake, sleep=True)
    env = prepare(sleepy, environ).env
    assert env["LD_LIBRARY_PATH"] == f"/mine:{cuda}"


def test_an_environment_says_whether_it_could_send_traces(away: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    package(site, "vllm", "0.33.0")
    environ = {"PATH": str(away), "PYTHONPATH": str(site), PYTHON_VARIABLE: sys.executable}
    program = find_program(ENTRY, environ, sys.executable)
    assert not can_trace(program)  # not asked yet
    probe_release(program)
    assert can_trace(program)  # this interpreter has the exporter
    other = tmp_path / "other"
    package(other, "vllm", "0.33.0")
    package(other, "opentelemetry", "0.1")  # one without it, in its place
    lacking = find_program(ENTRY, environ | {"PYTHONPATH": str(other)}, sys.executable)
    probe_release(lacking)
    assert not can_trace(lacking)


def test_libraries_are_added_once_and_last() -> None:
    assert with_library({}, "") == {}
    assert with_library({"A": "1"}, "/x") == {"A": "1", "LD_LIBRARY_PATH": "/x"}
    assert with_library({"LD_LIBRARY_PATH": "/x:/y"}, "/x") == {"LD_LIBRARY_PATH": "/x:/y"}


def test_the_simulator_is_run_as_it_is() -> None:
    spec = msgspec.structs.replace(SPEC, engine="simulator", args=("--dialect", "sglang"))
    ready = prepare(spec, {"PATH": "/bin"})
    assert ready.argv[:3] == (sys.executable, "-m", "backends.simulator")
    assert ready.release == UNKNOWN_RELEASE
    assert known_release(program_of(ENGINES["simulator"], spec, {})) == UNKNOWN_RELEASE
