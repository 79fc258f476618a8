"""When a job must not wait for spare capacity any longer.

The lines of a job that would miss its window move up a class: they are sent as semi-online work,
which waits in the proxy like any other, for which pools grow and come up from nothing. What is left
is looked at in the order of the deadlines, as one worker would do it: each must be done when all
before it and it itself are, at the speed of the last minute. Once moved up, lines stay so until
what was late is done: the speed is then that of the class, and would tell the opposite at once.

Where engine workers do a model's lines, how many there are is the manager's to decide, by the same
needs, and nothing moves up.
"""

from __future__ import annotations

from collections.abc import Sequence

from backends.offline.work import JobNeed

MARGIN = 1.25  # times as long as it should take
# Before any line is done, and where nothing is awake: what one replica should do at least.
TOKENS_PER_S_GUESS = 1_000.0
START_S = 300.0  # for a replica that has to come up first


def first_late(needs: Sequence[JobNeed], tokens_per_s: float, *, awake: bool) -> JobNeed | None:
    """Return the first need that would be late; None: all is done in time.

    `tokens_per_s` is what was reached of late, 0 where nothing was to be had.
    """
    start_s = 0.0 if awake else START_S
    speed = tokens_per_s or TOKENS_PER_S_GUESS
    tokens = 0
    for need in sorted(needs, key=lambda need: need.due_in_s):
        tokens += need.tokens
        if need.lines and start_s + MARGIN * tokens / speed > need.due_in_s:
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
