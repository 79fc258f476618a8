"""deploy/bootstrap.py: what it decides, without installing anything."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

PATH = Path(__file__).parents[2] / "deploy" / "bootstrap.py"


@pytest.fixture
def bootstrap(tmp_path: Path) -> ModuleType:
    """Load the script with a root of its own."""
    spec = importlib.util.spec_from_file_location("bootstrap", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    scope: Any = module
    scope.ROOT = tmp_path
    scope.VENV = tmp_path / ".venv"
    scope.BIN = tmp_path / ".venv" / "bin"
    scope.STAMP = tmp_path / ".venv" / "doherty-stamp"
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    return module


@pytest.fixture
def installs(bootstrap: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record what would be done."""
    calls: list[str] = []

    def make_venv() -> None:
        calls.append("venv")
        bootstrap.BIN.mkdir(parents=True)
        (bootstrap.BIN / "python").write_text("")

    def run(argv: list[Any], **_: Any) -> subprocess.CompletedProcess[bytes]:
        calls.append(str(argv[-1]).removeprefix(str(bootstrap.ROOT)))
        return subprocess.CompletedProcess(argv, 0)

    monkeypatch.setattr(bootstrap, "make_venv", make_venv)
    monkeypatch.setattr(bootstrap, "runs", lambda python: python.exists())
    monkeypatch.setattr(bootstrap.subprocess, "run", run)
    return calls


def test_it_installs_once(bootstrap: Any, installs: list[str]) -> None:
    bootstrap.ensure(())
    bootstrap.ensure(())
    assert installs == ["venv", ""]


def test_it_installs_what_is_new(bootstrap: Any, installs: list[str]) -> None:
    bootstrap.ensure(("dev",))
    bootstrap.ensure(())
    assert installs == ["venv", "[dev]"], "what is there serves a smaller wish"
    (bootstrap.ROOT / "pyproject.toml").write_text("[project]\nname='x'\n")
    bootstrap.ensure(())
    assert installs == ["venv", "[dev]", "[dev]"], "nothing is lost by an update"


def test_a_release_is_made_in_an_environment_that_can(bootstrap: Any, installs: list[str]) -> None:
    assert bootstrap.main(["release", "--draft"]) == 0
    assert installs == ["venv", "[release]", "--draft"]


def test_a_moved_or_broken_environment_is_made_anew(bootstrap: Any, installs: list[str]) -> None:
    bootstrap.ensure(())
    stamp = json.loads(bootstrap.STAMP.read_text())
    bootstrap.STAMP.write_text(json.dumps(stamp | {"venv": "/elsewhere"}))
    bootstrap.ensure(())
    assert installs == ["venv", ""] * 2
    (bootstrap.BIN / "python").unlink()
    bootstrap.ensure(())
    assert installs == ["venv", ""] * 3


def test_a_failed_installation_is_told_and_tried_again(
    bootstrap: Any, installs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        bootstrap.subprocess, "run", lambda argv, **_: subprocess.CompletedProcess(argv, 1)
    )
    for _ in range(2):
        with pytest.raises(bootstrap.SetupError, match="pip could not install"):
            bootstrap.ensure(())


def test_without_ensurepip_and_virtualenv_the_remedy_is_told(
    bootstrap: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bootstrap.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(bootstrap.SetupError, match="apt-get install python3-venv"):
        bootstrap.make_venv()


def test_steps_stop_at_the_first_failure_and_are_summed_up(
    bootstrap: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []

    def step(name: str, status: int) -> Any:
        def act() -> int:
            ran.append(name)
            return status

        return bootstrap.Step(name, act)

    assert bootstrap.run_steps([step("one", 0), step("two", 3), step("three", 0)]) == 3
    assert ran == ["one", "two"]
    summary = capsys.readouterr().out.split("=== summary ===\n")[1].splitlines()
    assert summary[0].startswith("one        ok")
    assert summary[1].startswith("two        FAILED (status 3)")
    assert summary[2] == "three      not run"


def test_usage(bootstrap: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert bootstrap.main([]) == 0
    assert bootstrap.main(["explode"]) == 2
    assert "bootstrap.py up" in capsys.readouterr().out


def test_it_needs_nothing_but_the_standard_library() -> None:
    code = f"import runpy; runpy.run_path({str(PATH)!r}, run_name='x')"
    subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True)
