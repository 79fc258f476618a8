"""The desk as its service sees it: the store, and what its workers get done, counted as it passes.

Everything that is done for jobs passes through here, whether it comes over HTTP from engine workers
or from the dispatcher in this process: so this is where the speed of jobs is measured.
Only what the store has accepted counts. It is also where workers say what they understand.
"""

from __future__ import annotations

from collections import Counter

from backends.clock import Clock
from backends.offline.abilities import Abilities
from backends.offline.rates import Rates
from backends.offline.work import Ask, Chunk, Desk, Receipt, Report


class CountedDesk:
    """A desk (`work.Desk`) over another."""

    def __init__(self, desk: Desk, clock: Clock) -> None:
        self._desk = desk
        self._clock = clock
        self._jobs = Rates()
        self.abilities = Abilities()
        self.totals: Counter[str] = Counter()  # by name of the metric

    async def ask(self, ask: Ask) -> Chunk | None:
        self.abilities.note(ask, self._clock.unix_s())
        chunk = await self._desk.ask(ask)
        self.totals["asks"] += 1
        if chunk is not None:
            self.totals["chunks"] += 1
            self.totals["lines_given"] += len(chunk.lines)
        return chunk

    async def report(self, report: Report) -> Receipt:
        receipt = await self._desk.report(report)
        self.totals["reports"] += 1
        self.totals["results"] += receipt.accepted
        self.totals["results_dropped"] += len(report.results) - receipt.accepted
        if receipt.accepted:
            self._count(report)
        return receipt

    def _count(self, report: Report) -> None:
        """Count the tokens of a report that was accepted, if only in part: a rate is a mean."""
        now_s, of_jobs = self._clock.unix_s(), Counter[str]()
        for result in report.results:
            of_jobs[result.job_id] += result.prompt_tokens + result.completion_tokens
            self.totals["prompt_tokens"] += result.prompt_tokens
            self.totals["cached_tokens"] += result.cached_tokens
            self.totals["completion_tokens"] += result.completion_tokens
        for job_id, tokens in of_jobs.items():
            self._jobs.count(job_id, now_s, tokens)

    def tokens_per_s(self) -> dict[str, float]:
        """Return how fast jobs get on, by id, as far as this service hears of it."""
        return self._jobs.per_worker(self._clock.unix_s())
