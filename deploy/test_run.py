"""The test run: its parts, what runs beside what, and what is judged at the end.

A machine of two cores is kept at work: half of what most parts take is waiting for processes that
they started, so there are more parts at a time than cores. What is left when few parts are is
waited for with an idle core; so the longest begin first.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "deploy"))  # where this is loaded by others
import second_try  # noqa: E402

BIN = ROOT / ".venv" / "bin"
TYPES = ("mypy",)
CORE = "proxy/core/"
CORE_BRANCH_PERCENT_MIN = 95.0
SLOTS = 4  # parts at a time: half of what most of them take is waiting for processes
# Where the core's branches are counted: counting costs three times what the tests themselves do, so
# it is done where it is judged. The files of tests/io are those that reach the rest of the core.
WITH_CORE = (
    *("abroad", "choice", "explain", "fair", "hops"),
    *("kv_events", "metering", "preemption", "tracing"),
)
MEASURED = ("tests/core", "tests/fuzz", *(f"tests/io/test_{name}.py" for name in WITH_CORE))
# What runs beside the translation, and so on the sources: what judges them, in containers, as a
# wheel and in documents, and what has no data path.
OF_SOURCES = (
    ("tests/deploy", "tests/bench_core"),
    ("tests/deploy/test_compose.py",),
    ("tests/backends/offline",),
)
# The rest, the longest first, so that the last to end are short.
OVER_TRANSLATION = (
    ("tests/faults",),
    ("tests/backends",),
    ("tests/io",),
    ("tests/loadtest",),
    ("tests/contract",),
)


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


def parts(folder: Path) -> list[Part]:
    """Return all of the tests, each in one part, the longest first.

    The data path is translated first, so that every test of a process meets what is run in earnest
    (but in `OF_SOURCES`); the core's own tests are run over the translation, too. What computes all
    the time comes beside what waits.
    """
    measure = (str(BIN / "coverage"), "run", "-m", "pytest")
    counted = {"COVERAGE_FILE": str(folder / "coverage")}
    core = pytest_part(folder, "core", MEASURED, command=measure, env=lambda: counted)
    made = translation()
    after = made[0].name if made else ""
    named = [path for paths in (MEASURED, *OF_SOURCES, *OVER_TRANSLATION) for path in paths]

    def together(paths: Sequence[str], after: str) -> Part:
        inner = [path for path in named if path.startswith(tuple(f"{each}/" for each in paths))]
        options = (*paths, *(f"--ignore={path}" for path in inner))
        return pytest_part(folder, paths[0].replace("/", "."), options, after=after)

    over = ("-q", "-o", "pythonpath=", "tests/core", "tests/fuzz")
    others = ("tests", *(f"--ignore={path}" for path in named))
    return [
        *made,
        *(together(paths, "") for paths in OF_SOURCES),
        *(together(paths, after) for paths in OVER_TRANSLATION),
        core,
        Part("types", (str(BIN / TYPES[0]), *TYPES[1:])),
        *(
            pytest_part(folder, "translated", over, env=over_translation, after=each.name)
            for each in made
        ),
        pytest_part(folder, "others", others, after=after),
    ]


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
