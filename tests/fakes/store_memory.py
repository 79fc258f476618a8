"""A process that takes a job of so many MB through the store and prints its peak memory in MB."""

from __future__ import annotations

import asyncio
import resource
import sys

import msgspec

from backends.offline.records import NewLine
from backends.offline.store import Store
from backends.offline.work import Line, Result
from tests.fakes.stored_jobs import ANN, CHAT, ask, report

_HEAD, _TAIL = b'{"custom_id":"c%06d","body":', b"}\n"
_BODY = b'{"p":"' + b"x" * 3950 + b'"}'
_LINE_BYTES = len(_HEAD % 0) + len(_BODY) + len(_TAIL)


def _line(number: int) -> NewLine:
    offset = number * _LINE_BYTES + len(_HEAD % number)
    # In the order of these keys neighbours lie far apart in the file.
    key = (number * 2654435761 % 2**32).to_bytes(4)
    return NewLine(
        number=number, custom_id=f"c{number:06d}", offset=offset, length=len(_BODY), sort_key=key
    )


def _answer(line: Line) -> Result:
    return Result(job_id=line.job_id, number=line.number, status=200, body=msgspec.Raw(_BODY))


async def main(path: str, megabytes: int) -> None:
    lines = megabytes * 1_000_000 // _LINE_BYTES
    store = await Store.open(path)
    record = await store.create_file(ANN, "a", "batch")
    for number in range(lines):
        await store.append_file(record.id, _HEAD % number + _BODY + _TAIL)
    await store.finish_file(record.id)
    job = await store.create_job(ANN, record.id, CHAT, window_s=9999.0)
    await store.claim_validation("s")
    for start in range(0, lines, 1000):
        new = [_line(number) for number in range(start, min(lines, start + 1000))]
        await store.add_lines("s", job.id, new)
    await store.begin_job("s", job.id, "m")
    while (chunk := await ask(store, lines_max=1000)) is not None:
        assert bytes(chunk.lines[0].body) == _BODY
        await report(store, chunk, chunk.lines, result=_answer, done=True)
    job = await store.job(ANN, job.id)
    assert job.output_file_id is not None
    size = sum([len(part) async for part in store.read_file(ANN, job.output_file_id)])
    assert size > megabytes * 1_000_000
    await store.close()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000)  # noqa: T201 - read by a test


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
