"""What the service tells of jobs and lines, as values. Pure.

Unknown fields are passed over and unknown states are states that have not ended, so that a client
goes on with a service that is newer than itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import orjson

from backends.offline.client.errors import JobProblem, LineFailedError
from backends.offline.records import COMPLETED, ENDED, FAILED

ID_PART = "/"  # between the two parts of a call's id; a batch's id has none


class _Problems(msgspec.Struct, frozen=True):
    data: tuple[JobProblem, ...] = ()


class _Counts(msgspec.Struct, frozen=True):
    total: int = 0
    completed: int = 0
    failed: int = 0


class _Own(msgspec.Struct, frozen=True):
    tokens: int = 0
    tokens_per_s: float = 0.0
    eta_s: float | None = None
    cost: float | None = None
    problem: str | None = None


class Batch(msgspec.Struct, frozen=True):
    """The object of a batch, as far as it is used here."""

    id: str
    status: str
    endpoint: str = ""
    model: str | None = None
    created_at: int = 0
    expires_at: int | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    metadata: dict[str, str] | None = None
    errors: _Problems | None = None
    request_counts: _Counts | None = None
    doherty: _Own | None = None


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """How far a job is. `cost` is in the currency of the configured price; None: there is none.
    `problem` says why nobody does its lines; None: nothing is known to be wrong.
    """

    job_id: str
    state: str
    endpoint: str
    model: str
    created_s: int
    expires_s: int | None
    total: int
    completed: int
    failed: int
    tokens: int
    tokens_per_s: float
    eta_s: float | None
    cost: float | None
    problem: str | None
    problems: tuple[JobProblem, ...]
    metadata: dict[str, str]

    @property
    def done(self) -> int:
        """Return the lines that have an answer or an error."""
        return self.completed + self.failed

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    @property
    def succeeded(self) -> bool:
        """Say whether it was done to its end; single lines may have failed all the same."""
        return self.state == COMPLETED

    @property
    def refused(self) -> bool:
        """Say whether it ended before it began."""
        return self.state == FAILED


class _Page(msgspec.Struct, frozen=True):
    data: tuple[Batch, ...]
    has_more: bool = False


def progress_of(body: bytes) -> Progress:
    """Read a batch. Raises `msgspec.MsgspecError`."""
    return _progress(msgspec.json.decode(body, type=Batch))


def page_of(body: bytes) -> tuple[list[Progress], bool]:
    """Read a list of batches, and whether there are more. Raises `msgspec.MsgspecError`."""
    page = msgspec.json.decode(body, type=_Page)
    return [_progress(batch) for batch in page.data], page.has_more


def _progress(batch: Batch) -> Progress:
    counts, own = batch.request_counts or _Counts(), batch.doherty or _Own()
    return Progress(
        job_id=batch.id,
        state=batch.status,
        endpoint=batch.endpoint,
        model=batch.model or "",
        created_s=batch.created_at,
        expires_s=batch.expires_at,
        total=counts.total,
        completed=counts.completed,
        failed=counts.failed,
        tokens=own.tokens,
        tokens_per_s=own.tokens_per_s,
        eta_s=own.eta_s,
        cost=own.cost,
        problem=own.problem,
        problems=batch.errors.data if batch.errors else (),
        metadata=batch.metadata or {},
    )


class LineResult(msgspec.Struct, frozen=True, kw_only=True):
    """What came of one request. `number` is its place among the requests, from 0."""

    job_id: str
    number: int
    sequence: int  # in the order of completion, from 1
    custom_id: str
    line: dict[str, Any]  # as in the output or error file

    @property
    def status(self) -> int:
        """Return the answer's status; 0: there is no answer."""
        response = self.line.get("response")
        return int(response["status_code"]) if response else 0

    @property
    def body(self) -> Any:
        """Return the answer's body, such as a chat completion; None: there is no answer."""
        response = self.line.get("response")
        return response["body"] if response else None

    @property
    def ok(self) -> bool:
        return self.status == 200

    def value(self) -> Any:
        """Return the body of a good answer. Raises `LineFailedError` for any other."""
        if self.ok:
            return self.body
        body = self.body if isinstance(self.body, dict) else {}
        problem = self.line.get("error") or body.get("error") or {}
        if not isinstance(problem, dict):
            problem = {"message": str(problem)}
        raise LineFailedError(
            f"{self.job_id}{ID_PART}{self.custom_id}",
            status=self.status,
            body=self.body,
            code=problem.get("code"),
            message=str(problem.get("message") or "no reason was given"),
        )


def results_of(job_id: str, body: bytes) -> Iterator[LineResult]:
    """Read results, one a line. Raises `ValueError`."""
    for row in body.splitlines():
        line = orjson.loads(row)
        number, sequence = line.pop("number"), line.pop("sequence")
        yield LineResult(
            job_id=job_id,
            number=number,
            sequence=sequence,
            custom_id=line["custom_id"],
            line=line,
        )


def split_call(call_id: str) -> tuple[str, str]:
    """Return job id and custom id in a call's. Raises `ValueError`."""
    job_id, part, custom_id = call_id.partition(ID_PART)
    if not (job_id and part and custom_id):
        raise ValueError(f"'{call_id[:100]}' is no call's id, such as batch_1a2b{ID_PART}line-0")
    return job_id, custom_id
