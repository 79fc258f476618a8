"""A process that makes jobs and does their lines, and says what the store has acknowledged.

It is meant to be killed: what it has said must be there afterwards.
"""

from __future__ import annotations

import asyncio
import itertools
import sys

from backends.offline.records import Limits
from backends.offline.store import Store
from tests.fakes.stored_jobs import ANN, CHAT, ask, body, input_file, report, stored_file

LIMITS = Limits(hold_s=0.3, attempts_max=1000)
LINES = 300


INPUT, NEW_LINES = input_file([body(number, 3000) for number in range(LINES)])


async def validate(store: Store) -> None:
    """Begin what is to be begun: jobs of one who died over them, too."""
    while (job := await store.claim_validation("service")) is not None:
        for start in range(0, LINES, 100):
            await store.add_lines("service", job.id, NEW_LINES[start : start + 100])
        await store.begin_job("service", job.id, "m")


def _say(*words: object) -> None:
    print(*words, flush=True)  # noqa: T201 - it is read by the test


async def main(url: str) -> None:
    store = await Store.open(url, limits=LIMITS)
    _say("open")
    for turn in itertools.count():
        if turn % 20 == 0:
            file_id = await stored_file(store, INPUT)
            _say("job", (await store.create_job(ANN, file_id, CHAT, window_s=9999.0)).id)
            await validate(store)
        chunk = await ask(store, lines_max=80)
        if chunk is None:
            await asyncio.sleep(0.05)
            continue
        for start in range(0, len(chunk.lines), 16):
            lines = chunk.lines[start : start + 16]
            done = start + 16 >= len(chunk.lines)
            if (await report(store, chunk, lines, done=done)).accepted == len(lines):
                _say("done", *(f"{line.job_id}/{line.number}" for line in lines))
        if turn % 7 == 6:
            page = await store.jobs(ANN, limit=1)
            await store.cancel_job(ANN, page.items[0].id)
            await store.finish_due()
            _say("cancelled", page.items[0].id)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
