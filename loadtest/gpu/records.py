"""What one run of an engine has shown, as a value: it is kept as JSON and shown as text.

A recording holds medians of what a client saw on the wire and nothing that was computed from them,
so that a better model can be fitted to an old run. Times are milliseconds.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

STEP_HEADS = ("batch", "context", "ms a token", "tokens/s")
CHUNK_TOKENS = 8192  # of a step of prefill: what both engines take on cards of 80 GB and more
TAIL_TOKENS = 200  # new ones after a cached prefix


class FirstToken(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Time to the first token of a prompt: never seen, seen, and seen but for its end."""

    prompt_tokens: int
    cold_ms: float | None = None
    cached_ms: float | None = None
    tail_ms: float | None = None  # all but the last `TAIL_TOKENS`
    cached_tokens: int = 0  # what the engine reported for the seen prompt
    repeats: int = 0
    spread_ms: float = 0.0  # of the cold ones: largest less smallest

    def times(self) -> dict[str, float]:
        """Return what was measured, by kind."""
        found = {"cold": self.cold_ms, "cached": self.cached_ms, "tail": self.tail_ms}
        return {kind: value for kind, value in found.items() if value is not None}


class Decode(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Time per token of one answer, while `batch` answers are computed together."""

    batch: int
    context_tokens: int  # of each, on average over the measurement
    token_ms: float
    repeats: int = 1


class Phase(msgspec.Struct, frozen=True):
    """A line of the engine's log that tells how its start goes, and when it came."""

    at_s: float
    text: str


class Recording(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One engine on one machine."""

    engine: str
    version: str
    gpu: str
    model: str
    weights: str = "bf16"
    tensor_parallel: int = 1
    date: str = ""
    command: str = ""
    driver: str = ""
    software: dict[str, str] = {}
    kv_cache_tokens: int = 0
    chunk_tokens: int = CHUNK_TOKENS
    ready_s: float = 0.0
    phases: tuple[Phase, ...] = ()
    first_token: tuple[FirstToken, ...] = ()
    decode: tuple[Decode, ...] = ()
    left_out: tuple[str, ...] = ()


class RecordingError(ValueError):
    """The file is no recording; the text says why."""


def read_recording(file: str) -> Recording:
    """Return what a file holds. Raises `RecordingError`."""
    try:
        return msgspec.json.decode(Path(file).read_bytes(), type=Recording)
    except OSError as error:
        raise RecordingError(f"{file}: cannot be read: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise RecordingError(f"{file}: {error}; expected what `gpu speeds --json` wrote") from error


def first_token(
    prompt_tokens: int,
    cold_s: Sequence[float],
    cached_s: Sequence[float],
    tail_s: Sequence[float],
    cached_tokens: int,
) -> FirstToken:
    """Return the medians of repeated measurements."""
    return FirstToken(
        prompt_tokens=prompt_tokens,
        cold_ms=_median_ms(cold_s),
        cached_ms=_median_ms(cached_s),
        tail_ms=_median_ms(tail_s),
        cached_tokens=cached_tokens,
        repeats=len(cold_s),
        spread_ms=round((max(cold_s) - min(cold_s)) * 1e3, 3) if cold_s else 0.0,
    )


def _median_ms(seconds: Sequence[float]) -> float | None:
    return round(statistics.median(seconds) * 1e3, 3) if seconds else None


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return columns, the first to the left and the others to the right."""
    lines = [tuple(heads), *(tuple(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    text = []
    for line in lines:
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        text.append("  ".join(cells).rstrip())
    return "\n".join(text)


def milliseconds(value: float | None) -> str:
    """Return a time for people."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" if value >= 10 else f"{value:.2f}"


def shown(recording: Recording) -> str:
    """Return the report of a run."""
    parts = [head(recording)]
    if recording.phases:
        lines = "\n".join(f"{phase.at_s:7.1f} s  {phase.text}" for phase in recording.phases)
        parts.append(f"start: ready after {recording.ready_s:.1f} s\n{lines}")
    if recording.first_token:
        rows = [
            (f"{row.prompt_tokens:,}", milliseconds(row.cold_ms), milliseconds(row.cached_ms),
             milliseconds(row.tail_ms), f"{row.cached_tokens:,}", f"{row.repeats}",
             milliseconds(row.spread_ms))
            for row in recording.first_token
        ]  # fmt: skip
        heads = ("prompt tokens", "cold ms", "cached ms", f"last {TAIL_TOKENS} new ms",
                 "cached tokens", "repeats", "cold max-min ms")  # fmt: skip
        parts.append(f"time to first token, medians\n{table(heads, rows)}")
    if recording.decode:
        steps = [
            (f"{row.batch}", f"{row.context_tokens:,}", milliseconds(row.token_ms),
             f"{row.batch / row.token_ms * 1e3:,.0f}")
            for row in recording.decode
        ]  # fmt: skip
        parts.append(f"decode, medians\n{table(STEP_HEADS, steps)}")
    parts += [f"NOT RUN: {text}" for text in recording.left_out]
    return "\n\n".join(parts)


def head(recording: Recording) -> str:
    """Return what was run where."""
    software = ", ".join(f"{name} {version}" for name, version in recording.software.items())
    facts = {
        "date": recording.date,
        "hardware": recording.gpu,
        "driver": recording.driver,
        "engine": f"{recording.engine} {recording.version}",
        "software": software,
        "model": f"{recording.model}, {recording.weights}, tensor parallel "
        f"{recording.tensor_parallel}",
        "KV cache": f"{recording.kv_cache_tokens:,} tokens" if recording.kv_cache_tokens else "",
        "command": recording.command,
    }
    return "\n".join(f"{name:<9} {value}" for name, value in facts.items() if value)
