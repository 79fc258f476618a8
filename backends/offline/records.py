"""What the store tells of files, jobs and lines, and the errors it raises.

`owner` is a tenant: a hash of the API key that it presents. Everything that a tenant asks for is
looked up together with its owner, so that what belongs to another does not exist for it.
Times are Unix seconds.
"""

from __future__ import annotations

from typing import Generic, TypeVar

import msgspec

from backends.offline.work import LineError

VALIDATING = "validating"
IN_PROGRESS = "in_progress"
FINALIZING = "finalizing"  # expired: the lines that nobody did are being given their errors
CANCELLING = "cancelling"
COMPLETED, FAILED, EXPIRED, CANCELLED = "completed", "failed", "expired", "cancelled"
ENDED = frozenset((COMPLETED, FAILED, EXPIRED, CANCELLED))

T = TypeVar("T")


class StoreError(Exception):
    """Something that the store will not or cannot do; its text is for people."""


class NotFoundError(StoreError):
    """There is no such file, job or line of this owner."""


class ConflictError(StoreError):
    """What is there forbids it: the input of a running job cannot go."""


class FullError(StoreError):
    """The disk, or the room that the configuration grants, is full; nothing was changed."""


class ClaimLostError(StoreError):
    """The job is not (any more) this service's to validate: leave it."""


class UnavailableError(StoreError):
    """The database does not answer; what was asked can be asked again."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """How much the store keeps and for how long it lends."""

    hold_s: float = 60.0  # of a chunk without a report, and of a validation without new lines
    chunk_lines: int = 2000  # most lines of one chunk
    attempts_max: int = 3  # chunks of one line alone that died, after which it gets an error
    keep_s: float = 30 * 86400.0  # of files that name no expiry, and of jobs after their end
    bytes_max: int = 100 * 1024**3  # of files and results; files and jobs beyond are refused


class Page(msgspec.Struct, Generic[T], frozen=True):
    """Some of a list, and whether there are more."""

    items: tuple[T, ...]
    more: bool


class FileRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A file as its owner sees it. Those with purpose `batch_output` are the results of a job."""

    id: str
    owner: str
    filename: str
    purpose: str
    bytes: int
    created_s: float
    expires_s: float | None
    ready: bool  # not while it is being uploaded


class JobError(msgspec.Struct, frozen=True, kw_only=True):
    """Why a job failed before it began; `line` counts from 1."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class JobRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A job as its owner sees it; the counts and sums are those of the results that exist."""

    id: str
    owner: str
    endpoint: str
    input_file_id: str
    window_s: float
    metadata: dict[str, str]
    state: str
    model: str  # of all its lines; empty until it begins
    errors: tuple[JobError, ...]
    created_s: float
    expires_s: float
    in_progress_s: float | None
    finalizing_s: float | None
    completed_s: float | None
    failed_s: float | None
    expired_s: float | None
    cancelling_s: float | None
    cancelled_s: float | None
    output_file_id: str | None
    error_file_id: str | None
    total: int
    completed: int
    failed: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    busy_s: float  # GPU-seconds that its workers reported
    tokens: int  # that all its lines were thought to take when it was validated
    tenant: str = ""  # whose it is, where keys are tenants'


class NewLine(msgspec.Struct, frozen=True, kw_only=True):
    """A line that validation found good. Its body lies in the input file, from `offset` on."""

    number: int  # from 0
    custom_id: str
    offset: int  # of the request body within the file
    length: int  # of it
    sort_key: bytes  # lines with the same beginnings are neighbours in this order
    tokens: int = 0  # prompt and answer, as far as that can be known before


class ResultRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the output or error file, with a newline at its end."""

    number: int
    sequence: int  # from 1, as results came
    custom_id: str
    failed: bool
    content: bytes


EXPIRED_ERROR = LineError(
    "batch_expired", "This request could not be executed before the batch expired."
)
CANCELLED_ERROR = LineError(
    "batch_cancelled", "This request was not executed: the batch was cancelled."
)
DIED_ERROR = LineError(
    "worker_died", "Every worker that was given this request alone died or fell silent over it."
)
