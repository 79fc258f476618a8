"""What is wrong with an input file: pure functions over its octets as they are read.

A batch runs if every line of its file is a request that can be asked; else it fails as a whole with
a list of what is wrong, because a client that sent half a file by mistake wants to know before it
pays. What only an engine can judge (a prompt too long, a parameter it does not know) is no business
of this: such a line gets its 400 in the error file and the others run.

The file is read in pieces; what is kept between two of them is the beginning of one line, bounded
by `line_bytes_max`. A line that is longer is not kept at all, only counted. Ends of line are LF or
CR LF, a byte order mark is passed over, and so are blank lines, which count as lines of the file
but not of the job. Text must be UTF-8 (RFC 8259, section 8.1).

Codes are OpenAI's where it has one for the case.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator

import msgspec

from backends.offline.prefix_order import Prompt, sort_key, tokens_of
from backends.offline.records import JobError

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
ERRORS_MAX = 100  # that a batch lists; what more there are is counted
CUSTOM_ID_CHARACTERS_MAX = 512
MODEL_CHARACTERS_MAX = 512
# Python's readers of JSON give up at about 1,000 levels, less what they are called from. What is
# read here must be readable to whoever holds it next, or a line would end each worker it goes to.
DEPTH_MAX = 200
_BOM = b"\xef\xbb\xbf"
_SPACE = b" \t\r\n"


class Code(enum.StrEnum):
    """What can be wrong with a file."""

    INVALID_JSON_LINE = "invalid_json_line"
    MISSING = "missing_required_parameter"
    DUPLICATE = "duplicate_custom_id"
    MISMATCHED_MODEL = "mismatched_model"
    MODEL_NOT_FOUND = "model_not_found"
    INVALID_METHOD = "invalid_method"
    INVALID_URL = "invalid_url"
    INVALID_REQUEST = "invalid_request"
    TOO_MANY = "too_many_requests"
    EMPTY = "empty_file"
    TOO_MANY_ERRORS = "too_many_errors"


class Piece(msgspec.Struct, frozen=True):
    """One line of a file. `octets` is None where it was too long to keep."""

    line: int  # from 1
    offset: int
    octets: bytes | None


class Good(msgspec.Struct, frozen=True):
    """A line that can be asked: what is kept of it is where its body lies, and what it costs."""

    line: int
    custom_id: str
    model: str
    offset: int  # of the body in the file
    length: int
    sort_key: bytes
    tokens: int
    inputs: int  # texts that it embeds; 0 for what is no embedding


class LineReader:
    """Cuts a stream of octets into lines."""

    def __init__(self, line_bytes_max: int) -> None:
        self._line_bytes_max = line_bytes_max
        self._held: list[bytes] = []  # of the line that is not complete yet
        self._held_bytes = 0
        self._offset = 0  # of that line
        self._line = 0
        self._too_long = False

    def feed(self, octets: bytes) -> Iterator[Piece]:
        """Take the next octets of the file; return the lines that end in them, less blank ones."""
        begin = 0
        while (end := octets.find(b"\n", begin)) >= 0:
            self._hold(octets[begin:end])
            begin = end + 1
            yield from self._take(1)
        self._hold(octets[begin:])

    def end(self) -> Iterator[Piece]:
        """The file has ended; return its last line, if that has no end."""
        if self._held_bytes:
            yield from self._take(0)

    def _hold(self, octets: bytes) -> None:
        self._held_bytes += len(octets)
        if self._held_bytes > self._line_bytes_max:
            self._too_long = True
            self._held.clear()
        elif octets:
            self._held.append(octets)

    def _take(self, newline_bytes: int) -> Iterator[Piece]:
        octets = None if self._too_long else b"".join(self._held)
        offset = self._offset
        self._line += 1
        self._offset += self._held_bytes + newline_bytes
        self._held, self._held_bytes, self._too_long = [], 0, False
        if octets is None:
            yield Piece(self._line, offset, None)
            return
        if self._line == 1 and octets.startswith(_BOM):
            octets, offset = octets[len(_BOM) :], offset + len(_BOM)
        if octets.strip(_SPACE):
            yield Piece(self._line, offset, octets)


Part = msgspec.Raw | msgspec.UnsetType


class _Given(msgspec.Struct):
    custom_id: Part = msgspec.UNSET
    method: Part = msgspec.UNSET
    url: Part = msgspec.UNSET
    body: Part = msgspec.UNSET


_GIVEN = msgspec.json.Decoder(_Given)
_PROMPT = msgspec.json.Decoder(Prompt)
_LIST = msgspec.json.Decoder(list[msgspec.Raw])
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"')
_NO_BRACKETS = bytes(octet for octet in range(256) if octet not in b"[]{}")
_NOT_JSON = "This line is not parseable as valid JSON"


class _WrongError(Exception):
    def __init__(self, code: Code, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.param = code, param


def check_line(piece: Piece, endpoint: str, line_bytes_max: int) -> Good | JobError:
    """Say whether a line can be asked, and of what job, or the first thing that is wrong."""
    try:
        return _good(piece, endpoint, line_bytes_max)
    except _WrongError as wrong:
        return JobError(
            code=wrong.code.value, message=str(wrong), line=piece.line, param=wrong.param
        )


def _good(piece: Piece, endpoint: str, line_bytes_max: int) -> Good:
    if piece.octets is None:
        message = f"This line has more than {line_bytes_max} bytes."
        raise _WrongError(Code.INVALID_REQUEST, message)
    given = _given(piece.octets)
    custom_id = _custom_id(given.custom_id)
    if _text(given.method) != "POST":
        raise _WrongError(Code.INVALID_METHOD, "'method' must be 'POST'.", "method")
    if _text(given.url) != endpoint:
        message = f"The URL of this request is not the batch's endpoint, '{endpoint}'."
        raise _WrongError(Code.INVALID_URL, message, "url")
    assert isinstance(given.body, msgspec.Raw)
    body = bytes(given.body)
    prompt, model = _body(body)
    return Good(
        line=piece.line,
        custom_id=custom_id,
        model=model,
        # Where the same octets stand earlier in the line, those are as good.
        offset=piece.offset + piece.octets.index(body),
        length=len(body),
        sort_key=sort_key(prompt.parts),
        tokens=tokens_of(endpoint, prompt),
        inputs=_inputs(prompt.input) if endpoint == "/v1/embeddings" else 0,
    )


def _given(octets: bytes) -> _Given:
    if not octets.isascii():
        try:
            octets.decode()
        except UnicodeDecodeError as error:
            message = f"{_NOT_JSON}: it is no UTF-8 ({error.reason})."
            raise _WrongError(Code.INVALID_JSON_LINE, message) from None
    try:
        given = _GIVEN.decode(octets)
    except msgspec.ValidationError:
        message = "This line is JSON, but not an object."
        raise _WrongError(Code.INVALID_JSON_LINE, message) from None
    except (msgspec.DecodeError, RecursionError) as error:
        message = f"{_NOT_JSON}: {_short(error)}."
        raise _WrongError(Code.INVALID_JSON_LINE, message) from None
    if too_deep(octets):
        message = f"{_NOT_JSON}: it is nested too deep (more than {DEPTH_MAX} levels)."
        raise _WrongError(Code.INVALID_JSON_LINE, message)
    for name in _Given.__struct_fields__:
        if getattr(given, name) is msgspec.UNSET:
            raise _WrongError(Code.MISSING, f"Missing required parameter: '{name}'.", name)
    return given


def too_deep(octets: bytes) -> bool:
    """Say whether octets, which are JSON, have objects and lists too deep within each other."""
    if octets.count(b"[") + octets.count(b"{") <= DEPTH_MAX:
        return False
    depth = 0
    for octet in _STRING.sub(b"", octets).translate(None, _NO_BRACKETS):
        depth += 1 if octet in b"[{" else -1
        if depth > DEPTH_MAX:
            return True
    return False


def _custom_id(part: Part) -> str:
    custom_id = _text(part)
    if custom_id is None or not 0 < len(custom_id) <= CUSTOM_ID_CHARACTERS_MAX:
        message = f"'custom_id' must be a string of 1 to {CUSTOM_ID_CHARACTERS_MAX} characters."
        raise _WrongError(Code.INVALID_REQUEST, message, "custom_id")
    if "\0" in custom_id:
        raise _WrongError(Code.INVALID_REQUEST, "'custom_id' has a NUL character.", "custom_id")
    return custom_id


def _body(body: bytes) -> tuple[Prompt, str]:
    """Return what is known of a body, and its model."""
    try:
        prompt = _PROMPT.decode(body)
    except msgspec.ValidationError:
        message = "'body' must be a JSON object."
        raise _WrongError(Code.INVALID_REQUEST, message, "body") from None
    if prompt.model is msgspec.UNSET:
        message = "Missing required parameter: 'body.model'."
        raise _WrongError(Code.MISSING, message, "body.model")
    model = _text(prompt.model)
    if model is None or not 0 < len(model) <= MODEL_CHARACTERS_MAX or "\0" in model:
        message = "'body.model' must be a model's name."
        raise _WrongError(Code.INVALID_REQUEST, message, "body.model")
    if isinstance(prompt.stream, msgspec.Raw) and bytes(prompt.stream) not in {b"false", b"null"}:
        message = "A request of a batch cannot be streamed: leave 'stream' out."
        raise _WrongError(Code.INVALID_REQUEST, message, "body.stream")
    return prompt, model


class FileCheck:
    """The whole file: that it has lines, one model, not too many; the errors that are listed."""

    def __init__(self, lines_max: int) -> None:
        self._lines_max = lines_max
        self._inputs = 0
        self._wrong = 0
        self._too_many = False
        self.lines = 0  # that can be asked, and those that cannot
        self.model: str | None = None  # that of the first line
        self.problems: list[JobError] = []

    def add(self, checked: Good | JobError) -> bool:
        """Take the next line; say whether it is one of the job."""
        self.lines += 1
        if isinstance(checked, JobError):
            self.note(checked)
            return False
        if self.model is None:
            self.model = checked.model
        elif checked.model != self.model:
            self.note(
                JobError(
                    code=Code.MISMATCHED_MODEL.value,
                    message="All requests of a batch are for one model: "
                    f"'{checked.model}' is not '{self.model}', the first.",
                    line=checked.line,
                    param="body.model",
                )
            )
            return False
        self._inputs += checked.inputs
        return True

    @property
    def full(self) -> bool:
        """There are too many lines already: what else there is needs no reading."""
        return max(self.lines, self._inputs) > self._lines_max

    def note(self, problem: JobError) -> None:
        self._wrong += 1
        if len(self.problems) < ERRORS_MAX:
            self.problems.append(problem)

    def end(self, *, model_known: bool) -> tuple[JobError, ...]:
        """Say what is wrong with the file as a whole, beside its lines; nothing: it may run."""
        if self.full:
            what = "embedding inputs" if self.lines <= self._lines_max else "requests"
            message = f"The batch has more than {self._lines_max} {what}."
            return (JobError(code=Code.TOO_MANY.value, message=message),)
        if not self.lines:
            message = "The input file is empty: a batch has at least one request."
            return (JobError(code=Code.EMPTY.value, message=message),)
        problems = list(self.problems)
        if self.model is not None and not model_known:
            message = f"No replica or pool serves the model '{self.model}'."
            problems.insert(
                0,
                JobError(code=Code.MODEL_NOT_FOUND.value, message=message, param="body.model"),
            )
        if (more := self._wrong - len(self.problems)) > 0:
            message = f"{more} further lines are wrong and not listed."
            problems.append(JobError(code=Code.TOO_MANY_ERRORS.value, message=message))
        return tuple(problems)


def duplicate(line: int, custom_id: str) -> JobError:
    """Return the problem of a line whose id an earlier line has."""
    message = f"The custom_id '{custom_id}' is that of another request; each has its own."
    return JobError(code=Code.DUPLICATE.value, message=message, line=line, param="custom_id")


def _text(part: Part) -> str | None:
    try:
        return msgspec.json.decode(part, type=str) if isinstance(part, msgspec.Raw) else None
    except msgspec.DecodeError:
        return None


def _inputs(part: Part) -> int:
    """Return how many texts an embedding request has; a list of tokens is one."""
    try:
        items = _LIST.decode(part) if isinstance(part, msgspec.Raw) else []
    except msgspec.DecodeError:
        return 1
    return len(items) if items and bytes(items[0])[:1] in {b'"', b"["} else 1


def _short(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    return str(error).removeprefix("JSON is malformed: ")
