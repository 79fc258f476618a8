"""Read an engine's metrics: a tolerant parser for Prometheus text, and names as tables.

The parser takes what it understands and skips the rest, because engines add and rename series from
release to release; a reading that lacks a series is a smaller reading, never a failure. Which
series mean what is data: `Series` lists the names that a figure has had, newest first, and how its
samples (ranks of one engine, sources of one counter) are put together.
"""

from __future__ import annotations

import enum
import math
import re
from collections.abc import Callable, Iterable, Mapping

import msgspec

from proxy.contract import LoadSample

Samples = Mapping[str, list[tuple[dict[str, str], float]]]

_LABEL = re.compile(r'([A-Za-z_][A-Za-z0-9_]*)="((?:[^"\\]|\\.)*)"')
_ESCAPES = {r"\\": "\\", r"\"": '"', r"\n": "\n"}
_COUNT_MAX = 2**53  # beyond it a float no longer counts


class Fold(enum.Enum):
    """How the samples of one figure become one value."""

    SUM = "sum"
    MAX = "max"  # the fullest rank is the one that stalls


class Series(msgspec.Struct, frozen=True):
    """One figure: the first of `names` that is present, its samples folded."""

    names: tuple[str, ...]
    fold: Fold = Fold.SUM


class Dialect(msgspec.Struct, frozen=True):
    """One engine's names for the fields of a `LoadSample`, and which samples count."""

    series: dict[str, Series]
    counts: Callable[[Mapping[str, str]], bool]


def read_samples(text: bytes, names: Iterable[str]) -> Samples:
    """Return labels and value of each finite sample of `names`; anything else is skipped."""
    wanted = {name.encode() for name in names}
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for line in text.splitlines():
        end = len(line)
        for stop in (line.find(b"{"), line.find(b" ")):
            end = stop if 0 <= stop < end else end
        name = line[:end]
        if name not in wanted:
            continue
        sample = _read_sample(line[end:].decode("utf-8", "replace"))
        if sample is not None:
            found.setdefault(name.decode(), []).append(sample)
    return found


def read_load(text: bytes, dialect: Dialect, at_s: float) -> LoadSample | None:
    """Return the load that `text` tells in `dialect`; None when it does not say what runs."""
    names = {name for series in dialect.series.values() for name in series.names}
    samples = read_samples(text, names)
    values: dict[str, float] = {}
    for field, series in dialect.series.items():
        value = _fold(samples, series, dialect.counts)
        if value is not None:
            values[field] = value
    if "running" not in values:
        return None
    ratio = min(1.0, max(0.0, values.pop("kv_used_ratio", 0.0)))
    counts = {field: int(min(max(value, 0), _COUNT_MAX)) for field, value in values.items()}
    return LoadSample(at_s=at_s, kv_used_ratio=ratio, **counts)


def _fold(
    samples: Samples, series: Series, counts: Callable[[Mapping[str, str]], bool]
) -> float | None:
    for name in series.names:
        values = [value for labels, value in samples.get(name, ()) if counts(labels)]
        if values:
            return sum(values) if series.fold is Fold.SUM else max(values)
    return None


def _read_sample(rest: str) -> tuple[dict[str, str], float] | None:
    labels: dict[str, str] = {}
    if rest.startswith("{"):
        close = rest.rfind("}")
        if close < 0:
            return None
        labels = {name: _unescape(value) for name, value in _LABEL.findall(rest[1:close])}
        rest = rest[close + 1 :]
    fields = rest.split()
    try:
        value = float(fields[0])
    except (IndexError, ValueError):
        return None
    return (labels, value) if math.isfinite(value) else None


def _unescape(value: str) -> str:
    return re.sub(r'\\[\\"n]', lambda match: _ESCAPES[match[0]], value) if "\\" in value else value
