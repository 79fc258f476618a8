"""The shape of the code: one-way imports, small files, and nothing declared in vain."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from proxy import errors
from proxy.core import claim_limits, limits

_ROOT = Path(__file__).parents[1]
_FOLDERS = ("proxy", "backends", "loadtest", "deploy")
_FILE_LINES_MAX = 450
_FUNCTION_LINES_MAX = 70


def _sources(*folders: str) -> Iterator[tuple[str, str]]:
    for folder in folders:
        for path in sorted((_ROOT / folder).rglob("*.py")):
            yield str(path.relative_to(_ROOT)), path.read_text(encoding="utf-8")


def test_imports_point_one_way() -> None:
    run = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"],
        cwd=_ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_files_are_small() -> None:
    sizes = {name: text.count("\n") for name, text in _sources(*_FOLDERS)}
    assert len(sizes) > 40  # the folders were found
    assert {name: size for name, size in sizes.items() if size > _FILE_LINES_MAX} == {}


def test_functions_are_small() -> None:
    long: dict[str, int] = {}
    for name, text in _sources(*_FOLDERS):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                size = (node.end_lineno or 0) - node.lineno + 1
                if size > _FUNCTION_LINES_MAX:
                    long[f"{name}:{node.name}"] = size
    assert long == {}


def test_every_limit_bounds_something() -> None:
    names = {name for module in (limits, claim_limits) for name in vars(module) if name.isupper()}
    used: set[str] = set()
    for source, text in _sources("proxy"):
        if source.endswith("limits.py"):
            # A unit is used where another number is made of it.
            for unit in ("KIB", "MIB"):
                used |= {unit} if re.search(rf"= .*\b{unit}\b", text) else set()
        used |= set(re.findall(r"\b(?:claim_)?limits\.([A-Z][A-Z0-9_]+)", text))
    assert names - used == set()
    assert used - names == set()


def test_every_error_is_raised_somewhere() -> None:
    text = "".join(body for name, body in _sources("proxy") if not name.endswith("proxy/errors.py"))
    unused = {
        kind.__name__ for kind in errors.ALL_ERRORS if not re.search(rf"\b{kind.__name__}\b", text)
    }
    assert unused == set()
