"""The differential law: what our readers take for a message, h11 takes for the same message.

One direction only. We may refuse what h11 takes; that costs a sender of doubtful octets an error.
What we take and another strict reader does not, or ends elsewhere, is how one client's octets
become another's request. So every request (and answer) that we read must be read by h11 with the
same method, target and body (status and body), and the next one must begin at the same octet.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final, NamedTuple

import h11

from proxy import errors
from proxy.core import limits
from proxy.core.http1 import (
    ChunkedDecoder,
    RequestHead,
    parse_request_head,
)
from tests.conformance.reader import read_response

_HEAD_BYTES_MAX: Final = 1 << 20
_TRAILER: Final = re.compile(rb"\n0+(?:[ \t]*;[^\r\n]*)?\r\n((?:[^\r\n]+\r\n)*)\r\n\Z")


class Read(NamedTuple):
    """One request: what it is, and where it ends."""

    method: bytes
    target: bytes
    body: bytes
    end: int


class Heard(NamedTuple):
    """One answer: what it is, and where it ends."""

    status: int
    body: bytes
    end: int


class Outcome(NamedTuple):
    """What came of some octets: messages taken, how the reading ended, the first difference."""

    taken: int
    refused: bool
    difference: str
    exceptions: tuple[str, ...]


# --- requests -------------------------------------------------------------------------------------


def _ours(octets: bytes) -> tuple[RequestHead, Read] | None:
    """Read one request. None: incomplete. Raises `errors.ProxyError`."""
    end = octets.find(b"\r\n\r\n")
    if end < 0:
        return None
    if end > limits.HEAD_BYTES_MAX:
        raise errors.HeadTooLargeError("too large")
    head = parse_request_head(octets[:end])
    rest = octets[end + 4 :]
    if head.chunked:
        decoder = ChunkedDecoder()
        after = decoder.feed(rest)
        if after is None:
            return None
        body = decoder.body()
    elif len(rest) < head.content_length:
        return None
    else:
        body, after = rest[: head.content_length], rest[head.content_length :]
    return head, Read(head.method, head.path + head.query, body, len(octets) - len(after))


def _theirs(octets: bytes) -> Read | str:
    """Read one request with h11, or return why it does not."""
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=_HEAD_BYTES_MAX)
    connection.receive_data(octets)
    body = b""
    try:
        request = connection.next_event()
        if not isinstance(request, h11.Request):
            return f"no request: {request!r}"
        while isinstance(event := connection.next_event(), h11.Data):
            body += event.data
    except h11.RemoteProtocolError as error:
        return str(error)
    if not isinstance(event, h11.EndOfMessage):
        return f"no end: {event!r}"
    trailing, _ = connection.trailing_data
    return Read(request.method, request.target, body, len(octets) - len(trailing))


def _absolute_form(read: Read, theirs: Read) -> bool:
    """RFC 9112 §3.2.2: the absolute form means its path; h11 hands it on as it came."""
    scheme, _, rest = theirs.target.partition(b"://")
    at = min((i for mark in b"/?" if (i := rest.find(mark)) >= 0), default=len(rest))
    path = rest[at:] if rest[at : at + 1] == b"/" else b"/" + rest[at:]
    meant = theirs._replace(target=path)
    return scheme.lower() in (b"http", b"https") and meant == read


def _space_before_extension(_: object, theirs: object, message: bytes) -> bool:
    """RFC 9112 §7.1.1: space before the semicolon of a chunk extension is passed over."""
    refused = isinstance(theirs, str) and theirs.startswith("illegal chunk header")
    return refused and (b" ;" in message or b"\t;" in message)


def _framing_field_in_trailer(_: object, theirs: object, message: bytes) -> bool:
    """RFC 9112 §7.1.2: trailers are dropped unread; h11 judges framing fields among them."""
    found = _TRAILER.search(message) if isinstance(theirs, str) else None
    trailer = found[1].lower() if found else b""
    return b"content-length:" in trailer or b"transfer-encoding:" in trailer


# Where we take what h11 does not, or understand another target. Each is met by a vector.
_OF_BOTH: Final[dict[str, Callable[[object, object, bytes], bool]]] = {
    "space_before_extension": _space_before_extension,
    "framing_field_in_trailer": _framing_field_in_trailer,
}
EXCEPTIONS: Final = frozenset(("absolute_form", *_OF_BOTH))


def _excused(ours: object, theirs: object, message: bytes) -> list[str]:
    """Return the exceptions that explain a difference."""
    names = [name for name, applies in _OF_BOTH.items() if applies(ours, theirs, message)]
    if isinstance(ours, Read) and isinstance(theirs, Read) and _absolute_form(ours, theirs):
        names.append("absolute_form")
    return names


def compare_requests(octets: bytes) -> Outcome:
    """Read a client's octets with both readers, request after request."""
    taken = 0
    met: list[str] = []
    while octets:
        if octets.startswith(b"\r\n"):  # RFC 9112 §2.2: one empty line is forgiven; h11 has none
            octets = octets[2:]
        try:
            ours = _ours(octets)
        except errors.ProxyError:
            return Outcome(taken, True, "", tuple(met))
        if ours is None:
            break
        head, read = ours
        theirs = _theirs(octets)
        if theirs != read:
            excused = _excused(read, theirs, octets[: read.end])
            if not excused:
                return Outcome(taken, False, f"{read!r} against {theirs!r}", tuple(met))
            met += excused
        taken += 1
        if not head.keep_alive:
            break
        octets = octets[read.end :]
    return Outcome(taken, False, "", tuple(met))


# --- answers --------------------------------------------------------------------------------------


def _their_answer(octets: bytes) -> Heard | str:
    """Read one answer with h11, or return why it does not."""
    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=_HEAD_BYTES_MAX)
    connection.send(h11.Request(method="POST", target="/", headers=[("host", "a")]))
    connection.send(h11.EndOfMessage())
    connection.receive_data(octets)
    body = b""
    try:
        while isinstance(response := connection.next_event(), h11.InformationalResponse):
            pass
        if not isinstance(response, h11.Response):
            return f"no answer: {response!r}"
        while isinstance(event := connection.next_event(), h11.Data):
            body += event.data
    except h11.RemoteProtocolError as error:
        return str(error)
    if not isinstance(event, h11.EndOfMessage):
        return f"no end: {event!r}"
    trailing, _ = connection.trailing_data
    return Heard(response.status_code, body, len(octets) - len(trailing))


def compare_answers(octets: bytes) -> Outcome:
    """Read an engine's octets with both readers; what we take to its end, h11 must, too."""
    answer = read_response([octets])
    if answer.failed:
        return Outcome(0, True, "", ())
    if not answer.ended:
        return Outcome(0, False, "", ())
    ours = Heard(answer.status, answer.payload, len(octets) - len(answer.surplus))
    theirs = _their_answer(octets)
    if theirs == ours:
        return Outcome(1, False, "", ())
    excused = _excused(ours, theirs, octets[: ours.end])
    return Outcome(1, False, "" if excused else f"{ours!r} against {theirs!r}", tuple(excused))
