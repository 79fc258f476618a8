"""What a scenario found: figures beside their gates, and whether each was met."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import msgspec


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One figure. A promise must hold on any machine; other gates are times of a quiet one."""

    what: str
    value: str
    gate: str = ""
    met: bool = True
    promise: bool = False


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What one scenario found; `skipped` says why it could not be run."""

    scenario: str
    figures: tuple[Figure, ...] = ()
    skipped: str = ""


def promise(what: str, value: str, gate: str, *, met: bool) -> Figure:
    return Figure(what=what, value=value, gate=gate, met=met, promise=True)


def at_most(
    what: str, value: float, limit: float, shown: Callable[[float], str], *, promised: bool = False
) -> Figure:
    """Return a figure that has an upper limit."""
    gate = f"<= {shown(limit)}"
    return Figure(what=what, value=shown(value), gate=gate, met=value <= limit, promise=promised)


def timing(what: str, seconds: float, gate_s: float) -> Figure:
    """Return a time beside its gate; it is reported, and breaks nothing."""
    return at_most(what, seconds, gate_s, milliseconds)


def ratio(what: str, value: float, base: float, gate: float) -> Figure:
    """Return a time under siege as a multiple of the time without."""
    times = value / base if base else math.inf
    shown = f"x{times:.2f} ({milliseconds(base)} -> {milliseconds(value)})"
    return Figure(what=what, value=shown, gate=f"<= x{gate:g}", met=times <= gate)


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms" if seconds < 1 else f"{seconds:,.2f} s"


def kibibytes(octets: float) -> str:
    return f"{octets / 1024:,.1f} KiB" if octets < 1 << 20 else f"{octets / (1 << 20):,.1f} MiB"


def kept_promises(findings: Iterable[Finding]) -> bool:
    return all(f.met for finding in findings for f in finding.figures if f.promise)


def table(findings: Sequence[Finding]) -> str:
    """Return the findings as text, a block for each scenario."""
    figures = [f for finding in findings for f in finding.figures]
    what = max((len(f.what) for f in figures), default=0)
    value = max((len(f.value) for f in figures), default=0)
    gate = max((len(f.gate) for f in figures), default=0)
    lines = []
    for finding in findings:
        lines.append(finding.scenario)
        if finding.skipped:
            lines.append(f"  skipped: {finding.skipped}")
        lines += [
            f"  {f.what:{what}}  {f.value:>{value}}  {f.gate:{gate}}  {verdict(f)}".rstrip()
            for f in finding.figures
        ]
    return "\n".join(lines)


def verdict(figure: Figure) -> str:
    if not figure.gate:
        return ""
    if figure.promise:
        return "kept" if figure.met else "BROKEN"
    return "met" if figure.met else "missed"
