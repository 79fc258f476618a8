"""What the reports of a test run say: who was skipped, who failed, and who may be tried once more.

Parts of the run share a machine, and a test that does not wait long enough for real processes may
fail for that. Such a test is a bug, but not one of what it tests. So the few that failed are run
once more with nothing beside them, and those that pass then are named at the end of the run, to be
mended. Nothing else is excused: not a part that died, was interrupted or has no whole report, not
more failures than a busy machine explains, and not the core's tests over the translation, which
wait for nobody.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from xml.etree import ElementTree

ALONE = "alone"  # the name of the part that is the second try
ONCE = ("translated",)  # parts that have no second try
TESTS_MAX = 5
TESTS_FAILED = 1  # pytest's exit status when that is all that happened


def tests_to_try(statuses: Mapping[str, int], folder: Path, root: Path) -> list[str]:
    """Return the failed tests, as pytest is told them; none if anything else went wrong, too."""
    found: dict[str, None] = {}
    for name, status in statuses.items():
        if not status:
            continue
        failed = [] if name in ONCE or status != TESTS_FAILED else failed_tests(folder, name, root)
        if not failed or "" in failed:
            return []
        found.update(dict.fromkeys(failed))
    return list(found) if len(found) <= TESTS_MAX else []


def failed_tests(folder: Path, part: str, root: Path) -> list[str]:
    """Return the node id of each failed test of a part; empty for one that is in no file."""
    return [
        node_id(case, root)
        for case in cases(folder / f"{part}.xml")
        if case.find("failure") is not None or case.find("error") is not None
    ]


def node_id(case: ElementTree.Element, root: Path) -> str:
    """Return the file, the classes and the name: `classname` is the first two, with dots."""
    names = case.get("classname", "").split(".")
    for count in range(len(names), 0, -1):
        path = Path(*names[:count]).with_suffix(".py")
        if (root / path).is_file():
            return "::".join((path.as_posix(), *names[count:], case.get("name", "")))
    return ""


def passed_alone(folder: Path, root: Path) -> list[str]:
    """Return those that passed the second time: no failure, no error, not skipped."""
    outcomes: dict[str, bool] = {}  # what fails after it has passed is there twice
    for case in cases(folder / f"{ALONE}.xml"):
        name = node_id(case, root)
        passed = all(case.find(mark) is None for mark in ("failure", "error", "skipped"))
        outcomes[name] = passed and outcomes.get(name, True)
    return [name for name, passed in outcomes.items() if passed]


def skipped_tests(report: Path) -> list[tuple[str, str, int]]:
    """Return name and reason of each skipped test, and how many cases of it that were.

    A machine without a compiler skips hundreds of cases of twenty tests in tests/core alone; line
    by line they would hide the summary above them.
    """
    found = Counter(
        (
            f"{case.get('classname', '')}::{case.get('name', '').partition('[')[0]}",
            mark.get("message", "no reason given"),
        )
        for case in cases(report)
        for mark in case.findall("skipped")
    )
    return [(name, reason, times) for (name, reason), times in found.items()]


def cases(report: Path) -> Iterator[ElementTree.Element]:
    """Yield the tests of a JUnit report of our own making; none of one that is not whole."""
    try:
        tree = ElementTree.parse(report)  # noqa: S314  # ours
    except (OSError, ElementTree.ParseError):
        return
    yield from tree.iter("testcase")
