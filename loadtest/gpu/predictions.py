"""What the planner predicts for a decode step, and its one constant per engine fitted to a run.

A prediction is a part that the constant does not touch plus one in proportion to it (the planner
says how much of its time that is), so the fit is a weighted mean. Weights are the inverse squares
of the measured times: errors are relative.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from loadtest.gpu.records import Recording, milliseconds, table

PROMISED_SHARE = 0.25
GPU_TYPES = ("h100", "h200", "a100", "l40s", "gb200", "b200", "b300")


class OutlookError(ValueError):
    """There is no prediction; the text says why and what to do."""


class Configuration(msgspec.Struct, frozen=True):
    """What is started."""

    engine: str
    tensor_parallel: int
    weights: str

    @property
    def text(self) -> str:
        return f"{self.engine} TP{self.tensor_parallel} {self.weights}"


class Row(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What came of a configuration: a time, or why there is none."""

    configuration: Configuration
    version: str = ""
    gpu: str = ""  # the cards of the machine
    token_ms: float = 0.0
    ready_s: float = 0.0
    failure: str = ""
    not_run: str = ""


class Prediction(msgspec.Struct, frozen=True, kw_only=True):
    """The planner's word for one configuration, at batch 1."""

    engine: str
    tp: int
    weights: str
    floor_ms: float
    expected_ms: float
    overhead_ms: float  # of that, in proportion to the engine's constant


class Constant(msgspec.Struct, frozen=True):
    """The one figure of an engine that is fitted."""

    constant: str
    value: float


class Outlook(msgspec.Struct, frozen=True):
    """What `doherty plan --json` says of decode."""

    predictions: list[Prediction]
    calibration: dict[str, Constant] = {}
    gpu: str = ""

    def of(self, wanted: Configuration) -> Prediction | None:
        """Return the prediction for a configuration."""
        for each in self.predictions:
            if (each.engine, each.tp, each.weights) == (
                wanted.engine, wanted.tensor_parallel, wanted.weights,
            ):  # fmt: skip
                return each
        return None


class _Plan(msgspec.Struct):
    decode: Outlook


class _Rows(msgspec.Struct):
    rows: list[Row]


class _Tried(msgspec.Struct):
    engine: str
    path: str


class _Finding(msgspec.Struct):
    trial: _Tried
    version: str = ""
    token_ms: float = 0.0
    ready_s: float = 0.0


class _Findings(msgspec.Struct):
    findings: list[_Finding]
    facts: dict[str, str] = {}


def read_outlook(octets: bytes) -> Outlook:
    """Return the predictions in a plan. Raises `OutlookError`."""
    try:
        return msgspec.json.decode(octets, type=_Plan).decode
    except msgspec.DecodeError as error:
        raise OutlookError(
            f"the plan: {error}; expected what `doherty plan --json` says"
        ) from error


def read_rows(file: str) -> list[Row]:
    """Return the rows of an earlier run, of whichever command. Raises `OutlookError`."""
    try:
        octets = Path(file).read_bytes()
    except OSError as error:
        raise OutlookError(f"{file}: cannot be read: {error.strerror}") from error
    kinds: tuple[type[_Rows | _Findings | Recording], ...] = (_Rows, _Findings, Recording)
    for kind in kinds:
        try:
            return _rows_of(msgspec.json.decode(octets, type=kind))
        except msgspec.DecodeError:
            continue
    raise OutlookError(f"{file}: expected what `gpu floors`, `paths` or `speeds` wrote as --json")


def _rows_of(found: _Rows | _Findings | Recording) -> list[Row]:
    """Return what there is of single answers without speculation."""
    if isinstance(found, _Rows):
        return [row for row in found.rows if not row.not_run]
    if isinstance(found, _Findings):
        return [
            Row(
                configuration=Configuration(each.trial.engine, 1, each.trial.path),
                version=each.version,
                gpu=found.facts.get("hardware", ""),
                token_ms=each.token_ms,
                ready_s=each.ready_s,
            )
            for each in found.findings
            if each.token_ms and each.trial.path in ("bf16", "fp8")
        ]
    engine = found.engine.partition(" ")[0]
    alone = [row for row in found.decode if row.batch == 1]
    return [
        Row(
            configuration=Configuration(engine, found.tensor_parallel, found.weights),
            version=found.version,
            gpu=found.gpu,
            token_ms=row.token_ms,
            ready_s=found.ready_s,
        )
        for row in sorted(alone, key=lambda row: row.context_tokens)[:1]
    ]


def gpu_type(names: Sequence[str]) -> str:
    """Return the planner's word for the first of these cards; empty when it has none."""
    if not names:
        return ""
    words = names[0].lower().replace("-", " ").split()
    return next((kind for kind in GPU_TYPES if kind in words), "")


def that_fit(wanted: Sequence[Configuration], cards: int) -> tuple[list[Configuration], list[Row]]:
    """Return what this machine can run, and rows that say of the others why not."""
    runnable = [each for each in wanted if each.tensor_parallel <= cards]
    rows = [
        not_run(each, f"needs {each.tensor_parallel} GPUs, here are {cards}")
        for each in wanted
        if each.tensor_parallel > cards
    ]
    return runnable, rows


def waves(
    wanted: Sequence[Configuration], cards: int, together: int = 1
) -> list[list[Configuration]]:
    """Return which configurations are started beside each other: in order, as many as have room.

    One engine after the other, while a card is for one alone; of both, where cards are shared.
    """
    found: list[list[Configuration]] = []
    left = 0
    for each in sorted(wanted, key=lambda each: (each.engine, each.tensor_parallel)):
        other = together == 1 and bool(found) and found[-1][0].engine != each.engine
        if each.tensor_parallel > left or other:
            found.append([])
            left = cards * together
        found[-1].append(each)
        left -= each.tensor_parallel
    return found


def placed(wave: Sequence[Configuration], cards: Sequence[str]) -> list[list[str]]:
    """Return the cards of each configuration: those with the fewest engines, each at most once."""
    engines = dict.fromkeys(cards, 0)
    found = []
    for each in wave:
        chosen = sorted(engines, key=lambda card: engines[card])[: each.tensor_parallel]
        for card in chosen:
            engines[card] += 1
        found.append(sorted(chosen, key=list(cards).index))
    return found


def not_run(each: Configuration, why: str) -> Row:
    """Return the row of what was not started."""
    return Row(configuration=each, not_run=why)


def failed(each: Configuration, why: str) -> Row:
    """Return the row of what did not come up, or did not answer."""
    return Row(configuration=each, failure=why)


def refit(engine: str, rows: Sequence[Row], outlook: Outlook) -> float | None:
    """Return by what an engine's constant must be multiplied; None when nothing says so."""
    above = below = 0.0
    for row in rows:
        prediction = outlook.of(row.configuration)
        if row.configuration.engine != engine or not row.token_ms or prediction is None:
            continue
        weight = prediction.overhead_ms / row.token_ms**2
        above += weight * (row.token_ms - prediction.expected_ms + prediction.overhead_ms)
        below += weight * prediction.overhead_ms
    return max(0.0, above / below) if below else None


def refitted_ms(prediction: Prediction, factor: float) -> float:
    """Return a prediction with another constant."""
    return prediction.expected_ms + prediction.overhead_ms * (factor - 1)


def report(
    facts: dict[str, str], rows: Sequence[Row], outlook: Outlook, *, rehearsed: bool = False
) -> tuple[str, bool]:
    """Return the text of a run, and whether its promise is kept (rehearsed: whether it ran)."""
    engines = sorted({row.configuration.engine for row in rows})
    factors = {engine: refit(engine, rows, outlook) for engine in engines}
    cells, errors = [], []
    for row in rows:
        if row.token_ms:
            prediction = outlook.of(row.configuration)
            factor = factors[row.configuration.engine]
            cells.append(_cells(row, prediction, factor))
            if prediction and factor is not None:
                errors.append(refitted_ms(prediction, factor) / row.token_ms - 1)
    heads = ("", "floor ms", "measured ms", "of floor", "predicted ms", "error", "refitted ms",
             "error", "ready s")  # fmt: skip
    parts = [
        "\n".join(f"{name:<9} {value}" for name, value in facts.items() if value),
        f"time per token at batch 1; measured: {_measured_on(rows)}; "
        f"{'predicted' if outlook.predictions else 'nothing predicted'} for a GPU "
        f"of type {outlook.gpu or 'not told'}",
        table(heads, cells),
        *(_constant_text(engine, factors[engine], outlook) for engine in engines),
        *(f"NOT RUN: {row.configuration.text}: {row.not_run}" for row in rows if row.not_run),
        *(f"FAIL: {row.configuration.text}: {row.failure}" for row in rows if row.failure),
    ]
    started = not any(row.failure for row in rows)
    if rehearsed:
        text, kept = "rehearsed: no verdict", started
    else:
        text, kept = _verdict(errors, started)
    return "\n\n".join(part for part in (*parts, text) if part), kept


def _verdict(errors: Sequence[float], started: bool) -> tuple[str, bool]:
    """Return the last line, and whether everything started and each prediction is close."""
    if not errors:
        return "FAIL: nothing was measured that has a prediction", False
    worst = max(abs(error) for error in errors)
    kept = worst <= PROMISED_SHARE and started
    return (
        f"{'PASS' if kept else 'FAIL'}: {len(errors)} predictions, the farthest {worst:.1%} "
        f"off with one constant per engine; promised {PROMISED_SHARE:.0%}"
    ), kept


def _cells(row: Row, prediction: Prediction | None, factor: float | None) -> tuple[str, ...]:
    name, measured, ready = row.configuration.text, row.token_ms, f"{row.ready_s:.0f}"
    if prediction is None or factor is None:
        return (name, "-", milliseconds(measured), "-", "-", "-", "-", "-", ready)
    again_ms = refitted_ms(prediction, factor)
    return (
        name,
        milliseconds(prediction.floor_ms),
        milliseconds(measured),
        f"{measured / prediction.floor_ms:.2f}x",
        milliseconds(prediction.expected_ms),
        f"{prediction.expected_ms / measured - 1:+.1%}",
        milliseconds(again_ms),
        f"{again_ms / measured - 1:+.1%}",
        ready,
    )


def _measured_on(rows: Sequence[Row]) -> str:
    found = {
        f"{row.configuration.engine} {row.version} on {row.gpu or 'cards not told'}"
        for row in rows
        if row.token_ms
    }
    return ", ".join(sorted(found)) or "nothing"


def _constant_text(engine: str, factor: float | None, outlook: Outlook) -> str:
    known = outlook.calibration.get(engine)
    if factor is None:
        return f"{engine}: nothing to fit its constant to"
    if known is None:
        return f"{engine}: its constant times {factor:.3f}"
    return f"{engine}: {known.constant} {known.value:.4g}, refitted {known.value * factor:.4g}"
