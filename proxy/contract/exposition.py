"""Read an engine's metrics: a tolerant parser for Prometheus text, and names as tables.

The parser takes what it understands and skips the rest, because engines add and rename series from
release to release; a reading that lacks a series is a smaller reading, never a failure. Which
series mean what is data: a `Dialect` lists, for each field of `Figures`, the names that it has had,
newest first.

Figures are put together by data-parallel rank first, since each rank is a machine of its own to
whoever chooses one; the whole engine is the sum of its ranks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Final

import msgspec
from msgspec.structs import replace

from proxy.contract import DP_SIZE_MAX, LoadSample, RankLoad

Sample = tuple[dict[str, str], float]
Samples = Mapping[str, list[Sample]]
ByRank = dict[int, dict[str, float]]  # field to value, by rank; see `NO_RANK`

NO_RANK: Final = -1  # whose figures are told for all ranks together

_LABEL = re.compile(r'([A-Za-z_][A-Za-z0-9_]*)="((?:[^"\\]|\\.)*)"')
_ESCAPES = {r"\\": "\\", r"\"": '"', r"\n": "\n"}
_COUNT_MAX = 2**53  # beyond it a float no longer counts
_SECONDS_MAX = 1e12
_RANK_DIGITS_MAX = 9
_REAL = frozenset(("kv_used_ratio", "prefill_busy_s_total"))
# Of the ranks the fullest is the one that stalls, and all have blocks of one size.
_LARGEST = frozenset(("kv_used_ratio", "block_tokens"))


class Dialect(msgspec.Struct, frozen=True):
    """One engine's names for the fields of `Figures`."""

    series: dict[str, tuple[str, ...]]  # the first that is present counts
    rank_label: str
    counted: Callable[[list[Sample]], list[Sample]]  # leaves out what would count twice


def read_samples(text: bytes, names: Iterable[str]) -> Samples:
    """Return labels and value of each finite sample of `names`; anything else is skipped."""
    found: dict[str, list[Sample]] = {}
    for name, rest in _lines_of(tuple(names)).findall(b"\n" + text):
        sample = _read_sample(rest.decode("utf-8", "replace"))
        if sample is not None:
            found.setdefault(name.decode(), []).append(sample)
    return found


@lru_cache
def _lines_of(names: tuple[str, ...]) -> re.Pattern[bytes]:
    """Return what finds their lines in one pass: pages are long, and few of the lines matter."""
    return re.compile(rb"\n(%b)([{ ][^\n]*)" % b"|".join(re.escape(n.encode()) for n in names))


def read_figures(text: bytes, dialect: Dialect) -> ByRank:
    """Return what `text` tells in `dialect`, by rank."""
    samples = read_samples(text, (name for names in dialect.series.values() for name in names))
    by_rank: ByRank = {}
    for field, names in dialect.series.items():
        present = (dialect.counted(samples[name]) for name in names if name in samples)
        for labels, value in next((counted for counted in present if counted), []):
            figures = by_rank.setdefault(rank_of(labels.get(dialect.rank_label)), {})
            figures[field] = _fold(field, figures.get(field, 0.0), value)
    return by_rank


def rank_of(text: str | None) -> int:
    """Return the number of a rank; `NO_RANK` for what is none."""
    if text is None or not (text.isdigit() and text.isascii() and len(text) <= _RANK_DIGITS_MAX):
        return NO_RANK
    return int(text)


def sample_of(
    by_rank: ByRank,
    at_s: float,
    *,
    asleep: bool = False,
    busy_adapters: tuple[str, ...] | None = None,
) -> LoadSample | None:
    """Return a reading; None when the figures do not say what runs."""
    total: dict[str, float] = {}
    for figures in by_rank.values():
        for field, value in figures.items():
            total[field] = _fold(field, total.get(field, 0.0), value)
    if "running" not in total:
        return None
    numbers = sorted(rank for rank in by_rank if rank != NO_RANK and "running" in by_rank[rank])
    whole = numbers == list(range(len(numbers))) and 1 < len(numbers) <= DP_SIZE_MAX
    return replace(
        LoadSample(at_s=at_s, asleep=asleep, busy_adapters=busy_adapters),
        # A server that knows only some of the ranks, or but one, gives no choice of them.
        ranks=tuple(replace(RankLoad(rank=n), **_held(by_rank[n])) for n in numbers)
        if whole
        else (),
        **_held(total),
    )


def _fold(field: str, one: float, other: float) -> float:
    return max(one, other) if field in _LARGEST else one + other


def _held(figures: Mapping[str, float]) -> dict[str, int | float]:
    """Hold values to what they can be."""
    held: dict[str, int | float] = {}
    for field, value in figures.items():
        if field == "kv_used_ratio":
            held[field] = min(1.0, max(0.0, value))
        elif field in _REAL:
            held[field] = min(_SECONDS_MAX, max(0.0, value))
        else:
            held[field] = int(min(max(value, 0), _COUNT_MAX))
    return held


def _read_sample(rest: str) -> Sample | None:
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
