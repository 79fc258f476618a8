"""A profile of the simulator from a recorded run of an engine, and how well it repeats that run.

The constants are fitted by least squares of relative errors, and then so that no promised figure is
far off, as far as that can be had; the file that comes out is a profile
as it stands: `doherty simulator --profile FILE` takes it, and so does the folder of shipped ones.
What a run of `speeds` does not measure (sleep and wake) is taken over from a profile named by
--like.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from loadtest.gpu import model
from loadtest.gpu.model import FitError, Profile
from loadtest.gpu.records import (
    Recording,
    RecordingError,
    head,
    milliseconds,
    read_recording,
    table,
)
from loadtest.gpu.speeds import write
from loadtest.report import to_json

SUMMARY = "a simulator profile from a recorded run"
TAKEN_OVER = ("max_model_len", "sleep_first_s", "sleep_s", "wake_s", "discard_s", "remap_s")


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """A figure of the engine beside the one that stands for it."""

    what: str
    engine_ms: float
    simulated_ms: float
    promised: bool = True  # whether it is among those that must be close

    @property
    def ratio(self) -> float:
        return self.simulated_ms / self.engine_ms


def add_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("recording", help="what `gpu speeds --json` wrote")
    add("--name", required=True, help="of the profile, such as h100-qwen3-8b-vllm")
    add("--like", metavar="FILE", default="", help="a profile whose sleep and wake are taken over")
    add("--out", metavar="FILE", help="write the profile (default: only show it)")


def run(args: argparse.Namespace) -> int:
    """Fit and show. Returns 2 when the recording does not allow it."""
    try:
        recording = read_recording(args.recording)
        profile = fitted(recording, args.name, _taken_over(args.like))
    except (RecordingError, FitError) as error:
        print(f"loadtest: {error}", file=sys.stderr)
        return 2
    rows = predicted_rows(recording, profile)
    octets = to_json(msgspec.to_builtins(profile))
    print(f"{head(recording)}\n\n{ratio_table(rows, 'fitted')}\n\n{octets.decode().strip()}")
    write(args.out, octets)
    return 0


def _taken_over(file: str) -> dict[str, object]:
    if not file:
        return {}
    try:
        like = msgspec.json.decode(Path(file).read_bytes(), type=Profile)
    except OSError as error:
        raise FitError(f"{file}: cannot be read: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise FitError(f"{file}: {error}; expected a profile") from error
    return {name: getattr(like, name) for name in TAKEN_OVER}


def fitted(recording: Recording, name: str, taken_over: dict[str, object]) -> Profile:
    """Return the profile of a run. Raises `FitError` when the run does not say enough."""
    prompts = model.prompts_of(recording.first_token)
    promised = [is_promised(prompt.tokens, prompt.kind) for prompt in prompts]
    constants = model.closest_first_token(prompts, recording.chunk_tokens, promised)
    bases, context_s = model.fit_decode(recording.decode)
    where = f"{recording.model}, {recording.weights} on {recording.gpu}"
    source = f"{recording.engine} {recording.version}, {where}, {recording.date}"
    fields: dict[str, object] = {
        "name": name,
        "source": source,
        "intake_s": constants["intake"],
        "intake_s_per_token": constants["intake_per_token"],
        "prefill_s_per_token": constants["linear"],
        "prefill_s_per_token_squared": constants["attention"],
        "prefill_floor_s": constants["floor"],
        "decode_s_per_context_token": context_s,
    }
    rounded = {
        field: float(f"{value:.4g}") if isinstance(value, float) else value
        for field, value in fields.items()
    }
    table_s = tuple((batch, float(f"{base_s:.4g}")) for batch, base_s in bases)
    sizes = {"decode_base_s": table_s, "kv_cache_tokens": recording.kv_cache_tokens}
    return msgspec.convert({**rounded, **sizes, **taken_over}, Profile)


def predicted_rows(recording: Recording, profile: Profile) -> list[Row]:
    """Return each figure of a run beside what the arithmetic of its profile says."""
    prompts = model.prompts_of(recording.first_token)
    rows = [
        Row(
            what=first_token_text(prompt.tokens, prompt.kind),
            engine_ms=prompt.first_s * 1e3,
            simulated_ms=model.predicted_first_s(profile, prompt, recording.chunk_tokens) * 1e3,
            promised=is_promised(prompt.tokens, prompt.kind),
        )
        for prompt in prompts
    ]
    rows += [
        Row(
            what=decode_text(row.batch, row.context_tokens),
            engine_ms=row.token_ms,
            simulated_ms=model.predicted_token_s(profile, row.batch, row.context_tokens) * 1e3,
            promised=row.batch <= 64,
        )
        for row in recording.decode
    ]
    return rows


def is_promised(tokens: int, kind: str) -> bool:
    """Return whether a prompt's time must be close: 1k to 32k, new or seen."""
    return 1000 <= tokens <= 32_768 and kind in ("cold", "cached")


def first_token_text(tokens: int, kind: str) -> str:
    """Name a prompt's measurement."""
    kinds = {"cold": "new", "cached": "seen before", "tail": "seen but for 200"}
    return f"first token, {tokens:,} tokens {kinds[kind]}"


def decode_text(batch: int, context_tokens: int) -> str:
    """Name a batch's measurement."""
    return f"per token, batch {batch}, context {context_tokens:,}"


def ratio_table(rows: Sequence[Row], name: str) -> str:
    """Return both figures of each row and their ratio; those that promise nothing in brackets."""
    cells = [
        (
            row.what,
            milliseconds(row.engine_ms),
            milliseconds(row.simulated_ms),
            f"{row.ratio:.3f}" if row.promised else f"({row.ratio:.3f})",
        )
        for row in rows
    ]
    return table(("", "engine ms", f"{name} ms", "ratio"), cells)
