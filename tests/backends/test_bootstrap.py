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


def test_the_share_of_branches_is_the_cores_alone(bootstrap: Any) -> None:
    def entry(branches: int, covered: int) -> dict[str, dict[str, int]]:
        return {"summary": {"num_branches": branches, "covered_branches": covered}}

    files = {"proxy/core/a.py": entry(10, 9), "proxy/core/b.py": entry(30, 29)}
    assert bootstrap.core_branch_percent(files | {"proxy/io/c.py": entry(10, 0)}) == 95.0
    assert bootstrap.core_branch_percent({"proxy/io/c.py": entry(10, 0)}) is None


REPORT = (
    '<testsuites><testsuite><testcase classname="tests.a" name="one"/>'
    '<testcase classname="tests.a" name="two"><skipped message="no GPU"/></testcase>'
    "</testsuite></testsuites>"
)


CASES = "".join(
    f'<testcase classname="tests.a" name="{name}"><skipped message="no compiler"/></testcase>'
    for name in ("three[a]", "three[b-[1]]")
)


def test_skipped_tests_are_listed_with_their_reasons(
    bootstrap: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.xml").write_text(REPORT.replace("</testsuite>", f"{CASES}</testsuite>", 1))
    (tmp_path / "torn.xml").write_text(REPORT[:-20])
    bootstrap.show_skipped(tmp_path)
    assert capsys.readouterr().out == (
        "\n=== skipped tests: 3 ===\ntests.a::two: no GPU\ntests.a::three (2 cases): no compiler\n"
    )


def test_usage(bootstrap: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert bootstrap.main([]) == 0
    assert bootstrap.main(["explode"]) == 2
    assert "bootstrap.py up" in capsys.readouterr().out


def test_it_needs_nothing_but_the_standard_library() -> None:
    code = f"import runpy; runpy.run_path({str(PATH)!r}, run_name='x')"
    subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True)


def test_parts_run_in_their_order_and_none_after_one_that_failed(
    bootstrap: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def part(name: str, status: int = 0, after: str = "") -> Any:
        code = f"import os, sys; print('said by', os.environ['NAME']); sys.exit({status})"
        env = {"NAME": name}
        return bootstrap.Part(name, (sys.executable, "-c", code), lambda: env, after)

    parts = [part("a"), part("b", after="a"), part("c", 3), part("d", after="c"), part("e")]
    assert bootstrap.run_parts(parts, tmp_path) == {"a": 0, "b": 0, "c": 3, "e": 0}
    said = capsys.readouterr().out
    assert [name for name in "abcde" if f"said by {name}" in said] == ["a", "b", "c", "e"]
    assert said.index("said by a") < said.index("said by b")


FLAKY = """
import pathlib, pytest
def once(name):
    there = pathlib.Path(__file__).with_name(name)
    failing = not there.exists()
    there.touch()
    assert not failing
class TestIn:
    @pytest.mark.parametrize("at", ["a.b::[c]", "/d e"])
    def test_flaky(self, at):
        once("x" + str(len(at)))
@pytest.fixture
def messy():
    yield
    once("messy")
def test_end(messy): ...
def test_good(): ...
"""


@pytest.mark.parametrize(
    ("more", "status", "said"),
    [
        ("", 0, "=== failed beside others, passed alone: 3 ==="),
        ("def test_bad(): assert 0", 1, "=== failed beside others, passed alone: 3 ==="),
        ("def test_shy():\n once('shy')\n pytest.skip('hm')", 1, "passed alone: 3 ==="),
        ("@pytest.mark.parametrize('n', range(3))\ndef test_bad(n): assert 0", 1, "FAILED"),
        ("def test_dies(): import os; os._exit(1)", 1, "--- tests:"),
        ("def test_stops(): pytest.exit('enough')", 2, "enough"),
    ],
)
def test_what_fails_beside_others_is_tried_once_more_alone(
    bootstrap: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    *,
    more: str,
    status: int,
    said: str,
) -> None:
    folder, tests = tmp_path / "reports", tmp_path / "tests"
    folder.mkdir()
    tests.mkdir()
    (tests / "test_flaky.py").write_text(f"{FLAKY}\n{more}\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -q\n")
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # it starts sooner
    bootstrap.BIN = Path(sys.executable).parent
    parts = [bootstrap.pytest_part(folder, "tests", ("tests",))]
    assert bootstrap.run_tests(parts, folder) == status
    bootstrap.show_skipped(folder)
    out = capfd.readouterr().out
    assert said in out
    assert ("once more alone" in out) == ("passed alone: 3" in out)
    if "passed alone: 3" in out:
        assert out.splitlines()[-3:] == [
            "tests/test_flaky.py::TestIn::test_flaky[a.b::[c]]",
            "tests/test_flaky.py::TestIn::test_flaky[/d e]",
            "tests/test_flaky.py::test_end",
        ]


@pytest.mark.parametrize("other", [{"translation": 1}, {"translated": 1}, {"core": -9}, {"io": 3}])
def test_what_else_went_wrong_is_not_excused(
    bootstrap: Any, tmp_path: Path, other: dict[str, int]
) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_a.py").touch()
    failed = REPORT.replace("tests.a", "tests.test_a").replace("skipped", "failure")
    for name in ("io", "tests", "translated", "core"):
        (tmp_path / f"{name}.xml").write_text(failed)
    tests_to_try = bootstrap.second_try.tests_to_try
    assert tests_to_try({"tests": 1, "core": 1}, tmp_path, tmp_path) == ["tests/test_a.py::two"]
    assert tests_to_try({"tests": 1, "others": 0} | other, tmp_path, tmp_path) == []
    assert tests_to_try({"tests": 0}, tmp_path, tmp_path) == []
    (tmp_path / "tests" / "test_a.py").unlink()
    assert tests_to_try({"tests": 1}, tmp_path, tmp_path) == []


def test_every_test_is_in_one_part(bootstrap: Any, tmp_path: Path) -> None:
    """As pytest reads the command lines: the folders given, less what is ignored."""
    tests = PATH.parents[1] / "tests"
    files = [str(each.relative_to(tests.parent)) for each in tests.rglob("test_*.py")]
    places = dict.fromkeys(files, 0)
    for part in bootstrap.test_parts(tmp_path):
        if part.name in ("translation", "translated"):
            continue
        words = [word for word in part.command if "tests" in word and str(tmp_path) not in word]
        ignored = [word.removeprefix("--ignore=") for word in words if word.startswith("--ignore=")]
        for name in files:
            within = [Path(name).is_relative_to(each) for each in words]
            places[name] += any(within) and not any(map(Path(name).is_relative_to, ignored))
    assert set(places.values()) == {1}, [name for name, count in places.items() if count != 1]
