"""HTTP/1.1 heads without I/O: octets to checked heads, and how a body is framed (RFC 9112).

Strict on purpose: whatever is not plainly one message is refused, because two readers that disagree
about where a message ends are how one client's octets become another's request. Heads are scanned
by hand rather than by a callback parser: one split, one table look-up per field, and no call back
into Python for each piece.

Requests raise `proxy.errors`; responses raise `BadResponse`, because a bad engine answer is our
problem to report and never the client's.
"""

from __future__ import annotations

import re
from typing import Final

from proxy import errors
from proxy.core import limits
from proxy.core.chunked import (
    NOT_CONTROL,
    TCHAR,
    BadResponse,
    ChunkedDecoder,
    ChunkFollower,
)

__all__ = [
    "HOP_BY_HOP",
    "BadResponse",
    "ChunkFollower",
    "ChunkedDecoder",
    "Field",
    "RequestHead",
    "ResponseHead",
    "check_partial_head",
    "parse_request_head",
    "parse_response_head",
]

_REQUEST_LINE: Final = re.compile(rb"([A-Z]{1,20}) ([\x21-\x7e]+) HTTP/([0-9])\.([0-9])")
_PARTIAL_LINE: Final = re.compile(rb"[A-Z]{1,20}(?: |\Z)|\r\Z")
_STATUS_LINE: Final = re.compile(
    rb"HTTP/1\.([01]) ([1-5][0-9]{2})(?: ([^\x00-\x08\x0a-\x1f\x7f]*))?"
)
_LENGTH: Final = re.compile(rb"[0-9]{1,19}")
# RFC 3986 §3.2.2 host, and port; no userinfo (RFC 9110 §4.2.4).
_AUTHORITY: Final = re.compile(
    rb"(?:\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._~%!$&'()*+,;=-]{1,255})(?::[0-9]{0,5})?"
)
_ABSOLUTE: Final = re.compile(rb"https?://([^/?#]*)([/?].*)?", re.IGNORECASE)

# Fields that describe one connection and end there (RFC 9110 §7.6.1), and those that we write anew.
HOP_BY_HOP: Final = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"proxy-connection",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    )
)
# What Connection may never name, or a client could strip what others rely on.
_NEVER_HOP: Final = frozenset(
    (
        *(b"host", b"content-length", b"transfer-encoding", b"content-type", b"cookie"),
        *(b"authorization", b"x-api-key"),
    )
)
_ONCE: Final = frozenset(
    (
        *(b"host", b"content-length", b"transfer-encoding", b"content-type", b"expect"),
        *(b"authorization", b"x-api-key"),
    )
)
# A client that sends this wants to be told where its request went, and why.
EXPLAIN: Final = b"x-doherty-explain"
# It names the class of its work: see `core/classes.py`.
WORK_CLASS: Final = b"x-doherty-class"
# By this a proxy of another region says that it has judged a request: see `core/hop.py`.
HOP: Final = b"x-doherty-hop"
_LOOKED_AT: Final = _ONCE | HOP_BY_HOP | {b"content-encoding", EXPLAIN, WORK_CLASS}

Field = tuple[bytes, bytes]


class RequestHead:
    """One checked request head. Names in `fields` are lower case; hop-by-hop ones are gone."""

    __slots__ = (
        "chunked",
        "content_length",
        "counted",
        "expects_continue",
        "fields",
        "keep_alive",
        "method",
        "minor",
        "path",
        "query",
        "special",
    )

    def __init__(self, method: bytes, path: bytes, query: bytes, minor: int) -> None:
        self.method = method
        self.path = path
        self.query = query  # with its question mark, or empty
        self.minor = minor
        self.fields: list[Field] = []
        self.special: dict[bytes, bytes] = {}
        self.content_length = 0
        self.counted = False  # by a Content-Length field
        self.chunked = False
        self.keep_alive = minor == 1
        self.expects_continue = False

    def get(self, name: bytes) -> bytes | None:
        """Return the value of the first field called `name` (lower case)."""
        for field in self.fields:
            if field[0] == name:
                return field[1]
        return None


def parse_request_head(block: bytes) -> RequestHead:
    """Check and take apart a head without its final empty line. Raises `errors.ProxyError`."""
    lines = block.split(b"\r\n")
    # One pass finds NUL, bare CR, bare LF and other controls anywhere in the head (RFC 9112 §2.2,
    # RFC 9110 §5.5): what is left of it must be just the line ends that we split at.
    if block.translate(None, NOT_CONTROL) != b"\r\n" * (len(lines) - 1):
        raise errors.BadHeadError("the request head holds a control character or a bare line end")
    if len(lines) - 1 > limits.FIELDS_MAX:
        raise errors.HeadTooLargeError(f"more than {limits.FIELDS_MAX} header fields")
    head = _parse_request_line(lines[0])
    special = head.special
    for index in range(1, len(lines)):
        name, colon, value = lines[index].partition(b":")
        # Also refuses folded lines and space before the colon (RFC 9112 §5.1, §5.2).
        if not colon or not name or name.translate(None, TCHAR):
            raise errors.BadHeadError("a header field is malformed")
        name = name.lower()
        value = value.strip(b" \t")
        if name in _LOOKED_AT:
            if name not in special:
                special[name] = value
            elif name in _ONCE:
                raise errors.BadHeadError(f"more than one {name.decode()} field")
            else:
                special[name] += b"," + value
            if name in HOP_BY_HOP:
                continue
        head.fields.append((name, value))
    _judge_request(head)
    return head


def check_partial_head(buffer: bytearray, searched: int) -> None:
    """Refuse what can no longer become a request, without waiting for the rest of it.

    `searched` octets were looked at before. Raises `errors.ProxyError`.
    """
    feed = buffer.find(b"\n", searched)
    while feed >= 0:
        if feed == 0 or buffer[feed - 1] != 0x0D:
            raise errors.BadHeadError("the request head holds a bare line end")
        feed = buffer.find(b"\n", feed + 1)
    line_end = buffer.find(b"\r\n")
    if line_end >= 0:
        if line_end >= searched - 1:
            _parse_request_line(bytes(buffer[:line_end]))
    elif not _PARTIAL_LINE.match(buffer):
        raise errors.BadHeadError("this is not an HTTP/1 request")
    elif len(buffer) > limits.TARGET_BYTES_MAX + 64:
        raise errors.TargetTooLongError("the request line is too long")


def _parse_request_line(line: bytes) -> RequestHead:
    match = _REQUEST_LINE.fullmatch(line)
    if match is None:
        if len(line) > limits.TARGET_BYTES_MAX and _PARTIAL_LINE.match(line):
            raise errors.TargetTooLongError("the request line is too long")
        raise errors.BadHeadError("the request line is malformed")
    method, target, major, minor = match.groups()
    if major != b"1" or minor not in (b"0", b"1"):
        raise errors.VersionNotSupportedError("only HTTP/1.0 and HTTP/1.1 are spoken here")
    if len(target) > limits.TARGET_BYTES_MAX:
        raise errors.TargetTooLongError(f"the target is over {limits.TARGET_BYTES_MAX} octets")
    if method in (b"CONNECT", b"TRACE"):
        raise errors.MethodNotImplementedError(f"{method.decode()} is not served here")
    if b"#" in target:
        raise errors.BadHeadError("the target has a fragment")
    if not target.startswith(b"/"):
        target = _origin_form(method, target)
    path, mark, query = target.partition(b"?")
    return RequestHead(method, path, mark + query, int(minor))


def _origin_form(method: bytes, target: bytes) -> bytes:
    """RFC 9112 §3.2.2: a server MUST accept the absolute form; it never chooses the replica."""
    absolute = _ABSOLUTE.fullmatch(target)
    if absolute is None or not _AUTHORITY.fullmatch(absolute[1]):
        if target == b"*" and method == b"OPTIONS":
            return target
        raise errors.BadHeadError("the target is neither a path nor an http URL")
    path = absolute[2] or b"/"
    return b"/" + path if path.startswith(b"?") else path


def _judge_request(head: RequestHead) -> None:
    """Framing, Host and Connection: the rules that decide where this request ends."""
    special = head.special
    host = special.get(b"host")
    if host is None:
        if head.minor == 1:  # RFC 9112 §3.2
            raise errors.BadHeadError("an HTTP/1.1 request needs a Host field")
    elif not _AUTHORITY.fullmatch(host):
        raise errors.BadHeadError("the Host field is not a host")
    _judge_framing(head, special.get(b"content-length"), special.get(b"transfer-encoding"))
    connection = special.get(b"connection")
    if connection is not None:
        _judge_connection(head, connection)
    if b"expect" in special:
        head.expects_continue = special[b"expect"].lower() == b"100-continue" and head.minor == 1


def _judge_framing(head: RequestHead, length: bytes | None, coding: bytes | None) -> None:
    if coding is not None:
        if length is not None:  # RFC 9112 §6.1: smuggling, or a broken intermediary
            raise errors.BadHeadError("both Content-Length and Transfer-Encoding are given")
        if coding.lower() != b"chunked" or head.minor == 0:
            raise errors.BadHeadError("the only transfer coding understood is chunked, in HTTP/1.1")
        head.chunked = True
    elif length is not None:
        if not _LENGTH.fullmatch(length):
            raise errors.BadHeadError("the Content-Length field is not a number")
        head.counted, head.content_length = True, int(length)


def _judge_connection(head: RequestHead, connection: bytes) -> None:
    options = {option.strip(b" \t").lower() for option in connection.split(b",")}
    options.discard(b"")
    if options & _NEVER_HOP:
        raise errors.BadHeadError("Connection names a field that may not be dropped")
    if b"close" in options:
        head.keep_alive = False
    elif b"keep-alive" in options:
        head.keep_alive = True
    named = options - {b"close", b"keep-alive"}
    if named:
        head.fields = [field for field in head.fields if field[0] not in named]


class ResponseHead:
    """One checked response head, without what belongs to its connection.

    `content_length` is -1 when the close of the connection, or a last chunk, ends the body.
    """

    __slots__ = (
        "chunked",
        "content_length",
        "counted",
        "event_stream",
        "fields",
        "keep_alive",
        "reason",
        "returned",
        "status",
    )

    def __init__(self, status: int, reason: bytes, keep_alive: bool) -> None:
        self.status = status
        self.reason = reason
        self.fields: list[Field] = []
        self.keep_alive = keep_alive
        self.chunked = False
        self.content_length = -1
        self.counted = False  # by a Content-Length field
        self.event_stream = False
        self.returned = b""  # status line and fields as clients get them; set once it is checked


def parse_response_head(block: bytes) -> ResponseHead:
    """Check and take apart a replica's head without its empty line. Raises `BadResponse`."""
    lines = block.split(b"\r\n")
    if block.translate(None, NOT_CONTROL) != b"\r\n" * (len(lines) - 1):
        raise BadResponse("control character in the head")
    if len(lines) - 1 > limits.FIELDS_MAX:
        raise BadResponse("too many fields")
    match = _STATUS_LINE.fullmatch(lines[0])
    if match is None:
        raise BadResponse("not an HTTP/1 status line")
    head = ResponseHead(int(match[2]), match[3] or b"", match[1] == b"1")
    special: dict[bytes, bytes] = {}
    for index in range(1, len(lines)):
        name, colon, value = lines[index].partition(b":")
        if not colon or not name or name.translate(None, TCHAR):
            raise BadResponse("malformed field")
        name = name.lower()
        value = value.strip(b" \t")
        if name in _LOOKED_AT:
            if name in special and name in _ONCE:
                # RFC 9110 §8.6: equal lengths may be merged; anything else is doubt.
                if name != b"content-length" or special[name] != value:
                    raise BadResponse(f"more than one {name.decode()}")
                continue
            special[name] = special[name] + b"," + value if name in special else value
            if name in HOP_BY_HOP or name == b"content-length":
                continue
        head.fields.append((name, value))
    _judge_response(head, special)
    return head


def _judge_response(head: ResponseHead, special: dict[bytes, bytes]) -> None:
    coding = special.get(b"transfer-encoding")
    length = special.get(b"content-length")
    if coding is not None:
        if length is not None or coding.lower() != b"chunked":
            raise BadResponse("unclear framing")
        head.chunked = True
    elif length is not None:
        if not _LENGTH.fullmatch(length):
            raise BadResponse("Content-Length is not a number")
        head.counted, head.content_length = True, int(length)
    if head.status in (204, 304) or head.status < 200:  # RFC 9112 §6.3: no body whatever is said
        head.chunked, head.counted, head.content_length = False, False, 0
    if not head.chunked and head.content_length < 0:
        head.keep_alive = False
    connection = special.get(b"connection")
    if connection is not None:
        options = {option.strip(b" \t").lower() for option in connection.split(b",")}
        if b"close" in options:
            head.keep_alive = False
        named = options - {b"close", b"keep-alive", b""}
        if named:
            head.fields = [field for field in head.fields if field[0] not in named]
    content_type = special.get(b"content-type", b"")
    head.event_stream = content_type[:17].lower() == b"text/event-stream"
