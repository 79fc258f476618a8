"""What a run on a lent machine leaves behind: one file, to which every cell is added as it ends.

A machine can be taken back at any moment, so a cell is written at once, as a gzip member of its own
(RFC 1952 lets members follow each other), and a member that was cut off is passed over when the
file is read. The next call reads what is there and goes on. Each request is kept, because tables
and intervals are made afterwards, where processors cost nothing.
"""

from __future__ import annotations

import gzip
import io
import os
import zlib
from pathlib import Path

import msgspec

DIGITS = 5  # of seconds: hundredths of a millisecond
EXPECTED = "expected what `gpu fleet` or `gpu surge` wrote as --record"
_MAGIC = b"\x1f\x8b"  # of a gzip member (RFC 1952 §2.3.1)


class RecordError(Exception):
    """The file cannot be used; the text says why."""


class Row(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One request. Times are seconds: `at_s` since the cell began, the others since sending."""

    at_s: float
    ttft_s: float | None
    tpot_s: float | None
    total_s: float
    prompt_tokens: int
    cached_tokens: int  # as the engine counts them
    output_tokens: int
    error: str


class Tokens(msgspec.Struct, frozen=True, array_like=True):
    """What one engine counted during a cell."""

    prompt: float
    cached: float
    output: float
    preemptions: float = 0.0

    @property
    def work(self) -> float:
        return self.prompt - self.cached


class CellKey(msgspec.Struct, frozen=True, kw_only=True, order=True):
    """Which cell it is: what is asked, how much of it, and who routes it."""

    workload: str
    load: float
    arm: str
    repeat: int = 0
    shape: str = "4x1"  # replicas x cards of each
    event: str = ""  # kill or backfill; empty: nothing happens

    @property
    def text(self) -> str:
        words = [self.workload, f"{self.load:g}", self.arm]
        words += [f"repeat {self.repeat + 1}"] if self.repeat else []
        words += [self.shape] if self.shape != "4x1" else []
        words += [self.event] if self.event else []
        return " ".join(words)


class CellRecord(msgspec.Struct, frozen=True, kw_only=True, tag="cell", tag_field="kind"):
    """What came of a cell."""

    key: CellKey
    began: str
    scale: float  # of the trace's time
    seconds: float
    warm_s: float  # requests sent before it are not measured
    rows: list[Row]
    engines: list[Tokens]  # of the whole cell, warm-up included
    router_s: float = 0.0  # processor seconds of the router and all it started, from rest
    router_start_s: float = 0.0  # and those until it was at rest
    router_mib: float = 0.0
    client_cpu_share: float = 0.0
    lateness_p99_s: float = 0.0
    told: dict[str, float] = {}  # of the event
    failure: str = ""

    @property
    def measured(self) -> list[Row]:
        return [row for row in self.rows if row.at_s >= self.warm_s]


class Capacity(msgspec.Struct, frozen=True, kw_only=True, tag="capacity", tag_field="kind"):
    """What saturated replicas do under round robin: uncached tokens a second, of one."""

    shape: str
    workload: str
    uncached_tokens_per_s: float
    slices: list[float]  # the same of its parts, one after the other
    requests: int
    settled_s: float  # since the first request, before anything was counted
    seconds: float
    engines: list[Tokens]


class Setting(msgspec.Struct, frozen=True, kw_only=True, tag="setting", tag_field="kind"):
    """What all cells of a file share; a call with another one is refused."""

    engine: str
    kv_cache_tokens: int
    conversation: str
    agents: str
    sessions_share: int
    input_tokens_max: int
    output_tokens_max: int
    seconds: float
    workers: int
    time_scale: float
    shape: str = "4x1"  # of the call that began the file: the loads of all are relative to it
    header: dict[str, str] = {}  # date, hardware, versions and command of the first call

    def same(self, other: Setting) -> bool:
        """Say whether cells of both can lie in one file; another shape can."""
        return msgspec.structs.replace(other, header=self.header, shape=self.shape) == self


class Versions(msgspec.Struct, frozen=True, kw_only=True, tag="versions", tag_field="kind"):
    """What a call found running or installed: an engine, and routers that came later."""

    of: dict[str, str]


class Burst(msgspec.Struct, frozen=True, kw_only=True, tag="burst", tag_field="kind"):
    """One burst from one awake replica."""

    rung: str  # where the others were
    factor: float
    rows: list[Row]
    ready_s: list[float]  # since the burst began, when there were so many replicas that serve
    began_s: float  # of the burst, on the rows' clock
    seconds: float
    failure: str = ""


Entry = CellRecord | Capacity | Setting | Versions | Burst


class Record:
    """The entries of a file, and the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: list[Entry] = []
        self._cut_to: int | None = None  # where an entry begins that was cut off
        if path.exists():
            self.entries, whole_bytes = _read(path)
            self._cut_to = whole_bytes if whole_bytes < path.stat().st_size else None

    def add(self, entry: Entry) -> None:
        """Write it at once. Raises `RecordError`."""
        try:
            if self._cut_to is not None:  # nothing behind it could be read
                os.truncate(self.path, self._cut_to)
                self._cut_to = None
            with self.path.open("ab") as file:
                file.write(gzip.compress(msgspec.json.encode(entry) + b"\n", 6))
        except OSError as error:
            raise RecordError(f"{self.path}: cannot be written: {error.strerror}") from error
        self.entries.append(entry)

    @property
    def cells(self) -> list[CellRecord]:
        return [entry for entry in self.entries if isinstance(entry, CellRecord)]

    @property
    def bursts(self) -> list[Burst]:
        return [entry for entry in self.entries if isinstance(entry, Burst)]

    @property
    def versions(self) -> dict[str, str]:
        """Return what took part, by name; of two versions the later one."""
        found: dict[str, str] = {}
        for entry in self.entries:
            found |= entry.of if isinstance(entry, Versions) else {}
        return found

    @property
    def setting(self) -> Setting | None:
        return next((entry for entry in self.entries if isinstance(entry, Setting)), None)

    def moved(self, conversation: str, agents: str) -> Record:
        """Let the setting name its traces where they lie on this machine, where that is told."""
        for place, entry in enumerate(self.entries):
            if isinstance(entry, Setting):
                self.entries[place] = msgspec.structs.replace(
                    entry,
                    conversation=conversation or entry.conversation,
                    agents=agents or entry.agents,
                )
        return self

    def done(self) -> set[CellKey]:
        """Return the cells that need not be run again."""
        return {cell.key for cell in self.cells if not cell.failure}

    def capacity(self, workload: str, shape: str) -> Capacity | None:
        for entry in self.entries:
            if isinstance(entry, Capacity) and (entry.workload, entry.shape) == (workload, shape):
                return entry
        return None


def read(path: Path) -> list[Entry]:
    """Return the entries of a file; a last one that was cut off is left out.

    Raises `RecordError`.
    """
    return _read(path)[0]


def _read(path: Path) -> tuple[list[Entry], int]:
    """Return the entries of a file, and the octets that they take."""
    try:
        octets = path.read_bytes()
    except OSError as error:
        raise RecordError(f"{path}: cannot be read: {error.strerror}; {EXPECTED}") from error
    text, whole_bytes = _whole(octets)
    if not whole_bytes and octets[: len(_MAGIC)] != _MAGIC[: len(octets)]:
        raise RecordError(f"{path}: is no record; {EXPECTED}")
    decoder = msgspec.json.Decoder(Entry)
    entries: list[Entry] = []
    for line in text.splitlines():
        try:
            entries.append(decoder.decode(line))
        except msgspec.MsgspecError as error:
            where = f"{path}: entry {len(entries) + 1}"
            raise RecordError(f"{where}: {error}; {EXPECTED}") from error
    return entries, whole_bytes


def _whole(octets: bytes) -> tuple[bytes, int]:
    """Return the text of all members that are whole, and where they end."""
    text, rest = io.BytesIO(), octets
    while rest:
        member = zlib.decompressobj(wbits=31)
        try:
            made = member.decompress(rest)
        except zlib.error:
            break
        if not member.eof:
            break
        text.write(made)
        rest = member.unused_data
    return text.getvalue(), len(octets) - len(rest)
