"""What an engine's own counters tell of its speed: how long its steps take, how fast it prefills.

Between two readings an engine made so many tokens for so many sequences: each sequence gets one a
step, so a step took `running x time / tokens`. What prompts held up in that time is in it, as it is
in what the streams felt. Times are kept by powers of two of the batch: they differ by less within
one than by what chance does to a reading.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from proxy.contract import LoadSample

READING_S = (0.2, 15.0)  # between two readings that tell something
ALIKE = 1.1  # times more at one reading than at the other: else nobody knows the batch between
NEWEST_SHARE = 0.2  # of a new time in what is believed
FORGET_S = 600.0  # a time that was not seen again for so long is not believed any more
CLASSES_MAX = 20  # a million sequences
# Before anything was measured; on the low side, for it bounds what lines may hold up.
TOKENS_PER_S_GUESS = 8_000.0


class StepTimes:
    """Step times by size of the batch."""

    def __init__(self) -> None:
        self._times: dict[int, tuple[float, float]] = {}  # size class: step, when seen last
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
        if before is not None and (step_s := step_between(before, load)) > 0.0:
            size = _class_of((before.running + load.running) / 2)
            known, _ = self._times.get(size, (step_s, 0.0))
            self._times[size] = (known + NEWEST_SHARE * (step_s - known), load.at_s)
        self._times = {s: t for s, t in self._times.items() if t[1] > load.at_s - FORGET_S}

    def step_s(self, batch: int) -> float:
        """Return how long a step of so many takes; 0: not known."""
        size = _class_of(batch)
        return next((self._times[s][0] for s in (size, size + 1) if s in self._times), 0.0)

    def batch_max(self, batch: int, slower_max: float) -> float:
        """Return how large a batch may grow from `batch` without steps that are slower by more.

        One class beyond what was seen is tried: there is no other way to see it. At least one
        sequence more is always let in, so that a time that was measured wrongly can be corrected.
        """
        size = _class_of(batch)
        if size not in self._times:
            return 2.0 ** (size + 1) - 1
        bound_s = self._times[size][0] * (1.0 + slower_max)
        while size + 1 in self._times and self._times[size + 1][0] <= bound_s:
            size += 1
        size += size + 1 not in self._times
        return max(2.0**size - 1, batch + 1.0)


class PrefillSpeed:
    """Prompt tokens that a replica computes in a second of computing them."""

    def __init__(self) -> None:
        self.tokens_per_s = TOKENS_PER_S_GUESS

    def note(self, load: LoadSample) -> None:
        """Take what an engine counts since its start; not all do."""
        if load.prefill_busy_s_total > 1.0 and load.prefill_tokens_total:
            self.tokens_per_s = load.prefill_tokens_total / load.prefill_busy_s_total


def step_between(before: LoadSample, after: LoadSample) -> float:
    """Return how long a step took between two readings; 0: they do not tell."""
    passed_s = after.at_s - before.at_s
    tokens = after.generation_tokens_total - before.generation_tokens_total
    low, high = sorted((before.running, after.running))
    if not READING_S[0] <= passed_s <= READING_S[1] or tokens <= 0:
        return 0.0
    if low < 1 or high > ALIKE * low:
        return 0.0
    return (low + high) / 2 * passed_s / tokens


def _class_of(batch: float) -> int:
    return min(CLASSES_MAX, max(1, math.ceil(batch)).bit_length())
