"""From a checkout to a running endpoint, or to a full test run, with Python 3.11 and pip alone.

    python3 deploy/bootstrap.py up [CONFIG] [FLAGS]     everything `doherty up` does
    python3 deploy/bootstrap.py compile                 the data path as machine code
    python3 deploy/bootstrap.py test [PYTEST ARGS]      every check, as the project's own runs do
    python3 deploy/bootstrap.py check                   the checks that run no test
    python3 deploy/bootstrap.py format                  rewrite the sources in the project's form
    python3 deploy/bootstrap.py bench-core [--write]    what the pure core costs, and did cost
    python3 deploy/bootstrap.py release [--draft]       wheel, sources and what they hold, in dist/
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
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "deploy"))  # where this is loaded by others
import test_run  # noqa: E402

VENV = ROOT / ".venv"
BIN = VENV / "bin"
STAMP = VENV / "doherty-stamp"
PYTHON_MIN = (3, 11)
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
        "release": release,
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
    print(f"installing the project into {VENV} (once; a minute, for tests some) ...", flush=True)
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
    ensure(("loadtest", "top"))
    sys.stdout.flush()
    os.execv(BIN / "doherty", ["doherty", "up", *argv])  # returns only by raising


def translate(_argv: Sequence[str]) -> int:
    """Build what workers run in place of the sources, where it fits them."""
    ensure(("compile", "loadtest"))
    return subprocess.run([BIN / "doherty", "compile"], cwd=ROOT, check=False).returncode


def check(_argv: Sequence[str]) -> int:
    ensure(("dev",))
    return run_steps(check_steps())


def rewrite(_argv: Sequence[str]) -> int:
    ensure(("dev",))
    return subprocess.run([BIN / "ruff", "format", "."], cwd=ROOT, check=False).returncode


def bench_core(argv: Sequence[str]) -> int:
    """Measure the pure core against the table that is kept; `--write` keeps the new one."""
    ensure(("dev",))
    command = [BIN / "python", "-m", "tests.bench_core", *argv]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def release(argv: Sequence[str]) -> int:
    ensure(("release",))
    command = [BIN / "python", "deploy/release.py", *argv]
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
    """Run every check; with arguments pytest sees a part, and coverage is not judged."""
    ensure(("dev",))
    # Where this is set, each of the hundreds of processes that tests start would compile all of its
    # modules anew: half of what a start costs.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    with tempfile.TemporaryDirectory(prefix="doherty-test-") as name:
        folder = Path(name)
        if argv:
            given = (*test_run.translation(), test_run.pytest_part(folder, "given", argv))
            steps = [
                *check_steps(),
                *(Step(part.name, lambda part=part: test_run.start(part).wait()) for part in given),
            ]
        else:
            steps = [
                *quick_steps(),
                Step("tests", lambda: test_run.run_tests(test_run.parts(folder), folder)),
                Step("coverage", lambda: test_run.judge_coverage(folder)),
            ]
        status = run_steps(steps)
        test_run.show_skipped(folder)
    return status


class Step:
    """One check with its heading; `act` returns an exit status."""

    def __init__(self, name: str, act: Callable[[], int]) -> None:
        self.name = name
        self.act = act


def check_steps() -> list[Step]:
    """Return the checks that run no test."""
    return [*quick_steps(), command_step("types", test_run.TYPES)]


def quick_steps() -> list[Step]:
    """Return those that are over in a second each."""
    return [
        command_step("lint", ("ruff", "check", ".")),
        command_step("form", ("ruff", "format", "--check", ".")),
        command_step("imports", ("lint-imports",)),
    ]


def command_step(name: str, command: Sequence[str]) -> Step:
    argv = [BIN / command[0], *command[1:]]
    return Step(name, lambda: subprocess.run(argv, cwd=ROOT, check=False).returncode)


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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
