"""What an engine's own counters tell of its speed: how long its steps take, how fast it prefills.

Between two readings an engine made so many tokens for so many sequences: each sequence gets one a
step, so a step took `running x time / tokens`; what prompts held up in that time is in it, as it is
in what the streams felt. How many ran between two readings is the mean of both, which is right in
the mean only: so sums over many readings are divided, and kept by powers of two of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from proxy.contract import LoadSample

READING_S = (0.2, 15.0)  # between two readings that tell something
ALIKE = 1.5  # times more at one reading than at the other: else nobody knows the batch between
KEEP_SHARE = 0.95  # of what was believed, at each reading: some 20 count
READINGS_MIN = 6.0  # by which a size is known: one reading may be off by half
FORGET_S = 600.0  # a time that was not seen again for so long is not believed any more
CLASSES_MAX = 20  # a million sequences
# Before anything was measured; on the low side, for it bounds what lines may hold up.
TOKENS_PER_S_GUESS = 8_000.0


class _Sums:
    """Of readings of one size class, older ones counting less."""

    __slots__ = ("at_s", "count", "sequence_s", "tokens")

    def __init__(self) -> None:
        self.sequence_s = self.tokens = self.count = self.at_s = 0.0

    def add(self, sequence_s: float, tokens: int, at_s: float) -> None:
        self.sequence_s = KEEP_SHARE * self.sequence_s + sequence_s
        self.tokens = KEEP_SHARE * self.tokens + tokens
        self.count = KEEP_SHARE * self.count + 1.0
        self.at_s = at_s


class StepTimes:
    """Step times by size of the batch."""

    def __init__(self) -> None:
        self._sums: dict[int, _Sums] = {}  # by size class
        self._last: dict[str, LoadSample] = {}

    def keep(self, replica_ids: Collection[str]) -> None:
        """Forget other replicas' readings."""
        self._last = {name: load for name, load in self._last.items() if name in replica_ids}

    def note(self, replica_id: str, load: LoadSample) -> None:
        """Take a reading; one that was taken already tells nothing."""
        before = self._last.get(replica_id)
        if before is not None and load.at_s <= before.at_s:
            return
        self._last[replica_id] = load
        if before is not None and tells(before, load):
            batch = (before.running + load.running) / 2
            tokens = load.generation_tokens_total - before.generation_tokens_total
            sums = self._sums.setdefault(_class_of(batch), _Sums())
            sums.add(batch * (load.at_s - before.at_s), tokens, load.at_s)
        old_s = load.at_s - FORGET_S
        self._sums = {size: sums for size, sums in self._sums.items() if sums.at_s > old_s}

    def step_s(self, batch: int) -> float:
        """Return how long a step of so many takes; 0: not known."""
        size = _class_of(batch)
        return self._time_of(size) or self._time_of(size + 1)

    def batch_max(self, batch: int, slower_max: float) -> float:
        """Return how large a batch may grow from `batch` without steps that are slower by more.

        One class beyond what was seen is tried: there is no other way to see it. At least one
        sequence more is always let in, so that a time that was measured wrongly can be corrected.
        """
        size = _class_of(batch)
        if not (known_s := self._time_of(size)):
            return 2.0 ** (size + 1) - 1
        bound_s = known_s * (1.0 + slower_max)
        while 0.0 < self._time_of(size + 1) <= bound_s:
            size += 1
        size += not self._time_of(size + 1)
        return max(2.0**size - 1, batch + 1.0)

    def _time_of(self, size: int) -> float:
        sums = self._sums.get(size)
        return sums.sequence_s / sums.tokens if sums and sums.count >= READINGS_MIN else 0.0


class PrefillSpeed:
    """Prompt tokens that a replica computes in a second of computing them."""

    def __init__(self) -> None:
        self.tokens_per_s = TOKENS_PER_S_GUESS

    def note(self, load: LoadSample) -> None:
        """Take what an engine counts since its start; not all do."""
        if load.prefill_busy_s_total > 1.0 and load.prefill_tokens_total:
            self.tokens_per_s = load.prefill_tokens_total / load.prefill_busy_s_total


def tells(before: LoadSample, after: LoadSample) -> bool:
    """Say whether two readings tell how long a step took between them."""
    low, high = sorted((before.running, after.running))
    return (
        READING_S[0] <= after.at_s - before.at_s <= READING_S[1]
        and after.generation_tokens_total > before.generation_tokens_total
        and low >= 1
        and high <= ALIKE * low
    )


def _class_of(batch: float) -> int:
    return min(CLASSES_MAX, max(1, math.ceil(batch)).bit_length())
