"""What a vector is, and the few octets that most of them begin with.

A client's vector says which requests are taken, with which status the rest is refused, or that it
is waited for; an engine's says what may be made of an answer. `rule` is the section that decides:
RFC 9110 (semantics), RFC 9112 (HTTP/1.1), RFC 9113 (HTTP/2), or a limit of ours. The verdict is the
same however the octets are cut. There is one right verdict each, the strict one: where the RFC
leaves a choice between refusing and repairing, refusing is right.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

from tests.conformance.reader import Taken

# Stands in whatever must never arrive: hidden requests, surplus answers, injected fields.
POISON = b"POISON"
# Stands in whatever belongs to one connection and must not be passed on.
HOP = b"HOPVALUE"

# The body of this path is opaque to the proxy, so that any octets may come as far as an engine.
PATH = b"/v1/audio/transcriptions"
LINE = b"POST " + PATH + b" HTTP/1.1\r\n"
HOST = b"Host: a\r\n"
GET = b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n"
GOT = Taken(b"GET", b"/livez", b"")
TE = b"Transfer-Encoding: chunked"
LAST = b"0\r\n\r\n"
HIDDEN = b"GET /v1/models?POISON HTTP/1.1\r\nHost: a\r\n\r\n"


class Vector(NamedTuple):
    """`taken` are the requests before `refused`; `waiting`: the last one never becomes whole.

    `answered` is what the whole proxy says to octets that are well-formed HTTP and still not
    served: too large a body, a coding that is not read.
    """

    name: str
    octets: bytes
    rule: str
    taken: tuple[Taken, ...] = ()
    refused: int = 0
    waiting: bool = False
    answered: int = 0


def posted(body: bytes) -> Taken:
    return Taken(b"POST", PATH, body)


def head(*fields: bytes, line: bytes = LINE, host: bytes = HOST) -> bytes:
    return line + host + b"".join(field + b"\r\n" for field in fields) + b"\r\n"


def chunked(body: bytes) -> bytes:
    return head(TE) + body


def no(name: str, octets: bytes, rule: str, status: int = 400) -> Vector:
    return Vector(name, octets, rule, refused=status)


def yes(name: str, octets: bytes, rule: str, *taken: Taken) -> Vector:
    return Vector(name, octets, rule, taken=taken)


class Outcome(enum.Enum):
    """What the client of a misbehaving engine may see: one of these, and nothing between."""

    WHOLE = enum.auto()  # the right answer, with its end
    ERROR = enum.auto()  # 502 with an error object
    CUT = enum.auto()  # an answer that is visibly not complete, or an error if none had begun


class EngineVector(NamedTuple):
    """`status` 0: no head may be understood. `payload` is the body without its framing."""

    name: str
    octets: bytes
    rule: str
    status: int = 200
    payload: bytes = b""
    ended: bool = False
    surplus: bytes = b""
    failed: bool = False

    @property
    def closes(self) -> bool:
        """Whether the engine closes after its octets; else it waits for the next request."""
        return not self.ended and not self.failed

    @property
    def chunked(self) -> bool:
        """Whether the body of an understood answer comes in chunks."""
        return self.status == 200 and b"\r\ntransfer-encoding:" in self.octets.lower()

    @property
    def until_close(self) -> bool:
        """Whether the close of the connection is the end of the body (RFC 9112 §6.3)."""
        counted = b"\r\ncontent-length:" in self.octets.lower()
        return self.closes and self.status == 200 and not counted and not self.chunked

    @property
    def outcome(self) -> Outcome:
        if self.status == 0:
            return Outcome.ERROR
        return Outcome.WHOLE if self.ended or self.until_close else Outcome.CUT
