"""What passes between those who keep jobs and those who do their lines.

A job is one batch; its lines are requests, numbered from 0 in the order of the input. The desk
gives lines out in chunks and takes results back. Three rules make each line count exactly once,
whoever dies when:

1. A chunk is held for `hold_s`; every report of it renews that. A chunk that nobody renews is given
   out anew under a higher fence.
2. A report counts only while its chunk is held under its fence: of two workers that both did a
   line, the later one's result is dropped, and it is told so.
3. Results and the state of their lines change in one transaction of the store.

A worker that begins says so with its first ask (`Ask.first`): whoever had its name before is dead,
and what it held goes out anew at once, not when its hold is over.

So a line may be computed twice, never answered twice; what is repeated after a crash is at most one
chunk. Workers are strangers to the store: all of this goes over HTTP, from whatever machine.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Annotated, Protocol

import msgspec
from msgspec import Meta

ASK_PATH = "/desk/ask"
REPORT_PATH = "/desk/report"
WORK_BYTES_MAX = 64 * 1024 * 1024  # of one body, either way
WAIT_S_MAX = 30.0  # that an ask may wait for lines
ID_LENGTH_MAX = 128
MODELS_MAX, URLS_MAX = 1_000, 16  # of one ask
SPARE_PREFIX = "spare-"  # of the worker ids of dispatchers
_PLACE_BYTES = 6
NO_BODY = msgspec.Raw(b"")  # msgspec reads no object into `Raw | None`

_Count = Annotated[int, Meta(ge=0, le=2**53)]
_Tokens = Annotated[int, Meta(ge=0, le=2**31)]  # of one line: sums of many stay below 2**63
_Seconds = Annotated[float, Meta(ge=0, le=1e9)]
_Id = Annotated[str, Meta(max_length=ID_LENGTH_MAX)]
_NO_NUL = r"^[^\x00]*$"
# Names that reach the database, which takes no NUL.
_Name = Annotated[str, Meta(max_length=512, pattern=_NO_NUL)]
_WorkerId = Annotated[str, Meta(max_length=ID_LENGTH_MAX, pattern=_NO_NUL)]


def spare_worker(dispatcher_id: str, model: str) -> str:
    """Return the worker id by which a dispatcher does the lines of a model with spare capacity."""
    return f"{dispatcher_id}:{model}"[:ID_LENGTH_MAX]


def worker_at(name: str, place: str) -> str:
    """Return the id of the engine worker `name` at this `place`.

    Each manager names its workers for itself, and several may have one queue: what begins anew
    under one of their names must not be taken for the others.
    """
    digest = blake2b(place.encode(), digest_size=_PLACE_BYTES).hexdigest()
    return f"{name[: ID_LENGTH_MAX - len(digest) - 1]}@{digest}"


def name_of(worker_id: str) -> str:
    """Return what its manager calls a worker; a dispatcher's id is its name."""
    name, at, _ = worker_id.rpartition("@")
    return name if at and not worker_id.startswith(SPARE_PREFIX) else worker_id


class Line(msgspec.Struct, frozen=True, omit_defaults=True):
    """One request of a job."""

    job_id: _Id
    number: _Count
    url: str  # such as /v1/chat/completions
    body: msgspec.Raw  # the request, a JSON object, as the client wrote it
    tenant: str = ""  # whose job it is, where keys are tenants'


class Ask(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A worker wants lines; it gets those that lie next to each other in prefix order."""

    worker_id: _WorkerId
    models: Annotated[tuple[_Name, ...], Meta(max_length=MODELS_MAX)]  # that it can serve
    urls: Annotated[tuple[_Name, ...], Meta(max_length=URLS_MAX)]  # whose requests it understands
    lines_max: Annotated[int, Meta(ge=1, le=100_000)]
    bytes_max: Annotated[int, Meta(ge=1)] = (
        16 * 1024 * 1024
    )  # of their bodies; one line always fits
    wait_s: Annotated[float, Meta(ge=0, le=WAIT_S_MAX)] = 0.0
    # It does not compute itself but sends lines to replicas that serve others first.
    spare: bool = False
    first: bool = False  # of this process: what it held in a life before is nobody's


class Chunk(msgspec.Struct, frozen=True, kw_only=True):
    """Lines that one worker holds. `due_in_s` is until the first of their jobs expires."""

    chunk_id: _Id
    fence: _Count
    hold_s: float
    due_in_s: float
    lines: tuple[Line, ...]
    # A worker died over lines of it: they are computed with no others, so that a death says more.
    alone: bool = False


class LineError(msgspec.Struct, frozen=True):
    """Why a line has no response: nobody could be asked, or the job ended before it."""

    code: str
    message: str


class Result(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What came of a line: an HTTP-like response, or an error."""

    job_id: _Id
    number: _Count
    status: Annotated[int, Meta(ge=0, le=999)] = 0  # of the response; 0: there is none
    request_id: str = ""
    body: msgspec.Raw = NO_BODY  # of the response, a JSON object; empty (and false): there is none
    error: LineError | None = None
    prompt_tokens: _Tokens = 0
    cached_tokens: _Tokens = 0  # of these
    completion_tokens: _Tokens = 0


class Report(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Results of a chunk as they come; without any, it only renews the hold."""

    worker_id: _WorkerId
    chunk_id: _Id
    fence: _Count
    results: tuple[Result, ...] = ()
    back: tuple[tuple[str, _Count], ...] = ()  # job id and number of lines that it will not do
    done: bool = False  # it holds nothing of this chunk any more: what is left goes back, too
    busy_s: _Seconds = (
        0.0  # time that it computed since its last report, times its GPUs: GPU-seconds
    )


class Receipt(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the desk says to a report. Not `held`: what is left of the chunk is to be dropped."""

    held: bool
    accepted: _Count = 0  # results that counted
    hold_s: float = 0.0
    dropped: tuple[str, ...] = ()  # jobs that have ended: their lines need no answer


class Desk(Protocol):
    """Where workers get lines and bring results: the store itself, or a client of its service."""

    async def ask(self, ask: Ask) -> Chunk | None:
        """Return lines to do; None: there are none, even after `wait_s`."""

    async def report(self, report: Report) -> Receipt:
        """Take results. Whoever hears nothing reports again: the same twice counts once."""


class JobNeed(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is left to do of jobs of one model that are due before the next in the list."""

    due_in_s: float
    lines: _Count
    tokens: _Count  # of prompts and answers, as far as that can be known before
    url: str = ""  # of the requests; empty: various


class JobNeeds(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """All that is left to do, by model, the earliest first; the service tells it its manager."""

    service_id: _Id
    sequence: _Count
    models: dict[str, tuple[JobNeed, ...]] = {}
    # What engine workers of a model said they understand, where any has asked this service.
    urls: dict[str, tuple[str, ...]] = {}
    # Tokens a second of each worker that reported in the last minute, by worker id.
    rates: dict[str, float] = {}


NEEDS_PATH = "/v1/jobs"  # of the manager; POST
NEEDS_INTERVAL_S = 1.0
NEEDS_AGE_S_MAX = 10.0  # after which a service that says nothing is gone
