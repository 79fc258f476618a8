"""From a checkout to a running endpoint, or to a full test run, with Python 3.11 and pip alone.

    python3 deploy/bootstrap.py up [CONFIG] [FLAGS]     everything `doherty up` does
    python3 deploy/bootstrap.py compile                 the data path as machine code
    python3 deploy/bootstrap.py test [PYTEST ARGS]      every check, as the project's own runs do
    python3 deploy/bootstrap.py check                   the checks that run no test
    python3 deploy/bootstrap.py format                  rewrite the sources in the project's form
    python3 deploy/bootstrap.py bench-core [--write]    what the pure core costs, and did cost
    python3 deploy/bootstrap.py clean                   remove what these commands made

The environment is `.venv` beside `pyproject.toml`. It is installed once, again when that file has
changed, and made anew when its interpreter is gone or the folder was moved.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TextIO
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
BIN = VENV / "bin"
STAMP = VENV / "doherty-stamp"
PYTHON_MIN = (3, 11)
CORE = "proxy/core/"
CORE_BRANCH_PERCENT_MIN = 95.0
# Nearly half of the time, most of it computing; the rest mostly waits for processes.
BESIDE_TESTS = tuple(
    f"tests/{name}"
    for name in ("core", "fuzz", "bench_core", "contract", "loadtest", "deploy", "faults")
)
CACHES = (".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis", ".import_linter_cache")
PRODUCTS = (".venv", "build", "dist", "doherty.egg-info", ".coverage")


class SetupError(Exception):
    """Something that a person has to put right first."""


def main(argv: Sequence[str]) -> int:
    commands: dict[str, Callable[[Sequence[str]], int]] = {
        "up": up,
        "compile": translate,
        "test": test,
        "check": check,
        "format": rewrite,
        "bench-core": bench_core,
        "clean": clean,
    }
    if not argv or argv[0] not in commands:
        print(__doc__)
        return 0 if argv[:1] in ([], ["--help"], ["-h"]) else 2
    if sys.version_info < PYTHON_MIN:
        wanted = ".".join(map(str, PYTHON_MIN))
        print(
            f"Python {wanted} or newer is needed, and this is {sys.version.split()[0]}; "
            "run this file with a newer one",
            file=sys.stderr,
        )
        return 1
    try:
        return commands[argv[0]](argv[1:])
    except SetupError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


# --- environment ----------------------------------------------------------------------------------


def ensure(extras: Iterable[str]) -> None:
    """Make `.venv` hold the project and `extras`, doing nothing when it does already."""
    wanted = hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()
    stamp = read_stamp()
    python = BIN / "python"
    moved = stamp.get("venv", str(VENV)) != str(VENV)  # its scripts name the folder
    if VENV.exists() and (moved or not runs(python)):
        print(f"{VENV} cannot be used; making it anew", flush=True)
        shutil.rmtree(VENV)
        stamp = {}
    if not VENV.exists():
        make_venv()
    everything = sorted(set(stamp.get("extras", ())) | set(extras))
    if stamp.get("project") == wanted and everything == stamp.get("extras"):
        return
    target = f"{ROOT}[{','.join(everything)}]" if everything else str(ROOT)
    print(f"installing the project into {VENV} (once) ...", flush=True)
    status = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-e", target],
        cwd=ROOT,
        check=False,
    ).returncode
    if status:
        raise SetupError(
            f"pip could not install the project (status {status}); its messages are above. "
            "Is the package index within reach?"
        )
    stamp = {"project": wanted, "extras": everything, "venv": str(VENV)}
    STAMP.write_text(json.dumps(stamp) + "\n")


def read_stamp() -> dict[str, list[str] | str]:
    try:
        stamp = json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def runs(python: Path) -> bool:
    """Say whether the interpreter starts and has pip."""
    try:
        return not subprocess.run(
            [python, "-c", "import pip"], capture_output=True, check=False
        ).returncode
    except OSError:
        return False


def make_venv() -> None:
    """Make the environment with what this Python has: venv, or virtualenv where venv lacks pip."""
    print(f"making {VENV} ...", flush=True)
    if importlib.util.find_spec("ensurepip") and importlib.util.find_spec("venv"):
        command = [sys.executable, "-m", "venv", str(VENV)]
    elif importlib.util.find_spec("virtualenv"):
        command = [sys.executable, "-m", "virtualenv", "--quiet", str(VENV)]
    else:
        raise SetupError(
            f"{sys.executable} can make no virtual environment: its ensurepip is missing.\n"
            "Install it (Debian, Ubuntu: apt-get install python3-venv) or virtualenv "
            f"({sys.executable} -m pip install --user virtualenv), then run this again."
        )
    status = subprocess.run(command, cwd=ROOT, check=False).returncode
    if status:
        shutil.rmtree(VENV, ignore_errors=True)
        raise SetupError(f"{' '.join(command)} failed with status {status}; see above.")


# --- commands -------------------------------------------------------------------------------------


def up(argv: Sequence[str]) -> int:
    """Become `doherty up`: signals and the exit status are its own."""
    ensure(("loadtest",))
    sys.stdout.flush()
    os.execv(BIN / "doherty", ["doherty", "up", *argv])  # returns only by raising


def translate(_argv: Sequence[str]) -> int:
    """Build what workers run in place of the sources, where it fits them."""
    ensure(("compile", "loadtest"))
    return subprocess.run([BIN / "doherty", "compile"], cwd=ROOT, check=False).returncode


def check(_argv: Sequence[str]) -> int:
    ensure(("dev",))
    return run_steps(lint_steps())


def rewrite(_argv: Sequence[str]) -> int:
    ensure(("dev",))
    return subprocess.run([BIN / "ruff", "format", "."], cwd=ROOT, check=False).returncode


def bench_core(argv: Sequence[str]) -> int:
    """Measure the pure core against the table that is kept; `--write` keeps the new one."""
    ensure(("dev",))
    command = [BIN / "python", "-m", "tests.bench_core", *argv]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def clean(_argv: Sequence[str]) -> int:
    """Remove the environment and every cache; run folders hold logs and stay."""
    for name in (*PRODUCTS, *CACHES):
        path = ROOT / name
        if path.is_dir():
            shutil.rmtree(path)
        elif path.exists():
            path.unlink()
    for path in (*ROOT.glob(".coverage.*"), *ROOT.rglob("__pycache__")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return 0


def test(argv: Sequence[str]) -> int:
    """Run every check in order; with arguments pytest sees a part, and coverage is not judged."""
    ensure(("dev",))
    with tempfile.TemporaryDirectory(prefix="doherty-test-") as name:
        folder = Path(name)
        steps = [
            *lint_steps(),
            *translation_steps(),
            Step("tests", lambda: run_tests(argv, folder)),
            Step("coverage", lambda: judge_coverage(folder, partial=bool(argv))),
        ]
        status = run_steps(steps)
        show_skipped(folder)
    return status


class Step:
    """One check with its heading; `act` returns an exit status."""

    def __init__(self, name: str, act: Callable[[], int]) -> None:
        self.name = name
        self.act = act


def lint_steps() -> list[Step]:
    """Return the checks that run no test."""

    def step(name: str, *command: str) -> Step:
        argv = [str(BIN / command[0]), *command[1:]]
        return Step(name, lambda: subprocess.run(argv, cwd=ROOT, check=False).returncode)

    return [
        step("lint", "ruff", "check", "."),
        step("form", "ruff", "format", "--check", "."),
        step("types", "mypy"),
        step("imports", "lint-imports"),
    ]


def translation_steps() -> list[Step]:
    """Translate the data path, so that every test of a process meets what is run in earnest.

    Then the core's own tests are run over the translation, too. Without a C compiler the sources
    are what runs, and these steps are left out by name.
    """
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    headers = Path(sysconfig.get_path("include"), "Python.h")
    if shutil.which(compiler) is None or not headers.is_file():
        missing = "a C compiler" if shutil.which(compiler) is None else "the headers of this Python"
        print(f"left out: translation, and the core's tests over it, for want of {missing}")
        return []

    def translated() -> int:
        root = subprocess.run(
            [BIN / "doherty", "compile"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        if root.returncode:
            print(root.stdout + root.stderr)
            return root.returncode
        path = os.pathsep.join((root.stdout.strip(), str(ROOT)))  # its `proxy` before the sources'
        options = ("-q", "-o", "pythonpath=", "-p", "no:cacheprovider")
        return subprocess.run(
            [BIN / "pytest", *options, "tests/core", "tests/fuzz"],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": path},
            check=False,
        ).returncode

    return [Step("translated", translated)]


def run_steps(steps: Sequence[Step]) -> int:
    """Run `steps` until one fails, and close with what each came to."""
    outcomes: list[tuple[str, str]] = []
    failure = 0
    for step in steps:
        if failure:
            outcomes.append((step.name, "not run"))
            continue
        print(f"\n=== {step.name} ===", flush=True)
        begun_s = time.monotonic()
        failure = step.act()
        verdict = f"FAILED (status {failure})" if failure else "ok"
        outcomes.append((step.name, f"{verdict}, {time.monotonic() - begun_s:.1f} s"))
    print("\n=== summary ===")
    for name, outcome in outcomes:
        print(f"{name:10} {outcome}")
    sys.stdout.flush()
    return failure


def run_tests(argv: Sequence[str], folder: Path) -> int:
    """Run the tests in two processes side by side: two cores serve both.

    What the first says is shown when the second has ended.
    """
    if argv:
        return start_pytest(argv, folder, "tests").wait()
    output = folder / "beside.txt"
    with output.open("w") as file:
        beside = start_pytest(BESIDE_TESTS, folder, "beside", file)
    try:
        status = start_pytest([f"--ignore={path}" for path in BESIDE_TESTS], folder, "rest").wait()
        status = status or beside.wait()
    finally:
        if beside.poll() is None:
            beside.terminate()
            beside.wait()
    print(output.read_text(), flush=True)
    return status


def start_pytest(
    argv: Sequence[str], folder: Path, name: str, output: TextIO | None = None
) -> subprocess.Popen[bytes]:
    command = [
        *(str(BIN / "coverage"), "run", "-m", "pytest"),
        *(f"--junit-xml={folder / name}.xml", "-o", f"cache_dir=.pytest_cache/{name}"),
        *argv,
    ]
    env = os.environ | {"COVERAGE_FILE": str(folder / f"coverage.{name}")}
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=output, stderr=output)


def judge_coverage(folder: Path, *, partial: bool) -> int:
    """Print the total, and hold the core's branches to their least share."""
    env = os.environ | {"COVERAGE_FILE": str(folder / "coverage")}

    def coverage(*args: str) -> int:
        return subprocess.run([BIN / "coverage", *args], cwd=ROOT, env=env, check=False).returncode

    if coverage("combine", "--quiet", str(folder)):
        return 1
    target = folder / "coverage.json"
    if coverage("json", "--quiet", "-o", str(target)):
        return 1
    measured = json.loads(target.read_text())
    percent = core_branch_percent(measured["files"])
    print(f"total      {measured['totals']['percent_covered']:.1f} % of lines and branches")
    if percent is None:
        print(f"{CORE} no branches measured")
        return 0 if partial else 1
    print(f"{CORE} {percent:.1f} % of branches (at least {CORE_BRANCH_PERCENT_MIN:g} %)")
    if partial:
        print("only a part of the tests ran: not judged")
        return 0
    return 0 if percent >= CORE_BRANCH_PERCENT_MIN else 1


def core_branch_percent(files: dict[str, dict[str, dict[str, int]]]) -> float | None:
    """Return the share of the core's branches that ran."""
    core = [entry["summary"] for name, entry in files.items() if name.startswith(CORE)]
    count = sum(summary.get("num_branches", 0) for summary in core)
    covered = sum(summary.get("covered_branches", 0) for summary in core)
    return 100.0 * covered / count if count else None


def show_skipped(folder: Path) -> None:
    """List the skipped tests by name, each with its reason."""
    reports = sorted(folder.glob("*.xml"))
    if not reports:
        return
    skipped = [case for report in reports for case in skipped_tests(report.read_text())]
    print(f"\n=== skipped tests: {len(skipped)} ===")
    for name, reason in skipped:
        print(f"{name}: {reason}")


def skipped_tests(report: str) -> list[tuple[str, str]]:
    """Return name and reason of each skipped test in a JUnit report of our own making."""
    found: list[tuple[str, str]] = []
    for case in ElementTree.fromstring(report).iter("testcase"):  # noqa: S314  # ours
        for mark in case.findall("skipped"):
            name = f"{case.get('classname', '')}::{case.get('name', '')}"
            found.append((name, mark.get("message", "no reason given")))
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
