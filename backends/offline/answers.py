"""What a replica's answer to a line means: its result, or that it is to be done again.

An answer is the line's result when asking again would bring the same: it was done, or the request
is wrong. What a proxy or an engine says of itself (it is full, it failed, it went away) says
nothing of the line, and no line gets an error for it before it has failed `FAILURES_MAX` times.
That there was no room, or that it was ended for somebody more urgent, is no failure, however often
it happens: a job has its deadline for that.

Bodies go on as they came, but on one line: they become lines of a file.
"""

from __future__ import annotations

import msgspec

from backends.offline.work import Line, LineError, Result

FAILURES_MAX = 5
WAIT_S_MIN, WAIT_S_MAX = 0.5, 60.0  # between two attempts of a line
WAIT_FULL_S = 1.0  # where nobody said how long
RETRY_AFTER_S_MAX = 120.0  # no proxy means more
MESSAGE_CHARACTERS_MAX = 500
TOKENS_MAX = 2**40  # that a line may be said to have taken
# The proxy's words for: there is no room now, nobody serves it at this moment.
_NO_ROOM = frozenset(
    ("no_spare_capacity", "preempted", "queue_full", "queue_timeout", "too_many_requests")
)
_NOBODY = frozenset(("no_replica", "not_awake", "model_not_found"))


class Answered(msgspec.Struct, frozen=True, kw_only=True):
    """What came back; status 0: nothing did."""

    status: int
    body: bytes = b""
    request_id: str = ""
    retry_after: str = ""
    problem: str = ""  # why nothing came


class Again(msgspec.Struct, frozen=True, kw_only=True):
    """The line is to be done again, not before `wait_s`."""

    wait_s: float
    failed: bool  # it counts among the line's failures
    full: bool = False  # there was no room
    preempted: bool = False  # it was ended for somebody's sake
    refused_us: bool = False  # the key is wrong: no line would fare better


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    prompt_tokens_details: _Details | None = None
    input_tokens_details: _Details | None = None


class _Body(msgspec.Struct):
    usage: _Usage | None = None


class _Error(msgspec.Struct):
    code: str | int | None = None


class _ErrorBody(msgspec.Struct):
    error: _Error


def judge(line: Line, answered: Answered, failures: int) -> Result | Again:
    """Return what an answer means for a line that has failed `failures` times before."""
    status = answered.status
    if 200 <= status < 300:
        body = one_line(answered.body)
        if body is not None:
            return _done(line, answered, body)
        failed = Answered(status=502, problem="the answer is no JSON object")
        return _after_failure(line, failed, failures)
    code = error_code(answered.body)
    if code in _NO_ROOM or status in (408, 429):
        wait_s = retry_after_s(answered.retry_after) or WAIT_FULL_S
        preempted = code == "preempted"
        return Again(wait_s=wait_s, failed=False, full=not preempted, preempted=preempted)
    if code in _NOBODY:
        return Again(
            wait_s=retry_after_s(answered.retry_after) or WAIT_FULL_S, failed=False, full=True
        )
    if status in (401, 403):
        return Again(wait_s=WAIT_S_MAX, failed=False, refused_us=True)
    if 400 <= status < 500:
        return Result(
            job_id=line.job_id,
            number=line.number,
            status=status,
            request_id=answered.request_id,
            body=msgspec.Raw(one_line(answered.body) or _told(answered)),
        )
    return _after_failure(line, answered, failures)


def one_line(body: bytes) -> bytes | None:
    """Return a JSON object without line ends between its parts; None: it is none."""
    try:
        msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        return msgspec.json.format(body, indent=-1) if b"\n" in body or b"\r" in body else body
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return None


def error_code(body: bytes) -> str:
    """Return the code of an error in OpenAI's form; empty: it has none."""
    try:
        return str(msgspec.json.decode(body, type=_ErrorBody).error.code or "")
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return ""


def retry_after_s(value: str) -> float:
    """Return the seconds of a Retry-After; 0: it names none (a date is for web caches)."""
    return min(RETRY_AFTER_S_MAX, float(value)) if value.isascii() and value.isdigit() else 0.0


def _done(line: Line, answered: Answered, body: bytes) -> Result:
    try:
        usage = msgspec.json.decode(body, type=_Body).usage or _Usage()
    except msgspec.MsgspecError:
        usage = _Usage()  # not as OpenAI has it: then nothing is counted
    details = usage.prompt_tokens_details or usage.input_tokens_details or _Details()
    prompt = usage.prompt_tokens or usage.input_tokens or 0
    return Result(
        job_id=line.job_id,
        number=line.number,
        status=answered.status,
        request_id=answered.request_id,
        body=msgspec.Raw(body),
        prompt_tokens=_count(prompt),
        cached_tokens=_count(details.cached_tokens),
        completion_tokens=_count(usage.completion_tokens or usage.output_tokens),
    )


def _count(said: int | None) -> int:
    """Return a count of tokens; what cannot be one is none, and a database would choke on it."""
    return said if said is not None and 0 <= said <= TOKENS_MAX else 0


def _after_failure(line: Line, answered: Answered, failures: int) -> Result | Again:
    failures += 1
    if failures < FAILURES_MAX:
        asked_s = retry_after_s(answered.retry_after)
        return Again(
            wait_s=min(WAIT_S_MAX, asked_s or WAIT_S_MIN * 4.0 ** (failures - 1)), failed=True
        )
    if answered.status >= 500 and (body := one_line(answered.body)) is not None:
        return Result(
            job_id=line.job_id,
            number=line.number,
            status=answered.status,
            request_id=answered.request_id,
            body=msgspec.Raw(body),
        )
    why = answered.problem or f"status {answered.status}"
    message = f"no answer in {failures} attempts; the last one: {why}"
    return Result(
        job_id=line.job_id,
        number=line.number,
        error=LineError("no_answer", message[:MESSAGE_CHARACTERS_MAX]),
    )


def _told(answered: Answered) -> bytes:
    """Return an error object for one that came as text."""
    text = answered.body[: 4 * MESSAGE_CHARACTERS_MAX].decode("utf-8", "replace")
    message = text[:MESSAGE_CHARACTERS_MAX] or f"status {answered.status}"
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return msgspec.json.encode({"error": error})
