"""One streamed answer, byte by byte: HTTP/1.1 framing around server-sent events.

A load test that spends a millisecond on each chunk measures itself. So this decodes JSON only where
it must: until the first token has been seen, and in events that are not plain tokens (usage,
errors). For the rest it finds the ends of events and counts.

Sans I/O: fed with bytes and the time they came at. What is not plainly an HTTP/1.1 answer with a
well-framed body raises `WireError`; the caller closes the connection.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import orjson

HEAD_BYTES_MAX = 64 * 1024
BODY_BYTES_MAX = (
    4 * 1024 * 1024
)  # of an answer that is no stream; the beginning is kept, the rest is read past
EVENT_BYTES_MAX = 16 * 1024 * 1024
CHUNK_LINE_BYTES_MAX = 1024
DETAIL_CHARACTERS_MAX = 300

_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9][0-9])(?: [^\r\n]*)?")
_CHUNK_SIZE = re.compile(rb"[0-9A-Fa-f]{1,15}")
_LENGTH = re.compile(rb"[0-9]{1,15}")
_TOKEN_MARKS = (b'"choices":[{', b'"choices": [{')


class WireError(Exception):
    """The answer breaks the protocol."""


class AnswerReader:
    """Reads one answer; `complete` when the connection is at the start of the next one."""

    __slots__ = (
        "_event_rest",
        "_held",
        "_last_token_event",
        "_left",
        "_read",
        "body",
        "complete",
        "content_events",
        "done_seen",
        "first_content_s",
        "headers",
        "keep_alive",
        "last_content_s",
        "status",
        "stream_error",
        "streamed",
        "usage",
    )

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.keep_alive = True
        self.complete = False
        self.streamed = False
        self.body = b""  # of an answer that is no stream
        self.first_content_s = 0.0
        self.last_content_s = 0.0
        self.content_events = 0
        self.done_seen = False
        self.stream_error: str | None = None
        self.usage: dict[str, Any] | None = None
        self._held = b""
        self._left = 0
        self._event_rest = b""
        self._last_token_event = b""
        self._read: Callable[[bytes, float], bytes] = self._read_head

    def feed(self, data: bytes, now_s: float) -> bool:
        """Take the next bytes. Returns whether the answer is complete."""
        if self._held:
            data = self._held + data
            self._held = b""
        while data and not self.complete:
            data = self._read(data, now_s)
        if data:
            raise WireError("bytes after the end of the answer")
        return self.complete

    def feed_end(self) -> bool:
        """Note that the server closed the connection. Returns whether that completes the answer."""
        if self._read == self._read_to_end:
            self._finish()
        self.keep_alive = False
        return self.complete

    # Each reader returns the bytes that it leaves for the next; what it must see again, it holds.

    def _read_head(self, data: bytes, _now_s: float) -> bytes:
        end = data.find(b"\r\n\r\n")
        if end > HEAD_BYTES_MAX or (end < 0 and len(data) > HEAD_BYTES_MAX):
            raise WireError(f"head over {HEAD_BYTES_MAX} bytes")
        if end < 0:
            self._held = data
            return b""
        status_line, *lines = data[:end].split(b"\r\n")
        match = _STATUS_LINE.fullmatch(status_line)
        if not match:
            raise WireError("not an HTTP/1.1 answer")
        status = int(match[2])
        if status == 101:
            raise WireError("the server switched protocols unasked")
        if status < 200:  # RFC 9110 §15.2: interim answers precede the final one
            return data[end + 4 :]
        self.status = status
        self.headers = {}
        for line in lines:
            name, colon, value = line.partition(b":")
            if not colon:
                raise WireError("header line without a colon")
            self.headers[name.decode("latin-1").lower()] = value.strip().decode("latin-1")
        tokens = self.headers.get("connection", "").lower()
        self.keep_alive = "close" not in tokens and (match[1] == b"1" or "keep-alive" in tokens)
        self._choose_framing()
        return data[end + 4 :]

    def _choose_framing(self) -> None:
        """RFC 9112 §6.3, for an answer to POST or GET."""
        media_type = self.headers.get("content-type", "").lower()
        self.streamed = self.status == 200 and media_type.startswith("text/event-stream")
        encoding = self.headers.get("transfer-encoding")
        length = self.headers.get("content-length")
        if encoding is not None:
            if encoding.lower() != "chunked":
                raise WireError(f"unknown transfer-encoding {encoding[:40]!r}")
            self._read = self._read_chunk_size
        elif self.status in (204, 304):
            self._finish()
        elif length is not None:
            if not _LENGTH.fullmatch(length.encode("latin-1")):
                raise WireError("content-length is not a number")
            self._left = int(length)
            self._read = self._read_length
            if self._left == 0:
                self._finish()
        else:
            self.keep_alive = False
            self._read = self._read_to_end

    def _read_length(self, data: bytes, now_s: float) -> bytes:
        piece = data[: self._left]
        self._left -= len(piece)
        self._take(piece, now_s)
        if self._left == 0:
            self._finish()
        return data[len(piece) :]

    def _read_to_end(self, data: bytes, now_s: float) -> bytes:
        self._take(data, now_s)
        return b""

    def _read_chunk_size(self, data: bytes, _now_s: float) -> bytes:
        end = data.find(b"\r\n")
        if end < 0:
            if len(data) > CHUNK_LINE_BYTES_MAX:
                raise WireError("chunk size line too long")
            self._held = data
            return b""
        size = data[:end].partition(b";")[0].strip()
        if not _CHUNK_SIZE.fullmatch(size):
            raise WireError("chunk size is not a number")
        self._left = int(size, 16)
        self._read = self._read_chunk if self._left else self._read_trailers
        return data[end + 2 :]

    def _read_chunk(self, data: bytes, now_s: float) -> bytes:
        piece = data[: self._left]
        self._left -= len(piece)
        self._take(piece, now_s)
        if self._left == 0:
            self._read = self._read_chunk_end
        return data[len(piece) :]

    def _read_chunk_end(self, data: bytes, _now_s: float) -> bytes:
        if len(data) < 2:
            self._held = data
            return b""
        if data[:2] != b"\r\n":
            raise WireError("chunk longer than its size")
        self._read = self._read_chunk_size
        return data[2:]

    def _read_trailers(self, data: bytes, _now_s: float) -> bytes:
        end = data.find(b"\r\n")
        if end < 0:
            if len(data) > HEAD_BYTES_MAX:
                raise WireError("trailers too long")
            self._held = data
            return b""
        if end == 0:
            self._finish()
        return data[end + 2 :]

    def _finish(self) -> None:
        self.complete = True
        if self.usage is None and self._last_token_event:
            self._decode(self._last_token_event, self.last_content_s)

    # Body bytes: events of a stream, or the text of an error.

    def _take(self, piece: bytes, now_s: float) -> None:
        if not self.streamed:
            if len(self.body) < BODY_BYTES_MAX:
                self.body += piece
            return
        text = self._event_rest + piece if self._event_rest else piece
        if b"\r" in text:
            text = text.replace(b"\r\n", b"\n")
        start = 0
        while (end := text.find(b"\n\n", start)) >= 0:
            if end > start:
                self._event(text[start:end], now_s)
            start = end + 2
        self._event_rest = text[start:]
        if len(self._event_rest) > EVENT_BYTES_MAX:
            raise WireError(f"event over {EVENT_BYTES_MAX} bytes")

    def _event(self, event: bytes, now_s: float) -> None:
        if event.startswith(b"data: ") and b"\n" not in event:
            data = event[6:]
        else:
            lines = [line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:")]
            if not lines:
                return  # a comment, such as a keep-alive
            data = b"\n".join(lines)
        if data == b"[DONE]":
            self.done_seen = True
        elif self.first_content_s and (_TOKEN_MARKS[0] in data or _TOKEN_MARKS[1] in data):
            self.content_events += 1
            self.last_content_s = now_s
            self._last_token_event = data
        else:
            self._decode(data, now_s)

    def _decode(self, data: bytes, now_s: float) -> None:
        try:
            value = orjson.loads(data)
        except orjson.JSONDecodeError as error:
            raise WireError("event is not JSON") from error
        if not isinstance(value, dict):
            raise WireError("event is not a JSON object")
        if value.get("error"):
            self.stream_error = error_text(value)
        if isinstance(value.get("usage"), dict):
            self.usage = value["usage"]
        if not self.first_content_s and _has_content(value.get("choices")):
            self.content_events += 1
            self.first_content_s = self.last_content_s = now_s


def _has_content(choices: Any) -> bool:
    """Return whether a chunk carries a token; the first one of a chat has only the role."""
    for choice in choices if isinstance(choices, list) else ():
        if not isinstance(choice, dict):
            continue
        if choice.get("text") or choice.get("finish_reason"):
            return True
        delta = choice.get("delta")
        if isinstance(delta, dict) and any(
            value for name, value in delta.items() if name != "role"
        ):
            return True
    return False


def error_text(value: Any) -> str:
    """Return the message of an error in any of the engines' shapes, for people, on one line."""
    error = value.get("error", value) if isinstance(value, dict) else value
    if isinstance(error, dict):
        error = error.get("message", error)
    return " ".join(str(error).split())[:DETAIL_CHARACTERS_MAX]
