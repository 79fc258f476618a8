"""What a request may ask of a scripted engine, what it then says, and what it writes down.

Shared by the engine and by those who judge it: an answer follows from its script, octet by octet.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Literal

import msgspec

MODEL = "demo"
# l_onoff, l_linger: closing resets the connection.
RESET = struct.pack("ii", 1, 0)

Point = Literal["", "head", "half_body", "body", "response_head", "mid_body"]
Framing = Literal["chunked", "length", "close"]
How = Literal["close", "reset", "half_close"]


class Script(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one request wants done. Times in ms."""

    token: str
    events: int = 8
    stream: bool = True
    framing: Framing = "chunked"
    first_ms: float = 0.0  # before the head of the answer
    pause_ms: float = 0.0  # between pieces; 0: all in one write
    pad: int = 0  # octets of filler in an event, at most
    chunk: int = 0  # octets of a chunk, at most; 0: an event, a chunk
    crc: int = 0  # of the request body; 0: unchecked
    point: Point = ""  # where to fail
    how: How = "close"


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What is done to answers under way."""

    do: Literal["break", "pause", "hang_up", "refuse"]
    how: How = "close"
    share: float = 1.0  # of the answers under way
    seed: int = 0
    seconds: float = 0.0  # of a pause
    count: int = 0  # of the next connections to refuse: they fail as soon as they are accepted


def event(script: Script, index: int) -> bytes:
    """Return one event of the stream, without its blank line."""
    filler = "x" * (script.pad * (index * 7 % 5) // 4)
    content = f"{script.token}:{index} {filler}"
    return f'data: {{"choices":[{{"index":0,"delta":{{"content":"{content}"}}}}]}}'.encode()


def whole_body(script: Script) -> bytes:
    """Return the body of an answer that is no stream."""
    words = " ".join(f"{script.token}:{index}" for index in range(script.events))
    content = f"{words} {'x' * script.pad}"
    return (
        f'{{"choices":[{{"index":0,"message":{{"role":"assistant","content":"{content}"}}}}],'
        f'"usage":{{"prompt_tokens":1,"completion_tokens":{script.events},'
        f'"total_tokens":{script.events + 1}}}}}'
    ).encode()


def pieces(script: Script) -> list[bytes]:
    """Return the answer's body, framed, as it is written piece by piece."""
    if script.stream:
        data = [event(script, index) + b"\n\n" for index in range(script.events)]
        data.append(
            b'data: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":%d,'
            b'"total_tokens":%d}}\n\ndata: [DONE]\n\n' % (script.events, script.events + 1)
        )
    else:
        body = whole_body(script)
        size = max(1, len(body) // max(1, script.events))
        data = [body[start : start + size] for start in range(0, len(body), size)]
    if script.framing == "chunked":
        data = [_chunked(piece, script.chunk) for piece in data]
        data[-1] += b"0\r\n\r\n"
    return data


def _chunked(data: bytes, size_max: int) -> bytes:
    size_max = size_max or len(data)
    parts = [data[start : start + size_max] for start in range(0, len(data), size_max)]
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)


def answer_head(script: Script, body_bytes: int) -> bytes:
    media_type = "text/event-stream" if script.stream else "application/json"
    framing = {
        "chunked": "transfer-encoding: chunked",
        "length": f"content-length: {body_bytes}",
        "close": "connection: close",
    }[script.framing]
    return f"HTTP/1.1 200 OK\r\ncontent-type: {media_type}\r\n{framing}\r\n\r\n".encode()


class Line(msgspec.Struct, frozen=True):
    """One line of a journal."""

    what: str
    token: str
    at_s: float
    detail: str


class Journal:
    """Reads what an engine writes down, as it is written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines: list[Line] = []
        self._read_bytes = 0

    def lines(self) -> list[Line]:
        """Return all lines until now; none when no engine has written there."""
        if self.path.exists():
            with self.path.open("rb") as file:
                file.seek(self._read_bytes)
                fresh = file.read()
            self._read_bytes += len(fresh)
            for text in fresh.decode("ascii").splitlines():
                what, token, at_s, detail = text.split(" ", 3)
                self._lines.append(Line(what, token, float(at_s), detail))
        return self._lines
