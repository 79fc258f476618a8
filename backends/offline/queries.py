"""What requests say in their query and body, checked: errors name the parameter."""

from __future__ import annotations

import asyncio
import hashlib
import re
from typing import Annotated

import msgspec
from aiohttp import web
from msgspec import Meta

from backends.offline.api_errors import ApiError

METADATA_MAX = 16
IDEMPOTENCY_CHARACTERS_MAX = 255
BODY_BYTES_MAX = 64 * 1024
ID_CHARACTERS_MAX = 128
BODY_S_MAX = 60.0
# OpenAI's bounds of an expiry: an hour to 30 days.
EXPIRES_S_MIN, EXPIRES_S_MAX = 3600, 30 * 86400

_MetadataKey = Annotated[str, Meta(max_length=64)]
_MetadataValue = Annotated[str, Meta(max_length=512)]


class ExpiresAfter(msgspec.Struct, frozen=True):
    """When a file goes."""

    seconds: Annotated[int, Meta(ge=EXPIRES_S_MIN, le=EXPIRES_S_MAX)]
    anchor: str = "created_at"


class BatchWish(msgspec.Struct, frozen=True):
    """The body of a request for a new batch."""

    input_file_id: Annotated[
        str, Meta(min_length=1, max_length=ID_CHARACTERS_MAX, pattern=r"^[^\x00]*$")
    ]
    endpoint: str
    completion_window: str
    metadata: dict[_MetadataKey, _MetadataValue] | None = None
    output_expires_after: ExpiresAfter | None = None


_PATH = re.compile(r"\$\.(\w+(?:\.\w+)*)")
_MISSING = re.compile(r"missing required field `(\w+)`")
_WISH = msgspec.json.Decoder(BatchWish)


async def batch_wish(request: web.Request) -> BatchWish:
    """Return what kind of batch is wished for. Raises `ApiError`."""
    if (request.content_length or 0) > BODY_BYTES_MAX:
        raise ApiError(413, f"The body has more than {BODY_BYTES_MAX} bytes.")
    body = b""
    try:
        async with asyncio.timeout(BODY_S_MAX):
            while len(body) <= BODY_BYTES_MAX and (more := await request.content.readany()):
                body += more
    except TimeoutError:
        raise ApiError(408, f"The body did not come within {BODY_S_MAX:g} s.") from None
    if len(body) > BODY_BYTES_MAX:
        raise ApiError(413, f"The body has more than {BODY_BYTES_MAX} bytes.")
    try:
        wish = _WISH.decode(body)
    except msgspec.ValidationError as error:
        raise _refusal(str(error)) from error
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise ApiError(400, f"The body is no JSON: {error}") from error
    if wish.metadata is not None and len(wish.metadata) > METADATA_MAX:
        raise ApiError(400, f"More than {METADATA_MAX} entries.", param="metadata")
    if wish.metadata is not None and "\0" in "".join([*wish.metadata, *wish.metadata.values()]):
        raise ApiError(400, "A NUL character.", param="metadata")
    if wish.output_expires_after is not None:
        _check_anchor(wish.output_expires_after.anchor, "output_expires_after")
    return wish


def _refusal(said: str) -> ApiError:
    """Say as OpenAI does what msgspec finds wrong: '… field `endpoint`', '… - at `$.metadata`'."""
    reason, _, place = said.partition(" - at ")
    path = _PATH.search(place)
    names = [path[1]] if path else []
    missing = _MISSING.search(reason)
    if missing:
        names.append(missing[1])
        reason = f"Missing required parameter: '{'.'.join(names)}'."
    return ApiError(400, reason, param=".".join(names) or None)


def idempotency_key(request: web.Request) -> str:
    """Return the key that makes several attempts one, "" where there is none."""
    key = request.headers.get("Idempotency-Key", "")
    if len(key) > IDEMPOTENCY_CHARACTERS_MAX:
        message = f"An Idempotency-Key has up to {IDEMPOTENCY_CHARACTERS_MAX} characters."
        raise ApiError(400, message)
    return key


def id_of(kind: str, owner: str, key: str) -> str:
    """Return the id that what `owner` makes with this key has, whichever attempt makes it."""
    octets = f"{owner}\0{key}".encode("utf-8", "surrogateescape")
    return kind + hashlib.blake2b(octets, digest_size=12, person=b"doherty once").hexdigest()


def expires_after(fields: dict[str, str]) -> int | None:
    """Return the seconds that the fields of an upload grant it, if they do. Raises `ApiError`."""
    anchor = fields.get("expires_after[anchor]")
    seconds = fields.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return None
    _check_anchor(anchor or "", "expires_after")
    try:
        return msgspec.convert({"seconds": seconds}, ExpiresAfter, strict=False).seconds
    except msgspec.ValidationError as error:
        message = f"seconds must be a number from {EXPIRES_S_MIN} to {EXPIRES_S_MAX}."
        raise ApiError(400, message, param="expires_after") from error


def _check_anchor(anchor: str, param: str) -> None:
    if anchor != "created_at":
        raise ApiError(400, "The only anchor is 'created_at'.", param=param)


def limit_of(request: web.Request, usual: int, most: int) -> int:
    """Return how many of a list are asked for. Raises `ApiError`."""
    return int(number_of(request, "limit", usual, 1, most))


def number_of(request: web.Request, name: str, usual: float, least: float, most: float) -> float:
    """Return a number of the query. Raises `ApiError`."""
    text = request.query.get(name)
    if text is None:
        return usual
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not least <= number <= most:
        raise ApiError(400, f"{name} must be a number from {least:g} to {most:g}.", param=name)
    return number


def after_of(request: web.Request) -> str | None:
    """Return the id after which a page begins. Raises `ApiError`."""
    after = request.query.get("after")
    if after is not None and len(after) > ID_CHARACTERS_MAX:
        raise ApiError(400, "No id is that long.", param="after")
    return after or None
