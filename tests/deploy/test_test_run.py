"""deploy/test_run.py: which parts a test run has, in which order, and what a failure leads to."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def test_run(tmp_path: Path) -> ModuleType:
    """Load the module with a root of its own."""
    spec = importlib.util.spec_from_file_location("test_run", ROOT / "deploy" / "test_run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    scope: Any = module
    scope.ROOT = tmp_path
    scope.BIN = tmp_path / ".venv" / "bin"
    return module


def test_the_share_of_branches_is_the_cores_alone(test_run: Any) -> None:
    def entry(branches: int, covered: int) -> dict[str, dict[str, int]]:
        return {"summary": {"num_branches": branches, "covered_branches": covered}}

    files = {"proxy/core/a.py": entry(10, 9), "proxy/core/b.py": entry(30, 29)}
    assert test_run.core_branch_percent(files | {"proxy/io/c.py": entry(10, 0)}) == 95.0
    assert test_run.core_branch_percent({"proxy/io/c.py": entry(10, 0)}) is None


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
    test_run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.xml").write_text(REPORT.replace("</testsuite>", f"{CASES}</testsuite>", 1))
    (tmp_path / "torn.xml").write_text(REPORT[:-20])
    test_run.show_skipped(tmp_path)
    assert capsys.readouterr().out == (
        "\n=== skipped tests: 3 ===\ntests.a::two: no GPU\ntests.a::three (2 cases): no compiler\n"
    )


def test_parts_run_in_their_order_and_none_after_one_that_failed(
    test_run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def part(name: str, status: int = 0, after: str = "") -> Any:
        code = f"import os, sys; print('said by', os.environ['NAME']); sys.exit({status})"
        env = {"NAME": name}
        return test_run.Part(name, (sys.executable, "-c", code), lambda: env, after)

    parts = [part("a"), part("b", after="a"), part("c", 3), part("d", after="c"), part("e")]
    assert test_run.run_parts(parts, tmp_path) == {"a": 0, "b": 0, "c": 3, "e": 0}
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
    test_run: Any,
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
    test_run.BIN = Path(sys.executable).parent
    parts = [test_run.pytest_part(folder, "tests", ("tests",))]
    assert test_run.run_tests(parts, folder) == status
    test_run.show_skipped(folder)
    out = capfd.readouterr().out
    assert said in out
    assert ("once more alone" in out) == ("passed alone: 3" in out)
    if "passed alone: 3" in out:
        assert out.splitlines()[-3:] == [
            "tests/test_flaky.py::TestIn::test_flaky[a.b::[c]]",
            "tests/test_flaky.py::TestIn::test_flaky[/d e]",
            "tests/test_flaky.py::test_end",
        ]


@pytest.mark.parametrize(
    "other", [{"translation": 1}, {"types": 1}, {"translated": 1}, {"core": -9}, {"io": 3}]
)
def test_what_else_went_wrong_is_not_excused(
    test_run: Any, tmp_path: Path, other: dict[str, int]
) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_a.py").touch()
    failed = REPORT.replace("tests.a", "tests.test_a").replace("skipped", "failure")
    for name in ("io", "tests", "translated", "core"):
        (tmp_path / f"{name}.xml").write_text(failed)
    tests_to_try = test_run.second_try.tests_to_try
    assert tests_to_try({"tests": 1, "core": 1}, tmp_path, tmp_path) == ["tests/test_a.py::two"]
    assert tests_to_try({"tests": 1, "others": 0} | other, tmp_path, tmp_path) == []
    assert tests_to_try({"tests": 0}, tmp_path, tmp_path) == []
    (tmp_path / "tests" / "test_a.py").unlink()
    assert tests_to_try({"tests": 1}, tmp_path, tmp_path) == []


def test_every_test_is_in_one_part(test_run: Any, tmp_path: Path) -> None:
    """As pytest reads the command lines: the folders given, less what is ignored."""
    tests = ROOT / "tests"
    files = [str(each.relative_to(tests.parent)) for each in tests.rglob("test_*.py")]
    places = dict.fromkeys(files, 0)
    for part in test_run.parts(tmp_path):
        if part.name in ("translation", "types", "translated"):
            continue
        words = [word for word in part.command if "tests" in word and str(tmp_path) not in word]
        ignored = [word.removeprefix("--ignore=") for word in words if word.startswith("--ignore=")]
        for name in files:
            within = [Path(name).is_relative_to(each) for each in words]
            places[name] += any(within) and not any(map(Path(name).is_relative_to, ignored))
    assert set(places.values()) == {1}, [name for name, count in places.items() if count != 1]
