"""What is in the store, in figures: for metrics, and for whoever asks how full it is."""

from __future__ import annotations

import msgspec

from backends.offline.rows import Part


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """Everything counted at one moment."""

    jobs: dict[str, int]  # by state
    lines: dict[str, int]  # of jobs that have not ended: waiting, held, completed, failed
    files: int
    bytes: int  # content of files and results
    due_in_s: float | None  # until the first job in progress expires


class FigureStore(Part):
    """The part of the store that counts."""

    async def figures(self) -> Figures:
        """Count jobs and files by their rows, which know their lines: lines are not read."""
        now_s = self._clock.unix_s()
        async with self._database.reading() as reading:
            states = await reading.fetch(
                "SELECT state, count(*) FROM jobs WHERE state <> 'gone' GROUP BY state"
            )
            running = await reading.fetch(
                "SELECT coalesce(sum(total), 0), coalesce(sum(waiting), 0), "
                "coalesce(sum(completed), 0), coalesce(sum(failed), 0), min(expires_s) "
                "FROM jobs WHERE state = 'in_progress'"
            )
            files = await reading.fetch(
                "SELECT count(*), coalesce(sum(bytes), 0) FROM files "
                "WHERE state <> 'gone' AND kind = 'stored'"
            )
            results = await reading.fetch(
                "SELECT coalesce(sum(output_bytes + error_bytes), 0) FROM jobs"
            )
        total, waiting, completed, failed = map(int, running[0][:4])
        due_s = running[0][4]
        return Figures(
            jobs={str(state): int(count) for state, count in states},
            lines={
                "waiting": waiting,
                "held": total - waiting - completed - failed,
                "completed": completed,
                "failed": failed,
            },
            files=int(files[0][0]),
            bytes=int(files[0][1]) + int(results[0][0]),
            due_in_s=None if due_s is None else max(0.0, float(due_s) - now_s),
        )
