"""An engine's error, told as the client's own library reads errors.

Engines say what went wrong in half a dozen shapes, by version and by the layer that refused: flat
objects, FastAPI's `detail`, nested ones with a number for a code, `{"error": "Unauthorized"}`,
plain text, a web page of something between. OpenAI's clients read `error.message`, `.type`,
`.param` and `.code`, the last a string or null; Anthropic's read `error.type` and `error.message`
beside `"type": "error"`. What already has the client's shape is kept octet for octet, the status
always.

What may be sent again follows one rule: we say aloud what the official clients do unasked (408,
409, 429 and 5xx), so that others know it too, save where the same request must fail again (501,
505 and every other 4xx; 413 goes unsaid, as in our own). A 500 is among the former, though the
engine may have computed: it is what an engine says as it dies, a repeat goes elsewhere, and whether
a second computation is worth it is the client's to say, never ours. What an engine itself says
about repeating is kept.
"""

from __future__ import annotations

import math
import re
from email.utils import mktime_tz, parsedate_tz
from http import HTTPStatus
from typing import Final

import msgspec
import orjson

from proxy import errors
from proxy.core import limits
from proxy.errors import Dialect

Field = tuple[bytes, bytes]

_REPEATED: Final = frozenset((408, 409, 429))
_HOPELESS: Final = frozenset((501, 505))
_BUSY: Final = frozenset((429, 503, 529))  # 529: Anthropic's word for overload
_WAIT_S_MAX: Final = errors.RETRY_AFTER_S_MAX
_NUMBER: Final = re.compile(rb"[0-9]{1,20}(?:\.[0-9]{1,20})?")
# The three forms of RFC 9110 §5.6.7 begin with the name of a day.
_DATE: Final = re.compile(rb"(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun)[a-z]{0,6},? [\x20-\x7e]{10,40}")
_TITLE: Final = re.compile(r"<title[^<>]*>([^<]*)", re.IGNORECASE)
_TAG: Final = re.compile(r"<[^<>]*>")
_PHRASES: Final = {status.value: status.phrase for status in HTTPStatus}
# What says something about the octets of a body.
_OF_THE_BODY: Final = frozenset(
    (b"content-type", b"etag", b"content-md5", b"digest", b"content-digest", b"repr-digest")
)
_OF_REPEATS: Final = frozenset((b"retry-after", b"retry-after-ms", b"x-should-retry"))


class _Told(msgspec.Struct):
    """What an engine's error says, whatever its shape."""

    message: str = ""
    kind: str | None = None
    param: str | None = None
    code: str | None = None


# --- the body ------------------------------------------------------------------------------------


def client_body(status: int, content_type: bytes, body: bytes, dialect: Dialect) -> bytes:
    """Return the body that the client should get; the same object when it is right already."""
    value = _json_of(body)
    if isinstance(value, dict) and _has_shape(value, dialect):
        return body
    told = _read(value)
    message = told.message.strip() or _text_of(content_type, body, value)
    message = message or f"the engine answered {status}{_phrase(status)} and said no more"
    if len(message) > limits.ENGINE_MESSAGE_CHARS_MAX:
        message = message[: limits.ENGINE_MESSAGE_CHARS_MAX] + "…"
    if dialect is Dialect.ANTHROPIC:
        kind = told.kind if told.kind in errors.ANTHROPIC_TYPES else errors.anthropic_type(status)
        return orjson.dumps({"type": "error", "error": {"type": kind, "message": message}})
    kind = told.kind if told.kind in errors.OPENAI_TYPES else errors.openai_type(status)
    error = {"message": message, "type": kind, "param": told.param, "code": told.code}
    return orjson.dumps({"error": error})


def _json_of(body: bytes) -> object:
    try:
        value: object = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    return value


def _has_shape(value: dict[str, object], dialect: Dialect) -> bool:
    """Whether a client of this dialect finds every member where, and as what, it looks for it."""
    error = value.get("error")
    if not isinstance(error, dict):
        return False
    if not isinstance(error.get("message"), str) or not isinstance(error.get("type"), str):
        return False
    if dialect is Dialect.ANTHROPIC:
        return value.get("type") == "error"
    return all(isinstance(error.get(name), str | None) for name in ("param", "code"))


def _read(value: object) -> _Told:
    """Find what is said in a JSON body; what is not understood stays empty."""
    if isinstance(value, str):
        return _Told(value)
    if not isinstance(value, dict):
        return _Told()
    error, detail = value.get("error"), value.get("detail")
    if isinstance(error, dict):
        return _read_members(error)
    if isinstance(error, str | list):
        return _Told(_words(error))
    if isinstance(detail, dict):
        inner = detail.get("error")
        return _read_members(inner if isinstance(inner, dict) else detail)
    if isinstance(detail, str | list):
        return _Told(_words(detail), param=_place_of_first(detail))
    return _read_members(value)


def _read_members(error: dict[str, object]) -> _Told:
    kind, param, code = error.get("type"), error.get("param"), error.get("code")
    if isinstance(code, int) and not isinstance(code, bool):
        code = str(code)
    return _Told(
        _words(error.get("message")),
        kind if isinstance(kind, str) else None,
        param if isinstance(param, str) else None,
        code if isinstance(code, str) else None,
    )


def _words(said: object) -> str:
    """Return a text, or the texts of a list, such as FastAPI's list of what is invalid."""
    if isinstance(said, str):
        return said
    if not isinstance(said, list):
        return ""
    lines: list[str] = []
    for item in said:
        if isinstance(item, str):
            lines.append(item)
        elif isinstance(item, dict):
            text = item.get("msg", item.get("message"))
            if isinstance(text, str):
                place = _place(item)
                lines.append(f"{place}: {text}" if place else text)
    return "; ".join(lines)


def _place_of_first(said: object) -> str | None:
    first = said[0] if isinstance(said, list) and said else None
    return (_place(first) or None) if isinstance(first, dict) else None


def _place(item: dict[str, object]) -> str:
    """Return where in the request something is invalid, as a dotted path."""
    found = item.get("loc")
    steps = found if isinstance(found, list) else []
    names = [str(step) for step in steps if isinstance(step, str | int)]
    return ".".join(names[1:] if names[:1] == ["body"] else names)


def _text_of(content_type: bytes, body: bytes, value: object) -> str:
    """Return what a body says that is no JSON object with words in it."""
    if value in ({}, [], ""):
        return ""
    text = body.decode("utf-8", "replace").strip()
    if content_type[:9].lower() == b"text/html" or text.startswith("<"):
        title = _TITLE.search(text)
        return " ".join((title[1] if title else _TAG.sub(" ", text)).split())
    return text


def _phrase(status: int) -> str:
    return f" {_PHRASES[status]}" if status in _PHRASES else ""


# --- the fields ----------------------------------------------------------------------------------


def client_fields(status: int, fields: list[Field], now_unix_s: float) -> list[Field]:
    """Return the fields of an engine's error answer as the client should get them."""
    kept = [field for field in fields if field[0] not in _OF_REPEATS]
    given = dict(reversed(fields))  # the first of each name
    said = given.get(b"x-should-retry")
    if said is None:
        said = _may_be_repeated(status)
    if said is not None:
        kept.append((b"x-should-retry", said))
    kept += _waits(status, given, now_unix_s, hopeless=said == b"false")
    if status == 401 and b"www-authenticate" not in given:  # RFC 9110 §11.6.1
        kept.append((b"www-authenticate", b"Bearer"))
    return kept


def with_our_body(fields: list[Field]) -> list[Field]:
    """Return the fields for a body that is JSON of ours, whatever it was before."""
    kept = [field for field in fields if field[0] not in _OF_THE_BODY]
    return [*kept, (b"content-type", b"application/json")]


def _may_be_repeated(status: int) -> bytes | None:
    if status < 408 or status == 413:
        return None
    again = status in _REPEATED or (status >= 500 and status not in _HOPELESS)
    return b"true" if again else b"false"


def _waits(
    status: int, given: dict[bytes, bytes], now_unix_s: float, *, hopeless: bool
) -> list[Field]:
    """Return how long to wait, never longer than the clients would: above that they give up."""
    wait_s = _seconds(given.get(b"retry-after"), now_unix_s)
    wait_ms = _count(given.get(b"retry-after-ms"), _WAIT_S_MAX * 1000)
    if not wait_s and wait_ms:
        wait_s = -(-wait_ms // 1000)
    if not wait_s and status in _BUSY and not hopeless:
        wait_s = 1
    waits: list[Field] = [(b"retry-after", b"%d" % wait_s)] if wait_s else []
    if wait_ms:
        waits.append((b"retry-after-ms", b"%d" % wait_ms))
    return waits


def _seconds(value: bytes | None, now_unix_s: float) -> int:
    """Return a Retry-After in whole seconds (RFC 9110 §10.2.3); 0 when it says nothing useful."""
    if value is None or not _DATE.fullmatch(value):
        return _count(value, _WAIT_S_MAX)
    parsed = parsedate_tz(value.decode("ascii"))
    if parsed is None:
        return 0
    try:
        left_s = mktime_tz(parsed) - now_unix_s
    except (ValueError, OverflowError):  # a date that no calendar has
        return 0
    return math.ceil(min(left_s, _WAIT_S_MAX)) if left_s > 0 else 0


def _count(value: bytes | None, most: int) -> int:
    """Return a positive number, rounded up and at most `most`; 0 for anything else."""
    if value is None or not _NUMBER.fullmatch(value):
        return 0
    return math.ceil(min(float(value), most))
