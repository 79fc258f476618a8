"""An upload as multipart/form-data (RFC 7578), read once and never held.

The parts come in the order that the client chose: `purpose` may stand after the file, so whoever
takes the file has to begin before it knows that. When a file expires must stand before it, as the
official clients have it. Everything but the file is a few words and bounded.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import msgspec
from aiohttp import BodyPartReader, web
from aiohttp.http_exceptions import HttpProcessingError

from backends.offline.api_errors import ApiError

FIELD_BYTES_MAX = 1024
PARTS_MAX = 16
PIECE_BYTES = 256 * 1024
FILENAME_CHARACTERS_MAX = 255
SILENCE_S_MAX = 60.0
# On the whole, after a minute: less is no upload but somebody who wants to hold a place.
BYTES_PER_S_MIN = 4 * 1024

T = TypeVar("T")


# Takes a file, by name, with the fields that came before it; returns the id that it has now.
Take = Callable[[str, dict[str, str], AsyncIterator[bytes]], Awaitable[str]]


class Upload(msgspec.Struct):
    """What a form says beside the content of its file."""

    fields: dict[str, str]
    file_id: str | None = None  # as `take` called it


async def read_upload(request: web.Request, take: Take) -> Upload:
    """Read the form; `take` is given the file's name, what fields came before it, and its octets.

    Raises `ApiError` for what is no form of a file. `take` may have been called by then: what it
    took is the caller's to drop.
    """
    if request.content_type != "multipart/form-data":
        raise ApiError(400, "A file is uploaded as multipart/form-data.", param="file")
    upload = Upload({})
    try:
        await _read(request, take, upload)
    except (ValueError, AssertionError, HttpProcessingError, web.HTTPBadRequest) as error:
        # Whatever aiohttp finds wrong with the form, it says in one of these.
        raise ApiError(400, f"The form cannot be read: {str(error)[:200]}") from error
    if upload.file_id is None:
        raise ApiError(400, "'file' is a required property", param="file")
    return upload


async def _read(request: web.Request, take: Take, upload: Upload) -> None:
    reader = await request.multipart()
    parts = 0
    while (part := await _in_time(reader.next())) is not None:
        parts += 1
        if parts > PARTS_MAX or not isinstance(part, BodyPartReader):
            raise ApiError(400, f"The form has more than {PARTS_MAX} parts, or forms in it.")
        if part.name == "file":
            if upload.file_id is not None:
                raise ApiError(400, "The form has two files; upload one at a time.", param="file")
            upload.file_id = await take(
                clean_name(part.filename or "file"), upload.fields, _pieces(part)
            )
        elif part.name and part.name.startswith("expires_after") and upload.file_id is not None:
            message = "Say when the file expires before its content."
            raise ApiError(400, message, param="expires_after")
        else:
            upload.fields[part.name or ""] = await _in_time(_text(part))


async def _pieces(part: BodyPartReader) -> AsyncIterator[bytes]:
    clock, total = asyncio.get_running_loop(), 0
    begun_s = clock.time()
    while piece := await _in_time(part.read_chunk(PIECE_BYTES)):
        total += len(piece)
        if too_slow(total, clock.time() - begun_s):
            raise ApiError(408, f"Less than {BYTES_PER_S_MIN} bytes a second came.", param="file")
        yield bytes(piece)


def too_slow(total_bytes: int, taken_s: float) -> bool:
    """Say whether an upload holds a place more than it uploads."""
    return total_bytes < (taken_s - SILENCE_S_MAX) * BYTES_PER_S_MIN


async def _in_time(reading: Coroutine[Any, Any, T]) -> T:
    """Wait for more of the form; whoever sends nothing for so long is taken to have gone."""
    try:
        async with asyncio.timeout(SILENCE_S_MAX):
            return await reading
    except TimeoutError:
        raise ApiError(408, f"Nothing more came for {SILENCE_S_MAX:g} s.") from None


async def _text(part: BodyPartReader) -> str:
    octets = b""
    while piece := await part.read_chunk(FIELD_BYTES_MAX):
        octets += piece
        if len(octets) > FIELD_BYTES_MAX:
            message = f"Over {FIELD_BYTES_MAX} bytes."
            raise ApiError(400, message, param=(part.name or "")[:64])
    return octets.decode("utf-8", "replace")


def clean_name(name: str) -> str:
    """Return a file's name without what no database or terminal should be given."""
    kept = "".join(c for c in name if c.isprintable())[:FILENAME_CHARACTERS_MAX]
    return kept.encode("utf-8", "replace").decode() or "file"
