"""What was found of starts from images, and whether it is what was promised."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import msgspec

GAIN_MIN = 10.0


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds to the first answer, and answers that were not the cold start's."""

    tables_mib: int
    cold_s: float
    dump_s: float
    image_mib: int
    restored_s: tuple[float, ...]
    paired_s: tuple[float, ...]  # of two started at once, the later
    loaded_s: tuple[float, ...]  # beside a copy under load
    load_answers: int
    answers: int
    wrong: int
    damage: str  # what was said of a damaged image; "" when it was used
    damage_s: float
    revivals_s: tuple[float, ...]  # by a manager, from a kill to an answer out of the image
    fallback_s: float  # the same when the image was damaged: a cold start
    judge_gain: bool = True  # an engine that starts quickly has little to gain

    @property
    def gain(self) -> float:
        """By how much the slowest start of a single copy beats the cold start."""
        return self.cold_s / max(self.restored_s)

    @property
    def kept_promises(self) -> bool:
        gained = self.gain >= GAIN_MIN or not self.judge_gain
        return gained and self.wrong == 0 and bool(self.damage)


def table(finding: Finding) -> str:
    """Return the findings as lines."""
    single = sorted(finding.restored_s)
    rows = [
        f"an engine that builds {finding.tables_mib:,} MiB of tables at its start",
        f"cold                 {finding.cold_s:8.2f} s to the first answer",
        f"dump                 {finding.dump_s:8.2f} s, image {finding.image_mib:,} MiB",
        f"restored x {len(single):<3}       {statistics.median(single):8.2f} s median, "
        f"{single[0]:.2f} to {single[-1]:.2f}: {finding.gain:.1f} times sooner at the slowest",
        f"two at once x {len(finding.paired_s):<3}    {_spread(finding.paired_s)}",
        f"beside load x {len(finding.loaded_s):<3}    {_spread(finding.loaded_s)}, "
        f"{finding.load_answers:,} answers meanwhile",
        f"answers              {finding.answers:,}, {finding.wrong} of them wrong",
        f"a flipped bit        {finding.damage or 'NOT FOUND'} ({finding.damage_s:.2f} s)",
        f"by a manager x {len(finding.revivals_s):<3}   {_spread(finding.revivals_s)}, "
        "from a kill to an answer out of its image",
        f"image damaged        {finding.fallback_s:8.2f} s, from a kill to an answer, started cold",
        "all promises kept" if finding.kept_promises else "PROMISES BROKEN",
    ]
    return "\n".join(rows)


def _spread(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds):8.2f} s median, at most {max(seconds):.2f}"
