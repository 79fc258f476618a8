"""When a job must not wait for spare capacity any longer.

The lines of a job that would miss its window move up a class: they are sent as semi-online work,
which waits in the proxy like any other, for which pools grow and come up from nothing. That is done
as late as it can be, because until then there may be room to spare at no cost, such as at night: at
the latest moment from which what is left would still be done, at the best speed of a whole minute
that was seen so far, with a margin. What is left is looked at in the order of the deadlines: each
job must be done when all before it and it itself are.

Once moved up, lines stay so until what was late is done. Where engine workers do a model's lines,
how many there are is the manager's to decide, by the same needs, and nothing moves up.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from backends.offline.work import JobNeed

MARGIN = 2.0  # times as long as it should take
# What one model should do at least, whatever serves it: until more has been seen.
TOKENS_PER_S_MIN = 1_000.0
START_S = 300.0  # for a replica that has to come up first
RATE_S = 60.0


class Speed:
    """Tokens a second, by a counter that grows: of the last minute, and the best minute so far."""

    def __init__(self) -> None:
        self.best_tokens_per_s = TOKENS_PER_S_MIN
        self._counts: deque[tuple[float, int]] = deque(maxlen=1024)

    def note(self, tokens_total: int, now_s: float) -> None:
        counts = self._counts
        counts.append((now_s, tokens_total))
        while len(counts) > 2 and counts[1][0] <= now_s - RATE_S:
            counts.popleft()
        if now_s - counts[0][0] >= RATE_S:
            self.best_tokens_per_s = max(self.best_tokens_per_s, self.tokens_per_s)

    @property
    def tokens_per_s(self) -> float:
        """Return the speed of the last minute, or of as much of it as there is."""
        if len(self._counts) < 2:
            return 0.0
        (first_s, first), (last_s, last) = self._counts[0], self._counts[-1]
        return (last - first) / (last_s - first_s) if last_s > first_s else 0.0


def first_late(needs: Sequence[JobNeed], tokens_per_s: float, *, awake: bool) -> JobNeed | None:
    """Return the first need that cannot wait any longer at this speed; None: all can."""
    start_s = 0.0 if awake else START_S
    tokens = 0
    for need in sorted(needs, key=lambda need: need.due_in_s):
        tokens += need.tokens
        if need.lines and start_s + MARGIN * tokens / tokens_per_s > need.due_in_s:
            return need
    return None


class Urgency:
    """Whether the lines of one model have moved up, and until when."""

    def __init__(self) -> None:
        self.due_s: float | None = None  # of what was late; None: nothing is

    def look(
        self, needs: Sequence[JobNeed], tokens_per_s: float, now_s: float, *, awake: bool
    ) -> bool:
        """Take what is left to do; say whether lines are moved up now."""
        if self.due_s is not None:
            left = any(need.lines and now_s + need.due_in_s <= self.due_s + 1.0 for need in needs)
            if not left:
                self.due_s = None
        late = first_late(needs, tokens_per_s, awake=awake)
        if late is not None:
            self.due_s = max(self.due_s or 0.0, now_s + late.due_in_s)
        return self.due_s is not None
