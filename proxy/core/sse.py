"""How a cut event stream tells its reader why: one last event, only where it cannot be misread.

An event is taken only when its blank line has come; a reader drops what it holds of an event when
the connection ends. So an error can be appended between two events. Within one it could only be
appended to that event's text, which a client would then take for data: there nothing is added, and
the missing end of the body is all that tells. Engines write an event and its chunk in one piece, so
a cut within an event is rare.

A stream may also begin before there is anything to tell: with comments, while its request waits.
"""

from __future__ import annotations

import re
from typing import Final

from proxy.core import limits
from proxy.core.http1 import ResponseHead
from proxy.core.routes import PromptKind, Route

# A size line, and the end of the stream's data before it.
_SIZE_LINE: Final = re.compile(rb"(?:\A|\r\n)[0-9A-Fa-f]{1,16}\r\n\Z")
# A line end that is all the data of its chunk so far: what stands before it is framing.
_LONE_LINE_END: Final = re.compile(rb"(?:\A|\r\n)[0-9A-Fa-f]{1,16}\r\n\r?\n\Z")


def chunk_of(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


# What a reader of events passes over; it tells whoever is between that the stream lives.
COMMENT: Final = chunk_of(b": waiting\n\n")

# The beginning of a line that says which event this is, or of one that is an event's data.
_EVENT_OR_DATA: Final = re.compile(rb"(?:\A|[\r\n])(?:event:[ ]?([^\r\n]*)(?=[\r\n])|(data:))")
_LINE_BYTES_KEPT: Final = 64  # no event that is looked for has a longer line


_STREAMED: Final = (
    PromptKind.CHAT,
    PromptKind.COMPLETION,
    PromptKind.RESPONSES,
    PromptKind.ANTHROPIC,
)


class Openings:
    """Reads a stream as it comes, until the events that open it are over.

    Some engines open a stream while the prompt still waits: those events say nothing of it. JSON
    has no line end within a string, so no text can look like an event's name.
    """

    __slots__ = ("_left_bytes", "_line", "_named", "_names")

    def __init__(self, names: tuple[bytes, ...]) -> None:
        self._names = names
        self._line = b""  # the beginning of a line that has not ended
        self._named = False
        self._left_bytes = limits.OPENINGS_BYTES_MAX

    def over(self, octets: bytes) -> bool:
        """Take octets, chunk framing included; return whether another event has begun."""
        self._left_bytes -= len(octets)
        if self._left_bytes < 0:
            return True
        octets = self._line + octets
        for match in _EVENT_OR_DATA.finditer(octets):
            if match[2]:
                if not self._named:
                    return True  # events without names: all are alike
            elif match[1].strip() in self._names:
                self._named = True
            else:
                return True
        begin = max(octets.rfind(b"\n"), octets.rfind(b"\r"), 0)
        self._line = octets[begin : begin + _LINE_BYTES_KEPT]
        return False


def may_begin_early(route: Route) -> bool:
    """Whether an answer of this route that is asked for as a stream is one of events."""
    return route.prompt in _STREAMED


def goes_on(response: ResponseHead) -> bool:
    """Whether a replica's answer can go on where we have begun a chunked stream of events."""
    return (
        response.status == 200
        and response.event_stream
        and response.chunked
        and all(name != b"content-encoding" for name, _ in response.fields)
    )


def cut_by_close(route: Route, response: ResponseHead, relayed: bytes) -> bool:
    """Whether a stream of tokens that only a close ends was cut by that close.

    `relayed` is the end of what the client was sent. Framing shows no such cut (RFC 9112 §8), but
    every whole stream of these routes ends with `[DONE]`.
    """
    return (
        response.content_length < 0
        and not response.chunked
        and response.event_stream
        and response.status == 200
        and route.prompt in (PromptKind.CHAT, PromptKind.COMPLETION)
        and not relayed.rstrip().endswith(b"[DONE]")
    )


def error_ending(relayed: bytes, open_chunk: tuple[int, int], event: bytes) -> bytes:
    """Return what ends a chunked event stream that was cut with `event`, or nothing.

    `relayed` is the end of what the client was sent, chunk framing included; `open_chunk` is what
    its reader still expects of the open chunk: data octets, then octets of the line end.
    """
    data_left, line_end_left = open_chunk
    if not _between_events(relayed, data_left, line_end_left):
        return b""
    if data_left >= len(event):
        return event
    ending = b"%x\r\n%b\r\n" % (len(event), event)
    if data_left:  # fill the chunk up with a comment (a line that begins with a colon)
        return b":" * (data_left - 1) + b"\n\r\n" + ending
    return b"\r\n"[2 - line_end_left :] + ending


def _between_events(relayed: bytes, data_left: int, line_end_left: int) -> bool:
    """Whether the stream's data so far ends with a whole event. Doubt means no."""
    size_line = _SIZE_LINE.search(relayed, max(0, len(relayed) - 20)) if data_left else None
    if size_line is not None:
        data = relayed[: size_line.start()]
    elif data_left or not relayed:
        data = relayed
    else:
        data = relayed[: len(relayed) - (2 - line_end_left)]
    if _LONE_LINE_END.search(data, max(0, len(data) - 22)):
        return False
    return not data or data.endswith((b"\n\n", b"\r\n\r\n"))
