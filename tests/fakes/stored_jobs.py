"""Jobs in a store, and workers that do what a test says, without a service between them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from backends.offline.records import JobRecord, NewLine
from backends.offline.store import Store
from backends.offline.work import Ask, Chunk, Line, Receipt, Report, Result

CHAT = "/v1/chat/completions"
ANN, BOB = "ann", "bob"


def body(number: int, padding: int = 0) -> bytes:
    return b'{"model":"m","n":%d,"p":"%b"}' % (number, b"x" * padding)


def chats(count: int, fields: Mapping[str, Any] | None = None) -> list[bytes]:
    """Return requests that say "line 0" and so on."""
    return [
        json.dumps(
            {"model": "m", "messages": [{"role": "user", "content": f"line {number}"}]}
            | dict(fields or {})
        ).encode()
        for number in range(count)
    ]


def input_file(bodies: Sequence[bytes]) -> tuple[bytes, list[NewLine]]:
    """Write an input file; return it and what validation would find in it."""
    text, lines = bytearray(), list[NewLine]()
    for number, content in enumerate(bodies):
        text += b'{"custom_id":"c%d","body":' % number
        lines.append(
            NewLine(
                number=number,
                custom_id=f"c{number}",
                offset=len(text),
                length=len(content),
                # Neighbours in prefix order are not those of the file.
                sort_key=bytes([number % 3]),
                tokens=10,
            )
        )
        text += content + b"}\n"
    return bytes(text), lines


async def stored_file(store: Store, content: bytes, owner: str = ANN) -> str:
    record = await store.create_file(owner, "input.jsonl", "batch")
    await store.append_file(record.id, content)
    return (await store.finish_file(record.id)).id


async def begun_job(
    store: Store,
    lines: int,
    *,
    owner: str = ANN,
    model: str = "m",
    window_s: float = 86400.0,
    padding: int = 0,
    lines_at_once: int = 2000,
    bodies: Sequence[bytes] = (),
    url: str = CHAT,
    tenant: str = "",
) -> JobRecord:
    """Upload, create, validate and begin a job of so many lines, or of these bodies."""
    content, new = input_file(bodies or [body(number, padding) for number in range(lines)])
    file_id = await stored_file(store, content, owner)
    job = await store.create_job(owner, file_id, url, window_s=window_s, tenant=tenant)
    claimed = await store.claim_validation("service-1")
    assert claimed is not None
    assert claimed.id == job.id
    for start in range(0, len(new), lines_at_once):
        await store.add_lines("service-1", job.id, new[start : start + lines_at_once])
    await store.begin_job("service-1", job.id, model)
    return await store.job(owner, job.id)


async def chat_job(
    store: Store,
    count: int,
    fields: Mapping[str, Any] | None = None,
    *,
    window_s: float = 86400.0,
    url: str = CHAT,
) -> JobRecord:
    """Begin a job of such requests as an engine reads."""
    return await begun_job(store, count, bodies=chats(count, fields), window_s=window_s, url=url)


async def outcomes(store: Store, job_id: str) -> tuple[Counter[str], list[dict[str, Any]]]:
    """Return how often each custom id has a result, ended or not, and all results."""
    found: list[dict[str, Any]] = []
    after = 0
    while page := await store.results(ANN, job_id, after=after, limit=1000):
        found += [json.loads(record.content) for record in page]
        after = page[-1].sequence
    return Counter(each["custom_id"] for each in found), found


async def ask(
    store: Store, worker_id: str = "w", *, lines_max: int = 1000, bytes_max: int = 2**24
) -> Chunk | None:
    return await store.ask(
        Ask(
            worker_id=worker_id,
            models=("m",),
            urls=(CHAT,),
            lines_max=lines_max,
            bytes_max=bytes_max,
        )
    )


async def given(store: Store, worker_id: str = "w", **limits: int) -> Chunk:
    chunk = await ask(store, worker_id, **limits)
    assert chunk is not None
    return chunk


def good(line: Line) -> Result:
    return Result(
        job_id=line.job_id,
        number=line.number,
        status=200,
        body=msgspec.Raw(b'{"answer":%d}' % line.number),
        prompt_tokens=7,
        cached_tokens=2,
        completion_tokens=3,
    )


def bad(line: Line) -> Result:
    content = msgspec.Raw(b'{"error":{"message":"too long"}}')
    return Result(job_id=line.job_id, number=line.number, status=400, body=content)


async def report(
    store: Store,
    chunk: Chunk,
    lines: Sequence[Line] = (),
    *,
    worker_id: str = "w",
    result: Callable[[Line], Result] = good,
    back: Sequence[Line] = (),
    done: bool = False,
    busy_s: float = 0.0,
) -> Receipt:
    return await store.report(
        Report(
            worker_id=worker_id,
            chunk_id=chunk.chunk_id,
            fence=chunk.fence,
            results=tuple(map(result, lines)),
            back=tuple((line.job_id, line.number) for line in back),
            done=done,
            busy_s=busy_s,
        )
    )


def numbers(chunk: Chunk) -> list[int]:
    return [line.number for line in chunk.lines]


async def content(store: Store, file_id: str | None, owner: str = ANN, start: int = 0) -> bytes:
    assert file_id is not None
    return b"".join([part async for part in store.read_file(owner, file_id, start)])


class WrittenResponse(msgspec.Struct, forbid_unknown_fields=True):
    status_code: int
    request_id: str
    body: dict[str, object]


class WrittenError(msgspec.Struct, forbid_unknown_fields=True):
    code: str
    message: str


class Written(msgspec.Struct, forbid_unknown_fields=True):
    """A line of an output or error file, read as strictly as its form is written."""

    id: str
    custom_id: str
    response: WrittenResponse | None
    error: WrittenError | None


def read(content: bytes) -> list[Written]:
    assert content.endswith(b"\n")
    return [msgspec.json.decode(line, type=Written) for line in content.splitlines()]


async def outcome(store: Store, job: JobRecord) -> dict[str, str]:
    """Read both files of a job that has ended: what became of each custom id, each once."""
    job = await store.job(job.owner, job.id)
    found: dict[str, str] = {}
    for file_id in (job.output_file_id, job.error_file_id):
        if file_id is None:
            continue
        written = await content(store, file_id, job.owner)
        assert (await store.file(job.owner, file_id)).bytes == len(written)
        for line in read(written):
            assert line.custom_id not in found
            status = line.response and str(line.response.status_code)
            found[line.custom_id] = status or (line.error.code if line.error else "nothing")
    assert len(found) == job.completed + job.failed
    return found
