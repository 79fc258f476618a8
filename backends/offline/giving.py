"""Which lines a worker gets, as values: whose turn it is, and where a chunk ends.

Jobs are done earliest deadline first; of equal ones the earlier comes first. But every fourth chunk
of a model goes to the tenant that has waited longest, and there to the job that has waited longest:
a job of ten lines behind one of fifty thousand waits for three chunks, not for all of them, while
whoever is due first has three quarters for sure.

A worker that dies takes the blame nowhere: its lines come back and are given out in chunks of an
eighth of what it held, then an eighth of that, until a line that kills workers stands alone. Only a
death over one line alone counts against that line. So of 2,000 lines a deadly one is found by 4
deaths, in chunks of 2000, 250, 32 and 4, and no innocent neighbour is ever blamed. Such a chunk is
marked to be computed alone: a worker that held several would die over all of them at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

SHARED_TURN = 4  # each such turn is for whoever has waited longest
_SHRINKS_TO = 8  # parts of a chunk that died
JOBS_OF_CHUNK_MAX = 8


class Candidate(msgspec.Struct, frozen=True):
    """A job that has lines to give."""

    number: int  # in the order of creation
    owner: str
    expires_s: float
    waiting: int  # lines
    turn: int  # at which it last gave; grows from turn to turn


class Offer(msgspec.Struct, frozen=True):
    """A line that waits, in prefix order."""

    job: int
    number: int
    start: int  # of its body in the input file
    bytes: int
    span: int  # the most lines of a chunk that it may be in; 0: any


def chosen(candidates: Sequence[Candidate], *, shared: bool, lines_max: int) -> tuple[int, ...]:
    """Return the jobs to take lines from, in order; later ones only fill up what is left."""
    order = sorted(candidates, key=lambda job: (job.expires_s, job.number))
    if shared and order:
        owners: dict[str, int] = {}
        for job in order:
            owners[job.owner] = max(owners.get(job.owner, 0), job.turn)
        waiter = min(owners, key=lambda owner: owners[owner])
        first = min((job for job in order if job.owner == waiter), key=lambda job: job.turn)
        order.remove(first)
        order.insert(0, first)
    lines, jobs = 0, list[int]()
    for job in order[:JOBS_OF_CHUNK_MAX]:
        if lines >= lines_max:
            break
        jobs.append(job.number)
        lines += job.waiting
    return tuple(jobs)


class Taking:
    """A chunk while it is being filled."""

    def __init__(self, lines_max: int, bytes_max: int) -> None:
        self.lines: list[Offer] = []
        self._lines_max = lines_max
        self._bytes_left = bytes_max

    @property
    def room(self) -> int:
        """Lines that could still be added."""
        return self._lines_max - len(self.lines)

    def fill(self, offers: Iterable[Offer]) -> None:
        """Take from the front; the first line always fits and says how many may come after it."""
        for offer in offers:
            if not self.lines:
                self._lines_max = min(self._lines_max, offer.span or self._lines_max)
            elif offer.bytes > self._bytes_left:
                self._lines_max = len(self.lines)
            elif offer.span and offer.span < self._lines_max:
                continue  # for a smaller chunk than this is
            if self.room <= 0:
                return
            self.lines.append(offer)
            self._bytes_left -= offer.bytes


def span_after_death(lines: int) -> int:
    """Return the most lines of a chunk that one of these, over which a worker died, may be in."""
    return -(-lines // _SHRINKS_TO)
