"""How a cut event stream tells its reader why: one last event, only where it cannot be misread.

An event is taken only when its blank line has come; a reader drops what it holds of an event when
the connection ends. So an error can be appended between two events. Within one it could only be
appended to that event's text, which a client would then take for data: there nothing is added, and
the missing end of the body is all that tells. Engines write an event and its chunk in one piece, so
a cut within an event is rare.
"""

from __future__ import annotations

import re
from typing import Final

from proxy.core.http1 import ResponseHead
from proxy.core.routes import PromptKind, Route

# A size line, and the end of the stream's data before it.
_SIZE_LINE: Final = re.compile(rb"(?:\A|\r\n)[0-9A-Fa-f]{1,16}\r\n\Z")
# A line end that is all the data of its chunk so far: what stands before it is framing.
_LONE_LINE_END: Final = re.compile(rb"(?:\A|\r\n)[0-9A-Fa-f]{1,16}\r\n\r?\n\Z")


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
