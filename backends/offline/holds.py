"""The chunks that a dispatcher holds: which of their lines are open, and what is to be reported.

A chunk is reported when it has results, when its hold is to be renewed, and when nothing of it is
left. A report that fails is sent again, the same; after the hold is surely over others have the
lines, and what was to be reported of them is dropped.
"""

from __future__ import annotations

import msgspec

from backends.offline.prefix_order import OCTETS_PER_TOKEN
from backends.offline.work import Chunk, Line, Receipt, Report, Result

RENEW_SHARE = 0.3  # of a hold, after which it is renewed
RESULTS_MAX = 1_000  # of one report
RESULT_BYTES_MAX = 16 * 1024 * 1024  # of their bodies, beside the first


class Held:
    """One line in hand."""

    __slots__ = ("chunk", "failures", "gone", "line", "not_before_s", "prompt_tokens")

    def __init__(self, line: Line, chunk: HeldChunk) -> None:
        self.line = line
        self.chunk = chunk
        self.failures = 0
        self.not_before_s = 0.0
        self.gone = False  # the desk wants no answer any more
        self.prompt_tokens = max(1, len(bytes(line.body)) // OCTETS_PER_TOKEN)


class HeldChunk:
    """One chunk in hand, from its ask to its last report."""

    def __init__(self, chunk: Chunk, worker_id: str, now_s: float) -> None:
        self.chunk = chunk
        self.lines = {(line.job_id, line.number): Held(line, self) for line in chunk.lines}
        self.body_bytes = sum(len(bytes(line.body)) for line in chunk.lines)
        self._worker_id = worker_id
        self._hold_s = chunk.hold_s
        self._renewed_s = now_s
        self._results: list[Result] = []
        self._back: list[tuple[str, int]] = []
        self.retry_s = 0.0  # no report before
        self.failures = 0  # reports that did not come through

    def answer(self, held: Held, result: Result) -> None:
        """A line has its result."""
        if self.lines.pop((held.line.job_id, held.line.number), None) is not None:
            self._results.append(result)

    def give_back(self, held: Held) -> None:
        """A line is to be done by somebody else."""
        if self.lines.pop((held.line.job_id, held.line.number), None) is not None:
            held.gone = True
            self._back.append((held.line.job_id, held.line.number))

    def due(self, now_s: float) -> bool:
        """Say whether there is something to report."""
        if now_s < self.retry_s:
            return False
        renew = now_s - self._renewed_s >= RENEW_SHARE * self._hold_s
        return renew or self.unsaid

    @property
    def unsaid(self) -> bool:
        """Whether something is to be reported that is more than a sign of life."""
        return bool(self._results or self._back) or not self.lines

    def over(self, now_s: float) -> bool:
        """Say whether others have the lines by now."""
        return now_s - self._renewed_s > self._hold_s

    def report(self) -> Report:
        """Return what is to be reported: the same again until `heard`."""
        results: list[Result] = []
        left_bytes = RESULT_BYTES_MAX
        for result in self._results[:RESULTS_MAX]:
            size = len(bytes(result.body))
            if results and size > left_bytes:
                break
            left_bytes -= size
            results.append(result)
        whole = len(results) == len(self._results)
        return Report(
            worker_id=self._worker_id,
            chunk_id=self.chunk.chunk_id,
            fence=self.chunk.fence,
            results=tuple(results),
            back=tuple(self._back) if whole else (),
            done=whole and not self.lines,
        )

    def heard(self, report: Report, receipt: Receipt, sent_s: float) -> bool:
        """Take the desk's answer; say whether the chunk is still ours."""
        self.failures, self.retry_s = 0, 0.0
        if not receipt.held or report.done:
            self._drop(list(self.lines.values()))
            return False
        self._renewed_s = sent_s
        self._hold_s = receipt.hold_s or self._hold_s
        del self._results[: len(report.results)]
        del self._back[: len(report.back)]
        self._drop([held for held in self.lines.values() if held.line.job_id in receipt.dropped])
        return True

    def lose(self) -> None:
        """Others have it: nothing of it is to be answered."""
        self._drop(list(self.lines.values()))

    def _drop(self, lines: list[Held]) -> None:
        for held in lines:
            held.gone = True
            del self.lines[held.line.job_id, held.line.number]


class Pace(msgspec.Struct):
    """Prompt tokens that may begin: so many a second, one line after the other or saved up."""

    saved: float = 0.0  # below 0: begun ahead of time
    at_s: float = 0.0
    spending: bool = False  # what was saved up

    def wait_s(self, tokens_per_s: float, at_once: float, now_s: float) -> float:
        """Return how long the next line has to wait; 0: it may begin."""
        if tokens_per_s == float("inf"):
            self.saved, self.at_s = 0.0, now_s
            return 0.0
        earned = tokens_per_s * max(0.0, now_s - self.at_s)
        self.saved, self.at_s = min(self.saved + earned, at_once), now_s
        if self.saved >= at_once:
            self.spending = True
        elif self.saved <= 0.0:
            self.spending = False
        return 0.0 if self.spending else (at_once - self.saved) / tokens_per_s

    def begin(self, tokens: int) -> None:
        """A line with a prompt of so many begins."""
        self.saved -= tokens
        self.spending &= self.saved > 0.0
