"""Whether a load is on its way somewhere, and where it will be: a line beyond chance.

A step is no line: who follows it would go on where it has ended. So where two levels with a step
between explain what came better than a line does, only what came since the step is looked at. A
rise that begins again after a fall (a wave, a timetable) is seen as soon as it has lasted for
`PARTS_MIN` parts of what is looked at, and not when the fall is out of sight; so is the first one
of a short history. Of so little, more certainty is asked: in the lab three deviations follow a wave
a second sooner, and half an hour of noise a dozen times.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

PARTS = 12  # that a whole history is cut into
PARTS_MIN = 5  # that a line is looked for in
SURE = 1.5  # deviations that its slope is believed less
REST_SURE = 4.0  # the same where it is not the whole history that says so


def rate_ahead(rates: Sequence[float], ahead: float) -> float:
    """Return the rate `ahead` parts after the last of `rates`, each of an equally long part, if
    they are a line that rises or falls beyond chance; 0.0 where they are none."""
    if len(rates) < PARTS_MIN:
        return 0.0
    rest = rates[step_in(rates) :]
    if len(rest) < PARTS_MIN:
        return 0.0
    slope, chance, mean = line_through(rest)
    sure = abs(slope) - (SURE if len(rest) == PARTS else REST_SURE) * chance
    if sure <= 0.0:
        return 0.0
    return max(0.0, mean + math.copysign(sure, slope) * (len(rest) / 2 + ahead))


def step_in(values: Sequence[float]) -> int:
    """Return where the second of two levels begins that explain values better than a line does;
    0 where none does. The value before it may be of both: a step comes when it likes."""
    slope, _, mean = line_through(values)
    middle = (len(values) - 1) / 2
    about_line = sum((value - mean - slope * (k - middle)) ** 2 for k, value in enumerate(values))
    about_steps, first = min(
        (_scatter(values[:end]) + _scatter(values[begin:]), begin)
        for begin in range(1, len(values))
        for end in {max(1, begin - 1), begin}
    )
    return first if about_steps < about_line else 0


def line_through(values: Sequence[float]) -> tuple[float, float, float]:
    """Return slope and its deviation, per value, and the mean, of the line through three or more
    equidistant values."""
    count = len(values)
    mean = sum(values) / count
    middle = (count - 1) / 2
    spread = sum((k - middle) ** 2 for k in range(count))
    slope = sum((k - middle) * value for k, value in enumerate(values)) / spread
    about_line = sum((value - mean - slope * (k - middle)) ** 2 for k, value in enumerate(values))
    return slope, math.sqrt(about_line / (count - 2) / spread), mean


def _scatter(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values)
