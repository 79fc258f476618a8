"""What a worker holds, and what it has to say of it: chunks, their lines, results not yet told.

Values in, values out; time is an argument. The rules:

- A result is told with the next report of its chunk, and stays here until the desk has taken it.
- A report goes out every `REPORT_S` while there are results, at once when the chunk is done, and at
  the latest after a third of the hold, so that two may be lost before the hold is.
- Whether a hold that was not renewed in time is over, the desk alone knows: it may have been away,
  and then nobody else has the lines. Everything is kept until it has spoken. What that takes is
  bounded by the lines in hand, of which no more come from a desk that is away.
- More lines are wanted while fewer than `ahead` are undone: the engine must not run dry while the
  next chunk is on its way, and must not hoard what another worker could do. Nor may they fill the
  memory: from `HELD_BYTES_MAX` on no more are asked for.
- Lines over which a worker died come in chunks that are to be computed alone. Nothing is asked for
  beside them: were several such chunks in hand, the next death would be held against all of them.
"""

from __future__ import annotations

from collections.abc import Iterable

from backends.offline.work import WORK_BYTES_MAX, Chunk, Line, Receipt, Report, Result

REPORT_S = 1.0
RESULTS_MAX = 2000  # of one report
REPORT_BYTES_MAX = WORK_BYTES_MAX // 8
RESULT_BYTES_MAX = WORK_BYTES_MAX // 2  # a longer answer could not be told
HELD_BYTES_MAX = 4 * WORK_BYTES_MAX  # of requests in hand, but for the last chunk's
RENEWALS = 3  # in the time of one hold


class HeldLine:
    """One line in hand."""

    __slots__ = ("bytes", "chunk", "line")

    def __init__(self, chunk: HeldChunk, line: Line) -> None:
        self.chunk = chunk
        self.line = line
        self.bytes = len(bytes(line.body))


class HeldChunk:
    """One chunk in hand."""

    __slots__ = (
        "alone",
        "chunk_id",
        "fence",
        "held_until_s",
        "hold_s",
        "told_s",
        "undone",
        "undone_bytes",
        "untold",
    )

    def __init__(self, chunk: Chunk, now_s: float) -> None:
        self.chunk_id = chunk.chunk_id
        self.alone = chunk.alone
        self.fence = chunk.fence
        self.hold_s = chunk.hold_s
        self.told_s = now_s
        self.held_until_s = now_s + chunk.hold_s
        self.undone = {HeldLine(self, line): None for line in chunk.lines}
        self.undone_bytes = sum(line.bytes for line in self.undone)
        self.untold: list[Result] = []

    def remove(self, line: HeldLine) -> None:
        """Note that a line is not in hand any more."""
        del self.undone[line]
        self.undone_bytes -= line.bytes

    def due_s(self) -> float:
        """Return when the next report has to go out."""
        if not self.undone or len(self.untold) >= RESULTS_MAX:
            return self.told_s
        if self.untold:
            return self.told_s + min(REPORT_S, self.hold_s / RENEWALS)
        return self.told_s + self.hold_s / RENEWALS


class Holdings:
    """All chunks in hand."""

    def __init__(self, worker_id: str, ahead: int) -> None:
        self._worker_id = worker_id
        self._ahead = ahead
        self._chunks: dict[tuple[str, int], HeldChunk] = {}

    def __len__(self) -> int:
        return len(self._chunks)

    @property
    def undone(self) -> int:
        """Lines in hand."""
        return sum(len(chunk.undone) for chunk in self._chunks.values())

    @property
    def undone_bytes(self) -> int:
        """The size of their requests."""
        return sum(chunk.undone_bytes for chunk in self._chunks.values())

    def wants_more(self) -> bool:
        """Say whether it is time to ask."""
        if any(chunk.alone for chunk in self._chunks.values()):
            return False
        return self.undone < self._ahead and self.undone_bytes < HELD_BYTES_MAX

    def take(self, chunk: Chunk, now_s: float) -> list[HeldLine]:
        """Hold a chunk that has just come; return its lines. The desk began to count when it
        answered, a little before; the first renewal leaves room for that."""
        held = HeldChunk(chunk, now_s)
        self._chunks[chunk.chunk_id, chunk.fence] = held
        return list(held.undone)

    def finish(self, line: HeldLine, result: Result) -> bool:
        """Note a result; return whether a report is due at once. A result of a line that was
        dropped meanwhile is nobody's."""
        chunk = line.chunk
        if line not in chunk.undone:
            return False
        chunk.remove(line)
        chunk.untold.append(result)
        return not chunk.undone or len(chunk.untold) == RESULTS_MAX

    def next_due_s(self) -> float | None:
        """Return when the next report is due; None: nothing is held."""
        return min((chunk.due_s() for chunk in self._chunks.values()), default=None)

    def due(self, now_s: float) -> list[HeldChunk]:
        """Return the chunks whose report is due, the one that lapses first in front."""
        chunks = [chunk for chunk in self._chunks.values() if chunk.due_s() <= now_s]
        return sorted(chunks, key=lambda chunk: chunk.held_until_s)

    def all(self) -> list[HeldChunk]:
        """Return every chunk."""
        return list(self._chunks.values())

    def report(self, chunk: HeldChunk, busy_s: float, *, give_back: bool = False) -> Report:
        """Return what to tell of a chunk now: as much as one report takes."""
        results = tuple(_first(chunk.untold))
        rest = len(results) < len(chunk.untold)
        return Report(
            worker_id=self._worker_id,
            chunk_id=chunk.chunk_id,
            fence=chunk.fence,
            results=results,
            done=not rest and (give_back or not chunk.undone),
            busy_s=busy_s,
        )

    def told(
        self, chunk: HeldChunk, report: Report, receipt: Receipt, sent_s: float
    ) -> list[HeldLine]:
        """Apply the desk's answer; return lines that nobody wants any more."""
        if not receipt.held:
            return self.drop(chunk)
        del chunk.untold[: len(report.results)]
        chunk.hold_s = receipt.hold_s or chunk.hold_s
        chunk.told_s = sent_s
        chunk.held_until_s = sent_s + chunk.hold_s
        if report.done:
            return self.drop(chunk)
        ended = set(receipt.dropped)
        unwanted = [line for line in chunk.undone if line.line.job_id in ended] if ended else []
        for line in unwanted:
            chunk.remove(line)
        return unwanted

    def drop(self, chunk: HeldChunk) -> list[HeldLine]:
        """Forget a chunk; return the lines of it that are still in hand."""
        self._chunks.pop((chunk.chunk_id, chunk.fence), None)
        lines = list(chunk.undone)
        chunk.undone.clear()
        chunk.undone_bytes = 0
        chunk.untold.clear()
        return lines


def _first(results: list[Result]) -> Iterable[Result]:
    """Yield as many results as one report takes, at least one of those that there are."""
    size = 0
    for index, result in enumerate(results[:RESULTS_MAX]):
        size += len(bytes(result.body))
        if index and size > REPORT_BYTES_MAX:
            return
        yield result
