"""Chunked bodies without I/O: where they end, and what is in them (RFC 9112 §7.1).

Two readers of one grammar. A request's body is decoded, because routing reads it; a response's is
followed and relayed as it came, because nothing here needs what it says. Both are strict about line
ends and sizes, bound what belongs to the connection (extensions, trailers) and pass none of it on.
The verdict never depends on how the octets were cut into pieces.
"""

from __future__ import annotations

import re
from typing import Final

from proxy import errors
from proxy.core import limits
from proxy.core.pieces import Pieces

# RFC 9110 §5.6.2: token characters.
TCHAR: Final = b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
# Everything but control characters; horizontal tab is allowed in values.
NOT_CONTROL: Final = bytes(c for c in range(256) if (c >= 0x20 and c != 0x7F) or c == 0x09)
_SIZE: Final = rb"([0-9A-Fa-f]{1,%d})" % limits.CHUNK_SIZE_DIGITS_MAX
_CHUNK_LINE: Final = re.compile(_SIZE + rb"\r\n")
_CHUNK_LINE_EXTENDED: Final = re.compile(_SIZE + rb"((?:[ \t]*;[\t\x20-\x7e\x80-\xff]*)?)\r\n")


# A size line that can still become a right one, with the first half of its line end.
_SIZE_LINE_BYTES_MAX: Final = limits.CHUNK_SIZE_DIGITS_MAX + limits.CHUNK_EXTENSION_BYTES_MAX + 1


def well_formed_field(line: bytes) -> bool:
    """Whether a trailer line is a field at all (RFC 9112 §5): a token, a colon, no control."""
    name, colon, _ = line.partition(b":")
    return bool(
        colon and name and not name.translate(None, TCHAR) and not line.translate(None, NOT_CONTROL)
    )


class BadResponse(Exception):  # noqa: N818 - an outcome that the exchange translates
    """A replica's octets that are not one well-formed response."""


class ChunkedDecoder:
    """Decodes a chunked request body. Extensions and trailers are checked, bounded and dropped."""

    __slots__ = ("_buffer", "_left", "_pieces", "_state", "_trailer_bytes", "body_bytes")

    def __init__(self) -> None:
        self._buffer = b""
        self._pieces = Pieces()
        self._left = 0
        self._state = 0  # 0 size line, 1 data, 2 end of data, 3 trailer
        self._trailer_bytes = 0
        self.body_bytes = 0

    def feed(self, data: bytes) -> bytes | None:
        """Take octets. Return what follows the body once it has ended, else None.

        Raises `errors.BadBodyFramingError`.
        """
        data = self._buffer + data if self._buffer else data
        at = 0
        while True:
            if self._state == 1:
                part = data[at : at + self._left]
                self._pieces.add(part)
                self.body_bytes += len(part)
                self._left -= len(part)
                at += len(part)
                if self._left:
                    self._buffer = b""
                    return None
                self._state = 2
            if self._state == 2:
                end = data[at : at + 2]
                if not b"\r\n".startswith(end):
                    raise errors.BadBodyFramingError("a chunk is longer than its size")
                if len(end) < 2:
                    self._buffer = end
                    return None
                at += 2
                self._state = 0
            line_end = data.find(b"\r\n", at)
            if line_end < 0:
                self._buffer = self._hold(data[at:])
                return None
            if self._state == 0:
                self._size_line(data, at)
                at = line_end + 2
                continue
            if line_end == at:
                return data[at + 2 :]
            self._trailer(data[at:line_end])
            at = line_end + 2

    def _hold(self, rest: bytes) -> bytes:
        line_max = _SIZE_LINE_BYTES_MAX if self._state == 0 else limits.TRAILER_BYTES_MAX
        if len(rest) > line_max or b"\n" in rest:
            raise errors.BadBodyFramingError("a chunk line is malformed or too long")
        return rest

    def _size_line(self, data: bytes, at: int) -> None:
        match = _CHUNK_LINE_EXTENDED.match(data, at)
        if match is None or len(match[2]) > limits.CHUNK_EXTENSION_BYTES_MAX:
            raise errors.BadBodyFramingError("a chunk size is malformed")
        self._left = int(match[1], 16)
        self._state = 1 if self._left else 3

    def _trailer(self, line: bytes) -> None:
        self._trailer_bytes += len(line) + 2
        if self._trailer_bytes > limits.TRAILER_BYTES_MAX or not well_formed_field(line):
            raise errors.BadBodyFramingError("a trailer field is malformed or too long")

    def body(self) -> bytes:
        """Return the decoded body; once, after `feed` has returned octets."""
        return self._pieces.take()


def decode_followed(decoder: ChunkedDecoder, data: bytes) -> bytes:
    """Return the data in further octets of a response that a `ChunkFollower` has found right."""
    try:
        decoder.feed(data)
    except errors.ProxyError as error:  # cannot be: both read the same grammar
        raise BadResponse(error.message) from error
    return decoder.body()


class ChunkFollower:
    """Follows a chunked response so that its octets can be relayed as they are.

    Nothing is decoded: only sizes are read. A size line is passed on once it is whole and well
    formed; chunk extensions and trailers, which belong to one connection, are left out. The last
    chunk is passed on only with the end of the body, so that up to there another chunk may follow.
    """

    __slots__ = (
        "_data_left",
        "_held",
        "_in_trailer",
        "_line_end_left",
        "_trailer_bytes",
        "ended",
    )

    def __init__(self) -> None:
        self._held = b""  # an incomplete line
        self._data_left = 0  # octets of data still to come in the open chunk
        self._line_end_left = 0  # octets of the line end after it
        self._in_trailer = False
        self._trailer_bytes = 0
        self.ended = False

    @property
    def chunk_left(self) -> tuple[int, int]:
        """What a reader of the relayed octets still expects of the open chunk: data, line end."""
        return self._data_left, self._line_end_left

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        """Return the octets to relay and those after the end. Raises `BadResponse`."""
        if not (self._held or self._data_left or self._line_end_left or self._in_trailer):
            match = _CHUNK_LINE.match(data)  # mostly what comes is just one chunk
            if match is not None and data.endswith(b"\r\n"):
                chunk_size = int(match[1], 16)
                if chunk_size and match.end() + chunk_size + 2 == len(data):
                    return data, b""
        if self._held:
            data, self._held = self._held + data, b""
        size = len(data)
        at = self._finish_chunk(data, 0)
        start = 0  # where the octets not yet relayed begin
        pieces: list[bytes] = []
        while at < size:
            match = None if self._in_trailer else _CHUNK_LINE.match(data, at)
            chunk_size = int(match[1], 16) if match is not None else 0
            if match is None or not chunk_size:
                odd = self._odd_line(data, at)
                if odd is None:  # incomplete: hold it back
                    self._held = data[at:]
                    break
                pieces += (data[start:at], odd[0])
                at = start = odd[1]
                if self.ended:
                    return b"".join(pieces), data[at:]
            else:
                self._open_chunk(chunk_size)
                at = match.end()
            at = self._finish_chunk(data, at)
        if not pieces:
            return (data if at == size else data[:at]), b""
        pieces.append(data[start:at])
        return b"".join(pieces), b""

    def _open_chunk(self, chunk_size: int) -> None:
        if chunk_size:
            self._data_left, self._line_end_left = chunk_size, 2
        else:
            self._in_trailer = True

    def _finish_chunk(self, data: bytes, at: int) -> int:
        """Pass over the open chunk's octets from `at`; return where they end."""
        left = self._data_left
        if left:
            room = len(data) - at
            if left >= room:
                self._data_left = left - room
                return len(data)
            self._data_left = 0
            at += left
        if self._line_end_left:
            due = b"\r\n"[-self._line_end_left :]
            got = data[at : at + len(due)]
            if got != due and not due.startswith(got):
                raise BadResponse("a chunk is longer than its size")
            self._line_end_left -= len(got)
            at += len(got)
        return at

    def _odd_line(self, data: bytes, at: int) -> tuple[bytes, int] | None:
        """Read a line that is not a plain size: extension, trailer, or the end of the body.

        Returns what to relay instead of it and where it ends; None when it is incomplete.
        """
        end = data.find(b"\r\n", at)
        if end < 0:
            rest = data[at:]
            if len(rest) > limits.TRAILER_BYTES_MAX or b"\n" in rest:
                raise BadResponse("a chunk line is malformed or too long")
            return None
        if end + 1 - at > limits.TRAILER_BYTES_MAX:  # as long as what is held above may become
            raise BadResponse("a chunk line is too long")
        if self._in_trailer:
            if end == at:
                self.ended = True
                return b"0\r\n\r\n", end + 2
            self._trailer_bytes += end + 1 - at
            if self._trailer_bytes > limits.TRAILER_BYTES_MAX:
                raise BadResponse("the trailers are too long")
            if not well_formed_field(data[at:end]):
                raise BadResponse("a trailer field is malformed")
            return b"", end + 2
        match = _CHUNK_LINE_EXTENDED.match(data, at)
        if match is None:
            raise BadResponse("a chunk size is malformed")
        chunk_size = int(match[1], 16)
        self._open_chunk(chunk_size)
        return match[1] + b"\r\n" if chunk_size else b"", end + 2
