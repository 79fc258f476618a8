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
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "deploy"))  # where this is loaded by others
import second_try  # noqa: E402

VENV = ROOT / ".venv"
BIN = VENV / "bin"
STAMP = VENV / "doherty-stamp"
PYTHON_MIN = (3, 11)
CORE = "proxy/core/"
CORE_BRANCH_PERCENT_MIN = 95.0
SLOTS = 3  # parts of the test run at a time: half of what each takes is waiting for processes
# Where the core's branches are counted: counting costs three times what the tests themselves do, so
# it is done where it is judged. The files of tests/io are those that reach the rest of the core.
WITH_CORE = (
    *("abroad", "choice", "explain", "fair", "hops"),
    *("kv_events", "metering", "preemption", "tracing"),
)
MEASURED = ("tests/core", "tests/fuzz", *(f"tests/io/test_{name}.py" for name in WITH_CORE))
# What judges the sources, in containers, as a wheel and in documents: beside the translation.
OF_SOURCES = (("tests/deploy/test_compose.py",), ("tests/deploy", "tests/bench_core"))
# What runs beside each other; the longest first, so that the last to end are short.
TOGETHER = (
    *OF_SOURCES,
    ("tests/faults", "tests/contract"),
    ("tests/backends",),
    ("tests/io",),
    ("tests/loadtest",),
    ("tests/backends/offline",),
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
    return run_steps(lint_steps())


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
    """Run every check in order; with arguments pytest sees a part, and coverage is not judged."""
    ensure(("dev",))
    with tempfile.TemporaryDirectory(prefix="doherty-test-") as name:
        folder = Path(name)
        tests = [
            Step("tests", lambda: run_tests(test_parts(folder), folder)),
            Step("coverage", lambda: judge_coverage(folder)),
        ]
        if argv:
            given = (*translation(), pytest_part(folder, "given", argv))
            tests = [Step(part.name, lambda part=part: start(part).wait()) for part in given]
        status = run_steps([*lint_steps(), *tests])
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


class Part:
    """A process of the test run; it starts once the part named `after` has succeeded."""

    def __init__(
        self,
        name: str,
        command: Sequence[Path | str],
        env: Callable[[], dict[str, str]] = dict,
        after: str = "",
    ) -> None:
        self.name = name
        self.command = command
        self.env = env  # asked when it starts: what it says may be made by then
        self.after = after


def test_parts(folder: Path) -> list[Part]:
    """Return all of the tests, each in one part, the longest first.

    The data path is translated first, so that every test of a process meets what is run in earnest
    (but in `OF_SOURCES`); the core's own tests are run over the translation, too.
    """
    measure = (str(BIN / "coverage"), "run", "-m", "pytest")
    counted = {"COVERAGE_FILE": str(folder / "coverage")}
    core = pytest_part(folder, "core", MEASURED, command=measure, env=lambda: counted)
    made = translation()
    parts = [*made, core]
    after = made[0].name if made else ""
    named = [path for paths in (MEASURED, *TOGETHER) for path in paths]
    for paths in TOGETHER:
        inner = [path for path in named if path.startswith(tuple(f"{each}/" for each in paths))]
        options = (*paths, *(f"--ignore={path}" for path in inner))
        name, then = paths[0].replace("/", "."), "" if paths in OF_SOURCES else after
        parts.append(pytest_part(folder, name, options, after=then))
    if made:
        options = ("-q", "-o", "pythonpath=", "tests/core", "tests/fuzz")
        parts.append(pytest_part(folder, "translated", options, env=over_translation, after=after))
    others = ("tests", *(f"--ignore={path}" for path in named))
    return [*parts, pytest_part(folder, "others", others, after=after)]


def translation() -> list[Part]:
    """Return what translates the data path.

    Without a C compiler the sources are what runs, and this is left out by name.
    """
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    headers = Path(sysconfig.get_path("include"), "Python.h")
    if shutil.which(compiler) is None or not headers.is_file():
        missing = "a C compiler" if shutil.which(compiler) is None else "the headers of this Python"
        print(f"left out: translation, and the core's tests over it, for want of {missing}")
        return []
    return [Part("translation", (BIN / "doherty", "compile"))]


def over_translation() -> dict[str, str]:
    """Return the environment in which the translation's `proxy` comes before the sources'."""
    command = (BIN / "doherty", "compile")  # says where it is, once it is there
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return {"PYTHONPATH": os.pathsep.join((said.stdout.strip(), str(ROOT)))}


def pytest_part(
    folder: Path,
    name: str,
    options: Sequence[str],
    *,
    command: Sequence[str] = (),
    env: Callable[[], dict[str, str]] = dict,
    after: str = "",
) -> Part:
    own = (f"--junit-xml={folder / name}.xml", "-o", f"cache_dir=.pytest_cache/{name}")
    return Part(name, (*(command or (str(BIN / "pytest"),)), *own, *options), env, after)


def run_tests(parts: Sequence[Part], folder: Path) -> int:
    """Run `parts`, and once more, alone, the few tests of them that failed."""
    statuses = run_parts(parts, folder)
    failure = next((status for status in statuses.values() if status), 0)
    tests = second_try.tests_to_try(statuses, folder, ROOT)
    if not tests:
        return failure
    print(f"\n=== failed, once more alone: {len(tests)} ===", flush=True)
    status = start(pytest_part(folder, second_try.ALONE, tests)).wait()
    passed = second_try.passed_alone(folder, ROOT)
    return status if status or set(passed) == set(tests) else failure


def run_parts(parts: Sequence[Part], folder: Path) -> dict[str, int]:
    """Run `parts` in their order, `SLOTS` at a time; return the exit status of each that ran.

    One that fails ends none but those that come after it. What a part said is shown when it ends.
    """
    waiting, statuses = list(parts), dict[str, int]()
    running: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
    try:
        while waiting or running:
            waiting = [part for part in waiting if not statuses.get(part.after)]
            ready = [part for part in waiting if not part.after or part.after in statuses]
            for part in ready[: SLOTS - len(running)]:
                waiting.remove(part)
                with (folder / f"{part.name}.txt").open("wb") as output:
                    running[part.name] = (start(part, output), time.monotonic())
            for name, (process, begun_s) in list(running.items()):
                if process.poll() is not None:
                    statuses[name] = process.returncode
                    del running[name]
                    print((folder / f"{name}.txt").read_text(errors="replace"))
                    print(f"--- {name}: {time.monotonic() - begun_s:.1f} s ---\n", flush=True)
            time.sleep(0.1)
    finally:
        for process, _ in running.values():
            process.terminate()
            process.wait()
    return statuses


def start(part: Part, output: BinaryIO | None = None) -> subprocess.Popen[bytes]:
    env = os.environ | part.env()
    return subprocess.Popen(part.command, cwd=ROOT, env=env, stdout=output, stderr=output)


def judge_coverage(folder: Path) -> int:
    """Hold the core's branches to their least share."""
    env = os.environ | {"COVERAGE_FILE": str(folder / "coverage")}
    target = folder / "coverage.json"
    for args in (
        ("combine", "--quiet", str(folder)),
        ("json", "--quiet", f"--include={CORE}*", "-o", str(target)),
    ):
        if subprocess.run([BIN / "coverage", *args], cwd=ROOT, env=env, check=False).returncode:
            return 1
    percent = core_branch_percent(json.loads(target.read_text())["files"])
    if percent is None:
        print(f"{CORE} no branches measured")
        return 1
    print(f"{CORE} {percent:.1f} % of branches (at least {CORE_BRANCH_PERCENT_MIN:g} %)")
    return 0 if percent >= CORE_BRANCH_PERCENT_MIN else 1


def core_branch_percent(files: dict[str, dict[str, dict[str, int]]]) -> float | None:
    """Return the share of the core's branches that ran."""
    core = [entry["summary"] for name, entry in files.items() if name.startswith(CORE)]
    count = sum(summary.get("num_branches", 0) for summary in core)
    covered = sum(summary.get("covered_branches", 0) for summary in core)
    return 100.0 * covered / count if count else None


def show_skipped(folder: Path) -> None:
    """List the skipped tests by name, each with its reason, and those that needed a second try."""
    reports = sorted(folder.glob("*.xml"))
    if not reports:
        return
    skipped = [line for report in reports for line in second_try.skipped_tests(report)]
    print(f"\n=== skipped tests: {sum(times for *_, times in skipped)} ===")
    for name, reason, times in skipped:
        print(f"{name}{f' ({times} cases)' if times > 1 else ''}: {reason}")
    passed = second_try.passed_alone(folder, ROOT)
    if passed:
        print(f"\n=== failed beside others, passed alone: {len(passed)} ===")
        print("\n".join(passed), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
