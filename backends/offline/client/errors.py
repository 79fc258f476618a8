"""What can go wrong for someone who has requests done offline, one class for each thing to do."""

from __future__ import annotations

from typing import Any

import msgspec
from typing_extensions import override


class OfflineError(Exception):
    """Any of the errors below; the text is for people."""


class InputError(OfflineError):
    """A request that could not be asked, found before anything was sent. `line` counts from 1."""

    def __init__(self, line: int, problem: str) -> None:
        super().__init__(f"line {line}: {problem}")
        self.line, self.problem = line, problem


class RefusedError(OfflineError):
    """The service will not: a wrong key, an id that does not exist, a file that is too large."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(f"{message} ({status})")
        self.status, self.message, self.code = status, message, code


class UnreachableError(OfflineError):
    """Nobody has answered for as long as the client is patient. What was begun goes on."""


class JobFailedError(OfflineError):
    """The job never began, because its input was not as it has to be."""

    def __init__(self, job_id: str, errors: tuple[JobProblem, ...]) -> None:
        told = "; ".join(map(str, errors[:3])) or "no reason was given"
        more = f"; and {len(errors) - 3} more" if len(errors) > 3 else ""
        super().__init__(f"{job_id} failed: {told}{more}")
        self.job_id, self.errors = job_id, errors


class JobProblem(msgspec.Struct, frozen=True):
    """One reason of a failed job; `line` counts from 1."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None

    @override
    def __str__(self) -> str:
        place = "" if self.line is None else f"line {self.line}: "
        return f"{place}{self.message}"


class LineFailedError(OfflineError):
    """One request was answered by an error, or not at all before its job ended.

    `status` and `body` are the engine's answer; status 0: there is none, and `code` says why.
    """

    def __init__(
        self, call_id: str, *, status: int, body: Any, code: str | None, message: str
    ) -> None:
        shown = f"status {status}" if status else str(code)
        super().__init__(f"{call_id}: {shown}: {message}")
        self.call_id, self.status, self.body = call_id, status, body
        self.code, self.message = code, message
