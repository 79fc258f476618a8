"""Steps of a proof: each says what it claims, and ends as PASS, FAIL or NOT RUN with its figures.

A step that fails does not end the run: on a machine that is lent for minutes, the other answers are
worth as much. A step that was done and could not tell is NOT RUN, with its figures: it has shown
nothing either way. Time is short there, too, so each step says how long it usually takes, and the
last ones are left out by name when they do not fit; one that must be done (the engine has to be
stopped) has its time kept for it.
"""

from __future__ import annotations

import asyncio
import enum
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

import msgspec

from loadtest.client import RequestError
from loadtest.run import RunError

Figure = float | int | str | bool | None
SLACK = 6.0  # a step may take so many times its usual time before it is given up


class Verdict(enum.StrEnum):
    """How a step ended."""

    PASS = "PASS"  # noqa: S105 - a verdict, no password
    FAIL = "FAIL"
    NOT_RUN = "NOT RUN"


class SkipError(Exception):
    """The step cannot be done here; the text says why."""


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What a step found."""

    name: str
    verdict: Verdict
    took_s: float = 0.0
    figures: dict[str, Figure] = {}
    broken: tuple[str, ...] = ()  # claims that did not hold, or why it was not run
    table: str = ""
    data: list[dict[str, Any]] = []  # what the table shows, for programs


class Findings:
    """Collects the figures and claims of one step while it runs."""

    def __init__(self) -> None:
        self.figures: dict[str, Figure] = {}
        self.broken: list[str] = []
        self.undecided: list[str] = []  # neither shown nor refuted, and why
        self.table = ""
        self.data: list[dict[str, Any]] = []

    def claim(self, holds: bool, what: str) -> None:
        """Note that `what` had to hold."""
        if not holds:
            self.broken.append(what)


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One thing to prove."""

    name: str
    run: Callable[[Findings], Awaitable[None]]
    usual_s: float
    limit_s: float = 0.0  # given up after it; 0: some times the usual
    needs: str = ""  # a step that must have passed
    kept: bool = False  # its time is kept for it, and it is done whatever failed
    spare: bool = False  # done only where the steps after it have time as well


async def run_steps(
    steps: Sequence[Step], limit_s: float, say: Callable[[str], None]
) -> list[Finding]:
    """Run the steps in order within `limit_s` (0: no limit), and tell of each as it ends."""
    deadline_s = time.monotonic() + limit_s if limit_s else float("inf")
    found: list[Finding] = []
    for index, step in enumerate(steps):
        after = steps[index + 1 :]
        kept_s = sum(
            later.usual_s for later in after if later.kept or (step.spare and not later.spare)
        )
        left_s = deadline_s - time.monotonic()
        why_not = _why_not(step, found, left_s, kept_s)
        finding = _not_run(step, why_not) if why_not else await _run(step, left_s - kept_s)
        found.append(finding)
        say(shown(finding))
    return found


def _why_not(step: Step, found: Iterable[Finding], left_s: float, kept_s: float) -> str:
    passed = {finding.name for finding in found if finding.verdict is Verdict.PASS}
    if step.needs and step.needs not in passed:
        return f"needs the step '{step.needs}'"
    if not step.kept and left_s - kept_s < step.usual_s:
        need = f", and the steps after it need {kept_s:.0f}" if kept_s else ""
        return f"it usually takes {step.usual_s:g} s; {max(0.0, left_s):.0f} s are left{need}"
    return ""


def _not_run(step: Step, why: str) -> Finding:
    return Finding(name=step.name, verdict=Verdict.NOT_RUN, broken=(why,))


async def _run(step: Step, left_s: float) -> Finding:
    findings = Findings()
    begun_s = time.monotonic()
    limit_s = step.limit_s or step.usual_s * SLACK
    if not step.kept:
        limit_s = min(limit_s, left_s)
    try:
        async with asyncio.timeout(limit_s):
            await step.run(findings)
    except SkipError as error:
        findings.undecided.append(str(error))
    except TimeoutError:
        findings.broken.append(f"it had not ended after {limit_s:.0f} s")
    except (RequestError, RunError, OSError, ValueError, KeyError, msgspec.MsgspecError) as error:
        findings.broken.append(f"{type(error).__name__}: {error}")
    return Finding(
        name=step.name,
        verdict=_verdict(findings),
        took_s=round(time.monotonic() - begun_s, 3),
        figures=findings.figures,
        broken=(*findings.broken, *findings.undecided),
        table=findings.table,
        data=findings.data,
    )


def _verdict(findings: Findings) -> Verdict:
    if findings.broken:
        return Verdict.FAIL
    return Verdict.NOT_RUN if findings.undecided else Verdict.PASS


def status_of(found: Sequence[Finding]) -> int:
    """Return the exit status: 1 when a step failed, or when not even the first was done."""
    failed = any(finding.verdict is Verdict.FAIL for finding in found)
    return 1 if failed or found[0].verdict is not Verdict.PASS else 0


# --- what is printed ------------------------------------------------------------------------------


def shown(finding: Finding) -> str:
    """Return a finding as lines: verdict and name, what is broken, figures, its table."""
    took = f" ({finding.took_s:.1f} s)" if finding.verdict is not Verdict.NOT_RUN else ""
    lines = [f"{finding.verdict.value:<8} {finding.name}{took}"]
    lines += [f"         ! {text}" for text in finding.broken]
    width = max((len(name) for name in finding.figures), default=0)
    for name, value in finding.figures.items():
        lines.append(f"         {name.replace('_', ' '):<{width}}  {figure_text(name, value)}")
    lines += [f"         {line}".rstrip() for line in finding.table.splitlines()]
    return "\n".join(lines)


def figure_text(name: str, value: Figure) -> str:
    """Write a figure; one in seconds that is small reads better in ms."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, str):
        return value
    if name.endswith("_s") and abs(value) < 1.0:
        return f"{value * 1e3:.1f} ms"
    return f"{value:,.4g}"


def report(title: str, header: dict[str, str], found: Sequence[Finding]) -> str:
    """Return the whole text of a run."""
    width = max(len(name) for name in header)
    lines = [title, "", *(f"{name:<{width}}  {text}" for name, text in header.items()), ""]
    lines += [shown(finding) for finding in found]
    counts = dict.fromkeys(Verdict, 0)
    for finding in found:
        counts[finding.verdict] += 1
    lines += ["", ", ".join(f"{count} {verdict.value}" for verdict, count in counts.items())]
    return "\n".join(lines) + "\n"
